import numpy as np
import pandas as pd
import pytest

from lightning_modules.results.redundancy import RULES, certain, redundancy, sufficient_fraction, sufficient_range
from lightning_modules.results.resampling import resample

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
    return pd.DataFrame(rows).assign(split="test", layer="one", bits=32, width=1000)


def test_limits_of_what_is_enough_are_where_margins_are_surely_on_one_side():
    drawn = np.column_stack([np.linspace(low, high, 2001) for low, high in [(0.5, 0.7), (0.68, 0.78), (0.7, 0.9)]])
    full = np.full(2001, 0.8)  # so 0.72 is asked for, which the first never has, the third has in nine of ten draws
    ranges = sufficient_range([0.1, 0.2, 0.4], drawn, full, 0.9)
    assert ranges["threshold"] == (0.2, 1.0)
    # Upper 97.5 % limits are 0.695 and 0.7775; lower 2.5 % limits 0.705 at 0.4 and 0.8 at the full layer.
    low, high = ranges["interpolated"]
    assert low == pytest.approx(0.1 + 0.1 * (0.72 - 0.695) / (0.7775 - 0.695), abs=1e-4)
    assert high == pytest.approx(0.4 + 0.6 * (0.72 - 0.705) / (0.8 - 0.705), abs=1e-4)
    assert ranges["nearest"] == (0.1, 0.4)


def test_a_fraction_is_certain_only_if_all_larger_ones_are():
    margins = np.column_stack([np.linspace(mean - 0.1, mean + 0.1, 101) for mean in (-0.2, 0.3, 0.05, 0.2)])
    assert certain(margins, 0.05).tolist() == [False, False, False, True]
    assert certain(margins, 0.3).tolist() == [False, True, True, True]


def test_the_foretold_redundancy_reads_the_foretold_cka_as_the_share_that_is_kept():
    table = few_seeds(3)
    assert redundancy(table, "test", [0.9], "accuracy")["foretold"].isna().all()
    subset = table["selection"] != "full"
    said = table.assign(cka_foretold=table["fraction"].where(subset))  # 0.9 is reached by no fraction below
    rows = redundancy(said, "test", [0.35, 0.9], "accuracy").set_index(["rule", "delta"])["foretold"]
    fractions = np.sort(table["fraction"][subset].unique())
    assert rows["threshold", 0.35] == 1 - fractions[fractions >= 0.35][0]
    assert rows["interpolated", 0.35] == pytest.approx(0.65)
    assert rows["interpolated", 0.9] == pytest.approx(0.1)


def test_intervals_hold_the_estimate_and_need_draws_alone():
    table = few_seeds(3)
    assert redundancy(table, "test", [0.9], "accuracy")[["low", "high"]].isna().all(axis=None)
    correct = np.arange(500) < (500 * table["accuracy"].to_numpy()[:, None]).round()
    np.random.seed(0)  # noqa: NPY002
    once = redundancy(table, "test", [0.8, 0.9], "accuracy", resample(correct, table))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    pd.testing.assert_frame_equal(once, redundancy(table, "test", [0.8, 0.9], "accuracy", resample(correct, table)))
    np.random.seed(0)  # noqa: NPY002
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert (once["low"] <= once["redundancy"]).all()
    assert (once["redundancy"] <= once["high"]).all()


def test_the_critical_mass_is_as_many_neurons_as_are_enough():
    given = redundancy(
        few_seeds(3).assign(accuracy=lambda t: np.where(t["fraction"] < 0.2, 0.1, 0.9)), "test", [0.9], "accuracy"
    )
    by_rule = given.set_index("rule")
    assert by_rule.loc["threshold", ["fraction", "neurons"]].tolist() == [0.2, 200]
    assert by_rule.loc["interpolated", "neurons"] == int(1000 * by_rule.loc["interpolated", "fraction"] + 1e-9)


def test_where_the_full_layer_is_never_right_all_of_it_is_needed():
    table = few_seeds(3).assign(accuracy=0.0)
    given = redundancy(table, "test", [0.9], "accuracy", resample(np.zeros((len(table), 50), bool), table))
    assert (given["redundancy"] == 0).all()
    assert (given["low"] == 0).all()
