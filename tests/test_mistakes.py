"""What a user's mistake is answered with, through the real command line: one line that names it, and nothing lost."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from safetensors.torch import load_file, save_file

from datamodules import Digits
from lightning_modules import Pretraining, RedundancyProbe
from lightning_modules.checkpoints import FORMAT
from lightning_modules.cli import run
from lightning_modules.cli.parser import CONFIGS
from lightning_modules.measures import Neighbours
from lightning_modules.objectives import Adversarial
from lightning_modules.probes import KNN, SGD, Logistic, Ridge

WEIGHTS = CONFIGS / "digits_0to4.safetensors"
OVERLAY = "model.backbone.pretrained_cfg_overlay"
PRETRAINING = ("--model=Pretraining", "--model.name=test_resnet", "--model.output=out.safetensors")
ANY_CALLABLE = f"--{OVERLAY}={{input_size: [3, 32, 32], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}"


def error_of(answer):
    """Return the one line that a mistake is answered with, last and alone."""
    status, out, err = answer
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == err.splitlines()[-1:]
    assert "usage:" not in err
    return errors[0]


def content(folder):
    """Return every file below a folder with what it holds."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_written(folder):
    """Return what an interrupted write left below a folder."""
    return [path for path in folder.rglob("*") if path.name.startswith(("unfinished", ".")) or path.suffix == ".tmp"]


# What is wrong, the arguments over those of a short run of the quickstart, and what the line must say.
MISTAKES = {
    # Subsets.
    "fraction as a word": (["--model.fractions=[0.1,few]"], "model.fractions is few", "a list of numbers"),
    "null for fractions": (["--model.fractions=null"], "model.fractions is null", "give it a value"),
    "more neurons than there are": (["--model.neurons=[2,385]"], "has 385, but layer penultimate has 384 neurons"),
    "seed as a word": (["--model.seeds=[a]"], "model.seeds is a", "a list of whole numbers"),
    "views of neighbours": (
        ["--model.solver=KNN", "--model.features=3"],
        "model.features is 3, but neighbours are looked for in the clean view; leave it clean",
    ),
    "bank larger than memory": (
        [
            "--model.seeds=1000",
            *(f"--model.solver.{name}={list(range(1, 51))}" for name in ("learning_rate", "weight_decay")),
        ],
        "GB of memory (2001 probes x 2500 candidates",
        "use fewer fractions, seeds or candidates",
    ),
    # The backbone.
    "unknown timm name": (["--model.backbone.name=resnet27"], "'resnet27' is neither", "did you mean resnet26"),
    "unknown timm tag": (["--model.backbone.name=resnet18.nope"], "timm has no weights 'resnet18.nope'; there are"),
    "unknown layer": (["--model.backbone.layer=layr4"], "has no layer 'layr4'; near it are layer4"),
    "backbone as a word": (["--model.backbone=resnet18"], "--model.backbone is 'resnet18'", "--model.backbone.name"),
    "unknown kwarg": (["--model.backbone.kwargs={wide: 2}"], "does not take kwargs {'wide': 2}"),
    "kwargs as a word": (["--model.backbone.kwargs=wide"], "model.backbone.kwargs is wide; it must be dict or null"),
    "missing weights": (["--model.backbone.weights=nowhere.pth"], "no file of weights 'nowhere.pth'", "'random'"),
    "weights of a wider network": (["--model.backbone.kwargs={}"], "does not hold the weights of this backbone"),
    "command for a backbone": (
        ["--model.backbone.name=os.system", "--model.backbone.kwargs={command: touch ran}", ANY_CALLABLE],
        "os.system is not known to return an nn.Module and is not called",
        "give a subclass of nn.Module",
    ),
    "dictionary for a backbone": (
        ["--model.backbone.name=builtins.dict", "--model.backbone.kwargs={a: 1}", ANY_CALLABLE],
        "builtins.dict is not known to return an nn.Module",
    ),
    "overlay of two means": ([f"--{OVERLAY}.mean=[0.5,0.5]"], "pretrained_cfg_overlay.mean is [0.5, 0.5]", "3 numbers"),
    "overlay of infinite means": ([f"--{OVERLAY}.mean=[.inf,0,0]"], "pretrained_cfg_overlay.mean", "inf", "numbers"),
    "overlay of std 0": (
        [f"--{OVERLAY}.std=[0,1,1]"],
        "pretrained_cfg_overlay.std is [0.0, 1.0, 1.0]",
        "numbers above 0",
    ),
    "unknown interpolation": ([f"--{OVERLAY}.interpolation=cubic"], "interpolation is cubic", "bilinear, bicubic"),
    "two numbers for a size": ([f"--{OVERLAY}.input_size=[32,32]"], "[32, 32]; it must be channels (3"),
    "crop of more than all": ([f"--{OVERLAY}.crop_pct=1.5"], "crop_pct is 1.5; it must be above 0, at most 1"),
    # Training.
    "unknown features": (["--model.features=cleen"], "model.features is cleen", "'clean'", "'off'"),
    "unknown epoch to keep": (["--model.solver.keep=bets"], "model.solver.keep is bets; it must be 'best' or 'last'"),
    "null for a learning rate": (
        ["--model.solver.learning_rate=null"],
        "model.solver.learning_rate is null; it must be a number or a list of numbers",
    ),
    "unknown solver": (
        ["--model.solver=Rigde"],
        "--model.solver is 'Rigde'; did you mean Ridge? It must be one of KNN, Logistic, Ridge, SGD, Search, or the",
    ),
    "task for a solver": (["--model.solver=datamodules.Digits"], "'datamodules.Digits', which is no Solver"),
    "unknown option of a solver": (["--model.solver.penalti=1"], "did you mean model.solver.penalty?"),
    "option of another solver": (
        ["--model.solver=Ridge", "--model.solver.learning_rate=0.1"],
        "--model.solver.learning_rate is an option of SGD; choose that with --model.solver, or leave",
    ),
    "option of the solver given to the model": (
        ["--model.learning_rate=0.1"],
        "--model.learning_rate is an option of Pretraining; did you mean model.solver.learning_rate?",
    ),
    "unknown measure": (["--model.measures=[CKAA]"], "'CKAA'; did you mean CKA? It must be one of Accuracy, CKA"),
    "measure twice": (["--model.measures=[CKA,CKA]"], "would both write cka; leave one out"),
    "unknown objective": (
        ["--model=Pretraining", "--model.objective=CrossEntrpy"],
        "--model.objective is 'CrossEntrpy'; did you mean CrossEntropy?",
    ),
    "objective without what it needs": (
        ["--model=Pretraining", "--model.objective=Adversarial"],
        "--model.objective.eps",
    ),
    "widths beyond the network": (
        [*PRETRAINING, "--model.objective=Matryoshka", "--model.objective.widths=[8,97]"],
        "Matryoshka of width 97; it must be from 1 to 96, the neurons",
    ),
    "objective on two classifiers": (
        [*PRETRAINING, "--model.name=deit_tiny_distilled_patch16_224", "--model.objective=DeCov"],
        "DeCov, which needs one linear classifier; VisionTransformerDistilled has tuple",
    ),
    # The task.
    "unknown task": (["--data=Digit"], "--data is 'Digit'; did you mean Digits? It must be one of CIFAR10, CIFAR100"),
    "task that is none": (["--data=Task"], "--data is 'Task'; it must be one of CIFAR10, CIFAR100"),
    "unknown model": (["--model=Probe"], "--model is 'Probe'; it must be one of RedundancyProbe, Pretraining"),
    "task that is not there": (
        ["--data=nowhere.Task"],
        "--data is 'nowhere.Task', which cannot be imported",
        "nowhere",
    ),
    "broken batch size": (["--data.batch_size=1.5"], "data.batch_size is 1.5; it must be a whole number"),
    "negative seed of everything": (["--seed_everything=-1"], "seed_everything", "-1 is not in bounds"),
    "missing root": (
        ["--data=ImageFolder", "--data.root=nowhere"],
        "nowhere has no folder train/",
        "nowhere/train/<class>",
    ),
    # The Trainer.
    "more devices than there are": (
        ["--trainer.accelerator=gpu", "--trainer.devices=99"],
        "accelerator gpu, devices 99",
    ),
    "no device": (["--trainer.devices=0"], "devices 0"),
    "unknown accelerator": (["--trainer.accelerator=gpux"], "accelerator gpux", "Available names are"),
    "unknown strategy": (["--trainer.strategy=ddpp"], "trainer.strategy is 'ddpp'; it must be one of auto, ddp"),
    "strategy that cuts the model": (["--trainer.strategy=fsdp"], "trainer.strategy is 'fsdp'", "one of auto, ddp"),
    "unknown precision": (["--trainer.precision=bf17"], "trainer.precision is bf17", "'bf16-mixed'"),
    "precision that rounds probes": (["--trainer.precision=bf16-true"], "trainer.precision is bf16-true", "bf16-mixed"),
    "epochs without end": (["--trainer.max_epochs=-1"], "trainer.max_epochs is -1", "max_time"),
    "nodes that were not started": (["--trainer.num_nodes=2"], "num_nodes 2", "start torchrun on each node"),
    "no epoch": (["--trainer.max_epochs=0"], "trainer.max_epochs is 0; it must be above 0"),
    "no time": (["--trainer.max_time=00:00:00:00"], "no probe was kept", "max_time"),
    "validation after the end": (
        ["--trainer.check_val_every_n_epoch=4"],
        "trainer.check_val_every_n_epoch is 4",
        "beyond the 3 epochs of trainer.max_epochs",
    ),
    "validation after every zero epochs": (
        ["--trainer.check_val_every_n_epoch=0"],
        "trainer.check_val_every_n_epoch is 0; it must be above 0",
    ),
    "validation after more steps than there are": (
        ["--trainer.val_check_interval=1000"],
        "trainer.val_check_interval is 1000, beyond the 9 steps",
    ),
    "refit after some steps": (
        ["--model.refit=true", "--trainer.max_steps=20"],
        "trainer.max_steps is 20, but model.refit repeats plain steps up to trainer.max_epochs",
    ),
    "refit after some time": (
        ["--model.refit=true", "--trainer.max_time=00:01:00:00"],
        "leave max_time and early stop",
    ),
    "refit on augmented views": (["--model.refit=true", "--model.features=2"], "model.refit trains on the clean view"),
    "no validation batch": (
        ["--trainer.limit_val_batches=0"],
        "trainer.limit_val_batches is 0",
        "every image is counted",
    ),
    "half of the test batches": (["--trainer.limit_test_batches=0.5"], "trainer.limit_test_batches is 0.5", "leave it"),
    "a run for developers": (["--trainer.fast_dev_run=true"], "fast_dev_run", "debug.yaml is a short run"),
    "clipped gradients": (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val", "leave it null"),
    "callback without an argument": (["--trainer.callbacks=EarlyStopping"], "Nothing sets trainer.callbacks.monitor"),
    "metric that is not logged": (
        ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/acuracy/full/1"],
        "EarlyStopping's monitor is 'val/acuracy/full/1', which is not logged; near it are val/accuracy/full/1, ",
    ),
    "the trainer as a word": (["--trainer=fast"], "--trainer is 'fast'", "it must be settings"),
    # Flags.
    "unknown flag": (["--overwrit=true"], "no option 'overwrit'; did you mean overwrite?"),
    "unknown flag of the trainer": (["--trainer.max_epochz=3"], "did you mean trainer.max_epochs?"),
    "abbreviated flag": (["--trainer.max_epoch=3"], "no option 'trainer.max_epoch'; did you mean trainer.max_epochs?"),
    "unknown flag of the model": (["--model.fraction=0.1"], "did you mean model.fractions"),
    "unknown flag of the overlay": ([f"--{OVERLAY}.crop_pt=1"], f"crop_pt'; did you mean {OVERLAY}.crop_pct?"),
    "flag like no other": (["--zzz=1"], "no option 'zzz'", "`train.py fit --help` lists all"),
    "word too many": (["quickly"], "quickly"),
    "neither true nor false to overwrite": (["--overwrite=maybe"], "overwrite is maybe; it must be true or false"),
    # Files.
    "unknown configuration": (["--config=quikstart.yaml"], "'quikstart.yaml'", "try quickstart.yaml"),
    "folder for a configuration": (["--config=."], "no configuration '.'", "quickstart.yaml"),
    "name outside of the runs": (["--name=.."], "--name is '..'; it must name a folder of its own"),
    "name longer than a folder's": (["--name=" + 128 * "é"], "--name has 256 bytes; a folder's has at most 255"),
    "output below a file": (
        ["--trainer.default_root_dir=file/runs"],
        "file/runs/quickstart cannot be written",
        "default_root_dir",
    ),
    "cache below a file": (
        ["--model.cache_dir=file/features"],
        "file/features",
        "cannot be written",
        "--model.cache_dir",
    ),
    "missing checkpoint": (["--ckpt_path=nowhere.ckpt"], "no checkpoint 'nowhere.ckpt'; give a file, or say last"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it_and_what_would_be_right(cli, short, tmp_path, mistake):
    (tmp_path / "file").write_text("not a folder")
    arguments, *said = MISTAKES[mistake]
    error = error_of(cli(*short, *arguments))
    for part in said:
        assert part in error
    assert len(error) < 500
    assert not list(tmp_path.rglob("results.csv"))


# What a class refuses, by whichever way it is asked, and what the error must say.
VALUES = [
    (RedundancyProbe, {"fractions": 0}, "model.fractions has 0; a fraction must be in (0, 1]"),
    (RedundancyProbe, {"fractions": [0.1, -0.2]}, "model.fractions has -0.2; a fraction must be in (0, 1]"),
    (RedundancyProbe, {"fractions": 1.5}, "model.fractions has 1.5; a fraction must be in (0, 1]"),
    (RedundancyProbe, {"fractions": float("nan")}, "model.fractions has nan; a fraction must be in (0, 1]"),
    (RedundancyProbe, {"fractions": [0.1, 0.1]}, "model.fractions lists 0.1 twice"),
    (RedundancyProbe, {"fractions": []}, "model.fractions is empty"),
    (RedundancyProbe, {"bits": [32, 16]}, "model.bits has 16; it must be one of 32, 8, 4, 2, 1"),
    (RedundancyProbe, {"bits": [4, 4]}, "model.bits lists 4 twice"),
    (RedundancyProbe, {"bits": []}, "model.bits is empty"),
    (RedundancyProbe, {"neurons": [2, 0]}, "model.neurons has 0; a subset has at least 1 neuron"),
    (RedundancyProbe, {"neurons": [2, 2]}, "model.neurons lists 2 twice"),
    (RedundancyProbe, {"seeds": []}, "model.seeds is []"),
    (RedundancyProbe, {"seeds": 0}, "model.seeds is 0; give a number of seeds from 1"),
    (RedundancyProbe, {"seeds": -3}, "model.seeds is -3; give a number of seeds from 1"),
    (RedundancyProbe, {"seeds": [0, -1]}, "model.seeds has -1; a seed must be 0 or more"),
    (RedundancyProbe, {"seeds": [4, 4]}, "model.seeds lists 4 twice"),
    (RedundancyProbe, {"seeds": 1000000000}, "model.seeds is 1000000000; give a number of seeds from 1 to 100,000"),
    (KNN, {"neighbours": [5, 0]}, "model.solver.neighbours is 0; it must be 1 or more"),
    (KNN, {"temperature": 0}, "temperature is 0; it must be above 0"),
    (RedundancyProbe, {"full_seeds": [0, 0]}, "model.full_seeds lists 0 twice"),
    (RedundancyProbe, {"full_seeds": 0}, "model.full_seeds is 0; give a number of seeds from 1"),
    (RedundancyProbe, {"selection": "randm"}, "'randm'; it must be one of backward, column_subset"),
    (RedundancyProbe, {"selection": ["first", "first"]}, "model.selection lists first twice"),
    (RedundancyProbe, {"selection": []}, "model.selection is empty"),
    (RedundancyProbe, {"features": 0}, "model.features is 0; it must be clean, off or a number"),
    (SGD, {"learning_rate": 0}, "model.solver.learning_rate is 0; it must be above 0"),
    (SGD, {"learning_rate": [0.1, -1]}, "model.solver.learning_rate is -1; it must be above 0"),
    (SGD, {"learning_rate": float("nan")}, "model.solver.learning_rate is nan; it must be above 0"),
    (SGD, {"learning_rate": []}, "model.solver.learning_rate is empty; give at least one value"),
    (SGD, {"learning_rate": [0.1, 0.1]}, "model.solver.learning_rate lists 0.1 twice"),
    (SGD, {"weight_decay": -1}, "model.solver.weight_decay is -1; it must be 0 or more"),
    (SGD, {"momentum": 1}, "model.solver.momentum is 1; it must be from 0 to below 1"),
    (SGD, {"gamma": 0}, "model.solver.gamma is 0; it must be above 0"),
    (SGD, {"step_size": 0}, "model.solver.step_size is 0; it must be at least 1"),
    (Ridge, {"penalty": -1}, "model.solver.penalty is -1; it must"),
    (Logistic, {"penalty": 0}, "model.solver.penalty is 0; it must be above 0"),
    (Pretraining, {"weights": "nowhere.pth"}, "no file of weights 'nowhere.pth'"),
    (Pretraining, {"name": None}, "model.name is null, and weights random do not say what they are of"),
    (Digits, {"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
    (Digits, {"num_workers": -1}, "data.num_workers is -1; it must be at least 0"),
    (Digits, {"seed": -1}, "data.seed is -1; it must be 0 or more"),
    (Digits, {"augmentation": "papr"}, "data.augmentation is 'papr'; it must be one of none, paper"),
    (Neighbours, {"neighbours": 0}, "neighbours is 0; it must be 1"),
    (Adversarial, {"eps": 0.0}, "model.objective.eps is 0; in L2 it must be above 0"),
    (Pretraining, {"momentum": 1.0}, "model.momentum is 1; it must be from 0 to below 1"),
    (Pretraining, {"warmup_steps": -1}, "model.warmup_steps is -1; it must be 0 or more"),
    (Digits, {"digits": [5]}, "data.digits is [5]; it must list at least two different digits"),
]


@pytest.mark.parametrize(("kind", "settings", "said"), VALUES, ids=[said for *_, said in VALUES])
def test_a_value_that_cannot_be_is_refused_with_what_would_be_right(kind, settings, said):
    network = {"name": "test_resnet", "output": "out.safetensors"}
    required = {RedundancyProbe: {"backbone": None}, Digits: {"digits": [0, 1]}, Pretraining: network}.get(kind, {})
    with pytest.raises(MisconfigurationException, match=re.escape(said)):
        kind(**required | settings)


VERBS = {
    "no verb": ([], "Give one of these verbs"),
    "unknown verb": (
        ["fitt", "--config", "quickstart.yaml"],
        "'fitt'; did you mean fit?",
        "compare, invert, export",
    ),
    "configuration before the verb": (["--config", "quickstart.yaml", "fit"], "--config comes after the verb"),
    "nothing but a verb": (["fit"], "Nothing sets data", "--config"),
    "an argument of a task without the task": (
        ["fit", "--data.features=x.npy"],
        "data has features and no class_path, which says what Task it is",
        "write data: {class_path: Embeddings, init_args: {features: x.npy}}, or say --data Embeddings before",
    ),
    "test without a run": (["test", "--config", "quickstart.yaml"], "no runs/quickstart/checkpoints/last.ckpt"),
    "nothing to extract": (
        ["extract", "--config", "quickstart.yaml", "--model.features=off", "--trainer.enable_progress_bar=false"],
        "There is nothing to extract: model.features is off.",
    ),
    "prediction without a run": (["predict", "--config", "quickstart.yaml"], "name the --config of a run"),
}


@pytest.mark.parametrize("mistake", VERBS)
def test_a_command_line_without_its_parts_says_which(cli, mistake):
    arguments, *said = VERBS[mistake]
    error = error_of(cli(*arguments))
    for part in said:
        assert part in error


# ---------------------------------------------------------------------------------------------------- configurations

YAMLS = {
    "broken": (b"model: {fractions: [0.1\n", "own.yaml is not valid YAML at line 2"),
    "a tab": (b"model:\n\tseeds: 2\n", "own.yaml is not valid YAML at line 2, column 1", "\\t"),
    "a list": (b"- 1\n- 2\n", "own.yaml holds [1, 2]; it must hold settings"),
    "a word": (b"CIFAR10", "own.yaml holds 'CIFAR10'; it must hold settings"),
    "nothing": (b"", "own.yaml holds None; it must hold settings"),
    "code": (
        b"name: !!python/object/apply:os.system ['touch ran']\n",
        "own.yaml is not valid YAML at line 1",
        "python",
    ),
    "no text": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "own.yaml is not valid YAML"),
    "a key at the top": (b"nam: x\n", "no option 'nam'; did you mean name"),
    "a key of the trainer": (b"trainer: {max_epoch: 3}\n", "did you mean trainer.max_epochs?"),
    "a key of the data": (b"data: {class_path: Digits, init_args: {batchsize: 3}}\n", "did you mean data.batch_size?"),
    "a key of the model": (b"model: {fractoins: 0.1}\n", "did you mean model.fractions"),
    "a key of the backbone": (b"model: {backbone: {weight: random}}\n", "did you mean model.backbone.weights?"),
    "a key of the overlay": (
        b"model: {backbone: {pretrained_cfg_overlay: {men: [0, 0, 0]}}}\n",
        "did you mean",
        "model.backbone.pretrained_cfg_overlay.mean?",
    ),
    "a key of another class": (
        b"data: {class_path: ImageFolder, init_args: {digits: [1, 2]}}\n",
        "--data.digits is an option of Digits; choose that with --data, or leave --data.digits out",
    ),
    "a key of another solver": (
        b"model: {solver: {class_path: Ridge, init_args: {momentum: 0.5}}}\n",
        "--model.solver.momentum is an option of SGD; choose that with --model.solver",
    ),
    "a wrong value": (b"model: {seeds: many}\n", "model.seeds is many", "a whole number"),
}


def test_a_task_that_a_configuration_does_not_name_is_asked_for(cli, tmp_path):
    (tmp_path / "own.yaml").write_text("data: {root: pets}\n")
    error = error_of(cli("fit", "--config=own.yaml"))
    assert "data has root and no class_path, which says what Task it is; write data: {class_path: " in error
    right, name = re.search(r"write (.*), or say --data (\w+) before", error).groups()
    (tmp_path / "own.yaml").write_text(right)
    for options in (["--config=own.yaml"], [f"--data={name}", "--data.root=pets"]):
        status, out, err = cli("fit", *options, "--print_config")
        assert status == 0, err
        assert yaml.safe_load(out)["data"]["init_args"]["root"] == "pets"


@pytest.mark.parametrize("mistake", YAMLS)
def test_a_configuration_with_a_mistake_is_named_and_nothing_in_it_is_run(cli, short, tmp_path, mistake):
    written, *said = YAMLS[mistake]
    (tmp_path / "own.yaml").write_bytes(written)
    error = error_of(cli(*short, "--config=own.yaml"))
    for part in said:
        assert part in error
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------- weights


class Code:
    """A pickle that touches a file when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def nan_weights(path):
    state = load_file(WEIGHTS)
    state["layer4.0.bn3.weight"] = state["layer4.0.bn3.weight"] * float("nan")
    save_file(state, path)


BAD_WEIGHTS = {
    "of another architecture": (
        "own.safetensors",
        lambda path: save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path),
        "own.safetensors does not hold the weights of this backbone",
        "missing",
        "unknown",
    ),
    "a page as safetensors": (
        "own.safetensors",
        lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
        "own.safetensors is not a complete safetensors file",
    ),
    "a page as pth": (
        "own.pth",
        lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
        "own.pth is no file of weights, or not a whole one",
    ),
    "truncated safetensors": (
        "own.safetensors",
        lambda path: path.write_bytes(WEIGHTS.read_bytes()[:-1000]),
        "own.safetensors is not a complete safetensors file",
    ),
    "truncated pth": (
        "own.pth",
        lambda path: (torch.save(load_file(WEIGHTS), path), path.write_bytes(path.read_bytes()[:-1000])),
        "own.pth is no file of weights",
    ),
    "empty": ("own.pth", lambda path: path.touch(), "own.pth is no file of weights"),
    "code in a pth": (
        "own.pth",
        lambda path: torch.save({"state_dict": Code()}, path),
        "own.pth is a pickle that holds code, which is never run",
        "safetensors.torch.save_file",
    ),
    "code in a bare pickle": ("own.pth", lambda path: path.write_bytes(pickle.dumps(Code())), "own.pth is"),
    "no weights": ("own.pth", lambda path: torch.save({"epoch": 3}, path), "own.pth holds no state dict"),
    "that are no numbers": (
        "own.safetensors",
        nan_weights,
        "Layer 'penultimate'",
        "is not finite for image",
        "of train",
    ),
}


@pytest.mark.parametrize("mistake", BAD_WEIGHTS)
def test_weights_that_cannot_be_are_named_and_no_code_in_them_is_run(cli, short, tmp_path, mistake):
    name, write, *said = BAD_WEIGHTS[mistake]
    write(tmp_path / name)
    error = error_of(cli(*short, f"--model.backbone.weights={name}"))
    for part in said:
        assert part in error
    assert not list(tmp_path.rglob("results.csv"))
    assert not half_written(tmp_path)


NETWORKS = '''
from torch import nn


class Shapeless(nn.Module):
    """Its body has five dimensions, and one part of it is never run."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Unflatten(1, (2, 2))
        self.idle = nn.Linear(4, 4)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(2, 5)

    def forward(self, images):
        return self.head(self.pool(self.body(self.stem(images))).flatten(1))


def make() -> dict:
    return {}


def fails():
    raise KeyError("no such thing")
'''
OWN = {
    "layer of five dimensions": (
        ["Shapeless", "body"],
        "model.backbone.layer 'body'",
        "gives (2, 2, 2, 30, 30)",
        "tokens",
    ),
    "layer that is never run": (["Shapeless", "idle"], "model.backbone.layer 'idle'", "is never run"),
    "layer that is not there": (["Shapeless", "boddy"], "no layer 'boddy'; near it are body"),
    "function of something else": (["make", "penultimate"], "own_networks.make is not known to return an nn.Module"),
    "function that fails": (["fails", "penultimate"], "own_networks.fails({}) fails ('no such thing')"),
    "function that is not there": (["mak", "penultimate"], "'own_networks.mak' is neither"),
}


@pytest.mark.parametrize("mistake", OWN)
def test_a_network_of_ones_own_that_cannot_be_probed_is_named(cli, short, tmp_path, monkeypatch, mistake):
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    (name, layer), *said = OWN[mistake]
    backbone = [f"--model.backbone.name=own_networks.{name}", f"--model.backbone.layer={layer}"]
    error = error_of(
        cli(*short, *backbone, "--model.backbone.weights=random", "--model.backbone.kwargs={}", ANY_CALLABLE)
    )
    for part in said:
        assert part in error


SOLVERS = """
from lightning_modules.probes import SGD


class Odd(SGD):
    def __init__(self, depth: int = 2):
        raise ValueError(f"depth is {depth}; it must be odd.")


class Foreign(SGD):
    def __init__(self):
        raise ModuleNotFoundError("No module named 'nowhere'")


class Bug(SGD):
    def candidates(self):
        return {}["x"]
"""


@pytest.fixture
def own_solvers(cli, short, tmp_path, monkeypatch):
    """The command line, with solvers that fail in the folder that it runs in."""
    monkeypatch.delitem(sys.modules, "own_solvers", raising=False)
    (tmp_path / "own_solvers.py").write_text(SOLVERS)
    return lambda name, *more: cli(*short, f"--model.solver=own_solvers.{name}", *more)


@pytest.mark.parametrize(
    ("name", "said"),
    [("Odd", "Odd: depth is 2; it must be odd."), ("Foreign", "Foreign: No module named 'nowhere'.")],
)
def test_what_a_constructor_of_ones_own_refuses_is_told_in_one_line(own_solvers, name, said):
    assert error_of(own_solvers(name)) == f"error: {said}"


def test_an_error_of_others_is_told_with_its_kind_and_where_to_look(own_solvers):
    place = SOLVERS[: SOLVERS.index('return {}["x"]')].count("\n") + 1
    error = error_of(own_solvers("Bug"))
    assert error.startswith(f"error: KeyError: 'x' (line {place} of ")
    assert "own_solvers.py); --debug shows the whole traceback." in error
    status, _, err = own_solvers("Bug", "--debug")
    assert (status, err.splitlines()[-1]) == (2, error)
    assert "Traceback (most recent call last):" in err
    assert err.index("Traceback") < err.index('return {}["x"]') < err.index("error: ")


# -------------------------------------------------------------------------------------------------------- finished runs


@pytest.fixture
def finished(quickstart, tmp_path):
    """A copy of a real finished run below the folder that the command line runs in."""
    shutil.copytree(quickstart[0].parent, tmp_path / "runs", ignore=shutil.ignore_patterns("wandb"))
    return tmp_path / "runs" / "quickstart"


def rerun(verb, *args):
    quiet = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--pictures=[]")
    return (verb, "--config", "runs/quickstart/config.yaml", *quiet, *args)


FOREIGN = {
    "backbone": (["--model.backbone.weights=random"], "its backbone is resnet26-digits_0to4"),
    "layer": (["--model.backbone.layer=layer3"], "its layer is penultimate, not layer3"),
    "task": (["--data=ImageFolder", "--data.root=pets"], "its task is digits"),
    "classes": (["--data.digits=[4,6,7,8,9]"], "its classes is ['5'"),
    "seeds": (["--model.seeds=4"], "its seeds is [0, 1, 2, 3, 4], not [0, 1, 2, 3]"),
    "interpolation": ([f"--{OVERLAY}.interpolation=bicubic"], "its preprocessing is"),
}
CHANGED = {
    "learning rate": (["--model.solver.learning_rate=0.2"], "its learning_rate and weight_decay is [[0.1, 0.0001]]"),
    "data seed": (["--data.seed=1"], "its data.seed is 0, not 1"),
    "precision": (["--trainer.precision=bf16-mixed"], "its trainer.precision is 32-true, not bf16-mixed"),
    "fewer epochs than are done": (["--trainer.max_epochs=50"], "100", "50"),
}


@pytest.mark.parametrize(
    ("verb", "mistake"),
    [
        ("fit", "backbone"),
        ("predict", "seeds"),
        *(("test", each) for each in ("layer", "task", "classes", "interpolation")),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_by_every_verb(cli, finished, image_folder, verb, mistake):
    arguments, said = FOREIGN[mistake]
    before = content(finished)
    assert said in error_of(cli(*rerun(verb, *arguments, "--name=quickstart", "--ckpt_path=last", "--overwrite=true")))
    assert content(finished) == before


@pytest.mark.parametrize("mistake", CHANGED)
def test_a_training_is_not_resumed_otherwise_than_it_began(cli, finished, mistake):
    arguments, *said = CHANGED[mistake]
    before = content(finished)
    error = error_of(cli(*rerun("fit", *arguments, "--ckpt_path=last", "--overwrite=true")))
    for part in said:
        assert part in error
    assert content(finished) == before


def test_a_checkpoint_says_all_that_is_compared(finished):
    saved = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["probes"]
    compared = {"backbone", "layer", "preprocessing", "task", "classes", "data.view", "selection", "fractions", "seeds"}
    compared |= {"standardise", "refit", "bits", "solver", "learning_rate and weight_decay"}
    assert compared <= saved["provenance"].keys()
    trained = {"momentum", "step_size", "gamma", "keep", "features"}
    assert trained | {"data.batch_size", "data.seed", "trainer.precision"} <= saved["training"].keys()


BAD_CHECKPOINTS = {
    "a page": (
        lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
        "own.ckpt is no checkpoint, or not a whole one",
    ),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-2000]),
        "own.ckpt is no checkpoint, or not a whole one",
    ),
    "empty": (lambda path: path.write_bytes(b""), "own.ckpt is no checkpoint, or not"),
    "code": (lambda path: torch.save({"probes": Code()}, path), "own.ckpt is a pickle that holds code"),
    "weights": (
        lambda path: torch.save(load_file(WEIGHTS), path),
        "own.ckpt holds no checkpoint of this project",
        "name a checkpoint",
    ),
    "a list": (lambda path: torch.save([1, 2], path), "own.ckpt holds no checkpoint of this project"),
    "another format": (
        lambda path: torch.save(torch.load(path, weights_only=True) | {"format": FORMAT + 1}, path),
        f"own.ckpt holds a checkpoint of format {FORMAT + 1}, where format {FORMAT} is read",
    ),
    "no format": (
        lambda path: torch.save({"probes": torch.load(path, weights_only=True)["probes"]}, path),
        "own.ckpt holds no checkpoint of this project",
    ),
}


@pytest.mark.parametrize(
    ("verb", "mistake"), [("fit", "truncated"), *(("test", mistake) for mistake in BAD_CHECKPOINTS)]
)
def test_a_file_that_is_no_checkpoint_is_named_and_no_code_in_it_is_run(cli, finished, tmp_path, verb, mistake):
    write, *said = BAD_CHECKPOINTS[mistake]
    shutil.copy(finished / "checkpoints" / "last.ckpt", tmp_path / "own.ckpt")
    write(tmp_path / "own.ckpt")
    before = content(finished)
    overwrite = ["--overwrite=true"] if verb == "fit" else []
    error = error_of(cli(*rerun(verb, "--ckpt_path=own.ckpt", "--model.cache_dir=fresh", *overwrite)))
    for part in said:
        assert part in error
    assert content(finished) == before
    assert not (tmp_path / "fresh").exists()  # before any image is extracted


def test_a_finished_run_of_the_same_name_is_kept(cli, finished):
    before = content(finished)
    error = error_of(cli(*rerun("fit")))
    assert "runs/quickstart holds a finished run; choose another --name, or say --overwrite true" in error
    assert content(finished) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.fractions=0"],
        ["--trainer.devices=0"],
        ["--trainer.val_check_interval=1000"],
        ["--model.cache_dir=runs/quickstart/config.yaml"],
        ["--data=ImageFolder", "--data.root=nowhere"],
        ["--model.backbone.weights=nan.safetensors"],
    ],
    ids=" ".join,
)
def test_overwriting_together_with_a_mistake_destroys_nothing(cli, finished, tmp_path, arguments):
    nan_weights(tmp_path / "nan.safetensors")
    before = content(finished)
    error_of(cli(*rerun("fit", "--overwrite=true", "--name=quickstart", *arguments)))
    assert content(finished) == before


# ------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def folder(short, image_folder):
    """The words of a short fit on a folder of images."""
    return *short, "--data=ImageFolder", f"--data.root={image_folder.name}", "--data.num_workers=0"


def noise(path, size=(32, 32), mode="RGB"):
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert(mode).save(path)


def keep(folder, number):
    """Leave that many files in a folder."""
    for path in sorted(folder.iterdir())[number:]:
        path.unlink()


LAYOUTS = {
    "no class": (
        lambda root: [shutil.rmtree(each) for each in (root / "train").iterdir()],
        "train holds 0 classes",
        "two",
    ),
    "one class": (
        lambda root: shutil.rmtree(root / "train" / "dog"),
        "train holds 1 classes; a task needs at least two",
    ),
    "no folder train": (lambda root: (root / "train").rename(root / "training"), "pets has no folder train/"),
    "a class without images": (lambda root: keep(root / "train" / "dog", 0), "train/dog holds no images", ".jpg"),
    "a class too small to split": (
        lambda root: keep(root / "train" / "dog", 2),
        "Class 'dog' of pets has 2 images in train; to cut val and test from it, it needs at least 3",
    ),
    "a class that test lacks": (lambda root: noise(root / "test" / "cat" / "a.png"), "pets/test lacks ['dog']"),
    "a class that val adds": (
        lambda root: [noise(root / "val" / name / "a.png") for name in ("cat", "dog", "cow")],
        "pets/val adds ['cow']",
    ),
    "a class without images in test": (
        lambda root: (noise(root / "test" / "cat" / "a.png"), (root / "test" / "dog").mkdir()),
        "pets/test/dog holds no images",
    ),
    "hidden images alone": (
        lambda root: (keep(root / "train" / "dog", 0), noise(root / "train" / "dog" / "._1.jpg")),
        "train/dog holds no images",
    ),
    "a file for a root": (lambda root: (shutil.rmtree(root), root.touch()), "pets has no folder train/"),
}


@pytest.mark.parametrize("mistake", LAYOUTS)
def test_a_folder_that_is_laid_out_otherwise_says_where(cli, folder, image_folder, mistake):
    change, *said = LAYOUTS[mistake]
    change(image_folder)
    error = error_of(cli(*folder))
    for part in said:
        assert part in error


BROKEN = {
    "corrupt": lambda path: path.write_bytes(path.read_bytes()[:40] + bytes(200) + path.read_bytes()[240:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no image"),
}


@pytest.mark.parametrize(("damage", "ending"), zip(BROKEN, ["png", "jpg", "png", "jpg"], strict=True))
def test_a_file_that_is_no_image_is_named_by_its_path(cli, folder, image_folder, damage, ending):
    broken = image_folder / "train" / "cat" / f"x.{ending}"
    noise(broken)
    BROKEN[damage](broken)
    error = error_of(cli(*folder))
    assert error.startswith(f"error: pets/train/cat/x.{ending} is not a readable image (")


@pytest.mark.parametrize("features", ["clean", "off"])
def test_a_corrupt_image_is_named_by_its_path_from_a_worker_process(cli, folder, image_folder, features):
    BROKEN["truncated"](image_folder / "train" / "cat" / "3.png")
    error = error_of(cli(*folder, "--data.num_workers=1", f"--model.features={features}"))
    assert error.startswith("error: pets/train/cat/3.png is not a readable image (")
    for worker in multiprocessing.active_children():  # which a process of its own would end, too
        worker.terminate()


def test_unusual_images_and_files_that_are_none_are_taken_as_they_are_meant(cli, folder, image_folder):
    cat = image_folder / "train" / "cat"
    for name, mode in (("cmyk.jpg", "CMYK"), ("palette.png", "P"), ("grey.png", "L"), ("bits.png", "1")):
        noise(cat / name, mode=mode)
    noise(cat / "alpha.png", mode="RGBA")
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60).save(cat / "deep.png")
    noise(cat / "pixel.png", (1, 1))
    noise(cat / "thin.png", (1, 500))
    noise(cat / "flat.JPG", (500, 1))
    noise(cat / "deeper" / "UPPER.JPEG")
    for name in ("._cmyk.jpg", ".DS_Store", "Thumbs.db", "notes.txt", ".hidden/image.png"):
        (cat / name).parent.mkdir(exist_ok=True)
        (cat / name).write_bytes(b"\x00\x05\x16\x07 no image")
    (cat / "folder.png").mkdir()
    (image_folder / "train" / ".Trashes").mkdir()
    status, _, err = cli(*folder)
    assert status == 0, err
    results = pd.read_csv("runs/quickstart/results.csv")
    shares = {split: int(rows["images"].iloc[0]) for split, rows in results.groupby("split")}
    assert shares == {"val": 10, "test": 10}  # a fifth of 30 and of 20, so that train has the 30 others of 50
    assert "Features of train, clean view: 30 x" in err


def test_features_that_are_not_finite_are_named_with_layer_and_image(cli, folder, tmp_path):
    state = load_file(WEIGHTS)
    state["layer4.0.bn3.bias"] = torch.full_like(state["layer4.0.bn3.bias"], float("inf"))
    save_file(state, tmp_path / "infinite.safetensors")
    error = error_of(cli(*folder, "--model.backbone.weights=infinite.safetensors", "--model.backbone.layer=layer4"))
    assert "Layer 'layer4' of" in error
    assert "is not finite for cat/" in error
    assert "check the weights and trainer.precision" in error


# ----------------------------------------------------------------------------------------------------- disks and rights


@contextlib.contextmanager
def full_disk(room):
    """Let no file grow beyond `room` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # Python ignores the signal: writes fail with an OSError
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_too_full_for_the_features_leaves_a_finished_run_alone(cli, finished, tmp_path):
    before = content(finished)
    with full_disk(20_000):
        answer = cli(*rerun("fit", "--overwrite=true", "--name=quickstart", "--model.cache_dir=full"))
    assert "full/" in error_of(answer)
    assert "cannot be written (" in error_of(answer)
    assert "--model.cache_dir" in error_of(answer)
    assert content(finished) == before
    assert not half_written(tmp_path)
    assert not list((tmp_path / "full").rglob("*.safetensors"))


def test_a_disk_too_full_for_a_checkpoint_leaves_other_runs_alone(cli, finished, tmp_path):
    before = content(finished)
    with full_disk(20_000):
        answer = cli(*rerun("fit", "--name=next"))
    assert "runs/next/checkpoints/last.ckpt cannot be written (File too large); make room" in error_of(answer)
    assert content(finished) == before
    assert not half_written(tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs" / "next").rglob("*")) == [
        "checkpoints",
        "config.yaml",
        "run.lock",
    ]


def test_a_disk_too_full_for_the_results_loses_no_training(cli, finished, tmp_path, monkeypatch):
    report, trained = run.report, []

    def on_a_full_disk(folder, results, *args):
        trained.append(results.tables["results"])
        with full_disk(5_000):
            return report(folder, results, *args)

    before = content(finished)
    monkeypatch.setattr(run, "report", on_a_full_disk)
    short = ("--name=next", "--trainer.max_epochs=3", "--model.seeds=2")
    error = error_of(cli(*rerun("fit", *short)))
    assert "runs/next cannot be written (File too large); make room there" in error
    assert content(finished) == before
    assert not half_written(tmp_path)
    assert not (tmp_path / "runs" / "next" / "results.csv").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    status, out, err = cli(*rerun("fit", *short, "--ckpt_path=last"))  # what the line advises
    assert status == 0, err
    assert "Restored all states from the checkpoint" in err
    assert "To keep 90 % of the accuracy" in out
    again = pd.read_csv(tmp_path / "runs" / "next" / "results.csv")
    pd.testing.assert_frame_equal(trained[0].reset_index(drop=True), again, check_dtype=False, rtol=1e-6)


@contextlib.contextmanager
def bound_by_permissions():
    """Take root's right to write everywhere from this process; others do not have it."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, before)
    effective, *others = before
    if libc.capset(header, (ctypes.c_uint32 * 6)(effective & ~0b110, *others)):  # DAC_OVERRIDE, DAC_READ_SEARCH
        pytest.skip("root cannot lay down its rights here")
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody may write to."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    with bound_by_permissions():
        yield folder
    folder.chmod(0o755)


def test_a_folder_that_must_not_be_written_is_named_before_any_image_is_seen(cli, short, read_only):
    error = error_of(answer := cli(*short, f"--trainer.default_root_dir={read_only}"))
    assert f"{read_only}/quickstart cannot be written (Permission denied)" in error
    assert "--trainer.default_root_dir" in error
    assert "Features of" not in answer[2]


def test_a_cache_that_must_not_be_written_is_named(cli, short, read_only):
    error = error_of(cli(*short, f"--model.cache_dir={read_only}"))
    assert f"{read_only}/" in error
    assert "cannot be written (Permission denied); name another folder with --model.cache_dir" in error


# ----------------------------------------------------------------------------------------------------------- processes


def said_by(processes):
    """Return the lines that processes end with: each says at most one, and none a traceback."""
    done = [process.wait() for process in processes]
    assert [each.returncode for each in done] == [2] * len(done), [each.stderr for each in done]
    assert not any("Traceback" in each.stderr or each.stdout for each in done)
    said = [[line for line in each.stderr.splitlines() if line.startswith("error")] for each in done]
    assert all(len(lines) <= 1 for lines in said)
    return [line for lines in said for line in lines]


def test_a_mistake_in_a_process_of_its_own_is_one_line_and_nothing_else(start, short, tmp_path):
    done = start(*short, "--model.fractions=0", cwd=tmp_path)[0].wait()
    assert done == (2, "", "error: model.fractions has 0; a fraction must be in (0, 1].\n")


def test_a_mistake_of_all_processes_is_told_by_each_with_its_rank(start, short, tmp_path):
    said = said_by(start(*short, "--model.fractions=0", cwd=tmp_path, processes=2))
    mistake = "model.fractions has 0; a fraction must be in (0, 1]."
    assert said == [f"error (process 1 of 2): {mistake}", f"error (process 2 of 2): {mistake}"]


@pytest.mark.parametrize(("broken", "process"), [("cat/0.png", 0), ("dog/9.png", 1)])
def test_a_mistake_that_one_process_meets_ends_all(start, folder, image_folder, tmp_path, broken, process):
    for split in ("val", "test"):  # train then has 40 images: 32 for the first process, 8 for the second
        for name in ("cat", "dog"):
            noise(image_folder / split / name / "a.png")
    BROKEN["truncated"](image_folder / "train" / broken)
    said = said_by(start(*folder, cwd=tmp_path, processes=2))
    assert f"error (process {process + 1} of 2): pets/train/{broken} is not a readable image" in said[process]
    assert "Another process of this run is gone" in said[1 - process]
    assert not list(tmp_path.rglob("results.csv"))


def test_fewer_images_than_processes_are_told(start, folder, image_folder, tmp_path):
    for split in ("val", "test"):
        for name in ("cat", "dog"):
            noise(image_folder / split / name / "a.png")
    said = said_by(start(*folder, cwd=tmp_path, processes=3))
    mistake = "The val split of pets has 2 images, fewer than the 3 processes; use at most 2 devices."
    assert said == [f"error (process {place} of 3): {mistake}" for place in (1, 2, 3)]


def test_a_folder_that_another_process_writes_to_is_left_to_it(cli, finished):
    before = content(finished)
    with FileLock(finished / "run.lock"):
        error = error_of(cli(*rerun("fit", "--overwrite=true", "--name=quickstart")))
    assert "runs/quickstart is being written by another process; leave it to that." in error
    assert content(finished) == before
