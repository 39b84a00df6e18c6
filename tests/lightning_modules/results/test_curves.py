import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.measures import Column
from lightning_modules.results.curves import class_losses, complete, curve


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
    given = curve(complete(table), split, "accuracy")
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
        assert row["difference"] == pytest.approx(values.mean() - full, abs=1e-12)
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
        curve(complete(table), "test", "accuracy").sort_values(columns, ignore_index=True),
        curve(complete(back), "test", "accuracy").sort_values(columns, ignore_index=True),
    )


def test_a_curve_has_every_measure_that_is_there_with_its_spread():
    table = results().assign(cka=lambda t: t["accuracy"] ** 2, cka_debiased=np.nan, gini=0.25)
    columns = [Column(name) for name in ("cka", "cka_debiased", "gini")]
    given = curve(complete(table), "test", "accuracy", columns).set_index(["selection", "fraction"])
    values = table.query("split == 'test' and selection == 'random' and fraction == 0.05")["cka"].to_numpy()
    assert given.loc[("random", 0.05), "cka"] == pytest.approx(values.mean())
    assert given.loc[("random", 0.05), "cka_std"] == pytest.approx(values.std())
    assert given.loc[("first", 0.1), "gini"] == 0.25
    assert np.isnan(given.loc[("first", 0.1), "gini_std"])
    assert "cka_debiased" not in given


def test_every_layer_is_divided_by_its_own_full_layer():
    one, two = results().assign(layer="one"), results().assign(layer="two")
    two["accuracy"] = two["accuracy"] / 2
    given = curve(complete(pd.concat([one, two])), "test", "accuracy")
    assert given["layer"].tolist() == ["one"] * 6 + ["two"] * 6
    np.testing.assert_allclose(given["mean"][:6].to_numpy(), 2 * given["mean"][6:].to_numpy())
    np.testing.assert_allclose(given["ratio"][:6].to_numpy(), given["ratio"][6:].to_numpy())


def test_without_a_full_row_fraction_one_is_the_full_layer_and_without_both_it_is_an_error():
    table = results().query("selection != 'first'")
    renamed = table.assign(selection="random")
    given = curve(complete(renamed), "test", "accuracy")
    assert given.loc[given["selection"] == "full", "mean"].item() == pytest.approx(
        table.query("split == 'test' and selection == 'full'")["accuracy"].mean()
    )
    with pytest.raises(MisconfigurationException, match="neither a full row nor fraction 1"):
        complete(renamed[renamed["fraction"] < 1])


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
    table = pd.DataFrame(rows).assign(
        split="test", layer="penultimate", bits=32, images=lambda t: np.where(t["class"] == "owl", 0, 10)
    )
    given = class_losses(table, "test")
    assert given[["class", "fraction"]].to_numpy().tolist() == [["dog", 0.1], ["dog", 0.5], ["cat", 0.1], ["cat", 0.5]]
    np.testing.assert_allclose(given["lost"], [0.5, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(given["full_accuracy"], [0.6, 0.6, 0.8, 0.8])
