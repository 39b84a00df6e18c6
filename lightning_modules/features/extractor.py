"""Features: extracted by one pass of the frozen backbone over each view of a split, and read as the probes see them."""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.features.cache import BATCH, FeatureCache, FeatureRows
from lightning_modules.features.moments import Moments, by_layer
from lightning_modules.progress import Progress

PAUSE = 0.5  # Seconds before it is asked again what others have made
Parts = Callable[[Tensor], Mapping[Any, Tensor]]
"""From features, shape (B, sum of widths), to parts of them by name, shape (B, D) each."""


class Extractor:
    """Turns the images of a task, as loaded, into features, with the Trainer's device, precision and processes.

    `cache_dir`, which all processes must see, and `features` are as for `RedundancyProbe`.
    """

    def __init__(
        self, backbone: FrozenBackbone, task: Any, trainer: Trainer, cache_dir: str | None, features: str | int
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.trainer = trainer
        self.directory = Path(cache_dir or Path(trainer.default_root_dir) / "feature_cache").expanduser()
        self.features = features
        self.seconds = 0.0  # Spent on extraction so far
        self.waited = 0.0  # Of these, seconds in which the backbone waited for images
        # What features depend on beside precision; computed once, as it reads all weights, and maybe all images.
        self.provenance = functools.cache(backbone.provenance)
        self.digest = functools.cache(lambda split: task.images[split].digest())

    def extract(self, split: str) -> Sequence[FeatureRows]:
        """Return the features of a split, one matrix per view; what the cache holds is not computed again."""
        started = time.perf_counter()
        views = range(self.features) if split == "train" and isinstance(self.features, int) else [None]
        rows = [self._extract_view(split, view) for view in views]
        self.seconds += time.perf_counter() - started
        return rows

    def _extract_view(self, split: str, view: int | None) -> FeatureRows:
        provenance = {
            "backbone": self.provenance(),
            "split": split,
            "view": self.task.view_provenance(view),
            "images": self.digest(split),
            "precision": str(self.trainer.precision),
            "network": self.backbone.preparation,
        }
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        cache = FeatureCache(self.directory, provenance, len(self.task.images[split]))
        share = cache.shards[rank::processes]
        missing = cache.missing(share)
        waited, pace = self.waited, ""
        if missing:
            description = f"Extracting {split}" + ("" if view is None else f", view {view + 1} of {self.features}")
            total = sum(map(len, missing))
            with self.backbone.inference(BATCH), Progress(total, description, "image", shown=rank == 0) as progress:
                left = missing
                while left:
                    made = self._make(cache, left, split, view, progress)
                    if not made:
                        time.sleep(PAUSE)  # others are at all that is left; a process that ends lets go of its own
                    left = cache.missing([shard for shard in left if shard not in made])
            seconds = time.monotonic() - progress.began
            here = " in this process" if processes > 1 else ""
            pace = (
                f" {progress.done / seconds:,.0f} images/s{here}; the backbone waited for images "
                f"{100 * (self.waited - waited) / seconds:.0f} % of the time."
            )
        self.trainer.strategy.barrier()
        rows = cache.read(processes)
        state = "extracted" if len(missing) == len(share) else "completed" if missing else "found"
        rank_zero_info(
            f"Features of {split}, {provenance['view']}: {len(rows):,} x {rows.shape[1]:,} "
            f"({4 * len(rows) * rows.shape[1] / 1e6:,.1f} MB) {state} in {cache.folder}; delete it to clear them.{pace}"
        )
        return rows

    def _make(
        self, cache: FeatureCache, shards: Sequence[range], split: str, view: int | None, progress: Any
    ) -> set[range]:
        """Extract those of the shards that no other process is at, and return them."""
        claimed: deque[range] = deque()  # a loader's workers are ahead by some batches

        def batches() -> Iterator[list[int]]:
            for shard in cache.claim(shards):
                claimed.append(shard)
                yield from (list(shard[i : i + BATCH]) for i in range(0, len(shard), BATCH))

        made: set[range] = set()
        parts: list[Tensor] = []
        try:
            asked = time.perf_counter()
            for batch in self.task.extraction_loader(split, batches(), view, BATCH):
                self.waited += time.perf_counter() - asked
                parts.append(self.represent(batch.inputs, batch.indices, split).cpu())
                progress.update(len(batch.indices))
                if len(parts) == -(-len(claimed[0]) // BATCH):
                    made.add(shard := claimed.popleft())
                    cache.write(shard, torch.cat(parts))
                    parts.clear()
                asked = time.perf_counter()
        finally:
            cache.release()
        return made

    def represent(self, images: Tensor, indices: Tensor, split: str) -> Tensor:
        """Return the features, shape (B, sum of widths), of the images at `indices` of a split, shape (B, C, H, W).

        A MisconfigurationException is raised if a layer is not finite; the message names it and the image.
        """
        device = self.trainer.strategy.root_device
        # On a CPU larger batches are no faster, and take memory in proportion.
        parts = images.split(BATCH) if device.type == "cpu" else [images]
        with self.trainer.precision_plugin.forward_context():
            features = torch.cat([self.backbone(part.to(device, non_blocking=True)) for part in parts])
        if not features.isfinite().all():
            bad = int(indices[int((~features.isfinite().all(1)).nonzero()[0])])
            layers = by_layer(features, self.backbone.widths)
            layer = next(name for name, values in layers.items() if not values.isfinite().all())
            raise MisconfigurationException(
                f"Layer {layer!r} of {self.backbone.label} is not finite for {self.task.images[split].name(bad)} of "
                f"{split}; check the weights and trainer.precision."
            )
        return features


class FeatureStream(nn.Module):
    """Turns batches of images or features into what the probes see, and reads whole splits so.

    With `standardise` neurons are centred and scaled by their statistics over train, see `fit_standardisation`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, extractor: Extractor, standardise: bool) -> None:
        super().__init__()
        self.extractor = extractor
        self.task = extractor.task
        self.trainer = extractor.trainer
        self.features = extractor.features
        self.widths: dict[str, int] = extractor.backbone.widths
        self.standardise = standardise
        self.register_buffer("mean", torch.zeros(sum(self.widths.values())))
        self.register_buffer("std", torch.ones(sum(self.widths.values())))

    def forward(self, batch: Any, split: str) -> Any:
        """Return a batch of images or features of a split with inputs as the probes see them, (B, sum of widths)."""
        inputs = batch.inputs
        seen = self.represent(inputs, batch.indices, split) if inputs.ndim == 4 else self._standardised(inputs)
        return batch._replace(inputs=seen, labels=batch.labels.to(self.mean.device))

    def represent(self, images: Tensor, indices: Tensor, split: str) -> Tensor:
        """Return what the probes see, (B, sum of widths), of images (B, C, H, W), with gradients where they want them.

        `indices` are their places in the split, by which an error names them.
        """
        return self._standardised(self.extractor.represent(images, indices, split))

    def images(self, split: str, indices: Tensor) -> Tensor:
        """Return images of a split in the clean view, normalised, shape (B, C, H, W)."""
        (batch,) = self.task.extraction_loader(split, [indices.tolist()], None, len(indices))
        return batch.inputs.to(self.mean.device)

    def batches(self, split: str, view: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' share of a split, of `train` in the epoch `view`: (B, sum of widths), and labels."""
        loader = getattr(self.task, f"{split}_dataloader")()
        loader.sampler.set_epoch(view)
        return self._labelled(loader, split)

    def all_views(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' share of a split, of train in all its views, as `batches` does."""
        views = self.features if isinstance(self.features, int) and split == "train" else 1
        return itertools.chain.from_iterable(self.batches(split, view) for view in range(views))

    def everything(self, split: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Return the features of the clean view of a split, or some rows of them, shape (n, sum of widths).

        None where they are not kept.
        """
        views = self.task.features(split) if self.features == "clean" else None
        return None if views is None else self._standardised(views[0][torch.arange(len(views[0]))[start:stop]])

    def moments(self, split: str, parts: Parts | None = None) -> dict[Any, Moments]:
        """Return moments over a split (all views of train), summed over processes: of each layer, or of what `parts`
        makes of features, by the same names.
        """
        return self._sum(self.all_views(split), parts=parts)

    def clean_moments(self, products: bool = True) -> dict[Any, Moments]:
        """Return the moments of each layer over the clean view of train, with or without the products X'X."""
        if self.features == "clean":
            return self._sum(self.batches("train"), products)
        loader = self.task.clean_loader("train")
        shown = self.trainer.is_global_zero
        bar = Progress(len(loader), "Extracting train, clean", "batch", shown, iterable=loader)
        with self.extractor.backbone.inference(), bar as progress:
            return self._sum(self._labelled(progress, "train"), products)

    def fit_standardisation(self) -> None:
        """Take mean and standard deviation of every neuron from the clean view of train, where they are wanted."""
        if self.standardise:
            moments = self.clean_moments(products=False).values()
            self.mean.copy_(torch.cat([each.mean for each in moments]))
            std = torch.cat([each.variance for each in moments]).sqrt()
            self.std.copy_(std.masked_fill(std == 0, 1.0))

    def _standardised(self, features: Tensor) -> Tensor:
        features = features.to(self.mean.device)
        return (features - self.mean) / self.std if self.standardise else features

    def _labelled(self, loader: Iterable[Any], split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            seen = self(batch, split)
            yield seen.inputs, seen.labels

    def _sum(
        self, batches: Iterable[tuple[Tensor, Tensor]], products: bool = True, parts: Parts | None = None
    ) -> dict[Any, Moments]:
        target, device, parts = (
            self.task.target,
            self.mean.device,
            parts or functools.partial(by_layer, widths=self.widths),
        )
        widths = {name: part.shape[1] for name, part in parts(self.mean.unsqueeze(0)).items()}
        moments = {
            name: Moments(width, target.outputs, outer=products, device=device) for name, width in widths.items()
        }
        for inputs, labels in batches:
            targets = target.matrix(labels)
            for name, part in parts(inputs).items():
                moments[name].update(part, targets)
        for each in moments.values():
            each.reduce(self.reduce)
        return moments

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")
