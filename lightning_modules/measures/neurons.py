"""What each neuron is worth: by how much the error of a ridge probe rises when it alone is dropped."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from lightning_modules.features.moments import Moments
from lightning_modules.measures.measure import Batch, Measure, Picture
from lightning_modules.results.results import Results
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.searches import rises
from lightning_modules.subsets.selections import SELECTIONS, Layer, fisher_ratio, order

SMOOTHED = 20  # a picture averages over this part of the neurons where it shows what transfers to test


class Neurons(Measure):
    """What each neuron is worth, by how much the error of a ridge probe rises when it alone is dropped: the table
    `neurons`.

    From the whole layer, on validation and test, and from a random half of it, the mean over subset seeds; exact, from
    X'X and X'Y of train and the other splits, with the penalty that errs least on validation. Beside it what may stand
    for it: variance and Fisher's ratio over train, and the neuron that it correlates with most. Costs n D^2 operations
    for n images of D neurons, 6 D^3, and D^3 for each seed, in float64.
    """

    table = "neurons"
    second_moments = True
    needs_clean_features = True
    needs_labels = True

    def update(self, batch: Batch) -> None:
        """Do nothing, as all follows from sums over the splits."""

    def compute(self) -> Mapping[str, pd.DataFrame]:
        """Return the table with the test; validation alone has none."""
        if self.split != "test":
            return {}
        splits = [self.context.moments(split) for split in ("train", "val", "test")]
        seeds = sorted({probe.seed for probe in self.context.probes if SELECTIONS[probe.selection].seeded}) or [0]
        tables = []
        for layer, width in self.context.coordinates.widths.items():
            train, val, test = (moments[layer] for moments in splits)
            found = dict(zip(("rise_val", "rise_test", "rise_in_half"), removals(train, val, test, seeds), strict=True))
            correlation, substitute = _substitutes(train)
            ratio = {"fisher": fisher_ratio(train)} if self.context.target.classes else {}
            columns = {"variance": train.variance, **ratio, **found}
            columns |= {"substitute": substitute, "correlation": correlation}
            values = {name: value.cpu().numpy() for name, value in columns.items()}
            tables.append(pd.DataFrame({"layer": layer, "neuron": range(width), "split": self.split, **values}))
        return {self.table: pd.concat(tables, ignore_index=True)}

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return how many neurons harm, and how many of these do so on test."""
        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        harms = rows.assign(harm=rows["rise_val"] < 0, harm_both=rows[["rise_val", "rise_test"]].max(axis=1) < 0)
        counts = harms.groupby("layer", sort=False).agg(
            neurons=("neuron", "size"), harm_on_validation=("harm", "sum"), and_on_test=("harm_both", "sum")
        )
        return {"Neurons without which the error falls": counts.reset_index()}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw the rises on validation in descending order, with their harmful tail, and what test says of them."""
        from lightning_modules.reporting import figures

        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        layers = rows.groupby("layer", sort=False)
        figure, panels = figures.panels(len(layers), results.title)
        looks = figures.styles(["full", "half"])
        for axes, (layer, worth) in zip(panels, layers, strict=True):
            worth = worth.sort_values("rise_val", ascending=False, ignore_index=True)
            places, window = worth.index + 1, max(1, len(worth) // SMOOTHED)
            lines = {"full": worth["rise_val"], "half": worth["rise_in_half"].sort_values(ascending=False)}
            labels = {"full": "from the full layer", "half": "from a random half, in its own order"}
            for name, values in lines.items():
                axes.plot(places, values, label=labels[name], **looks[name] | {"marker": "", "linewidth": 1.3})
            smooth = worth["rise_test"].rolling(window, center=True, min_periods=1).mean()
            label = "from the full layer, on test (running mean)"
            axes.plot(places, smooth, label=label, color="gray", linewidth=1, linestyle=":")
            harmful = worth["rise_val"].clip(upper=0)
            axes.fill_between(
                places, harmful, color="#D55E00", alpha=0.3, linewidth=0, label="harmful: the error falls"
            )
            axes.set_yscale("symlog", linthresh=float(worth["rise_val"].abs().median()) or 1.0)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.grid(visible=True, linewidth=0.4, alpha=0.5)
            axes.set_xlabel("neurons, by their worth")
            axes.set_ylabel("rise of the squared error without it")
            axes.set_title(f"layer {layer}" if len(layers) > 1 else "", fontsize=9, loc="left")
        figures.legend(figure, panels)
        caption = "What each neuron is worth: by how much the squared error of a ridge probe rises on validation when "
        return {"neurons": Picture(figure, f"{caption}that neuron alone is dropped.")}


def removals(train: Moments, val: Moments, test: Moments, seeds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rise of the squared error, as in `Ridge`, without each neuron, shape (D,), in three settings.

    From the full layer on validation and on test; and on validation from the half of the layer that it lies in, where a
    subset seed halves the neurons at random, the mean over seeds. The penalty is the one that errs least for the full
    layer on validation.
    """
    from lightning_modules.probes.ridge import PENALTIES, ridge_probes

    width = train.width
    ((probe,),) = ridge_probes(train, val, [Ordering(torch.arange(width), [width])], PENALTIES)
    system, cross = train.scatter, train.cross
    system.diagonal().add_(probe.penalty * system.diagonal().mean())
    judged = [_error(train, moments) for moments in (val, test)]
    on_val, on_test = rises(system, cross, judged)
    in_half = torch.zeros_like(on_val)
    for seed in seeds:
        for half in order("random", Layer(width), seed).to(system.device).chunk(2):
            quadratic, linear = judged[0]
            of_half = (quadratic[half][:, half], linear[half])
            in_half[half] += rises(system[half][:, half], cross[half], [of_half])[0] / len(seeds)
    return on_val, on_test, in_half


def _error(train: Moments, judged: Moments) -> tuple[Tensor, Tensor]:
    """Return M, shape (D, D), and G, (D, C): weights W, (D, C), err by tr(W'MW) - 2 tr(W'G) + a constant on a split.

    Mean over images, with the bias that is the best one on train.
    """
    away = judged.mean - train.mean
    more = judged.target_mean - train.target_mean
    return judged.scatter / judged.count + away.outer(away), judged.cross / judged.count + away.outer(more)


def _substitutes(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return each neuron's largest correlation, of either sign, with another, and which that is; shape (D,) each.

    The correlation is 0 where there is none, as of a neuron that never changes.
    """
    scatter = moments.scatter
    scale = scatter.diagonal().rsqrt().nan_to_num(posinf=0)
    correlations = (scatter * scale * scale.unsqueeze(1)).fill_diagonal_(0)
    best = correlations.abs().argmax(1)
    return correlations.gather(1, best.unsqueeze(1)).squeeze(1), best
