import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.results.curves import (
    RULES,
    class_inequality,
    class_losses,
    curve,
    diffused_redundancy,
    frontier,
    group_means,
    paired_difference,
    redundancy,
    sufficient_fraction,
)

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


def test_a_curve_has_every_measure_that_is_there_with_its_spread():
    table = results().assign(cka=lambda t: t["accuracy"] ** 2, cka_debiased=np.nan, gini=0.25)
    given = curve(table, "test").set_index(["selection", "fraction"])
    values = table.query("split == 'test' and selection == 'random' and fraction == 0.05")["cka"].to_numpy()
    assert given.loc[("random", 0.05), "cka"] == pytest.approx(values.mean())
    assert given.loc[("random", 0.05), "cka_std"] == pytest.approx(values.std())
    assert given.loc[("first", 0.1), "gini"] == 0.25
    assert np.isnan(given.loc[("first", 0.1), "gini_std"])
    assert "cka_debiased" not in given


def test_every_layer_is_divided_by_its_own_full_layer():
    one, two = results().assign(layer="one"), results().assign(layer="two")
    two["accuracy"] = two["accuracy"] / 2
    given = curve(pd.concat([one, two]), "test")
    assert given["layer"].tolist() == ["one"] * 6 + ["two"] * 6
    np.testing.assert_allclose(given["mean"][:6].to_numpy(), 2 * given["mean"][6:].to_numpy())
    np.testing.assert_allclose(given["ratio"][:6].to_numpy(), given["ratio"][6:].to_numpy())


def test_without_a_full_row_fraction_one_is_the_full_layer_and_without_both_it_is_an_error():
    table = results().query("selection != 'first'")
    renamed = table.assign(selection="random")
    given = curve(renamed, "test")
    assert given.loc[given["selection"] == "full", "mean"].item() == pytest.approx(
        table.query("split == 'test' and selection == 'full'")["accuracy"].mean()
    )
    with pytest.raises(MisconfigurationException, match="neither a full row nor fraction 1"):
        curve(renamed[renamed["fraction"] < 1], "test")


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
    row = redundancy(table, "test", [0.9]).set_index("rule").loc[rule]
    assert row["redundancy"] == pytest.approx(
        diffused_redundancy(list(by_seed), (by_seed.mean() / 0.9).tolist(), 0.9, rule)
    )
    # Within what 2,000 draws of the 256 ways may miss.
    assert drawn[int(0.01 * 256)] - 1e-9 <= row["low"] <= drawn[int(0.04 * 256)] + 1e-9
    assert drawn[int(0.96 * 256) - 1] - 1e-9 <= row["high"] <= drawn[int(0.99 * 256)] + 1e-9
    assert row["low"] < row["high"]


def test_intervals_need_three_seeds_and_no_global_state():
    assert redundancy(few_seeds(2), "test", [0.9])[["low", "high"]].isna().all(axis=None)
    np.random.seed(0)  # noqa: NPY002
    once = redundancy(few_seeds(3), "test", [0.8, 0.9])
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    pd.testing.assert_frame_equal(once, redundancy(few_seeds(3), "test", [0.8, 0.9]))
    np.random.seed(0)  # noqa: NPY002
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert once[["low", "high"]].notna().all(axis=None)


def test_the_critical_mass_is_as_many_neurons_as_are_enough():
    given = redundancy(few_seeds(3).assign(accuracy=lambda t: np.where(t["fraction"] < 0.2, 0.1, 0.9)), "test", [0.9])
    by_rule = given.set_index("rule")
    assert by_rule.loc["threshold", ["fraction", "neurons"]].tolist() == [0.2, 200]
    assert by_rule.loc["interpolated", "neurons"] == int(1000 * by_rule.loc["interpolated", "fraction"] + 1e-9)


def test_where_the_full_layer_is_never_right_all_of_it_is_needed():
    given = redundancy(few_seeds(3).assign(accuracy=0.0), "test", [0.9])
    assert (given["redundancy"] == 0).all()
    assert (given["low"] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_class_inequality_is_that_of_its_definitions(seed):
    random = np.random.default_rng(seed)
    images = np.array([40, 0, 7, 120, 1])
    correct = random.integers(0, images + 1, (4, 3, 5))
    given = class_inequality(correct, images)
    for place in np.ndindex(4, 3):
        x = [correct[*place, c] / images[c] for c in (0, 2, 3, 4)]
        pairs = sum(abs(a - b) for a in x for b in x)
        assert given["gini"][place] == pytest.approx(pairs / (2 * 16 * np.mean(x)), rel=1e-12)
        assert given["coefficient_of_variation"][place] == pytest.approx(np.std(x) / np.mean(x), rel=1e-12)
        assert given["largest_gap"][place] == pytest.approx(max(x) - min(x))


def test_where_no_class_or_one_class_is_right():
    images = np.array([10, 10, 10, 10])
    assert {name: float(value) for name, value in class_inequality(np.zeros(4), images).items()} == {
        "gini": 0,
        "coefficient_of_variation": 0,
        "largest_gap": 0,
    }
    only = class_inequality(np.array([10, 0, 0, 0]), images)
    assert float(only["gini"]) == pytest.approx(3 / 4)
    assert float(only["largest_gap"]) == 1


def test_classes_that_lose_most_come_first_by_name():
    rows = [
        {"selection": selection, "fraction": fraction, "seed": seed, "class": name, "correct": correct}
        for selection, fraction, by_class in [
            ("full", 1.0, {"cat": [8], "dog": [6], "owl": [0]}),
            ("random", 0.5, {"cat": [8, 6], "dog": [1, 3], "owl": [0, 0]}),
            ("random", 0.1, {"cat": [5, 7], "dog": [1, 1], "owl": [0, 0]}),
        ]
        for name, values in by_class.items()
        for seed, correct in enumerate(values)
    ]
    table = pd.DataFrame(rows).assign(split="test", images=lambda t: np.where(t["class"] == "owl", 0, 10))
    given = class_losses(table, "test")
    assert given[["class", "fraction"]].to_numpy().tolist() == [["dog", 0.1], ["dog", 0.5], ["cat", 0.1], ["cat", 0.5]]
    np.testing.assert_allclose(given["lost"], [0.5, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(given["full_accuracy"], [0.6, 0.6, 0.8, 0.8])


def test_paired_differences_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    cells = random.multinomial(300, [0.7, 0.03, 0.07, 0.2], size=4000)  # both right, gained, lost, both wrong
    given = paired_difference(cells[:, 1], cells[:, 2], np.full(4000, 300))
    np.testing.assert_allclose(given["difference"], (cells[:, 1] - cells[:, 2]) / 300)
    covered = (given["difference_low"] <= -0.04) & (given["difference_high"] >= -0.04)
    assert 0.935 < covered.mean() < 0.97
    same = paired_difference(np.array([0]), np.array([0]), np.array([50]))
    assert same["difference_low"][0] < 0 < same["difference_high"][0]


def test_the_frontier_is_what_nothing_else_beats():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 8, (2, 30))
    beaten = [
        any((x[j] >= x[i] and y[j] > y[i]) or (x[j] > x[i] and y[j] >= y[i]) for j in range(30)) for i in range(30)
    ]
    given = frontier(x, y)
    assert {(x[i], y[i]) for i in given} == {(x[i], y[i]) for i in range(30) if not beaten[i]}
    assert list(x[given]) == sorted(x[given])


def test_group_means_weigh_tasks_alike_and_are_missing_where_a_task_was_not_measured():
    def run(task, group, full, accuracies):
        rows = [("full", 1.0, 0, full)]
        rows += [("random", fraction, s, value) for fraction, values in accuracies.items() for s, value in values]
        table = pd.DataFrame(rows, columns=["selection", "fraction", "seed", "accuracy"])
        return table.assign(layer="penultimate", split="test", width=10, task=task, group=group)

    one = run("one", "natural", 0.8, {0.1: [(0, 0.2), (1, 0.4), (2, 0.6)], 0.5: [(0, 0.72), (1, 0.72), (2, 0.72)]})
    two = run("two", "structured", 0.5, {0.1: [(0, 0.45)], 0.5: [(0, 0.45)]})
    three = run("three", "natural", 0.6, {0.1: [(0, 0.1)]})
    table = group_means(pd.concat([one, two, three], ignore_index=True), 0.9, "threshold").set_index("group")
    assert table.index.tolist() == ["natural", "structured", "all"]
    assert table["tasks"].tolist() == [2, 1, 3]
    np.testing.assert_allclose(table["full_accuracy"], [0.7, 0.5, 1.9 / 3])
    np.testing.assert_allclose(table["redundancy"], [0.25, 0.9, 1.4 / 3])
    np.testing.assert_allclose(table["accuracy_0.1"], [0.25, 0.45, 0.95 / 3])
    np.testing.assert_allclose(table["accuracy_0.5"], [np.nan, 0.45, np.nan])
