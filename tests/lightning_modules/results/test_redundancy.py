import itertools

import numpy as np
import pandas as pd
import pytest

from lightning_modules.results.redundancy import RULES, redundancy, sufficient_fraction

GROWING = [0.1, 0.2, 0.4, 0.8], [0.5, 0.7, 0.9, 0.95]
HUMP = [0.1, 0.2, 0.4, 0.8], [0.5, 0.92, 0.85, 0.97]
AT_ONCE = [0.1, 0.5], [0.96, 0.98]
NEVER = [0.1, 0.5], [0.3, 0.6]
NEVER_EVEN_AT_ONE = [0.5, 1.0], [0.8, 0.85]
TIE_ABOVE_AND_BELOW = [0.1, 0.2, 0.4], [0.5, 0.85, 0.95]
TIE_OF_EQUALS = [0.1, 0.2, 0.4], [0.7, 0.88, 0.88]
EXACTLY = [0.1, 0.2, 0.4], [0.5, 0.72 / 0.8, 0.95]  # 0.8999999999999999 in floating point


@pytest.mark.parametrize(
    ("measured", "delta", "rule", "expected"),
    [
        (GROWING, 0.9, "threshold", 0.4),
        (GROWING, 0.8, "threshold", 0.4),
        (GROWING, 0.96, "threshold", 1.0),
        (GROWING, 0.72, "nearest", 0.2),
        (GROWING, 0.9, "nearest", 0.4),
        (GROWING, 0.99, "nearest", 1.0),
        (GROWING, 0.8, "interpolated", 0.3),
        (GROWING, 0.9, "interpolated", 0.4),
        (GROWING, 0.96, "interpolated", 0.84),
        (HUMP, 0.9, "threshold", 0.2),
        (HUMP, 0.95, "threshold", 0.8),
        (HUMP, 0.86, "nearest", 0.4),
        (HUMP, 0.92 - 0.21, "interpolated", 0.15),
        (HUMP, 0.95, "interpolated", 0.4 + 0.4 * 10 / 12),
        *[(AT_ONCE, 0.9, rule, 0.1) for rule in RULES],
        *[(NEVER, 0.9, rule, 1.0) for rule in ("threshold", "nearest")],
        (NEVER, 0.8, "interpolated", 0.75),
        (NEVER, 1.0, "interpolated", 1.0),
        (NEVER_EVEN_AT_ONE, 0.9, "threshold", 1.0),
        (NEVER_EVEN_AT_ONE, 0.9, "nearest", 1.0),
        (NEVER_EVEN_AT_ONE, 0.9, "interpolated", 1.0),
        (TIE_ABOVE_AND_BELOW, 0.9, "nearest", 0.2),
        (TIE_OF_EQUALS, 0.9, "nearest", 0.2),
        *[(EXACTLY, 0.9, rule, 0.2) for rule in RULES],
        (([], []), 0.9, "threshold", 1.0),
        (([], []), 0.9, "nearest", 1.0),
        (([0.5], [0.0]), 0.0, "threshold", 0.5),
    ],
)
def test_the_fraction_that_is_enough(measured, delta, rule, expected):
    fractions, ratios = measured
    assert sufficient_fraction(fractions, ratios, delta, rule) == pytest.approx(expected, abs=1e-9)
    back = sufficient_fraction(fractions[::-1], ratios[::-1], delta, rule)
    assert back == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_growing_curve_gives_what_numpys_interpolation_gives(seed):
    random = np.random.default_rng(seed)
    fractions = np.sort(random.uniform(0.01, 0.99, 8))
    ratios = np.sort(random.uniform(0.2, 0.99, 8))
    for delta in (0.5, 0.9, 0.95):
        expected = np.interp(delta, [*ratios, 1.0], [*fractions, 1.0])
        assert sufficient_fraction(fractions, ratios, delta, "interpolated") == pytest.approx(expected)
        enough = [f for f, r in zip([*fractions, 1.0], [*ratios, 1.0], strict=True) if r >= delta]
        assert sufficient_fraction(fractions, ratios, delta, "threshold") == min(enough)


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match=f"'median'.*{', '.join(RULES)}"):
        sufficient_fraction([0.5], [0.9], 0.9, "median")


def few_seeds(seeds):
    """A run whose subsets differ so much that redundancies depend on which are drawn."""
    random = np.random.default_rng(1)
    grid = [0.05, 0.1, 0.2, 0.5]
    rows = [{"selection": "full", "fraction": 1.0, "seed": 0, "accuracy": 0.9}]
    for seed in range(seeds):
        offset = random.uniform(-0.15, 0.15)
        rows += [
            {"selection": "random", "fraction": f, "seed": seed, "accuracy": 0.6 + 0.1 * place + offset}
            for place, f in enumerate(grid)
        ]
    return pd.DataFrame(rows).assign(split="test", layer="one", width=1000)


@pytest.mark.parametrize("rule", RULES)
def test_intervals_are_those_of_all_ways_to_draw_seeds_jointly(rule):
    table = few_seeds(4)
    by_seed = table.query("selection == 'random'").pivot(index="seed", columns="fraction", values="accuracy")
    drawn = np.sort(
        [
            1 - sufficient_fraction(list(by_seed), by_seed.loc[list(seeds)].mean() / 0.9, 0.9, rule)
            for seeds in itertools.product(range(4), repeat=4)
        ]
    )
    row = redundancy(table, "test", [0.9], "accuracy").set_index("rule").loc[rule]
    assert row["redundancy"] == pytest.approx(
        1 - sufficient_fraction(list(by_seed), (by_seed.mean() / 0.9).tolist(), 0.9, rule)
    )
    # Within what 2,000 draws of the 256 ways may miss.
    assert drawn[int(0.01 * 256)] - 1e-9 <= row["low"] <= drawn[int(0.04 * 256)] + 1e-9
    assert drawn[int(0.96 * 256) - 1] - 1e-9 <= row["high"] <= drawn[int(0.99 * 256)] + 1e-9
    assert row["low"] < row["high"]


def test_intervals_need_three_seeds_and_no_global_state():
    assert redundancy(few_seeds(2), "test", [0.9], "accuracy")[["low", "high"]].isna().all(axis=None)
    np.random.seed(0)  # noqa: NPY002
    once = redundancy(few_seeds(3), "test", [0.8, 0.9], "accuracy")
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    pd.testing.assert_frame_equal(once, redundancy(few_seeds(3), "test", [0.8, 0.9], "accuracy"))
    np.random.seed(0)  # noqa: NPY002
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert once[["low", "high"]].notna().all(axis=None)


def test_the_critical_mass_is_as_many_neurons_as_are_enough():
    given = redundancy(
        few_seeds(3).assign(accuracy=lambda t: np.where(t["fraction"] < 0.2, 0.1, 0.9)), "test", [0.9], "accuracy"
    )
    by_rule = given.set_index("rule")
    assert by_rule.loc["threshold", ["fraction", "neurons"]].tolist() == [0.2, 200]
    assert by_rule.loc["interpolated", "neurons"] == int(1000 * by_rule.loc["interpolated", "fraction"] + 1e-9)


def test_where_the_full_layer_is_never_right_all_of_it_is_needed():
    given = redundancy(few_seeds(3).assign(accuracy=0.0), "test", [0.9], "accuracy")
    assert (given["redundancy"] == 0).all()
    assert (given["low"] == 0).all()
