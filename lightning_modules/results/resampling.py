"""Resampling of subsets and images together, from which every interval comes."""

import numpy as np
import pandas as pd

from lightning_modules.results.curves import CELL, SERIES
from lightning_modules.subsets.plan import series
from lightning_modules.subsets.selections import FULL

RESAMPLES = 2000  # draws behind an interval
BLOCK = 4096  # images weighted at once


def resample(correct: np.ndarray, probes: pd.DataFrame) -> pd.DataFrame:
    """Draw the mean metric of each curve's fractions as other subsets and other images would have given it.

    Images are weighted as in the Bayesian bootstrap (Rubin, 1981), alike for all probes, so that differences to the
    full layer are paired. Half an image is added to each of the four cells of full layer and subset, right or wrong (as
    Agresti and Min, 2005, do for paired proportions), so that an interval has a width where no image changed sides;
    not so to other values than right and wrong, which change by degrees. A metric that is no mean over images, as
    average precision and R^2, comes as what each image adds to it, the metric plus its influence: means of that with
    other weights are the metric with these weights, to first order.

    Subsets are those of the seeds. A draw shifts the mean of S seeds, at all fractions together since subsets of a seed
    nest, by a multivariate t with S - 1 degrees of freedom and the covariance of that mean: the distribution that few
    normal values leave for it, where resampling three of them would give a third of the width. With a single seed, or
    without seeds, images alone vary.

    Args:
        correct: Which images each probe has right, shape (P, n), boolean; or the metric of each.
        probes: The P probes: `layer`, `selection`, `bits`, `fraction`, `seed`.

    Returns:
        A row per draw, and a column per (layer, selection, bits, fraction), in the order of the probes.
    """
    cells = probes.reset_index(drop=True).groupby(CELL, sort=False).indices
    draws = np.zeros((RESAMPLES, len(cells)))
    weight = np.zeros((RESAMPLES, 1))
    random = np.random.default_rng(0)
    for start in range(0, correct.shape[1], BLOCK):
        of_block = correct[:, start : start + BLOCK]
        means = np.stack([of_block[members].mean(0) for members in cells.values()])  # (cells, images)
        weights = random.standard_exponential((RESAMPLES, means.shape[1]))
        draws += weights @ means.T
        weight += weights.sum(1, keepdims=True)
    added = random.standard_gamma(0.5, (RESAMPLES, 2, 2))  # full layer wrong or right, subsets wrong or right
    added *= correct.dtype == bool
    full = np.array([selection == FULL for _, selection, *_ in cells])
    draws += np.where(full, added[:, 1].sum(-1, keepdims=True), added[:, :, 1].sum(-1, keepdims=True))
    draws /= weight + added.sum((1, 2))[:, None]

    table, places = probes.assign(mean=correct.mean(1)), {cell: place for place, cell in enumerate(cells)}
    for (layer, selection, bits), of_order in table[table["selection"] != FULL].groupby(SERIES, sort=False):
        by_seed = of_order.pivot_table(index="seed", columns="fraction", values="mean")
        by_seed = by_seed.loc[:, by_seed.count() > 1].dropna()  # of seeds that are measured everywhere
        seeds = len(by_seed)
        if seeds < 2 or by_seed.empty:
            continue
        deviations = (by_seed - by_seed.mean()).to_numpy() / np.sqrt(seeds * (seeds - 1))  # (S, fractions)
        random = np.random.default_rng(
            [*f"{layer}/{series(selection, bits)}".encode()]
        )  # the same whatever else is measured
        scale = np.sqrt((seeds - 1) / random.chisquare(seeds - 1, (RESAMPLES, 1)))
        shift = scale * random.standard_normal((RESAMPLES, seeds)) @ deviations
        draws[:, [places[layer, selection, bits, fraction] for fraction in by_seed]] += shift
    return pd.DataFrame(draws, columns=pd.MultiIndex.from_tuples(cells))


def with_limits(curve: pd.DataFrame, draws: pd.DataFrame) -> pd.DataFrame:
    """Return a curve with 95 % limits of its ratios and differences to the full layer: `ratio_low`, `ratio_high`, ...

    They are missing for the full layer itself.
    """
    limits = []
    for cell in curve[CELL].itertuples(index=False, name=None):
        full = draws[cell[0], FULL, 32, 1.0]
        shared = full if full.mean() > 0 else full * np.nan
        pair = [np.full_like(full, np.nan)] * 2 if cell[1] == FULL else [draws[cell] / shared, draws[cell] - full]
        limits.append(np.quantile(pair, [0.025, 0.975], axis=1).T.ravel())
    names = ["ratio_low", "ratio_high", "difference_low", "difference_high"]
    return curve.assign(**dict(zip(names, np.transpose(limits), strict=True)))
