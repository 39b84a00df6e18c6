"""Diffused redundancy: the fraction that is enough to keep a share of the full layer's metric, with its interval."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from lightning_modules.results.curves import SERIES
from lightning_modules.subsets import plan
from lightning_modules.subsets.selections import FULL

RULES = ("threshold", "nearest", "interpolated")
DELTAS = (0.8, 0.9, 0.95, 0.99)  # shares of the full layer's metric for which redundancy is given
FORETOLD = "cka_foretold"  # the column of what X'X alone foretells of subsets, without labels
MANY_DELTAS = tuple(each / 100 for each in range(70, 100))  # those of its curve, `DELTAS` among them


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


def certain(margins: np.ndarray, level: float) -> np.ndarray:
    """Return which fractions surely keep a share of the full layer's metric, shape (F,), by one-sided tests of `level`.

    Fractions are tested from the largest down until one is not sure: so tested in a fixed order, the chance that one
    is wrongly called sure is at most `level`, however many there are.

    Args:
        margins: Draws of the metric less that share of the full layer's, shape (draws, F), by ascending fraction.
        level: For example 0.05.
    """
    return np.logical_and.accumulate((np.quantile(margins, level, axis=0) >= 0)[::-1])[::-1]


def sufficient_range(
    fractions: Sequence[float] | np.ndarray, drawn: np.ndarray, full: np.ndarray, delta: float
) -> dict[str, tuple[float, float]]:
    """Return the 95 % limits of the fraction that is enough, by rule.

    Up to the lower limit of `threshold` and `interpolated` no fraction may be enough: the upper 97.5 % limit of its
    margin is below zero. From the upper limit on all are, see `certain`. Along the line between two measured fractions
    the same is asked of the interpolated margin. (Quantiles of what is enough in each draw would lie too low, as the
    smallest fraction that reaches delta already is the luckiest.) The limits of `nearest` are such quantiles.

    Args:
        fractions: Measured fractions, shape (F,), ascending.
        drawn: Draws of the metric at each, shape (draws, F).
        full: Draws of the full layer's, shape (draws,).
        delta: What is to be kept, for example 0.9.
    """
    grid, margins = np.array(fractions, float), drawn - delta * full[:, None]
    nearest = sufficient_fraction(grid, drawn / full[:, None], delta, "nearest")
    if 1.0 not in grid:
        grid, margins = np.append(grid, 1.0), np.column_stack([margins, (1 - delta) * full])
    # In few bits even fraction 1 may not be enough; it is then the limit.
    may_be, surely = np.quantile(margins, 0.975, axis=0) >= 0, certain(margins, 0.025)
    may_be[-1] = surely[-1] = True
    places = {0.975: int(may_be.argmax()), 0.025: int(surely.argmax())}

    def crossing(level: float) -> float:
        place = places[level]
        before, after = margins[:, max(place - 1, 0)], margins[:, place]
        if place == 0 or np.quantile(after, level) < 0:
            return grid[place]
        share = brentq(lambda at: np.quantile(before + at * (after - before), level), 0, 1, xtol=1e-4)
        return grid[place - 1] + share * (grid[place] - grid[place - 1])

    return {
        "threshold": (grid[places[0.975]], grid[places[0.025]]),
        "nearest": tuple(np.quantile(nearest, [0.025, 0.975], method="inverted_cdf")),
        "interpolated": (crossing(0.975), crossing(0.025)),
    }


def redundancy(
    rows: pd.DataFrame, split: str, deltas: Sequence[float], metric: str, draws: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return DR(delta) by every rule, with a 95 % interval over subsets and images and the critical mass of neurons.

    Args:
        rows: As `curves.complete` returns them.
        split: The split to look at.
        deltas: Shares of the full layer's metric.
        metric: Column of the metric.
        draws: Of the mean of each curve's fractions, as `resampling.resample` returns them; None for no intervals.

    Returns:
        One row per layer, selection, bits, rule and delta: `layer`, `selection`, `bits`, `rule`, `delta`, `fraction`
        (that is enough), `neurons` (the critical mass: as many as that fraction is; missing without `width`),
        `redundancy`, the limits `low` and `high`, missing without draws, and `foretold`: the redundancy if subsets kept
        the share that the foretold CKA is, missing where none was foretold. All are missing where in so few bits even
        all coordinates are not enough.
    """
    rows = rows[rows["split"] == split]
    table = []
    for (layer, selection, bits), group in rows[rows["selection"] != FULL].groupby(SERIES, sort=False):
        full = rows.loc[(rows["layer"] == layer) & (rows["selection"] == FULL), metric].mean()
        full = full if full > 0 else np.nan  # of an R^2 below 0 there is nothing to keep
        means = group.groupby("fraction")[metric].mean()
        grid, ratios = means.index.to_numpy(float), means.to_numpy() / full
        if draws is not None:
            drawn = draws[[(layer, selection, bits, each) for each in grid]].to_numpy()
            drawn_full = draws[layer, FULL, 32, 1.0].to_numpy()
        foretold = group.groupby("fraction")[FORETOLD].mean() if FORETOLD in group else means * np.nan
        for delta in deltas:
            ranges: dict[str, tuple[float, float]] = {}
            if draws is not None:
                nothing = dict.fromkeys(RULES, (1.0, 1.0))
                ranges = sufficient_range(grid, drawn, drawn_full, delta) if full > 0 else nothing
            for rule in RULES:
                enough = float(sufficient_fraction(grid, ratios, delta, rule))
                least, most = ranges.get(rule, (np.nan, np.nan))
                mass = plan.neurons(enough, int(group["width"].iloc[0])) if "width" in group else np.nan
                low, high = 1 - max(most, enough), 1 - min(least, enough)  # NaN comes first, and so stays
                said = np.nan
                if foretold.notna().all():
                    said = 1 - float(sufficient_fraction(grid, foretold.to_numpy(), delta, rule))
                found = [enough, mass, 1 - enough, low, high, said]
                never = bits < 32 and rule != "nearest" and not (ratios.round(12) >= delta).any()
                table.append([layer, selection, bits, rule, delta, *([np.nan] * len(found) if never else found)])
    columns = [*SERIES, "rule", "delta", "fraction", "neurons", "redundancy", "low", "high", "foretold"]
    return pd.DataFrame(table, columns=columns)
