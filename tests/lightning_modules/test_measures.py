from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_modules.measures import RULES, curve, diffused_redundancy, sufficient_fraction

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "resnet50_imagenet1k_accuracy.csv"

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
    assert diffused_redundancy(fractions, ratios, delta, rule) == pytest.approx(1 - expected, abs=1e-9)
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


@pytest.mark.parametrize(
    ("rule", "published"),
    [
        ("nearest", {"cifar10": 0.90, "cifar100": 0.50, "flowers102": 0.20, "oxford_iiit_pet": 0.90}),
        ("threshold", {"cifar10": 0.80, "oxford_iiit_pet": 0.80}),
    ],
)
def test_the_papers_curves_give_the_papers_redundancies(rule, published):
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE.name} is not there")
    table = pd.read_csv(REFERENCE)
    for task, expected in published.items():
        rows = table[(table["pretraining"] == "standard") & (table["task"] == task)]
        full = rows.loc[rows["fraction"] == 1.0, "accuracy_mean"].item()
        given = diffused_redundancy(rows["fraction"].tolist(), (rows["accuracy_mean"] / full).tolist(), 0.9, rule)
        assert given == pytest.approx(expected, abs=1e-9)


def results(seeds=3):
    random = np.random.default_rng(0)
    rows = [
        {"selection": selection, "fraction": fraction, "neurons": k, "seed": seed, "split": split}
        for split in ("val", "test")
        for selection, fraction, k, by_chance in [
            ("random", 0.5, 10, True),
            ("random", 0.01, 1, True),
            ("random", 0.05, 1, True),
            ("full", 1.0, 20, True),
            ("first", 0.5, 10, False),
            ("first", 0.1, 2, False),
        ]
        for seed in range(seeds if by_chance else 1)
    ]
    return pd.DataFrame(rows).assign(accuracy=random.uniform(0.1, 0.9, len(rows)))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_curve_is_mean_and_spread_over_seeds_by_selection_and_fraction(split, seeds):
    table = results(seeds)
    given = curve(table, split)
    rows = table[table["split"] == split].to_dict("records")

    def accuracies(selection, fraction):
        return np.array([r["accuracy"] for r in rows if (r["selection"], r["fraction"]) == (selection, fraction)])

    assert list(zip(given["selection"], given["fraction"], given["neurons"], strict=True)) == [
        ("full", 1.0, 20),
        ("random", 0.01, 1),
        ("random", 0.05, 1),
        ("random", 0.5, 10),
        ("first", 0.1, 2),
        ("first", 0.5, 10),
    ]
    full = accuracies("full", 1.0).mean()
    for row in given.to_dict("records"):
        values = accuracies(row["selection"], row["fraction"])
        assert row["seeds"] == len(values) == (1 if row["selection"] == "first" else seeds)
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert row["ratio"] == pytest.approx(values.mean() / full, rel=1e-12)
        if len(values) > 1:
            spread = np.sqrt(((values - values.mean()) ** 2).mean())
            assert row["std"] == pytest.approx(spread, rel=1e-9)
        else:
            assert np.isnan(row["std"])


def test_a_curve_does_not_depend_on_the_order_of_seeds():
    table = results()
    back = table.sort_values(["selection", "seed"], ascending=False)
    columns = ["selection", "fraction"]
    pd.testing.assert_frame_equal(
        curve(table, "test").sort_values(columns, ignore_index=True),
        curve(back, "test").sort_values(columns, ignore_index=True),
    )
