import json
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import train
from datamodules import Digits
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.backbones.frozen import FrozenBackbone

USE = """
import importlib.util, json, sys
import safetensors.torch, torch
found = {}
features = torch.load(sys.argv[1])["features"]
images = torch.load(sys.argv[1])["images"]
for folder in sys.argv[2:]:
    card = json.load(open(f"{folder}/card.json"))
    subset = safetensors.torch.load_file(f"{folder}/subset.safetensors")
    exec(card["use"][0])
    found[folder] = {"subset": logits.argmax(1).tolist()}
    spec = importlib.util.spec_from_file_location("recipe", f"{folder}/recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    stored = recipe.store(features.numpy())
    assert stored.shape == (len(features), card["bytes"]) and stored.dtype == "uint8"
    logits = torch.from_numpy(recipe.read(stored)) @ subset["weight"].T + subset["bias"]
    found[folder]["recipe"] = logits.argmax(1).tolist()
    if len(card["use"]) > 1:
        program = torch.export.load(f"{folder}/backbone.pt2").module()
        kept = torch.cat([program(part) for part in (images[:1], images[1:8], images[8:])])
        exec("; ".join(card["use"][1].split("; ")[1:]))
        found[folder]["program"] = logits.argmax(1).tolist()
ours = ("lightning_modules", "datamodules", "train", "lightning", "timm")
found["ours"] = [name for name in sys.modules if name.split(".")[0] in ours]
print(json.dumps(found))
"""
"""A program that uses what a card says, and says which modules that took."""


class Run(NamedTuple):
    folder: object
    predictions: pd.DataFrame
    inputs: object
    features: torch.Tensor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short fit of the quickstart's backbone with neurons, components and projections, also in 4 bits."""
    folder = tmp_path_factory.mktemp("export")
    arguments = ["--config", "quickstart.yaml", "--name", "digits", "--trainer.max_epochs", "2"]
    arguments += ["--trainer.default_root_dir", str(folder), "--trainer.logger", "false", "--model.seeds", "2"]
    arguments += ["--model.fractions", "[0.1, 0.5]", "--model.standardise", "true", "--model.measures", "[]"]
    arguments += ["--model.selection", "[random, pca, random_projection]", "--data.view", "squash"]
    arguments += ["--model.refit", "true", "--model.bits", "[32, 4]"]
    with pytest.MonkeyPatch.context() as patch:
        for verb in ("fit", "predict"):
            patch.setattr(sys, "argv", ["train.py", verb, *arguments])
            train.main()
    settings = yaml.safe_load((folder / "digits" / "config.yaml").read_text())["model"]["init_args"]["backbone"]
    overlay = PretrainedCfgOverlay(**settings.pop("pretrained_cfg_overlay"))
    backbone = FrozenBackbone(**settings, pretrained_cfg_overlay=overlay)
    task = Digits([5, 6, 7, 8, 9], batch_size=1000)
    task.preprocessing = backbone.preprocessing
    task.setup()
    (batch,) = task.test_dataloader()
    features = backbone(batch.inputs)
    torch.save({"images": batch.inputs, "features": features}, folder / "inputs.pt")
    predictions = pd.read_csv(folder / "digits" / "predictions.csv", dtype=str)
    return Run(folder / "digits", predictions, folder / "inputs.pt", features)


def use(inputs, *folders):
    """Run `USE` where this project is not to be found."""
    command = [sys.executable, "-I", "-c", USE, str(inputs), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=inputs.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_exported_files_predict_what_the_run_predicted_and_need_nothing_of_this_project(run, cli, tmp_path):
    wanted = {"random/0.1/1": "neurons", "random_projection/0.1/1": "projection"}
    wanted |= {"random_4bit/0.5/1": "few_bits", "pca_4bit/0.5/0": "components_in_few_bits"}
    for column, name in wanted.items():
        (selection, *few), fraction, seed = column.split("/")[0].split("_4"), *column.split("/")[1:]
        arguments = ["--selection", selection, "--fraction", fraction, "--seed", seed, "--output", name]
        arguments += ["--bits", "4" if few else "32"]
        status, out, err = cli("export", "--run", str(run.folder), *arguments)
        assert status == 0, err
        assert out.split() == [
            f"{name}/{file}" for file in ("subset.safetensors", "card.json", "recipe.py", "backbone.pt2")
        ]
    found = use(run.inputs, *(tmp_path / name for name in wanted.values()))
    assert found["ours"] == []
    results = pd.read_csv(run.folder / "results.csv")
    for column, name in wanted.items():
        (selection, *few), fraction, seed = column.split("/")[0].split("_4"), *column.split("/")[1:]
        card = json.loads((tmp_path / name / "card.json").read_text())
        said = np.array(card["classes"])
        for way in ("subset", "program", "recipe"):
            alike = said[found[str(tmp_path / name)][way]] == run.predictions[column]
            assert alike.sum() >= len(alike) - bool(few)  # a value between two levels may be rounded the other way
        assert card["neurons"] == int(float(fraction) * 384)
        assert [card[key] for key in ("selection", "fraction", "seed")] == [selection, float(fraction), int(seed)]
        assert [card[key] for key in ("task", "layer", "width")] == ["digits", "penultimate", 384]
        rows = results[(results.selection == selection) & (results.fraction == float(fraction))]
        rows = rows[rows.bits == (4 if few else 32)]
        assert (card["bits"], card["bytes"]) == (rows.bits.iloc[0], rows.bytes.iloc[0])
        rows = rows[rows.seed == int(seed)].set_index("split")
        assert card["accuracy"] == {split: rows.accuracy[split] for split in ("val", "test")}
        right = (run.predictions[column] == run.predictions.label).mean()
        assert card["accuracy"]["test"] == pytest.approx(right, abs=1e-12)
        assert card["preprocessing"]["input_size"] == [3, 32, 32]
        assert card["preprocessing"]["crop_mode"] == "squash"


def test_exported_neurons_are_the_papers_for_that_seed(run, cli, tmp_path):
    cli(
        *("export", "--run", str(run.folder), "--selection", "random", "--fraction", "0.1", "--seed", "1"),
        *("--bits", "32", "--output", "o"),
    )
    subset = load_file(tmp_path / "o" / "subset.safetensors")
    assert torch.equal(subset["indices"], torch.randperm(384, generator=torch.Generator().manual_seed(1))[:38])
    assert subset["weight"].shape == (5, 38)
    assert subset["bias"].shape == (5,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"selection": "fisher"}, ["fisher", "full, random, pca, random_projection"]),
        ({"fraction": "0.2"}, ["0.2", "0.1, 0.5"]),
        ({"bits": "8"}, ["--bits is 8", "32, 4 for penultimate random"]),
        ({"seed": "7"}, ["7", "0, 1"]),
        ({"selection": "pca", "seed": "1"}, ["1", "has 0"]),
        ({"layer": "stem"}, ["stem", "penultimate"]),
        ({"run": "nowhere"}, ["nowhere", "config.yaml"]),
        ({"output": "/proc/nowhere"}, ["/proc/nowhere"]),
    ],
)
def test_what_a_run_has_not_is_refused_in_one_line(run, cli, change, named):
    asked = {"run": str(run.folder), "selection": "random", "bits": "32", "fraction": "0.1", "seed": "1"}
    asked["output"] = "out"
    flags = [part for key, value in (asked | change).items() for part in (f"--{key}", value)]
    status, _, err = cli("export", *flags)
    assert status == 2
    assert err.strip().startswith("error: ")
    assert err.strip().count("\n") == 0
    assert [name for name in named if name not in err] == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--run", "r"], ["--selection and --fraction and --output"]),
        (["--run", "r", "--fractio", "0.1"], ["'fractio'", "fraction?"]),
        (["--run", "r", "--selection", "s", "--output", "o", "--fraction", "much"], ["fraction is much", "a number"]),
    ],
)
def test_flags_that_are_wrong_or_missing_are_named_as_this_verb_calls_them(cli, flags, named):
    status, _, err = cli("export", *flags)
    assert status == 2
    assert err.strip().count("\n") == 0
    assert [name for name in named if name not in err] == []
    assert "model." not in err


def test_weights_that_changed_since_are_refused(run, cli, tmp_path):
    settings = (run.folder / "config.yaml").read_text()
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "checkpoints" / "last.ckpt").write_bytes((run.folder / "checkpoints" / "last.ckpt").read_bytes())
    (copy / "config.yaml").write_text(settings.replace("digits_0to4.safetensors", "random"))
    arguments = ["--selection", "random", "--fraction", "0.1", "--output", "out"]
    status, _, err = cli("export", "--run", str(copy), *arguments)
    assert status == 2
    assert "weights" in err
    assert not (tmp_path / "out").exists()
