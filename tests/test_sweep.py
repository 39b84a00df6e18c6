"""Many runs by one command: what is kept, resumed, skipped and left to others, and the comparison at the end."""

import re
import time

import pandas as pd
import pytest
import yaml
from conftest import ROOT

import datamodules
from lightning_modules.cli.sweep import RUNS, Sweep, shard_of

TASKS = '''
"""Two tasks on scikit-learn's digits, and one whose data are nowhere."""

from datamodules import Digits, ImageFolder


class Low(Digits):
    name = "low"
    group = "natural"

    def __init__(self, batch_size: int = 64):
        super().__init__([1, 2, 3], batch_size=batch_size)


class High(Digits):
    name = "high"
    group = "specialized"

    def __init__(self, batch_size: int = 64):
        super().__init__([7, 8, 9], batch_size=batch_size)


class Gone(High):
    name = "gone"

    def prepare_data(self):
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        raise MisconfigurationException("The data of gone could not be had; put them into data.")
'''
NETWORK = """
import logging

from torch import nn


def network(works: bool = True) -> nn.Module:
    with open("loads.txt", "a") as file:
        file.write("once\\n")
    if not works:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no such host")
    return nn.Sequential(nn.Conv2d(3, 16, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
"""
RUN = """
trainer: {max_epochs: 2, enable_progress_bar: false, logger: false, accelerator: cpu}
model:
  backbone:
    name: sweep_networks.network
    weights: random
    pretrained_cfg_overlay: {input_size: [3, 32, 32], mean: [0, 0, 0], std: [1, 1, 1]}
  fractions: [0.25, 0.5]
  measures: []
"""
SWEEP = ("sweep", "--output=compared", "--vary.data=[sweep_tasks.Low, sweep_tasks.High]", "--configs=run.yaml")
SWEEP += ("--model.seeds=2", "--pictures=[]")
NAMES = [f"{task}_sweep_networks.network-random_random" for task in ("low", "high")]


@pytest.fixture
def sweep(cli, tmp_path, monkeypatch):
    """The verb in this process, over tasks and a network that lie in the folder it runs in."""
    write_modules(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *more: cli(*SWEEP, *more)


def write_modules(folder):
    (folder / "sweep_tasks.py").write_text(TASKS)
    (folder / "sweep_networks.py").write_text(NETWORK)
    (folder / "run.yaml").write_text(RUN)


def runs(folder):
    """Return when each run of a folder was finished, by name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/results.csv")}


def lines(err, *words):
    return [line for line in err.splitlines() if all(word in line for word in words)]


def test_every_combination_runs_with_one_backbone_and_is_compared(sweep, tmp_path):
    gone = "--vary.data=[sweep_tasks.Low, sweep_tasks.Gone, sweep_tasks.High]"
    status, out, err = sweep(gone)
    assert status == 0, err
    assert set(runs(tmp_path)) == set(NAMES)
    assert (tmp_path / "loads.txt").read_text() == "once\n"
    assert lines(err, "sweep_tasks.Gone (2 of 3) is skipped: The data of gone could not be had; put them into data.")
    assert lines(err, "1 of 3 runs are not finished: sweep_tasks.Gone (2 of 3).")
    table = pd.read_csv(tmp_path / "compared" / "dr_table.csv")
    assert list(table.columns) == ["backbone", "width", "low", "high"]
    assert "Diffused redundancy, DR(0.9), by the nearest rule" in out
    groups = pd.read_csv(tmp_path / "compared" / "groups.csv").set_index("group")
    assert groups["tasks"].to_dict() == {"natural": 1, "specialized": 1, "all": 2}
    assert groups.loc["all", "redundancy"] == pytest.approx(table[["low", "high"]].to_numpy().mean())
    assert "Means over tasks" in out
    where = pd.read_csv(tmp_path / "compared" / RUNS)
    assert where["run"].tolist() == [f"runs/{name}" for name in (NAMES[0], NAMES[0].replace("low", "gone"), NAMES[1])]

    # Once more: a run was interrupted before its end, the other is kept.
    before = runs(tmp_path)
    (tmp_path / "runs" / NAMES[1] / "results.csv").unlink()
    status, _, err = sweep(gone)
    assert status == 0, err
    assert lines(err, f"sweep_tasks.Low (1 of 3) is kept: runs/{NAMES[0]} holds a finished run")
    assert err.count("Restored all states from the checkpoint") == 1
    after = runs(tmp_path)
    assert [name for name in NAMES if after[name] != before[name]] == [NAMES[1]]

    again = ("--vary.data=sweep_tasks.High", "--overwrite=true", "--model.seeds=1", "--output=other")
    status, _, err = sweep(*again, "--pictures=pdf")
    assert status == 0, err
    drawn = {path.parent.name for path in tmp_path.rglob("*.*") if path.suffix in (".pdf", ".png", ".svg")}
    assert drawn == {NAMES[1], "other"}
    assert not lines(err, "is kept")
    assert pd.read_csv(tmp_path / "runs" / NAMES[1] / "results.csv")["seed"].unique().tolist() == [0]


def test_what_cannot_be_had_is_tried_once_and_told_in_one_line(sweep, tmp_path):
    status, _, err = sweep("--model.backbone.kwargs={works: false}")
    assert status == 2
    assert (tmp_path / "loads.txt").read_text() == "once\n"
    assert err.splitlines() == [
        "sweep_tasks.Low (1 of 2) is skipped: sweep_networks.network({'works': False}) fails (no such host).",
        "2 of 2 runs are not finished: sweep_tasks.Low (1 of 2), sweep_tasks.High (2 of 2).",
        "error: None of the runs can be had; the lines above say why.",
    ]


def test_what_a_table_cannot_tell_apart_is_compared_apart(sweep, tmp_path):
    status, _, err = sweep("--vary.data=sweep_tasks.Low", "--vary.model.standardise=[true, false]")
    assert status == 0, err
    apart = ["standardise=false", "standardise=true"]
    assert sorted(runs(tmp_path)) == [f"{NAMES[0]}_{each}" for each in apart]
    assert sorted(path.parent.name for path in (tmp_path / "compared").rglob("dr_table.csv")) == apart


def test_shards_are_disjoint_and_complete(sweep, tmp_path, monkeypatch):
    status, _, err = sweep("--shard=2/2")
    assert status == 0, err
    (before,) = runs(tmp_path).items()
    assert before[0] == NAMES[1]
    assert lines(err, "1 of 2 runs are not finished: sweep_tasks.Low (1 of 2).")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    status, _, err = sweep()
    assert status == 0, err
    assert not lines(err, "not finished")
    assert set(runs(tmp_path)) == set(NAMES)
    assert before in runs(tmp_path).items()
    assert pd.read_csv(tmp_path / "compared" / "results.csv")["run"].nunique() == 2
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.svg")]


@pytest.mark.parametrize(
    ("array", "shard"),
    [
        ({}, (1, 1)),
        ({"ID": 3, "MIN": 1, "COUNT": 4}, (3, 4)),
        ({"ID": 8, "MIN": 0, "STEP": 4, "COUNT": 3}, (3, 3)),
    ],
)
def test_a_slurm_array_says_which_part_is_mine(monkeypatch, array, shard):
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert shard_of(None) == shard
    assert shard_of("2/7") == (2, 7)


def test_two_sweeps_at_once_do_every_run_once_and_go_on_with_one_that_was_killed(start, tmp_path):
    write_modules(tmp_path)
    more = ("--vary.data=sweep_tasks.Low", "--vary.model.selection=[random, first, pca]", "--trainer.max_epochs=40")
    names = [NAMES[0].replace("random_random", f"random_{rule}") for rule in ("random", "first", "pca")]

    def begin():
        return start(*SWEEP, *more, cwd=tmp_path, PYTHONPATH=str(tmp_path))[0]

    killed = begin()
    last = tmp_path / "runs" / names[1] / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 90
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = runs(tmp_path)
    assert list(before) == names[:1]

    done = [process.wait() for process in (begin(), begin())]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert set(runs(tmp_path)) == set(names)
    assert runs(tmp_path)[names[0]] == before[names[0]]
    reported = [re.findall(r"runs/(\S+)/summary.json", each.stdout) for each in done]
    assert sorted(reported[0] + reported[1]) == sorted(names[1:])
    assert sum("Restored all states from the checkpoint" in each.stderr for each in done) == 1
    assert any("is being written by another process" in each.stderr for each in done)
    assert any("not finished" not in each.stderr for each in done)


def test_several_processes_of_a_launch_agree_and_the_first_compares(start, tmp_path):
    write_modules(tmp_path)
    gone = "--vary.data=[sweep_tasks.Gone, sweep_tasks.Low]"
    both = start(*SWEEP, gone, cwd=tmp_path, processes=2, PYTHONPATH=str(tmp_path))
    first, second = (process.wait() for process in both)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert lines(first.stderr, "is skipped: The data of gone")
    assert set(runs(tmp_path)) == {NAMES[0]}
    assert "Diffused redundancy" in first.stdout
    assert second.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vary.data=[sweep_tasks.Gone]"], "None of the runs can be had; the lines above say why."),
        (["--vary.data=[DTDD]"], "vary.data holds 'DTDD'; did you mean DTD? It must be one of CIFAR10, "),
        (["--vary.data=[]"], "vary.data is empty; there is nothing to run."),
        (["--vary.data={"], "vary.data holds '{'; it must be one of CIFAR10, "),
        (["--vary.config=[cifar10_curv.yaml]"], "try cifar10_curve.yaml"),
        (["--name=mine"], "All runs would go to one folder; leave --name out."),
        (["--delta=2"], "--delta is 2; it must be above 0, at most 1."),
        (["--rule=best"], "rule is best; it must be 'threshold'"),
        (["--shard=3/2"], "--shard is 3/2; it must be i/n, the i-th of n parts, as 1/4."),
        (["--trainer.max_epoch=3"], "There is no option 'trainer.max_epoch'; did you mean trainer.max_epochs?"),
        (["--model.fractions=0"], "model.fractions has 0; a fraction must be in (0, 1]"),
    ],
)
def test_mistakes_end_in_one_line(sweep, arguments, said):
    status, _, err = sweep(*arguments)
    assert status == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert err.splitlines()[-1] == errors[0]


def test_without_anything_to_vary_it_says_so(cli):
    status, _, err = cli("sweep")
    assert (status, err) == (2, "error: vary is empty; there is nothing to run.\n")


# --------------------------------------------------------------------------------------------------- shipped sweeps


def shipped(name):
    return yaml.safe_load((ROOT / "configs" / name).read_text())


def test_the_sweep_over_vtab_has_its_19_tasks():
    ((option, tasks),) = shipped("sweep_vtab.yaml")["vary"].items()
    assert (option, len(set(tasks))) == ("data", 19)
    assert {getattr(datamodules, name).group for name in tasks} == {"natural", "specialized", "structured"}


def test_the_sweep_over_the_papers_table_has_its_backbones_and_tasks():
    sweep = shipped("sweep_paper.yaml")
    table = pd.read_csv(ROOT / "lightning_modules" / "reporting" / "reference" / f"{sweep['reference']}.csv")
    names, configs = sweep["vary"]["model.backbone.name"], sweep["vary"]["config"]
    assert [name.partition(".")[0] for name in names] == table["backbone"].tolist()
    assert [name.removesuffix("_curve.yaml") for name in configs] == list(table.columns[3:])
    assert shipped("sweep_wandb.yaml")["parameters"] == {
        "config": {"values": configs},
        "model.backbone.name": {"values": names},
    }


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("sweep_vtab.yaml", ["SmallNORBElevation"]),
        ("sweep_paper.yaml", ["vgg16_bn.tv_in1k", "OxfordIIITPet"]),
        ("sweep_paper_weights.yaml", ["resnet50_linf_eps4.0.ckpt", "OxfordIIITPet"]),
    ],
)
def test_the_command_lines_of_a_shipped_sweep_are_those_of_fit(cli, name, last):
    sweep = Sweep(**shipped(name))
    planned = sweep.planned(["--data.batch_size=7"])[-1]
    status, out, err = cli(*planned.arguments, "--print_config")
    assert status == 0, err
    config = yaml.safe_load(out)
    assert (config["name"], config["overwrite"], config["data"]["init_args"]["batch_size"]) == (None, False, 7)
    assert all(word in out for word in last)


def test_pre_trainings_are_swept_then_what_they_made_is_and_compared_with_training_as_a_whole(cli, tmp_path):
    (tmp_path / "short.yaml").write_text(
        "trainer: {max_epochs: 1}\nmodel: {class_path: Pretraining, init_args: {output: made.safetensors}}"
    )
    common = ("--data.digits=[0,1]", "--data.batch_size=256", "--trainer.enable_progress_bar=false")
    common += ("--trainer.accelerator=cpu",)
    vary = ("--vary.config=[[pretrain_digits.yaml,short.yaml]]", "--vary.seed_everything=[0,1]")
    status, out, err = cli("sweep", *vary, "--output=made", *common)
    assert status == 0, err
    names = [f"made_seed_everything={seed}" for seed in (0, 1)]
    accuracies = []
    for name in names:
        assert (tmp_path / f"{name}.safetensors").is_file()
        config = yaml.safe_load((tmp_path / "runs" / f"digits_{name}" / "config.yaml").read_text())
        assert config["model"]["init_args"]["output"] == f"{name}.safetensors"
        rows = pd.read_csv(tmp_path / "runs" / f"digits_{name}" / "results.csv").set_index("split")
        assert rows["backbone"].unique() == [name]
        right = rows["accuracy"] * rows["images"]
        assert right.tolist() == pytest.approx(right.round().tolist())
        accuracies.append(rows.loc["test", "accuracy"])
        assert re.search(rf"digits +{name} +{100 * accuracies[-1]:.2f}", out)
    status, _, err = cli("sweep", *vary, "--output=made", *common)
    assert status == 0, err
    assert len(lines(err, "is kept")) == 2

    probes = ("--data=Digits", "--model.solver=Ridge", "--model.fractions=0.5", "--model.seeds=1", *common)
    probes += ("--model.measures=[]", "--trainer.logger=false", "--output=probed", "--pictures=[]")
    status, _, err = cli("sweep", "--vary.model.backbone.weights=made_*.safetensors", *probes)
    assert status == 0, err
    table = pd.read_csv(tmp_path / "probed" / "dr_table.csv")
    assert table["backbone"].tolist() == [f"resnet26-{name}" for name in names]
    status, out, err = cli("compare", "runs/*", "--pictures=svg")
    assert status == 0, err
    assert "Networks trained as a whole, on test" in out
    drawn = (tmp_path / "compare" / "curves.svg").read_text()
    assert [name for name in names if f"whole: {name}" not in drawn] == []
    assert pd.read_csv(tmp_path / "compare" / "dr_table.csv")["digits"].notna().all()
