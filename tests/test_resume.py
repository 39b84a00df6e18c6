"""Runs that are killed: they go on where they were, and end with the numbers of runs that were not."""

import json
import random
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lightning_modules.checkpoints import PAUSE, AtomicCheckpointIO


@pytest.fixture(scope="module")
def slow(short, tmp_path_factory):
    """The words of a fit that takes a while, and its extraction too: its images are larger than the network's."""
    *words, config = short
    settings = yaml.safe_load(Path(config).read_text())
    settings["trainer"]["max_epochs"] = 20
    settings["model"] |= {"features": 2, "fractions": [0.02, 0.1, 0.5]}
    settings["model"]["backbone"]["pretrained_cfg_overlay"]["input_size"] = [3, 64, 64]
    settings["data"]["init_args"] |= {"augmentation": "paper", "digits": [5, 6, 7], "num_workers": 0}
    file = tmp_path_factory.mktemp("slow") / "slow.yaml"
    file.write_text(yaml.safe_dump(settings))
    return *words, str(file)


@pytest.mark.parametrize(
    ("processes", "kills"), [(1, ["extraction"] + ["training"] * 2), (2, ["extraction", "training"])]
)
def test_a_run_killed_at_random_moments_ends_with_the_numbers_of_one_that_was_not(
    slow, start, tmp_path, processes, kills
):
    def fit(name):
        command = (*slow, f"--name={name}", f"--model.cache_dir={tmp_path / name}-features", "--ckpt_path=last")
        return start(*command, cwd=tmp_path, processes=processes)

    def progress(phase):
        """What a life has reached: how many shards there are, or when the checkpoint was written."""
        if phase == "extraction":
            return len(list(tmp_path.glob("killed-features/*/0*.safetensors")))
        return last.stat().st_mtime_ns if last.exists() else 0

    for process in fit("whole"):
        done = process.wait()
        assert done.returncode == 0, done.stderr
    last = tmp_path / "runs" / "killed" / "checkpoints" / "last.ckpt"
    moments = random.Random(0)
    for phase in kills:
        before = progress(phase)
        running = fit("killed")
        deadline = time.monotonic() + 60
        while progress(phase) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        assert last.exists() == (phase == "training")
        for process in running:
            process.kill()
        assert [process.wait().returncode for process in running] == [-9] * processes
        assert not (last.parents[1] / "results.csv").exists()
    resumed = [process.wait() for process in fit("killed")]
    assert [done.returncode for done in resumed] == [0] * processes, resumed[0].stderr
    assert "Restored all states from the checkpoint" in resumed[0].stderr
    for name in ("results.csv", "classes.csv"):
        assert (tmp_path / "runs/killed" / name).read_bytes() == (tmp_path / "runs/whole" / name).read_bytes()


def test_any_number_of_processes_extract_together_and_go_on_where_one_is_killed(slow, start, tmp_path):
    def run(verb, cache):
        command = (*slow[1:], "--model.features=clean", "--trainer.max_epochs=1")
        return start(verb, *command, f"--model.cache_dir={cache}", cwd=tmp_path)[0]

    def made(cache):
        return {path.relative_to(tmp_path / cache): path.read_bytes() for path in (tmp_path / cache).glob("*/*")}

    workers = [run("extract", "together") for _ in range(4)]
    moments = random.Random(0)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("together/*/0*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for worker in workers[:2]:
        time.sleep(moments.uniform(0, 0.2))
        worker.kill()
    ended = [worker.wait() for worker in workers]
    assert [each.returncode for each in ended[2:]] == [0, 0], ended[2].stderr
    assert run("fit", "alone").wait().returncode == 0
    shards = {name: content for name, content in made("together").items() if name.suffix == ".safetensors"}
    assert shards == made("alone")
    fit = run("fit", "together").wait()
    assert "found in" in fit.stderr
    assert "extracted in" not in fit.stderr


FEW = ("--data=ImageFolder", "--data.root=pets", "--data.batch_size=8", "--model.solver.keep=last")


@pytest.mark.parametrize(
    ("features", "refit", "data"), [("off", "false", FEW), ("clean", "true", ("--data.digits=[5,6]",))]
)
def test_a_finished_run_that_is_lengthened_ends_as_one_that_was_as_long(
    cli, short, image_folder, tmp_path, features, refit, data
):
    command = (*short, "--data.num_workers=0", "--data.augmentation=paper", "--model.bits=[32,4]", *data)
    command += (f"--model.features={features}", f"--model.refit={refit}")
    assert cli(*command, "--name=whole", "--trainer.max_epochs=2")[0] == 0
    assert cli(*command, "--name=longer", "--trainer.max_epochs=1")[0] == 0
    again = ("--trainer.max_epochs=2", "--ckpt_path=last", "--overwrite=true")
    status, _, err = cli(*command, "--name=longer", *again)
    assert status == 0, err
    whole, longer = (pd.read_csv(tmp_path / "runs" / name / "results.csv") for name in ("whole", "longer"))
    pd.testing.assert_frame_equal(whole, longer, check_exact=True)


def test_checkpoints_are_small_and_seldom_written(cli, tmp_path, monkeypatch):
    writes = []
    save = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(
        AtomicCheckpointIO, "save_checkpoint", lambda *given, **more: (writes.append(1), save(*given, **more))
    )
    command = ("fit", "--config", "quickstart.yaml", "--name=run", "--trainer.max_epochs=12", "--trainer.logger=false")
    command += ("--trainer.enable_progress_bar=false", "--data.num_workers=0", "--pictures=[]", "--model.measures=[]")
    status, _, err = cli(*command)
    assert status == 0, err
    folder = tmp_path / "runs" / "run"
    seconds = json.loads((folder / "summary.json").read_text())["seconds"]["fit"]
    assert 2 <= len(writes) <= 2 + seconds / PAUSE
    probes = pd.read_csv(folder / "results.csv").query("split == 'val'")
    numbers = 5 * (probes["neurons"] + 1).sum()  # weights and biases of five classes
    indices, others = 8 * probes["neurons"].sum(), 200_000  # the history of all epochs, and what torch adds
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size < 3 * 4 * numbers + indices + others
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
