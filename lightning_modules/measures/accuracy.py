"""Accuracy: right answers of every probe, by class and beside the full layer's, and the loss, all exact."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.measures.measure import Batch, Context, Measure, Picture
from lightning_modules.results.curves import SERIES
from lightning_modules.results.results import Results
from lightning_modules.results.tables import PER_IMAGE, Column, by_series
from lightning_modules.subsets.plan import references

TABLE_CLASSES = 40  # that the report's table has room for
PICTURE_CLASSES = 30  # that the heat map has room for


class ClassCounts(Measure):
    """Counts the images of each class, and every probe's right answers among them."""

    needs_classes = True
    correct: Tensor
    images: Tensor

    def setup(self, context: Context) -> None:
        """Add the counts."""
        super().setup(context)
        correct = torch.zeros(len(context.probes), len(context.target.classes), dtype=torch.int64)
        self.add_state("correct", correct.to(context.device), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros_like(self.correct[0]), dist_reduce_fx="sum")

    def update(self, batch: Batch) -> None:
        """Count a batch."""
        self.correct.index_add_(1, batch.labels, (batch.predicted == batch.labels).long())
        self.images.index_add_(0, batch.labels, torch.ones_like(batch.labels))


class ByClass(Measure):
    """Shows what is told of every class, or label, or number, one by one: the table `classes`."""

    table = "classes"

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return the classes that lose most and the points they lose, a column per fraction, by the first selection."""
        headline, first = results.headline, _first_curve(results.class_losses(split))
        if first.empty:
            return {}
        full = first.drop_duplicates("class").set_index("class")
        lost = _lost(first)[:TABLE_CLASSES] * headline.scale
        words = lost.map(f"{{:.{headline.digits}f}}".format).rename(columns="{:.3g}".format)
        full_words = full[f"full_{headline.name}"].map(headline.words)
        words.insert(0, headline._replace(label="full").heading, full_words)
        words.insert(0, "test images", full["images"].astype(str))
        heading = f"{results.target.parts.capitalize()} that lose most"
        return {heading: words.reset_index().rename_axis(columns=None)}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw a heat map of the points that each class loses, by the first selection of the first layer."""
        from lightning_modules.reporting import figures

        headline, first = results.headline, _first_curve(results.class_losses(split))
        if first.empty:
            return {}
        points, parts = _lost(first) * headline.scale, results.target.parts
        shown = points[:PICTURE_CLASSES]
        figure = Figure(figsize=(2.6 + 0.55 * shown.shape[1], 1.6 + 0.27 * max(5, len(shown))), layout="constrained")
        axes = figure.subplots()
        bound = max(headline.scale / 100, float(shown.abs().max(axis=None)))
        image = axes.imshow(shown, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto")
        for (row, column), value in np.ndenumerate(shown):
            ink = "white" if abs(value) > 0.6 * bound else "black"
            words = f"{value:z.{headline.digits - 1}f}"
            axes.text(column, row, words, ha="center", va="center", fontsize=7, color=ink, in_layout=False)
        axes.set_xticks(range(shown.shape[1]), list(map(figures.short, shown)), fontsize=8, rotation=45)
        axes.set_yticks(range(len(shown)), list(map(str, shown.index)), fontsize=8)
        axes.set_xlabel(f"fraction of neurons ({by_series(first)['selection'].iloc[0]})")
        what = "points" if headline.unit == "%" else headline.label
        figure.colorbar(image, label=f"{what} lost to the full layer")
        layer = f", {first['layer'].iloc[0]}" if len(results.layers) > 1 else ""
        some = f", the {len(shown)} of {len(points)} {parts} that lose most" if len(shown) < len(points) else ""
        figure.suptitle(f"{results.title}{layer}{some}", fontsize=10)
        caption = f"What {parts} lose of the test {headline.label} to the full layer, mean over subsets; "
        return {"classes": Picture(figure, f"{caption}those that lose most on top.")}


class Accuracy(ByClass, ClassCounts):
    """Accuracy and mean loss of every probe, and which images it has right.

    Gives the table `classes`: images and right answers by probe and class. Always measured, at no cost to speak of but
    a byte per probe and image while a split is evaluated.
    """

    columns = (
        Column("accuracy", "accuracy", "%", digits=1, logged=True),
        *map(Column, ("images", "loss", "gained", "lost")),
    )
    loss: Tensor
    gained: Tensor
    lost: Tensor
    right: list[tuple[Tensor, Tensor]]

    def setup(self, context: Context) -> None:
        """Add the counts, and the sums of the losses."""
        super().setup(context)
        zeros = torch.zeros(len(context.probes), dtype=torch.int64, device=context.device)
        self.add_state("loss", zeros.double(), dist_reduce_fx="sum")
        self.add_state("gained", zeros, dist_reduce_fx="sum")
        self.add_state("lost", zeros, dist_reduce_fx="sum")
        self.references = references(context.probes).to(context.device)

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self.right = []

    def update(self, batch: Batch) -> None:
        """Count a batch."""
        super().update(batch)
        self.loss += self.context.solver.loss(self.context.target, batch.logits, batch.labels).double()
        right = batch.predicted == batch.labels
        reference = right[self.references]
        self.gained += (right & ~reference).sum(1)
        self.lost += (reference & ~right).sum(1)
        self.right.append((batch.indices, right))

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return the columns, the table of classes, and which images each probe has right, shape (P, n).

        `gained` are images that the probe gets right and the full layer's probe does not, `lost` the reverse.
        """
        images, names = self.images.sum(), self.context.target.classes
        probes = pd.DataFrame(list(self.context.probes))[["layer", "selection", "bits", "fraction", "seed"]]
        classes = probes.loc[probes.index.repeat(len(names))].reset_index(drop=True)
        classes["split"] = self.split
        classes["class"] = list(names) * len(probes)
        classes["images"] = self.images.cpu().repeat(len(probes)).numpy()
        classes["correct"] = self.correct.cpu().numpy().ravel()
        return {
            "images": images.expand(len(probes)),
            "accuracy": self.correct.sum(1).double() / images,
            "loss": self.loss / images,
            "gained": self.gained,
            "lost": self.lost,
            "classes": classes,
            PER_IMAGE: self._per_image(int(images)),
        }

    def _per_image(self, images: int) -> Tensor:
        """Return which images each probe has right, joined over processes: each has zeros where others have answers."""
        right = torch.zeros(len(self.context.probes), images, dtype=torch.uint8, device=self.context.device)
        for indices, of_batch in self.right:
            right[:, indices] = of_batch.to(right)
        return self.context.reduce(right).bool()


def _first_curve(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the first layer and curve."""
    return losses if losses.empty else losses[(losses[SERIES] == losses.iloc[0][SERIES]).all(axis=1)]


def _lost(losses: pd.DataFrame) -> pd.DataFrame:
    """Return what is lost: a row per class, a column per fraction."""
    return losses.pivot_table(index="class", columns="fraction", values="lost", sort=False).sort_index(axis=1)
