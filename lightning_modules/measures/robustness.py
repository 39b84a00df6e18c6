"""Robustness: what the probes say of test images that were moved against them, through the backbone, and of others'."""

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.attacks import PGD, Norm
from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.features.cache import BATCH
from lightning_modules.measures.measure import Batch, Context, Measure, Picture
from lightning_modules.progress import Progress
from lightning_modules.results.results import Results
from lightning_modules.results.tables import Column
from lightning_modules.subsets import plan
from lightning_modules.subsets.selections import FULL, SELECTIONS

KEYS = ["layer", "selection", "fraction", "seed"]  # of probes in 32 bits
SOURCE = [f"source_{key}" for key in KEYS]
TOGETHER = "all"  # the seed, in the table, of what all seeds of a fraction say together


class Robustness(Measure):
    """Accuracy of every probe on test images that projected gradient descent moved against it, through the backbone.

    An image counts where the probe is right about it as it is and moved. Several probes of one fraction are attacked
    together, too, by the mean of their probabilities. The table `transfer` says how right each of them is about the
    images that were made against each other one. Costs a pass of the backbone forwards and backwards for each step,
    image and attacked probe: the arguments that choose these bound it. Not for probes of validation.

    Args:
        eps: Radius of the ball around an image, of pixels in [0, 1] at the backbone's input size; the paper's 3 is for
            224 pixels, published in Linf is 0.0157 (4/255).
        norm: `L2`, the length over all pixels and channels, or `Linf`, the largest change of any.
        steps: Gradient steps.
        step_size: Length of a step, in the same norm; null is a third of eps, the paper's 1 for its 3.
        restarts: Random places in the ball to start at, one after the other, until one attack succeeds; 0 starts once,
            at the image itself.
        images: How many test images, a random sample that is always the same; null is all.
        fractions: Fractions whose probes are attacked beside the full layer's; null is all.
        seeds: Subset seeds whose probes are attacked, a number n means 0 to n - 1; null is all.

    Raises:
        MisconfigurationException: If an argument is out of range.
    """

    columns = (
        Column("robust_accuracy", "accuracy under attack", "%", 1, drawn=True),
        Column("unattacked_accuracy", "the same images as they are", "%", 1, drawn=True, reference=True),
    )
    panel = "accuracy under attack (%)"
    table = "transfer"
    needs_classes = True
    needs_images = True
    unattacked: Tensor
    right: Tensor
    images: Tensor

    def __init__(
        self,
        eps: float = 3.0,
        norm: Norm = "L2",
        steps: int = 50,
        step_size: float | None = None,
        restarts: int = 0,
        images: int | None = 500,
        fractions: float | list[float] | None = None,
        seeds: int | list[int] | None = None,
    ) -> None:
        super().__init__()
        self.pgd = PGD(eps, norm, steps, eps / 3 if step_size is None else step_size, "model.measures")
        for name, value, least in (("restarts", restarts, 0), ("images", images, 1)):
            if value is not None and value < least:
                raise MisconfigurationException(f"model.measures.{name} is {value}; it must be at least {least}.")
        self.restarts = restarts
        self.sample_size = images
        self.fractions = [fractions] if isinstance(fractions, float | int) else fractions
        self.seeds = None if seeds is None else plan.seed_list(seeds, "model.measures.seeds")

    def setup(self, context: Context) -> None:
        """Choose probes and images, and add the counts; refuse what cannot be attacked."""
        super().setup(context)
        backbone = context.stream.extractor.backbone
        if not isinstance(backbone, FrozenBackbone):
            raise MisconfigurationException(
                "model.measures lists Robustness, which moves images, but the task holds vectors; leave it out."
            )
        if any(probe.bits < 32 for probe in context.probes) or not context.solver.linear:
            which = "numbers of few bits" if context.solver.linear else "votes of neighbours"
            raise MisconfigurationException(
                f"model.measures lists Robustness, which follows gradients, but {which} have none; leave it out."
            )
        backbone.check_differentiable()
        probes, fractions = context.probes, self.fractions or context.fractions
        known: dict[str, set[Any]] = {"fractions": {*context.fractions}, "seeds": {probe.seed for probe in probes}}
        for name, values in known.items():
            unknown = [each for each in getattr(self, name) or [] if each not in values]
            if unknown:
                there = ", ".join(f"{each:g}" for each in sorted(values))
                raise MisconfigurationException(f"model.measures.{name} has {unknown[0]:g}; the run has {there}.")
        self.single = [
            index
            for index, probe in enumerate(probes)
            if probe.selection == FULL
            or (
                probe.fraction in fractions
                and (self.seeds is None or probe.seed in self.seeds or not SELECTIONS[probe.selection].seeded)
            )
        ]
        together = plan.ensembles([probes[index] for index in self.single], fractions)
        self.heads = [[index] for index in self.single] + [[self.single[i] for i in members] for members in together]
        images = len(context.stream.task.images["test"])
        order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
        self.sample = order[: self.sample_size]
        counts = torch.zeros(len(self.heads), len(self.heads), dtype=torch.int64, device=context.device)
        self.add_state("right", counts, dist_reduce_fx="sum")  # a row for each head that images were moved against
        self.add_state("unattacked", counts[0].clone(), dist_reduce_fx="sum")
        self.add_state("images", counts.new_zeros(()), dist_reduce_fx="sum")
        trainer = context.stream.trainer
        total = len(self.heads) * -(-len(self.sample) // trainer.world_size)
        self.progress = partial(Progress, total, "Attacking test", "image", trainer.is_global_zero)
        self.bar: Progress | None = None

    def update(self, batch: Batch) -> None:
        """Attack those images of a batch that are in the sample, all heads side by side, and count."""
        chosen = torch.isin(batch.indices.cpu(), self.sample).nonzero()[:, 0]
        if self.split != "test" or not len(chosen):
            return
        self.bar = self.bar or self.progress()
        labels, indices = batch.labels[chosen.to(batch.labels.device)], batch.indices.cpu()[chosen]
        unattacked = self._said(batch.logits[:, :, chosen.to(batch.logits.device)]).argmax(1) == labels  # (H, b)
        self.unattacked += unattacked.sum(1)
        self.images += len(chosen)
        images = self.context.stream.images("test", indices)
        rows = BATCH if images.device.type == "cpu" else 8 * BATCH
        for pairs in torch.arange(len(self.heads) * len(chosen)).split(rows):
            heads, places = pairs // len(chosen), (pairs % len(chosen))
            there = places.to(images.device)
            right = self._attacked(images[there], labels[there], indices[places], heads.to(images.device))
            self.right.index_add_(0, heads.to(images.device), (right & unattacked[:, there]).t().long())
            self.bar.update(len(pairs))

    @torch.inference_mode(False)
    def _attacked(self, images: Tensor, labels: Tensor, indices: Tensor, heads: Tensor) -> Tensor:
        """Return which of all H heads are right about images that are moved against one head each, shape (H, b).

        Of several restarts the first counts that succeeds.
        """
        stream, rows = self.context.stream, torch.arange(len(images), device=images.device)
        heads = heads.clone()  # no tensor of inference any more, which autograd takes none of

        def said(moved: Tensor) -> Tensor:
            assert self.context.logits is not None
            return self._said(self.context.logits(self.context.coordinates(stream.represent(moved, indices, "test"))))

        right = None
        for restart in range(max(1, self.restarts)):
            start = partial(self._start, indices, restart) if self.restarts else None
            preprocessing = stream.extractor.backbone.preprocessing
            moved = self.pgd(lambda moved: said(moved)[heads, :, rows], images, labels, preprocessing, start)
            now = said(moved).argmax(1) == labels
            right = now if right is None else torch.where(right[heads, rows], now, right)
        assert right is not None
        return right

    def _said(self, logits: Tensor) -> Tensor:
        """Return what each head says, (H, C, B), from the logits of all probes, (P, C, B).

        Of several probes together, the logarithm of their mean probabilities, which are logits of these; where least
        squares estimates probabilities, which may be negative, their mean itself.
        """
        said = [logits[self.single]]
        for members in self.heads[len(self.single) :]:
            own = logits[members]
            probabilities = self.context.solver.probabilities(own)
            mean = probabilities.mean(0, keepdim=True)
            said.append(mean if probabilities is own else mean.clamp_min(torch.finfo(mean.dtype).tiny).log())
        return torch.cat(said)

    def _start(self, indices: Tensor, restart: int, pixels: Tensor) -> Tensor:
        """Return a random place in the ball around each image, whatever else is in the batch."""
        places = []
        with torch.random.fork_rng(devices=[]):
            for image, index in zip(pixels.cpu().split(1), indices.tolist(), strict=True):
                torch.default_generator.manual_seed(zlib.crc32(f"{restart}/{index}".encode()))
                places.append(self.pgd.random(image))
        return torch.cat(places).to(pixels.device)

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return the columns, missing for probes that were not attacked, and the table; nothing of validation."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if not (images := int(self.images)):
            return {}
        right, unattacked = self.right.double().cpu() / images, self.unattacked.double().cpu() / images
        probes = self.context.probes
        columns = torch.full((2, len(probes)), torch.nan, dtype=torch.float64)
        columns[:, self.single] = torch.stack([right.diagonal(), unattacked])[:, : len(self.single)]
        heads = pd.DataFrame([probes[head[0]]._asdict() for head in self.heads])[KEYS].astype({"seed": str})
        heads.loc[len(self.single) :, "seed"] = TOGETHER
        pairs = heads.add_prefix("source_").merge(heads, how="cross").assign(split=self.split, images=images)
        pairs = pairs.assign(accuracy=right.flatten(), unattacked_accuracy=unattacked.repeat(len(heads)))
        return {"robust_accuracy": columns[0], "unattacked_accuracy": columns[1], self.table: pairs}

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return attacked heads by fraction: single probes, and all seeds together."""
        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        own = rows[(rows[SOURCE].to_numpy() == rows[KEYS].to_numpy()).all(1)]
        own = own.assign(probes=own["seed"].where(own["seed"] == TOGETHER, "one"))
        means = own.groupby(["layer", "selection", "fraction", "probes"], sort=False)
        shares = 100 * means[["unattacked_accuracy", "accuracy"]].mean()
        names = {"unattacked_accuracy": "as they are (%)", "accuracy": "under attack (%)"}
        words = shares.map("{:.1f}".format).rename(columns=names).reset_index()
        return {f"Accuracy of {rows['images'].iloc[0]:,} {split} images": words}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw how right probes are about images made against others, by fraction, of the first selection."""
        from lightning_modules.reporting import figures

        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        layer, selection = rows.loc[rows["selection"] != FULL, ["layer", "selection"]].iloc[0]
        for prefix in ("", "source_"):
            its = (rows[f"{prefix}layer"] == layer) & rows[f"{prefix}selection"].isin([FULL, selection])
            rows = rows[its & (rows[f"{prefix}seed"] != TOGETHER)]
        same = (rows[SOURCE].to_numpy() == rows[KEYS].to_numpy()).all(1)
        keys = ["source_fraction", "fraction"]
        means = rows[~same].groupby(keys)["accuracy"].mean().combine_first(rows.groupby(keys)["accuracy"].mean())
        shown = 100 * means.unstack()
        figure = Figure(figsize=(3.2 + 0.55 * shown.shape[1], 2.2 + 0.4 * len(shown)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for row, values in enumerate(shown.to_numpy()):
            for column, value in enumerate(values):
                ink = "white" if value < 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(shown.shape[1]), list(map(figures.short, shown.columns)), fontsize=8)
        axes.set_yticks(range(len(shown)), list(map(figures.short, shown.index)), fontsize=8)
        axes.set_xlabel("fraction of neurons of the probe that sees the images")
        axes.set_ylabel("made against a probe on")
        figure.colorbar(image, label=f"{split} accuracy (%)")
        figure.suptitle(results.title, fontsize=10)
        caption = (
            "How right probes are about images that were made against another probe, mean over pairs of different "
        )
        return {"transfer": Picture(figure, f"{caption}subsets; 1 is the full layer.")}
