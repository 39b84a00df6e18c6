"""Accuracy: right answers of every probe, by class and beside the full layer's, and the loss, all exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightning_modules.measures.measure import Batch, Column, Context, Measure, Picture
from lightning_modules.subsets.plan import references

if TYPE_CHECKING:
    from lightning_modules.results.results import Results

NORMAL_95 = 1.959963984540054
"""The standard normal's quantile at 97.5 %."""
TABLE_CLASSES = 40
"""Classes that the report's table has room for."""
PICTURE_CLASSES = 30
"""Classes that the heat map has room for."""


class ClassCounts(Measure):
    """Counts the images of each class, and every probe's right answers among them."""

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


class Accuracy(ClassCounts):
    """Accuracy and mean loss of every probe, and its difference to the full layer's probe on the same images.

    Gives the table `classes`: images and right answers by probe and class. It is always measured, at no cost to speak
    of.
    """

    columns = (
        Column("images"),
        Column("accuracy", "accuracy", "%", digits=1, logged=True),
        Column("loss"),
        Column("gained"),
        Column("lost"),
        Column("difference", "difference", "points", digits=1, limits=("difference_low", "difference_high")),
        Column("difference_low"),
        Column("difference_high"),
    )
    table = "classes"
    loss: Tensor
    gained: Tensor
    lost: Tensor

    def setup(self, context: Context) -> None:
        """Add the counts, and the sums of the losses."""
        super().setup(context)
        zeros = torch.zeros(len(context.probes), dtype=torch.int64, device=context.device)
        self.add_state("loss", zeros.double(), dist_reduce_fx="sum")
        self.add_state("gained", zeros, dist_reduce_fx="sum")
        self.add_state("lost", zeros, dist_reduce_fx="sum")
        self.references = references(context.probes).to(context.device)

    def update(self, batch: Batch) -> None:
        """Count a batch."""
        super().update(batch)
        self.loss += self.context.solver.loss(self.context.target, batch.logits, batch.labels).double()
        right = batch.predicted == batch.labels
        reference = right[self.references]
        self.gained += (right & ~reference).sum(1)
        self.lost += (reference & ~right).sum(1)

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return the columns, and the table of classes.

        `gained` are images that the probe gets right and the full layer's probe does not, `lost` the reverse.
        """
        images = self.images.sum()
        return {
            "images": images.expand(len(self.correct)),
            "accuracy": self.correct.sum(1).double() / images,
            "loss": self.loss / images,
            "gained": self.gained,
            "lost": self.lost,
            **paired_difference(self.gained, self.lost, images),
            "classes": self._classes(),
        }

    def _classes(self) -> pd.DataFrame:
        """Return images and right answers by probe and class."""
        probes, names = self.context.probes, self.context.target.classes
        keys = ("layer", "selection", "fraction", "seed")
        return pd.DataFrame(
            {
                **{key: np.repeat([getattr(probe, key) for probe in probes], len(names)) for key in keys},
                "split": self.split,
                "class": list(names) * len(probes),
                "images": np.tile(self.images.cpu().numpy(), len(probes)),
                "correct": self.correct.cpu().numpy().ravel(),
            }
        )

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return the points that those classes lose which lose most, a column per fraction, for the first selection."""
        losses = results.class_losses(split)
        if losses.empty:
            return {}
        first = _first_selection(losses)
        first = first[first["class"].isin(first["class"].unique()[:TABLE_CLASSES])]
        wide = first.pivot_table(index="class", columns="fraction", values="lost", sort=False).sort_index(axis=1)
        words = (100 * wide).map("{:.1f}".format).rename(columns="{:.3g}".format)
        full = first.drop_duplicates("class").set_index("class")
        words.insert(0, "full (%)", (100 * full["full_accuracy"]).map("{:.1f}".format))
        words.insert(0, "test images", full["images"].astype(str))
        return {"Classes that lose most": words.reset_index().rename_axis(columns=None)}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw a heat map of the points that each class loses, by the first selection of the first layer."""
        from matplotlib.figure import Figure

        from lightning_modules.reporting import figures

        losses = results.class_losses(split)
        if losses.empty:
            return {}
        rows = _first_selection(losses)
        names, fractions = list(dict.fromkeys(rows["class"])), sorted(rows["fraction"].unique())
        shown = names[:PICTURE_CLASSES]
        lost = rows.pivot_table(index="class", columns="fraction", values="lost").loc[shown, fractions]
        values = 100 * lost.to_numpy()
        figure = Figure(figsize=(2.6 + 0.55 * len(fractions), 1.6 + 0.27 * len(shown)), layout="constrained")
        axes = figure.subplots()
        bound = max(1.0, float(np.abs(values).max()))
        image = axes.imshow(values, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if abs(value) > 0.6 * bound else "black"
            axes.text(column, row, f"{value:z.0f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(len(fractions)), list(map(figures.short, fractions)), fontsize=8, rotation=45)
        axes.set_yticks(range(len(shown)), [str(name) for name in shown], fontsize=8)
        axes.set_xlabel(f"fraction of neurons ({rows['selection'].iloc[0]})")
        figure.colorbar(image, label="points lost to the full layer")
        layer = f", {rows['layer'].iloc[0]}" if losses["layer"].nunique() > 1 else ""
        some = f", the {len(shown)} of {len(names)} classes that lose most" if len(shown) < len(names) else ""
        figure.suptitle(f"{results.title}{layer}{some}", fontsize=10)
        caption = "Points of test accuracy that each class loses to the full layer, mean over subsets; those that lose "
        return {"classes": Picture(figure, f"{caption}most on top.")}


def _first_selection(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the first selection of the first layer."""
    return losses[(losses[["layer", "selection"]] == losses.iloc[0][["layer", "selection"]]).all(axis=1)]


def paired_difference(gained: Tensor, lost: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Return the difference in accuracy to the full layer on the same images, with its 95 % interval.

    The interval is that of Agresti and Min (2005): Wald's, after half an image was added to each of the four cells
    (both right, gained, lost, both wrong), so that it has a width where no image changed sides.

    Args:
        gained: Images that the probe has right and the full layer wrong.
        lost: The reverse.
        images: All images.

    Returns:
        `difference`, (gained - lost) / images, and its limits `difference_low` and `difference_high`, float64.
    """
    gained, lost, images = gained.double(), lost.double(), images.double()
    centre = (gained - lost) / (images + 2)
    error = ((gained + lost + 1) / (images + 2) - centre.square()).sqrt() / (images + 2).sqrt()
    return {
        "difference": (gained - lost) / images,
        "difference_low": (centre - NORMAL_95 * error).clamp(min=-1),
        "difference_high": (centre + NORMAL_95 * error).clamp(max=1),
    }
