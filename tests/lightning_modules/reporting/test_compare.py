"""Runs together, through the command line."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import SHARED
from made_up import ACCURACY

from lightning_modules.reporting.compare import group_means, redundancy_differences
from lightning_modules.reporting.figures import pareto_frontier
from lightning_modules.results.results import Results

REFERENCE = SHARED / "reference"


def write(folder, **changes):
    """A made-up run's results.csv: two fractions, three seeds, and a full layer of 100 neurons."""
    accuracies = {("random", 0.1): [0.60, 0.70, 0.65], ("random", 0.5): [0.80, 0.88, 0.84], ("full", 1.0): [0.9]}
    rows = [
        {"task": "pets", "backbone": "net", "layer": "penultimate", "selection": selection, "fraction": fraction}
        | {"neurons": int(100 * fraction), "width": 100, "seed": seed, "split": split, "images": 1000}
        | {"accuracy": accuracy, "solver": "sgd", "augmentation": "none", "view": "weights", "features": "clean"}
        for split in ("val", "test")
        for (selection, fraction), values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    folder.mkdir(parents=True)
    table = pd.DataFrame(rows).assign(**changes)
    table.to_csv(folder / "results.csv", index=False)
    return table


@pytest.fixture
def paper(tmp_path):
    """The authors' curves of ResNet-50 as runs, a folder per task; without full rows and most columns."""
    if not REFERENCE.is_dir():
        pytest.skip("needs the authors' numbers beside the checkout")
    table = pd.read_csv(REFERENCE / "resnet50_imagenet1k_accuracy.csv").query("pretraining == 'standard'")
    for task, rows in table.groupby("task"):
        (tmp_path / "paper" / task).mkdir(parents=True)
        rows.assign(backbone="resnet50", selection="random", split="test").rename(
            columns={"accuracy_mean": "accuracy"}
        )[["task", "backbone", "selection", "fraction", "split", "accuracy"]].to_csv(
            tmp_path / "paper" / task / "results.csv", index=False
        )


def test_the_papers_curves_give_the_papers_table_in_the_order_given(paper, cli, tmp_path):
    tasks = ["oxford_iiit_pet", "cifar10", "flowers102", "cifar100"]
    status, out, err = cli("compare", *(f"paper/{task}" for task in tasks), "--reference=resnet50_imagenet1k")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv")
    assert list(table.columns) == ["backbone", *tasks]
    published = pd.read_csv(REFERENCE / "dr_table.csv").set_index("backbone").loc["resnet50", tasks]
    np.testing.assert_allclose(table.loc[0, tasks].astype(float), published.astype(float), atol=1e-9)
    assert [line.split() for line in out.splitlines() if line.startswith("resnet50")] == [
        ["resnet50", *(f"{published[task]:.2f}" for task in tasks)]
    ]
    joined = pd.read_csv(tmp_path / "compare" / "results.csv")
    assert joined["run"].unique().tolist() == [f"paper/{task}" for task in tasks]
    assert len(joined) == 4 * 15
    for name in ("frontier", "curves"):
        assert (tmp_path / "compare" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert b"</svg>" in (tmp_path / "compare" / f"{name}.svg").read_bytes()


def test_the_authors_redundancies_stand_beside_ours(paper, cli, tmp_path):
    status, out, err = cli("compare", "--pictures=[]", "paper/cifar10", "paper/flowers102", "--reference=dr_table")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv")
    assert list(table.columns) == ["backbone", "cifar10", "cifar10_reference", "flowers102", "flowers102_reference"]
    assert table.loc[0, ["cifar10", "flowers102"]].tolist() == [0.9, 0.2]
    assert table.loc[0, ["cifar10_reference", "flowers102_reference"]].tolist() == [0.9, 0.2]
    assert "cifar10_reference" in out


def test_rule_and_delta_change_the_table_and_patterns_find_the_runs(paper, cli, tmp_path):
    status, _, err = cli("compare", "--pictures=[]", "paper/*", "--rule=threshold", "--output=other")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "other" / "dr_table.csv")
    assert (table["cifar10"].item(), table["oxford_iiit_pet"].item()) == (0.8, 0.8)
    status, out, err = cli(
        "compare", "--pictures=[]", "paper/*", "other", "--rule=threshold", "--output=third", "--delta=0.99"
    )
    assert status == 0, err
    assert "Left out: other is a comparison itself." in out
    assert pd.read_csv(tmp_path / "third" / "dr_table.csv")["cifar10"].item() < 0.8


def test_runs_of_a_selection_in_other_bits_stand_beside_each_other(cli, tmp_path):
    write(tmp_path / "runs" / "a")
    write(tmp_path / "runs" / "b", bits=lambda rows: np.where(rows["selection"] == "full", 32, 4))
    status, out, err = cli("compare", "--pictures=[]", "runs/*")
    assert status == 0, err
    assert "Left out" not in out
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv")
    assert table[["selection", "pets"]].to_numpy().tolist() == [["random", 0.5], ["random_4bit", 0.5]]
    write(tmp_path / "runs" / "c", bits=lambda rows: np.where(rows["selection"] == "full", 32, 4))
    assert "both measure random_4bit subsets of net" in cli("compare", "--pictures=[]", "runs/*")[1]


def test_rows_tell_layers_and_selections_apart_where_they_differ(cli, tmp_path):
    write(tmp_path / "runs" / "a")
    write(tmp_path / "runs" / "b", layer="layer3", width=50)
    write(tmp_path / "runs" / "c", backbone="other", task="cars", images=70, augmentation="paper")
    (tmp_path / "runs" / "feature_cache").mkdir()
    status, out, err = cli("compare", "--pictures=[]", "runs/*")
    assert status == 0, err
    assert "Left out: runs/feature_cache has no results.csv." in out
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv")
    assert list(table.columns) == ["backbone", "layer", "width", "pets", "cars"]
    assert table[["backbone", "layer", "width"]].to_numpy().tolist() == [
        ["net", "penultimate", 100],
        ["net", "layer3", 50],
        ["other", "penultimate", 100],
    ]
    assert table["pets"].isna().tolist() == [False, False, True]
    assert table["cars"].dropna().tolist() == [0.5]  # 0.84 of 0.9 is nearer to 0.9 than 1


def test_what_was_foretold_without_labels_stands_beside_what_was_measured(cli, tmp_path):
    for name, foretold in (("a", {0.1: 0.5, 0.5: 0.95}), ("b", {0.1: 0.91, 0.5: 0.97})):
        fractions = write(tmp_path / "made" / name)["fraction"]
        write(tmp_path / "runs" / name, task=name, cka_foretold=fractions.map(foretold))
    status, out, err = cli("compare", "--pictures=[]", "runs/*", "--rule=threshold")
    assert status == 0, err
    assert "Foretold from X'X, without labels: off by 0.20 on average" in out
    table = pd.read_csv(tmp_path / "compare" / "foretold.csv").set_index("task")
    assert table["redundancy"].tolist() == [0.5, 0.5]  # 0.84 of 0.9
    np.testing.assert_allclose(table["foretold"], [0.5, 0.9])
    np.testing.assert_allclose(table["error"], [0, 0.4])


def test_a_real_run_is_compared_with_one_of_an_older_version(quickstart, cli, tmp_path):
    shutil.copytree(quickstart[0], tmp_path / "quickstart", ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    older = pd.read_csv(quickstart[0] / "results.csv").assign(backbone="older")
    (tmp_path / "older").mkdir()
    older.drop(columns=["solver", "layer", "width", "images", "seed"]).to_csv(tmp_path / "older" / "results.csv")
    status, _, err = cli("compare", "--pictures=[]", "quickstart", "older")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv")
    assert table["backbone"].tolist() == ["resnet26-digits_0to4", "older"]
    assert table["digits"].nunique() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone": "two", "images": 900}, "number of test images of pets is 1000 in a, but 900 in b"),
        ({"backbone": "two", "solver": "ridge"}, "solver is sgd in a, but ridge in b"),
        ({"backbone": "two", "features": "off"}, "features is clean in a, but off in b"),
        ({"backbone": "two", "augmentation": "paper"}, "augmentation of pets is none in a, but paper in b"),
        ({"backbone": "two", "view": "squash"}, "view of pets is weights in a, but squash in b"),
        ({"task": "cars", "width": 50}, "width of net, layer penultimate is 100 in a, but 50 in b"),
        ({}, "a and b both measure random subsets of net, layer penultimate, on pets"),
    ],
)
def test_what_is_not_comparable_is_refused_in_one_line(cli, tmp_path, change, said):
    write(tmp_path / "a")
    write(tmp_path / "b", **change)
    status, _, err = cli("compare", "a", "b", "--strict=true")
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "compare").exists()


def test_the_largest_group_that_is_comparable_is_taken_and_the_others_are_named(cli, tmp_path):
    write(tmp_path / "runs" / "a", solver="ridge")
    write(tmp_path / "runs" / "b")
    write(tmp_path / "runs" / "c", backbone="two", accuracy=0.9)
    write(tmp_path / "runs" / "d", task="cars", images=70)
    write(tmp_path / "runs" / "e")
    write(tmp_path / "runs" / "f", backbone="three", solver="ridge")
    write(tmp_path / "runs" / "g", split="val")
    (tmp_path / "runs" / "h").mkdir()
    (tmp_path / "runs" / "h" / "results.csv").write_text("fraction\n1\n")
    status, out, err = cli("compare", "--pictures=[]", "runs/*")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv").set_index("backbone")
    assert table.loc["net", ["pets", "cars"]].tolist() == [0.5, 0.5]  # 0.84 of 0.9 is nearer to 0.9 than 1
    assert table["pets"].to_dict() == {"net": 0.5, "two": 0.9}
    assert [line for line in out.splitlines() if line.startswith("Left out")] == [
        "Left out: runs/g. runs/g/results.csv has no rows of the test split; finish the run.",
        "Left out: runs/h. runs/h/results.csv has no task, backbone, selection, split, accuracy; a fit writes such a "
        "file.",
        "Left out: runs/a. Not comparable: the solver is sgd in runs/b, but ridge in runs/a.",
        "Left out: runs/e. runs/b and runs/e both measure random subsets of net, layer penultimate, on pets; leave one "
        "of them out.",
        "Left out: runs/f. Not comparable: the solver is sgd in runs/b, but ridge in runs/f.",
    ]


def test_solvers_are_compared_where_that_is_asked_for(cli, tmp_path):
    for name, solver, more in (("a", "sgd", 0.0), ("b", "ridge", 0.05), ("c", "ridge", 0.0)):
        table = write(tmp_path / name, solver=solver)
        rows = table["fraction"] == 0.1
        table.assign(accuracy=table["accuracy"] + more * rows).to_csv(tmp_path / name / "results.csv", index=False)
    status, out, err = cli("compare", "a", "b", "c", "--solvers=true", "--pictures=svg")
    assert status == 0, err
    table = pd.read_csv(tmp_path / "compare" / "dr_table.csv")
    assert table[["backbone", "solver"]].to_numpy().tolist() == [["net", "sgd"], ["net", "ridge"]]
    assert pd.read_csv(tmp_path / "compare" / "differences.csv")[["first", "second"]].to_numpy().tolist() == [
        ["net, sgd", "net, ridge"]
    ]
    assert "Left out: c. b and c both measure random subsets of net, layer penultimate, on pets, by ridge" in out
    assert "net, ridge" in (tmp_path / "compare" / "curves.svg").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([{"standardise": True}, {"standardise": False}], "standardise is True in a, but False in b"),
        ([{"solver": {"init_args": {"keep": keep}}} for keep in ("best", "last")], "keep is best in a, but last in b"),
    ],
)
def test_settings_of_the_configuration_must_agree_too(cli, tmp_path, settings, said):
    for name, of_model in zip("ab", settings, strict=True):
        write(tmp_path / name, backbone=name)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": of_model}}))
    status, _, err = cli("compare", "a", "b", "--strict=true")
    assert status == 2
    assert said in err


def test_the_metric_is_what_the_runs_say_and_must_agree(cli, tmp_path):
    target = {"metric": "map", "label": "mean average precision", "unit": "", "chance": 0.1}
    for name in ("a", "b"):
        table = write(tmp_path / name, task=name)
        table.rename(columns={"accuracy": "map"}).to_csv(tmp_path / name / "results.csv", index=False)
        (tmp_path / name / "summary.json").write_text(json.dumps({"target": target}))
    status, _, err = cli("compare", "a", "b", "--pictures=svg")
    assert status == 0, err
    assert "<!-- test mean average precision -->" in (tmp_path / "compare" / "curves.svg").read_text()
    write(tmp_path / "c", task="c")
    status, _, err = cli("compare", "a", "c", "--strict=true")
    assert status == 2
    assert "Not comparable: the metric is map in a, but accuracy in c" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "There is no folder 'nowhere'"),
        (["empty"], "None of empty has a results.csv"),
        (["a", "--delta=0"], "--delta is 0"),
        (
            ["a", "--reference=nothing"],
            "--reference is 'nothing'; it must be a CSV file or one of dr_table, resnet50_dropout, ",
        ),
        (["a", "--reference=resnet50_dropout"], "and none of pets"),
        (["a", "--reference=a/results.csv"], "has no column pretraining"),
        (["a", "--output=a/results.csv"], "name another folder with --output"),
        (["validated"], "no rows of the test split"),
        (["part"], "neither a full row nor fraction 1"),
        (["broken"], "has no task, backbone"),
    ],
)
def test_mistakes_end_in_one_line(cli, tmp_path, arguments, said):
    table = write(tmp_path / "a")
    for name, rows in (
        ("validated", table.query("split == 'val'")),
        ("part", table.query("selection != 'full'")),
        ("broken", table[["fraction"]]),
    ):
        (tmp_path / name).mkdir()
        rows.to_csv(tmp_path / name / "results.csv", index=False)
    (tmp_path / "empty").mkdir()
    status, _, err = cli("compare", *arguments)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_the_frontier_is_what_nothing_else_beats():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 8, (2, 30))
    beaten = [
        any((x[j] >= x[i] and y[j] > y[i]) or (x[j] > x[i] and y[j] >= y[i]) for j in range(30)) for i in range(30)
    ]
    given = pareto_frontier(pd.DataFrame({"redundancy": x, "full": y}), "redundancy", "full")
    assert set(map(tuple, given.to_numpy())) == {(x[i], y[i]) for i in range(30) if not beaten[i]}
    assert given["redundancy"].is_monotonic_increasing


def test_group_means_weigh_tasks_alike_and_are_missing_where_a_task_was_not_measured():
    def run(task, group, full, accuracies):
        rows = [("full", 1.0, 0, full)]
        rows += [("random", fraction, s, value) for fraction, values in accuracies.items() for s, value in values]
        table = pd.DataFrame(rows, columns=["selection", "fraction", "seed", "accuracy"])
        return group, Results(
            {"results": table.assign(layer="penultimate", split="test", width=10, task=task, backbone="net")},
            [],
            ACCURACY,
        )

    one = run("one", "natural", 0.8, {0.1: [(0, 0.2), (1, 0.4), (2, 0.6)], 0.5: [(0, 0.72), (1, 0.72), (2, 0.72)]})
    two = run("two", "structured", 0.5, {0.1: [(0, 0.45)], 0.5: [(0, 0.45)]})
    three = run("three", "natural", 0.6, {0.1: [(0, 0.1)]})
    table = group_means([one, two, three], 0.9, "threshold").set_index("group")
    assert table.index.tolist() == ["natural", "structured", "all"]
    assert table["tasks"].tolist() == [2, 1, 3]
    np.testing.assert_allclose(table["full_accuracy"], [0.7, 0.5, 1.9 / 3])
    np.testing.assert_allclose(table["redundancy"], [0.25, 0.9, 1.4 / 3])
    np.testing.assert_allclose(table["accuracy_0.1"], [0.25, 0.45, 0.95 / 3])
    np.testing.assert_allclose(table["accuracy_0.5"], [np.nan, 0.45, np.nan])


def test_of_each_two_it_says_whether_they_differ():
    cells = pd.DataFrame(
        [
            {"task": "pets", "series": "a", "redundancy": 0.9, "low": 0.8, "high": 0.95},
            {"task": "pets", "series": "b", "redundancy": 0.5, "low": 0.2, "high": 0.8},
            {"task": "pets", "series": "c", "redundancy": 0.8, "low": 0.5, "high": 0.9},
            {"task": "food", "series": "a", "redundancy": 0.9, "low": np.nan, "high": np.nan},
            {"task": "food", "series": "b", "redundancy": 0.5, "low": 0.2, "high": 0.8},
        ]
    )
    given = redundancy_differences(cells).set_index(["task", "first", "second"])
    row = given.loc[("pets", "a", "b")]
    assert row["difference"] == pytest.approx(0.4)
    # Root of the squared distances to the nearer limits, 0.1 and 0.3 below, 0.05 and 0.3 above.
    assert row["low"] == pytest.approx(0.4 - np.sqrt(0.1**2 + 0.3**2))
    assert row["high"] == pytest.approx(0.4 + np.sqrt(0.05**2 + 0.3**2))
    assert given["differ"].tolist() == ["yes", "not sure", "not sure", "unknown"]
    assert len(given) == 4
