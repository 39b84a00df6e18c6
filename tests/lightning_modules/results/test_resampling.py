import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lightning_modules.results.resampling import resample, with_limits


def probes(seeds, fractions=(0.1, 0.5), bits=32):
    rows = [("net", "full", 32, 1.0, 0)]
    rows += [("net", "random", bits, fraction, seed) for seed in range(seeds) for fraction in fractions]
    return pd.DataFrame(rows, columns=["layer", "selection", "bits", "fraction", "seed"])


def test_images_vary_as_proportions_of_pairs_do():
    cells = [(1, 1)] * 140 + [(1, 0)] * 34 + [(0, 1)] * 6 + [(0, 0)] * 60  # full layer and subset, right or not
    draws = resample(np.array(cells, bool).T, probes(1, [0.5]))
    difference = draws["net", "random", 32, 0.5] - draws["net", "full", 32, 1.0]
    # After Agresti and Min (2005), with half an image in each cell.
    mean, images = (6 - 34) / 242, 242
    assert difference.mean() == pytest.approx(mean, abs=0.002)
    assert difference.std() == pytest.approx(np.sqrt(((6 + 34 + 1) / images - mean**2) / images), rel=0.05)
    same = resample(np.ones((2, 50), bool), probes(1, [0.5]))
    ratio = same["net", "random", 32, 0.5] / same["net", "full", 32, 1.0]
    assert np.quantile(ratio, 0.025) < 1 < np.quantile(ratio, 0.975)


def test_graded_values_vary_as_their_paired_means_do():
    values = np.random.default_rng(0).random((2, 200)) ** [[1], [2]]
    draws = resample(values.astype(np.float32), probes(1, [0.5]))
    difference, pairs = draws["net", "random", 32, 0.5] - draws["net", "full", 32, 1.0], values[1] - values[0]
    assert difference.mean() == pytest.approx(pairs.mean(), abs=0.003)
    assert difference.std() == pytest.approx(stats.sem(pairs), rel=0.05)
    same = resample(values[[0, 0]], probes(1, [0.5]))
    assert np.ptp(same["net", "random", 32, 0.5] / same["net", "full", 32, 1.0]) < 1e-9


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_subsets_vary_as_the_mean_of_a_few_normal_values_does(seeds):
    table = probes(seeds)
    shares = np.random.default_rng(0).uniform(0.3, 0.7, len(table))
    images = np.random.default_rng(1).permutation(20_000)  # so many that they hardly matter
    draws = resample(images < 20_000 * shares[:, None], table)
    for fraction in (0.1, 0.5):
        values = shares[(table["fraction"] == fraction).to_numpy()]
        expected = stats.t.interval(0.8, seeds - 1, values.mean(), stats.sem(values))
        found = np.quantile(draws["net", "random", 32, fraction], [0.1, 0.9])
        np.testing.assert_allclose(found, expected, atol=0.08 * (expected[1] - expected[0]) + 0.003)


def test_draws_of_a_selection_do_not_depend_on_what_else_was_measured():
    table = probes(3)
    correct = np.random.default_rng(0).random((len(table), 300)) < 0.7
    alone = resample(correct, table)
    more = pd.concat([table, table[1:].assign(selection="first", seed=0).drop_duplicates()], ignore_index=True)
    beside = resample(np.concatenate([correct, correct[1:3]]), more)
    pd.testing.assert_frame_equal(beside[list(alone)], alone)
    share = correct[1].mean()  # of a single subset images alone vary
    assert beside["net", "first", 32, 0.1].std() == pytest.approx(np.sqrt(share * (1 - share) / 300), rel=0.1)


def test_of_a_fraction_that_one_seed_alone_measured_images_alone_vary():
    table = pd.concat([probes(3, bits=4), pd.DataFrame([("net", "random", 4, 1.0, 0)], columns=list(probes(1)))])
    correct = np.random.default_rng(0).random((len(table), 300)) < 0.7
    given, without = resample(correct, table), resample(correct[:-1], table[:-1])
    share = correct[-1].mean()
    assert given["net", "random", 4, 1.0].std() == pytest.approx(np.sqrt(share * (1 - share) / 300), rel=0.1)
    pd.testing.assert_series_equal(given["net", "random", 4, 0.5], without["net", "random", 4, 0.5])


def test_a_curve_gets_limits_of_ratios_and_differences():
    table = probes(10)
    correct = np.random.default_rng(0).random((len(table), 300)) < np.where(table["fraction"] < 1, 0.6, 0.8)[:, None]
    rows = table.assign(mean=correct.mean(1)).groupby(list(table)[:4], as_index=False)["mean"].mean()
    given = with_limits(rows, resample(correct, table)).set_index(["selection", "fraction"])
    assert given.loc["full", "ratio_low":].isna().all(axis=None)
    full = given.loc[("full", 1.0), "mean"]
    for fraction in (0.1, 0.5):
        row = given.loc[("random", fraction)]
        assert row["ratio_low"] < row["mean"] / full < row["ratio_high"] < 1
        assert row["difference_low"] < row["mean"] - full < row["difference_high"] < 0
