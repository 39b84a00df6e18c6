"""What a results table says about a representation: pure functions from tables to numbers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lightning_modules.subsets import FULL

RULES = ("threshold", "nearest", "interpolated")


def curve(results: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return accuracy against fraction.

    Args:
        results: Rows as in `results.csv`.
        split: `val` or `test`.

    Returns:
        One row per selection and fraction, the full layer first, fractions ascending: `selection`, `fraction`,
        `neurons`, `mean` and `std` of the accuracy over seeds (population, as in the paper's tables; missing for a
        single seed), `seeds`, and `ratio`, the mean over the full layer's mean (missing if that is never right).
    """
    rows = results[results["split"] == split]
    table = (
        rows.groupby(["selection", "fraction", "neurons"], sort=False)["accuracy"]
        .agg(mean="mean", std=lambda values: values.std(ddof=0) if len(values) > 1 else np.nan, seeds="size")
        .reset_index()
    )
    full = table.loc[table["selection"] == FULL, "mean"].item()
    table["ratio"] = table["mean"] / (full or np.nan)
    order = {name: place for place, name in enumerate(dict.fromkeys([FULL, *table["selection"]]))}
    return table.sort_values(["selection", "fraction"], key=lambda c: c.map(order) if c.name == "selection" else c)


def sufficient_fraction(fractions: Sequence[float], ratios: Sequence[float], delta: float, rule: str) -> float:
    """Return the fraction that is enough to keep `delta` of the full layer's accuracy.

    Fraction 1 counts as measured, at ratio 1 where it was not: the full layer always is enough.

    Args:
        fractions: Measured fractions.
        ratios: Mean accuracy at each, over the full layer's; a missing one keeps nothing.
        delta: What is to be kept, for example 0.9.
        rule: `threshold`, the smallest measured fraction that reaches delta (Nanda et al., 2023, definition 1);
            `nearest`, the measured one whose ratio lies nearest to delta, which may be below (their table 1; ties go
            to the smaller); `interpolated`, where the line between measured points first reaches delta.
    """
    measured = dict(sorted({1.0: 1.0, **dict(zip(fractions, ratios, strict=True))}.items()))
    grid, kept = np.array(list(measured)), np.array(list(measured.values()))
    kept = np.nan_to_num(kept.round(12), nan=-np.inf)  # what differs by rounding alone is a tie
    if rule == "nearest":
        return float(grid[np.abs(kept - delta).round(12).argmin()])
    if rule not in RULES:
        raise ValueError(f"The rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    reached = int((kept >= delta).argmax())
    if kept[reached] < delta:
        return 1.0
    if rule == "threshold" or reached == 0:
        return float(grid[reached])
    low, high = kept[reached - 1], kept[reached]
    share = (delta - low) / (high - low) if high > low else 1.0
    return float(grid[reached - 1] + share * (grid[reached] - grid[reached - 1]))


def diffused_redundancy(fractions: Sequence[float], ratios: Sequence[float], delta: float, rule: str) -> float:
    """Return DR(delta), one minus the fraction that is enough; arguments as for `sufficient_fraction`."""
    return 1 - sufficient_fraction(fractions, ratios, delta, rule)
