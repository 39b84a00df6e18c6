import json
import sys
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from evaluation import quantised
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


FORMS = """
import json, os, sys
import faiss, numpy as np, onnxruntime, torch
from sentence_transformers import SentenceTransformer
for folder in sys.argv[1:]:
    os.chdir(folder)
    features, told = np.load("features.npy"), {}
    for name, use in json.load(open("card.json"))["formats"].items():
        exec(use)
        if name == "faiss":  # sa_decode of the whole index would also turn back
            store, transform = faiss.downcast_index(index.index), faiss.read_VectorTransform("transform.faiss")
            kept = store.sa_decode(store.sa_encode(transform.apply(features)))
            told["found"], told["bytes"] = found[1], store.code_size
        told[name] = np.asarray(kept.detach() if isinstance(kept, torch.Tensor) else kept)
    SentenceTransformer(modules=list(model)).save("again", create_model_card=False)
    again = SentenceTransformer("again", trust_remote_code=True)
    told["again"] = again({"sentence_embedding": torch.from_numpy(features)})["sentence_embedding"].detach().numpy()
    np.savez("told.npz", **told)
ours = ("lightning_modules", "datamodules", "train")
assert not [name for name in sys.modules if name.split(".")[0] in ours]
"""
"""A program that uses the further forms as their cards say."""


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
    arguments += ["--model.refit", "true", "--model.bits", "[32, 4]", "--pictures", "[]"]
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


def run_apart(start, folder, program, *args, **given):
    """Run a program where this project is not to be found; return what it prints."""
    (folder / "program.py").write_text(program)
    done = start(*map(str, args), cwd=folder, program=folder / "program.py", **given)[0].wait()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exported_files_predict_what_the_run_predicted_and_need_nothing_of_this_project(run, cli, start, tmp_path):
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
    folders = [tmp_path / name for name in wanted.values()]
    found = json.loads(run_apart(start, tmp_path, USE, run.inputs, *folders, has="torch"))
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
    subset, order = load_file(tmp_path / "neurons" / "subset.safetensors"), torch.Generator().manual_seed(1)
    assert torch.equal(subset["indices"], torch.randperm(384, generator=order)[:38])  # as in the paper's code
    assert (subset["weight"].shape, subset["bias"].shape) == ((5, 38), (5,))


def test_every_form_gives_the_vectors_of_the_run_in_a_process_without_this_project(cli, papers, start, tmp_path):
    corpus, order = np.load(papers / "corpus.npz")["vectors"], torch.randperm(20, generator=torch.manual_seed(1))[:10]
    directions = np.linalg.eigh(np.cov(corpus.T.astype(float)))[1][:, :-11:-1]
    directions *= np.sign(directions[abs(directions).argmax(0), range(10)])
    coordinates = {"random": corpus[:, order], "pca_uncentred": (corpus @ directions).astype(np.float32)}
    wanted = {}
    for compared, taken in (
        ("cosine both", [("random", 32), ("random", 1), ("pca_uncentred", 4)]),
        ("l2 stored", [("random", 8), ("random", 2)]),
    ):
        selections, numbers = (",".join(map(str, dict.fromkeys(each))) for each in zip(*taken, strict=True))
        similarity, quantised_sides = compared.split()
        fit = ("fit", "--config", "retrieval_beir.yaml", "--trainer.logger=false", f"--name={similarity}")
        fit += (f"--model.selection=[{selections}]", "--model.fractions=0.5", "--model.seeds=[1]")
        fit += (
            f"--model.solver.quantised={quantised_sides}",
            f"--model.solver.similarity={similarity}",
            f"--model.bits=[{numbers}]",
            "--trainer.accelerator=cpu",
            "--pictures=[]",
        )
        status, _, err = cli(*fit, "--data.root=papers")
        assert status == 0, err
        for selection, bits in taken:
            folder = tmp_path / f"{similarity}_{selection}_{bits}"
            asked = ("--selection", selection, "--bits", str(bits), "--fraction", "0.5", "--output", folder.name)
            asked += ("--seed", "1" if selection == "random" else "0")
            forms = ("--formats", "[faiss,onnx,sentence_transformers]")
            status, out, err = cli("export", "--run", f"runs/{similarity}", *asked, *forms)
            assert status == 0, err
            assert [name for name in out.split() if not (tmp_path / name).is_file()] == []
            np.save(folder / "features.npy", corpus)
            kept = coordinates[selection]
            kept = quantised(kept, kept, bits) if bits < 32 else kept
            wanted[folder] = kept / np.linalg.norm(kept, axis=1, keepdims=True) if similarity == "cosine" else kept
    variables = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run_apart(start, tmp_path, FORMS, *wanted, has="libraries", **variables)
    for folder, kept in wanted.items():
        told, card = dict(np.load(folder / "told.npz")), json.loads((folder / "card.json").read_text())
        cosine, exact = folder.name.startswith("cosine"), card["bits"] == 32 or folder.name.startswith("l2")
        assert told["bytes"] == card["bytes"]
        if cosine:  # FAISS stores them before they are brought back to length 1
            told["faiss"] /= np.linalg.norm(told["faiss"], axis=1, keepdims=True)
        for name in ("faiss", "onnx", "sentence_transformers", "again"):
            differ = abs(told[name] - kept).max(1) > 1e-5
            assert differ.sum() <= (card["bits"] < 32), (folder, name)  # a value between two levels may go either way
        assert ("rank them again by cosine" in card["formats"]["faiss"]) != exact
        assert ("use_of_queries" in card) == (not cosine)
        if exact:
            queries = {"features": torch.from_numpy(corpus), "subset": load_file(folder / "subset.safetensors")}
            exec(card.get("use_of_queries", card["use"][0]), queries | {"torch": torch}, queries)
            asked = queries["kept"][:1].double().numpy()
            alike = (asked @ kept.T if cosine else -np.square(asked - kept).sum(1)[None])[0]
            assert alike[told["found"][0]] == pytest.approx(np.sort(alike)[::-1][:10], rel=1e-4)


def test_a_form_whose_library_is_not_there_is_refused_before_anything_is_written(run, cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    asked = ("--selection", "random", "--fraction", "0.1", "--bits", "32", "--output", "out")
    status, _, err = cli("export", "--run", str(run.folder), *asked, "--formats", "faiss")
    assert status == 2
    assert "--formats faiss needs faiss, which is not installed; `pip install 'diffused-redundancy[faiss]'`" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"selection": "fisher"}, ["fisher", "full, random, pca, random_projection"]),
        ({"fraction": "0.2"}, ["0.2", "0.1, 0.5"]),
        ({"bits": "8"}, ["--bits is 8", "32, 4 for penultimate random"]),
        ({"seed": "7"}, ["7", "0, 1"]),
        ({"selection": "pca", "seed": "1"}, ["1", "has 0"]),
        ({"layer": "stem"}, ["stem", "penultimate"]),
        ({"formats": "gguf"}, ["--formats has 'gguf'", "faiss, onnx, sentence_transformers"]),
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
