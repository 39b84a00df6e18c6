"""Diffused redundancy: the fraction that is enough, with its interval; the frontier, and means over tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_modules.subsets import plan
from lightning_modules.subsets.selections import FULL

if TYPE_CHECKING:
    from lightning_modules.results.results import Results

RULES = ("threshold", "nearest", "interpolated")
DELTAS = (0.8, 0.9, 0.95, 0.99)
"""Shares of the full layer's accuracy for which redundancy is given."""
RESAMPLES = 2000
"""Bootstrap samples behind an interval."""
FEWEST_SEEDS = 3
"""Subset seeds below which there is no interval."""


def sufficient_fraction(
    fractions: Sequence[float] | np.ndarray, ratios: Sequence[float] | np.ndarray, delta: float, rule: str
) -> np.ndarray:
    """Return the fraction that is enough to keep `delta` of the full layer's accuracy, for one curve or several.

    Fraction 1 counts as measured, at ratio 1 where it was not: the full layer always is enough.

    Args:
        fractions: Measured fractions, shape (F,).
        ratios: Mean accuracy at each, over the full layer's, shape (..., F); a missing one keeps nothing.
        delta: What is to be kept, for example 0.9.
        rule: `threshold`, the smallest measured fraction that reaches delta (Nanda et al., 2023, definition 1);
            `nearest`, the measured one whose ratio lies nearest to delta, which may be below (their table 1; ties go
            to the smaller); `interpolated`, where the line between measured points first reaches delta.

    Returns:
        Shape (...).
    """
    if rule not in RULES:
        raise ValueError(f"The rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    grid, kept = np.array(fractions, float), np.array(ratios, float)
    if 1.0 not in grid:
        grid, kept = np.append(grid, 1.0), np.concatenate([kept, np.ones((*kept.shape[:-1], 1))], axis=-1)
    order = grid.argsort()
    grid, kept = grid[order], kept[..., order]
    kept = np.nan_to_num(kept.round(12), nan=-np.inf)  # what differs by rounding alone is a tie
    if rule == "nearest":
        return grid[np.abs(kept - delta).round(12).argmin(-1)]
    reached = kept >= delta
    first = reached.argmax(-1)
    enough = grid[first]
    if rule == "interpolated":
        before = np.maximum(first - 1, 0)
        low = np.take_along_axis(kept, before[..., None], -1)[..., 0]
        high = np.take_along_axis(kept, first[..., None], -1)[..., 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (delta - low) / (high - low)
            crossed = grid[before] + share * (enough - grid[before])
        enough = np.where((first > 0) & np.isfinite(low) & reached.any(-1), crossed, enough)
    return np.where(reached.any(-1), enough, 1.0)


def redundancy(rows: pd.DataFrame, split: str, deltas: Sequence[float], metric: str = "accuracy") -> pd.DataFrame:
    """Return DR(delta) by every rule, with an interval over subsets and the critical mass of neurons.

    The interval is the 95 % percentile bootstrap over subset seeds. A resampled seed brings its accuracies at all
    fractions, as its subsets nest; the full layer, which has no subset, stays as it is.

    Args:
        rows: As `complete` returns them.
        split: `val` or `test`.
        deltas: Shares of the full layer's accuracy.
        metric: The column of the headline metric, here called accuracy.

    Returns:
        One row per layer, selection, rule and delta: `layer`, `selection`, `rule`, `delta`, `fraction` (that is
        enough), `neurons` (the critical mass: as many as that fraction is; missing without `width`), `redundancy`,
        and `low` and `high`, missing below three seeds.
    """
    rows = rows[rows["split"] == split]
    table = []
    for (layer, selection), group in rows[rows["selection"] != FULL].groupby(["layer", "selection"], sort=False):
        full = rows.loc[(rows["layer"] == layer) & (rows["selection"] == FULL), metric].mean() or np.nan
        accuracies = group.pivot_table(index="seed", columns="fraction", values=metric)
        grid, ratios = accuracies.columns.to_numpy(float), accuracies.mean().to_numpy() / full
        everywhere = accuracies.dropna().to_numpy()  # seeds that were measured at all fractions
        resampled = None
        if len(everywhere) >= FEWEST_SEEDS:
            picks = np.random.default_rng(0).integers(len(everywhere), size=(RESAMPLES, len(everywhere)))
            times = np.apply_along_axis(np.bincount, 1, picks, minlength=len(everywhere))  # how often each is drawn
            resampled = times @ everywhere / len(everywhere) / full
        for rule in RULES:
            for delta in deltas:
                enough = float(sufficient_fraction(grid, ratios, delta, rule))
                low = high = np.nan
                if resampled is not None:
                    drawn = 1 - sufficient_fraction(grid, resampled, delta, rule)
                    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")  # a value that was drawn
                mass = plan.neurons(enough, int(group["width"].iloc[0])) if "width" in group else np.nan
                table.append([layer, selection, rule, delta, enough, mass, 1 - enough, low, high])
    columns = ["layer", "selection", "rule", "delta", "fraction", "neurons", "redundancy", "low", "high"]
    return pd.DataFrame(table, columns=columns)


def frontier(redundancies: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Return the places of those that no other beats in both redundancy and accuracy, redundancy ascending.

    The redundancy-performance Pareto frontier (Nanda et al., 2023).
    """
    best, chosen = -np.inf, []
    for place in sorted(range(len(redundancies)), key=lambda i: (-redundancies[i], -accuracies[i])):
        if accuracies[place] > best:
            best = accuracies[place]
            chosen.append(place)
    return chosen[::-1]


def group_means(runs: Iterable[tuple[str, Results]], delta: float, rule: str) -> pd.DataFrame:
    """Return what a backbone reaches on the average task of each group; every task counts the same.

    Args:
        runs: A run for each task, with the task's group.
        delta: As for `sufficient_fraction`.
        rule: As for `sufficient_fraction`.

    Returns:
        One row per group in the order of the runs, and `all`, for each layer and selection: `group`, `layer`,
        `selection`, `tasks`, `redundancy`, `full_<metric>` and, for each fraction, `<metric>_<fraction>`; on the test
        split, means over tasks of means over seeds. Missing where it was not measured on every one of the tasks.
    """
    rows = []
    for group, results in runs:
        means, metric = results.curve("test"), results.headline.name
        full = means[means["selection"] == FULL].set_index("layer")["mean"]
        found = results.redundancy("test", (delta,))
        for cell in found[found["rule"] == rule].to_dict("records"):
            keys = {"layer": cell["layer"], "selection": cell["selection"]}
            of_cell = means[(means["layer"] == cell["layer"]) & (means["selection"] == cell["selection"])]
            values = {f"{metric}_{row.fraction:g}": row.mean for row in of_cell[["fraction", "mean"]].itertuples()}
            numbers = {"redundancy": cell["redundancy"], f"full_{metric}": full[cell["layer"]], **values}
            rows += [{"group": name, **keys, "tasks": 1, **numbers} for name in (group, "all")]
    table = pd.DataFrame(rows)
    table = pd.concat([table[table["group"] != "all"], table[table["group"] == "all"]])
    groups = table.groupby(["group", "layer", "selection"], sort=False)
    averages = groups.agg(lambda column: column.mean(skipna=False)).assign(tasks=groups["tasks"].sum())
    return averages.reset_index()
