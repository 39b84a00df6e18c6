"""The extraction: one pass of the frozen backbone over each view of a split, whose features are kept on disk."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.features.cache import BATCH, FeatureCache, FeatureRows


class Extractor:
    """Turns the images of a task into features.

    Args:
        backbone: The backbone.
        task: The task as loaded; anything with the methods of `datamodules.Task`.
        trainer: Gives device, precision and processes.
        directory: Where features are kept; all processes must see it. None is `feature_cache` under the Trainer's
            `default_root_dir`.
        features: `clean`, a number of augmented views of train, or `off`, as for `RedundancyProbe`.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        task: Any,
        trainer: Trainer,
        directory: str | None,
        features: Literal["clean", "off"] | int,
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.trainer = trainer
        self.directory = Path(directory or Path(trainer.default_root_dir) / "feature_cache").expanduser()
        self.features = features
        self.seconds = 0.0
        """Spent on extraction so far."""
        self._provenance: dict[str, Any] | None = None
        self._digests: dict[str, str] = {}

    def provenance(self) -> dict[str, Any]:
        """Return what features depend on beside images and precision; computed once, as it reads all weights."""
        if self._provenance is None:
            self._provenance = self.backbone.provenance()
        return self._provenance

    def digest(self, split: str) -> str:
        """Return the hash of a split's images; computed once, as it may read all of them."""
        if split not in self._digests:
            self._digests[split] = self.task.images[split].digest()
        return self._digests[split]

    def extract(self, split: str) -> Sequence[FeatureRows]:
        """Return the features of a split, one matrix per view; what the cache holds is not computed again.

        Raises:
            MisconfigurationException: If a layer is not finite for some image, or the cache cannot be written.
        """
        started = time.perf_counter()
        augmented = split == "train" and isinstance(self.features, int)
        views = range(int(self.features)) if augmented else [None]
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
        }
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        cache = FeatureCache(self.directory, provenance, len(self.task.images[split]))
        missing = cache.missing(rank, processes)
        batches = [list(shard[i : i + BATCH]) for shard in missing for i in range(0, len(shard), BATCH)]
        if batches:
            description = f"Extracting {split}" + ("" if view is None else f", view {view + 1} of {self.features}")
            with tqdm(total=sum(map(len, missing)), desc=description, unit="image", disable=rank > 0) as progress:
                loader = iter(self.task.extraction_loader(split, batches, view))
                for shard in missing:
                    parts = []
                    for batch in itertools.islice(loader, -(-len(shard) // BATCH)):
                        parts.append(self.represent(batch.inputs, batch.indices, split).cpu())
                        progress.update(len(batch.indices))
                    cache.write(shard, torch.cat(parts))
        self.trainer.strategy.barrier()
        rows = cache.read(processes)
        state = (
            "extracted" if len(missing) == len(cache.shards[rank::processes]) else "completed" if missing else "found"
        )
        rank_zero_info(
            f"Features of {split}, {provenance['view']}: {len(rows):,} x {rows.shape[1]:,} "
            f"({4 * len(rows) * rows.shape[1] / 1e6:,.1f} MB) {state} in {cache.folder}; delete it to clear them."
        )
        return rows

    def represent(self, images: Tensor, indices: Tensor, split: str) -> Tensor:
        """Return the features of images, shape (B, sum of widths), on the Trainer's device.

        Args:
            images: Shape (B, C, H, W).
            indices: Their places in the split, for the message.
            split: The split that they are of.

        Raises:
            MisconfigurationException: If a layer is not finite; the message names it and the image.
        """
        device = self.trainer.strategy.root_device
        # On a CPU larger batches are no faster, and take memory in proportion.
        parts = images.split(BATCH) if device.type == "cpu" else [images]
        with self.trainer.precision_plugin.forward_context():
            features = torch.cat([self.backbone(part.to(device, non_blocking=True)) for part in parts])
        if not features.isfinite().all():
            bad = int(indices[int((~features.isfinite().all(1)).nonzero()[0])])
            layers = dict(
                zip(self.backbone.widths, features.split(list(self.backbone.widths.values()), 1), strict=True)
            )
            layer = next(name for name, values in layers.items() if not values.isfinite().all())
            raise MisconfigurationException(
                f"Layer {layer!r} of {self.backbone.label} is not finite for {self.task.images[split].name(bad)} of "
                f"{split}; check the weights and trainer.precision."
            )
        return features
