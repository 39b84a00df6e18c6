"""Several processes, on one node or several: they share the work out, count every image once, and write files once."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file

from datamodules import Digits
from lightning_modules import FrozenBackbone, RedundancyProbe
from lightning_modules.backbones.build import PretrainedCfgOverlay

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--pictures=[]")


def shards(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("feature_cache/*/*.safetensors")}


@pytest.fixture(scope="module")
def run(short):
    """The words of a short fit with batches that processes share unevenly."""
    return *short, "--name=run", "--data.batch_size=50", "--model.refit=true"


@pytest.fixture(scope="module")
def one(run, start, tmp_path_factory):
    """The folder of a run on one process."""
    folder = tmp_path_factory.mktemp("one")
    done = start(*run, cwd=folder)[0].wait()
    assert done.returncode == 0, done.stderr
    return folder / "runs"


def assert_the_same_within_sampling_error(one, other):
    mine, theirs = (pd.read_csv(runs / "run" / "results.csv") for runs in (one, other))
    measured = ["accuracy", "loss", "epoch"]
    pd.testing.assert_frame_equal(mine.drop(columns=measured), theirs.drop(columns=measured))
    np.testing.assert_allclose(mine["accuracy"], theirs["accuracy"], atol=0.012)  # two images of 179
    np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-3)
    remarks = [json.loads((runs / "run" / "summary.json").read_text())["remarks"] for runs in (one, other)]
    assert remarks[0] == remarks[1]
    assert shards(one) == shards(other)


def assert_the_first_alone_speaks(processes):
    first, *others = processes
    assert "To keep 90 %" in first.stdout
    for other in others:
        assert other.stdout == ""
        assert [line for line in other.stderr.splitlines() if "GLOBAL_RANK" not in line] == []


def test_torchrun_fits_on_as_many_processes_as_it_starts(one, run, start, tmp_path):
    done = start(*run, "--pictures=png", "--trainer.logger=true", cwd=tmp_path, torchrun=2)[0].wait()
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr
    assert done.stdout.count("To keep 90 % of the accuracy") == 1
    assert_the_same_within_sampling_error(one, tmp_path / "runs")
    assert (tmp_path / "runs" / "run" / "curve.png").is_file()
    assert len(list(tmp_path.glob("runs/run/wandb/offline-run-*"))) == 1
    assert not list(tmp_path.rglob("unfinished-*"))


def test_lightnings_own_launcher_fits_on_several_devices(one, run, start, tmp_path):
    done = start(*run, "--trainer.devices=2", cwd=tmp_path)[0].wait()
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr
    assert done.stdout.count("To keep 90 % of the accuracy") == 1
    assert_the_same_within_sampling_error(one, tmp_path / "runs")


def test_two_nodes_fit_together(one, run, start, tmp_path):
    said = [process.wait() for process in start(*run, cwd=tmp_path, processes=2, nodes=2)]
    assert [each.returncode for each in said] == [0, 0], said
    assert sum("Starting with 2 processes" in each.stderr for each in said) == 1
    assert_the_first_alone_speaks(said)
    assert_the_same_within_sampling_error(one, tmp_path / "runs")


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 7), (3, 41)])
def test_a_checkpoint_counts_the_same_on_any_number_of_processes(quickstart, start, tmp_path, processes, batch_size):
    folder, _ = quickstart
    arguments = ("--config", str(folder / "config.yaml"), "--name=again", f"--data.batch_size={batch_size}", *QUIET)
    checkpoint = ("--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--model.cache_dir=features")
    for verb, file in (("test", "test.csv"), ("predict", "predictions.csv")):
        for process in start(verb, *arguments, *checkpoint, cwd=tmp_path, processes=processes):
            done = process.wait()
            assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs" / "again" / file).exists()
    stored = pd.read_csv(folder / "results.csv").query("split == 'test'").reset_index(drop=True)
    measured = pd.read_csv(tmp_path / "runs" / "again" / "test.csv")
    assert (measured["images"] == stored["images"]).all()
    assert (measured["accuracy"] == stored["accuracy"]).all()
    predicted = pd.read_csv(tmp_path / "runs" / "again" / "predictions.csv")
    columns = [f"{row.selection}/{row.fraction:g}/{row.seed}" for row in stored.itertuples()]
    correct = [(predicted[column] == predicted["label"]).sum() for column in columns]
    np.testing.assert_allclose(np.array(correct) / len(predicted), stored["accuracy"], atol=1e-12)


def test_a_step_sends_no_buffer_and_no_weight_of_the_backbone(tmp_path):
    backbone = FrozenBackbone("test_resnet", "random", pretrained_cfg_overlay=PretrainedCfgOverlay([3, 32, 32]))
    model = RedundancyProbe(backbone, fractions=[0.5], seeds=2)
    task = Digits([0, 1], num_workers=0)
    task.preprocessing = model.preprocessing
    plain = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, default_root_dir=tmp_path, **plain).fit(model, datamodule=task)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        sent = [parameter.numel() for parameter in parallel._module_parameters]
        assert parallel.modules_buffers == []
        assert sum(sent) == sum(bank.weight.numel() + bank.bias.numel() for bank in model.grid.banks)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_leave_the_files_of_one(run, start, tmp_path):
    measures = ("--model.solver=Ridge", "--model.selection=[random,pca,greedy]")
    attacked = "eps: 0.1, steps: 1, restarts: 1, images: 9, fractions: 0.1, seeds: 1"
    neighbours = "{class_path: Neighbours, init_args: {neighbours: 5}}"
    given = f"--model.measures=[CKA, Inequality, {neighbours}, Ensembles, Neurons, "
    given += f"{{class_path: Robustness, init_args: {{{attacked}}}}}]"
    command = (*run, *measures, given, "--model.backbone.layer=[layer2,penultimate]", "--model.fractions=0.1")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        for process in start(*command, cwd=tmp_path / str(processes), processes=processes):
            done = process.wait()
            assert done.returncode == 0, done.stderr
    one, two = (tmp_path / str(processes) / "runs" / "run" for processes in (1, 2))
    for name in ("results", "classes", "layers", "ensembles", "neighbours", "neurons", "transfer"):
        mine, theirs = (pd.read_csv(folder / f"{name}.csv") for folder in (one, two))
        # Sums of float64 differ by their order alone; counts do not.
        pd.testing.assert_frame_equal(mine, theirs, rtol=1e-6, atol=1e-9)
        counted = [column for column in mine if column in ("accuracy", "correct", "images", "kept", "gained", "lost")]
        assert mine[counted].equals(theirs[counted])


OPTIMA = ("--model.solver=Logistic", "--model.solver.penalty=[10,100]")
VOTES = ("--model.solver=KNN", "--model.solver.neighbours=[5,20]", "--model.refit=false", "--model.bits=[32,2]")


@pytest.mark.parametrize(("solver", "chosen"), [(OPTIMA, "penalty"), (VOTES, "voters")])
def test_two_processes_find_the_probes_of_one(one, run, start, tmp_path, solver, chosen):
    command = (*run, *solver, f"--model.cache_dir={one / 'feature_cache'}")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        said = [process.wait() for process in start(*command, cwd=tmp_path / str(processes), processes=processes)]
        assert [done.returncode for done in said] == [0] * processes, said
        assert_the_first_alone_speaks(said)
    one, two = (pd.read_csv(tmp_path / str(processes) / "runs" / "run" / "results.csv") for processes in (1, 2))
    assert one[chosen].equals(two[chosen])
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=5e-3)
    np.testing.assert_allclose(one["accuracy"], two["accuracy"], atol=0.006)  # one image of 179


def test_two_processes_score_several_labels_as_one_does(start, tmp_path):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(205, 12)).astype(np.float32)
    labels = vectors @ random.normal(size=(12, 3)) + random.normal(size=(205, 3)) > 0.5
    np.savez(tmp_path / "v.npz", features=vectors, labels=labels)
    fit = ("fit", *QUIET, "--trainer.logger=false", "--trainer.max_epochs=2", "--model.backbone=null")
    fit += ("--model.fractions=0.5", "--model.seeds=2", "--model.measures=[CKA,Neurons]", "--data=Embeddings")
    fit += ("--data.features=v.npz", "--data.target=multilabel", "--data.batch_size=7")
    runs = [start(*fit, f"--name={number}", cwd=tmp_path, processes=number) for number in (1, 2)]
    for done in [process.wait() for run in runs for process in run]:
        assert done.returncode == 0, done.stderr
    for name in ("results", "classes", "neurons", "layers"):
        one, two = (pd.read_csv(tmp_path / "runs" / number / f"{name}.csv") for number in ("1", "2"))
        pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-5)


def test_two_processes_search_as_one_does_without_a_solver_to_be_named(start, papers):
    search = ("fit", *QUIET, "--trainer.logger=false", "--model.backbone=null", "--model.selection=[random,pca]")
    search += ("--model.fractions=[0.2,0.5]", "--data=Retrieval", "--data.root=papers", "--data.batch_size=7")
    runs = [start(*search, f"--name={number}", cwd=papers.parent, processes=number) for number in (1, 2)]
    for done in [process.wait() for run in runs for process in run]:
        assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(papers.parent / "runs" / name / "results.csv") for name in ("1", "2"))
    assert set(one["solver"]) == {"search"}
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=1e-12)


def test_several_processes_stream_the_features_of_one_that_copies(start, tmp_path):
    random, images = np.random.default_rng(0), []
    for _ in range(120):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file := io.BytesIO(), "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    (tmp_path / "birds").mkdir()
    for part in range(2):
        table = pa.table({"image": images[60 * part :][:60], "label": ["cat", "dog", "eel"] * 20})
        pq.write_table(table, tmp_path / "birds" / f"{part}.parquet", row_group_size=7)
    run = ("--config=image_folder.yaml", "--config=debug.yaml", *QUIET, "--trainer.logger=false", "--model.measures=[]")
    run += ("--model.backbone.name=test_resnet", "--model.backbone.weights=random", "--data=HuggingFaceImages")
    run += ("--data.name=birds", "--data.root=data")
    streamed = (*run, "--data.streaming=true", "--model.cache_dir=streamed")
    started = start("extract", *run, "--model.cache_dir=copied", cwd=tmp_path)
    started += start("extract", *streamed, cwd=tmp_path) + start("extract", *streamed, cwd=tmp_path, processes=2)
    ended = [process.wait() for process in started]
    assert [done.returncode for done in ended] == [0] * 4, [done.stderr for done in ended]
    values = [
        sorted(load_file(path)["features"].numpy().tobytes() for path in (tmp_path / name).glob("*/*.safetensors"))
        for name in ("copied", "streamed")
    ]
    assert len(values[0]) > 3
    assert values[0] == values[1]
