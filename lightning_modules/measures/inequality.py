"""How unequal a probe's accuracy is over classes."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightning_modules.measures.accuracy import ClassCounts
from lightning_modules.measures.measure import Picture
from lightning_modules.results.results import Results
from lightning_modules.results.tables import Column, by_series
from lightning_modules.subsets.selections import FULL

KEYS = ["layer", "selection", "bits", "fraction", "neurons"]


class Inequality(ClassCounts):
    """Gini coefficient, coefficient of variation and largest gap of the accuracy over classes, and its mean.

    Of every probe, in the columns; and, as in the paper, of class accuracies that were averaged over seeds before: the
    table `inequality_of_means`. The latter are smaller, as an average evens out what differs by the seed.
    """

    columns = (
        Column("mean_class_accuracy", "mean class accuracy", "%", digits=1),
        Column("gini", "Gini"),
        Column("coefficient_of_variation", "coefficient of variation"),
        Column("largest_gap", "largest gap"),
    )

    table = "inequality_of_means"

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return the columns and the table; classes without images do not count."""
        correct, images = self.correct.cpu().numpy(), self.images.cpu().numpy()
        columns = {name: torch.from_numpy(value) for name, value in class_inequality(correct, images).items()}
        groups = pd.DataFrame(list(self.context.probes)).groupby(KEYS, sort=False)
        rows = pd.DataFrame([key for key, _ in groups], columns=KEYS)
        rows["seeds"], rows["split"] = [len(group) for _, group in groups], self.split
        means = np.stack([correct[group.index].mean(0) for _, group in groups])
        return {**columns, self.table: rows.assign(**class_inequality(means, images))}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw Gini coefficient and coefficient of variation against the headline metric: a point per probe."""
        from lightning_modules.reporting import figures

        rows, headline = by_series(results.rows[results.rows["split"] == split]), results.headline
        several = len(results.layers) > 1
        figure, grid = figures.grid(len(results.layers), 2, results.title)
        styles = figures.styles(rows.loc[rows["selection"] != FULL, "selection"])
        means = by_series(results.table(self.table, split).merge(results.curve(split)[[*KEYS, "mean"]]))
        styles[FULL] = {"color": "black", "marker": "*", "markersize": 9}
        named = {"gini": "Gini coefficient over classes", "coefficient_of_variation": "coefficient of variation"}
        for panels, layer in zip(grid, results.layers, strict=True):
            for axes, (column, name) in zip(panels, named.items(), strict=True):
                for selection, style in styles.items():
                    points = rows[(rows["layer"] == layer) & (rows["selection"] == selection)]
                    options = {"markersize": 4, "alpha": 0.7} | style | {"linestyle": ""}
                    label = "full layer" if selection == FULL else selection
                    axes.plot(headline.scale * points[headline.name], points[column], label=label, **options)
                    line = means[(means["layer"] == layer) & (means["selection"] == selection)]
                    axes.plot(headline.scale * line["mean"], line[column], color=style["color"], linestyle=":")
                axes.set_xlabel(f"{split} {headline.heading}")
                axes.grid(visible=True, linewidth=0.4, alpha=0.5)
                figures.value_axis(axes, name, f"layer {layer}" if several and axes is panels[0] else "")
        figures.legend(figure, grid.flat)
        caption = (
            f"How unequal accuracy is over classes, against {headline.label}. A point is a probe; dotted: of class "
        )
        caption += "accuracies averaged over seeds, as in the paper. 0 is equal."
        return {"inequality": Picture(figure, caption)}


def class_inequality(correct: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean and inequality of the accuracy over classes, from right answers (..., C) and images (C,).

    Classes without images do not count. Where no class is ever right all are equal, which is 0.

    Returns:
        `mean_class_accuracy`; `gini`, the Gini coefficient: the mean absolute difference between two classes over twice
        the mean; `coefficient_of_variation`, the population's standard deviation over the mean; and `largest_gap`, the
        best class less the worst; each of shape (...).
    """
    seen = images > 0
    accuracy = np.sort(correct[..., seen] / images[seen])
    classes = accuracy.shape[-1]
    mean = accuracy.mean(-1)
    divisor = np.where(mean > 0, mean, 1.0)  # where the mean is 0 so is what it divides
    # Of sorted values, the i-th of C is the larger in i pairs and the smaller in C - 1 - i.
    differences = (accuracy * (2 * np.arange(classes) - classes + 1)).sum(-1)
    return {
        "mean_class_accuracy": mean,
        "gini": differences / (classes**2 * divisor),
        "coefficient_of_variation": accuracy.std(-1) / divisor,
        "largest_gap": accuracy[..., -1] - accuracy[..., 0],
    }
