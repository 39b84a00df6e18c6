"""Diffused redundancy: the fraction that is enough to keep a share of the full layer's metric, with its interval."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lightning_modules.subsets import plan
from lightning_modules.subsets.selections import FULL

RULES = ("threshold", "nearest", "interpolated")
DELTAS = (0.8, 0.9, 0.95, 0.99)  # shares of the full layer's metric for which redundancy is given
RESAMPLES = 2000  # bootstrap samples behind an interval
FEWEST_SEEDS = 3  # subset seeds below which there is no interval


def sufficient_fraction(
    fractions: Sequence[float] | np.ndarray, ratios: Sequence[float] | np.ndarray, delta: float, rule: str
) -> np.ndarray:
    """Return the fraction that is enough to keep `delta` of the full layer's metric, for one curve or several.

    Fraction 1 counts as measured, at ratio 1 where it was not: the full layer always is enough.

    Args:
        fractions: Measured fractions, shape (F,).
        ratios: Mean metric at each, over the full layer's, shape (..., F); a missing one keeps nothing.
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
        low, high = (np.take_along_axis(kept, at[..., None], -1)[..., 0] for at in (before, first))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (delta - low) / (high - low)
            crossed = grid[before] + share * (enough - grid[before])
        enough = np.where((first > 0) & np.isfinite(low) & reached.any(-1), crossed, enough)
    return np.where(reached.any(-1), enough, 1.0)


def redundancy(rows: pd.DataFrame, split: str, deltas: Sequence[float], metric: str) -> pd.DataFrame:
    """Return DR(delta) by every rule, with an interval over subsets and the critical mass of neurons.

    The interval is the 95 % percentile bootstrap over subset seeds. A resampled seed brings its values of the metric at
    all fractions, as its subsets nest; the full layer, which has no subset, stays as it is. Rows are as `complete`
    returns them.

    Returns:
        One row per layer, selection, rule and delta: `layer`, `selection`, `rule`, `delta`, `fraction` (that is
        enough), `neurons` (the critical mass: as many as that fraction is; missing without `width`), `redundancy`,
        and `low` and `high`, missing below three seeds.
    """
    rows = rows[rows["split"] == split]
    table = []
    for (layer, selection), group in rows[rows["selection"] != FULL].groupby(["layer", "selection"], sort=False):
        full = rows.loc[(rows["layer"] == layer) & (rows["selection"] == FULL), metric].mean() or np.nan
        by_seed = group.pivot_table(index="seed", columns="fraction", values=metric)
        grid, ratios = by_seed.columns.to_numpy(float), by_seed.mean().to_numpy()[None] / full
        everywhere = by_seed.dropna().to_numpy()  # seeds that were measured at all fractions
        if len(everywhere) >= FEWEST_SEEDS:
            picks = np.random.default_rng(0).integers(len(everywhere), size=(RESAMPLES, len(everywhere)))
            times = np.apply_along_axis(np.bincount, 1, picks, minlength=len(everywhere))  # how often each is drawn
            ratios = np.concatenate([ratios, times @ everywhere / len(everywhere) / full])
        for rule, delta in itertools.product(RULES, deltas):
            enough, *drawn = sufficient_fraction(grid, ratios, delta, rule)
            redundancies = 1 - np.array(drawn or [np.nan])
            low, high = np.quantile(redundancies, [0.025, 0.975], method="inverted_cdf")  # a value that was drawn
            mass = plan.neurons(enough, int(group["width"].iloc[0])) if "width" in group else np.nan
            table.append([layer, selection, rule, delta, enough, mass, 1 - enough, low, high])
    columns = ["layer", "selection", "rule", "delta", "fraction", "neurons", "redundancy", "low", "high"]
    return pd.DataFrame(table, columns=columns)
