"""The command line as a user meets it: real runs, the files they leave, and what a mistake is answered with."""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from conftest import ROOT, SHARED

from datamodules import Digits
from lightning_modules import RedundancyProbe
from lightning_modules.cli.run import run_name

SWEEP = "sweep_wandb.yaml"
SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
QUICK = ("fit", "--config", "quickstart.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
COLUMNS = (
    *("task", "backbone", "layer", "selection", "fraction", "neurons", "width", "bits", "bytes", "seed", "split"),
    *("images", "accuracy", "loss", "solver", "augmentation", "view", "features", "epoch"),
)


def digits(split):
    task = Digits([5, 6, 7, 8, 9])
    task.setup()
    return task.images[split]


# ------------------------------------------------------------------------------------------------ configurations


def test_pre_trainings_differ_in_objective_and_dropout_alone():
    kinds = {"adversarial_l2": "Adversarial", "adversarial_linf": "Adversarial", "decov": "DeCov"}
    kinds |= {"dropout": "CrossEntropy", "matryoshka": "Matryoshka"}
    base = yaml.safe_load((ROOT / "configs" / "pretrain_cifar10.yaml").read_text())["model"]["init_args"]
    for kind, name in kinds.items():
        found = yaml.safe_load((ROOT / "configs" / f"pretrain_cifar10_{kind}.yaml").read_text())
        model = base | found["model"]["init_args"]
        assert found.keys() == {"name", "model"}
        assert model["output"] == f"cifar10_{kind}.safetensors"
        assert model["objective"]["class_path"] == name
        assert model["kwargs"] == base["kwargs"] | ({"drop_rate": 0.5} if kind == "dropout" else {})
        assert {key: model[key] for key in model if key not in ("output", "objective", "kwargs")} == {
            key: base[key] for key in base if key not in ("output", "objective", "kwargs")
        }


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_configuration_is_commented(name):
    lines = (ROOT / "configs" / name).read_text().splitlines()
    bare = [line for line in lines if re.search(r":\s+[^#\s]", line) and not line.startswith("#") and " #" not in line]
    assert bare == []


def sweep_commands():
    """Command lines of the shipped sweep without the interpreter, as W&B's agents make them; all combinations."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "configs" / SWEEP).read_text())
    assert (sweep["method"], sweep["program"]) == ("grid", "train.py")
    names, values = zip(*((name, each["values"]) for name, each in sweep["parameters"].items()), strict=True)
    for combination in itertools.product(*values):
        given = {name: {"value": value} for name, value in zip(names, combination, strict=True)}
        macros = create_sweep_command_args({"args": given}) | {"env": [], "interpreter": [], "program": []}
        chunks = [re.fullmatch(r"\$\{(\w+)\}", chunk) or chunk for chunk in create_sweep_command(sweep["command"])]
        yield [word for chunk in chunks for word in ([chunk] if isinstance(chunk, str) else macros[chunk[1]])]


def test_the_sweep_covers_backbones_and_tasks_with_commands_that_parse(cli):
    found = []
    for command in sweep_commands():
        assert command[0] == "fit"
        if len(found) in (0, 9, 23):  # a parse takes a while
            status, out, err = cli(*command, "--print_config")
            assert status == 0, err
            assert f"name: {command[-1].partition('=')[2]}\n" in out
        found.append(tuple(command[1:]))
    assert len(set(found)) == len(found) == 6 * 4
    tasks, names = ({argument.partition("=")[2] for argument in column} for column in zip(*found, strict=True))
    assert all((ROOT / "configs" / task).is_file() for task in tasks)
    assert names <= set(timm.list_models(pretrained=True))


def test_a_command_of_the_sweep_runs(cli, tmp_path):
    quick = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["model"]["backbone"]
    command = next(sweep_commands())
    status, _, err = cli(
        *command,
        *(f"--model.backbone={json.dumps(quick)}", "--data=Digits", "--data.digits=[0,1]", "--model.seeds=1"),
        *("--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--name=swept", "--pictures=[]"),
    )
    assert status == 0, err
    assert (tmp_path / "runs" / "swept" / "report.html").is_file()
    assert list((tmp_path / "runs" / "swept").glob("wandb/offline-run-*"))


@pytest.mark.parametrize(
    ("task", "weight_decay", "size"),
    [
        *(("cifar10", 5e-4, "20pct"), ("cifar100", 5e-4, "curve")),
        *(("flowers102", 1e-4, "curve"), ("oxford_iiit_pet", 1e-4, "20pct")),
    ],
)
def test_the_papers_recipe_is_that_of_its_authors(cli, task, weight_decay, size):
    status, out, err = cli("fit", "-c", f"{task}_{size}.yaml", "-c", "paper_recipe.yaml", "--print_config")
    assert status == 0, err
    config = yaml.safe_load(out)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (trainer["max_epochs"], trainer["check_val_every_n_epoch"]) == (100, 5)
    assert model["solver"]["class_path"].endswith(".SGD")
    solver = {"learning_rate": 0.1, "momentum": 0.9, "step_size": 20, "gamma": 0.1, "keep": "best"}
    assert model["solver"]["init_args"] == solver | {"weight_decay": weight_decay}
    assert (model["features"], data["augmentation"], data["batch_size"]) == ("off", "paper", 256)
    assert (model["standardise"], model["selection"], model["seeds"]) == (False, "random", [1, 2, 3, 4, 5])
    tenths = [0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.9]
    assert model["fractions"] == (0.2 if size == "20pct" else tenths)
    assert model["backbone"]["name"] == "resnet50.a1_in1k"
    overlay = model["backbone"]["pretrained_cfg_overlay"]
    assert {key: value for key, value in overlay.items() if value is not None} == {
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


@pytest.mark.parametrize(
    ("arguments", "solver"),
    [
        (["--model.solver.learning_rate=0.05"], {"SGD": {"learning_rate": 0.05, "momentum": 0.9}}),
        (["--config=settings.yaml"], {"SGD": {"learning_rate": 0.07, "keep": "last"}}),
        (["--model=RedundancyProbe"], {"SGD": {"learning_rate": 0.1}}),
        (["--config=quickstart.yaml", "--model.solver=Ridge", "--model.solver.penalty=[0.1,1]"], {"Ridge": {}}),
    ],
    ids=["a flag", "settings in a file", "nothing", "another solver"],
)
def test_a_solver_is_sgd_where_none_is_named(cli, tmp_path, arguments, solver):
    (tmp_path / "settings.yaml").write_text("model: {solver: {init_args: {learning_rate: 0.07, keep: last}}}\n")
    status, out, err = cli("fit", "--data=Digits", *arguments, "--print_config")
    assert (status, err) == (0, "")
    ((name, expected),) = solver.items()
    found = yaml.safe_load(out)["model"]["init_args"]["solver"]
    assert found["class_path"].endswith(f".{name}")
    assert expected.items() <= found["init_args"].items()
    assert name == "SGD" or found["init_args"] == {"penalty": [0.1, 1.0]}


def test_the_default_solver_from_python_is_sgd():
    assert RedundancyProbe(None).solver.describe().startswith("SGD (learning_rate 0.1, ")


def test_a_run_begins_with_what_it_will_do_as_resolved(cli, tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n\nclass Silent(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overlay = ("--config=debug.yaml", "--model.backbone.name=resnet18", "--model.backbone.weights=random")
    overlay += ("--model.backbone.kwargs.stem_width=4", "--trainer.callbacks=own_callbacks.Silent", "--pictures=[]")
    status, _, err = cli(*QUICK, *overlay, "--model.backbone.kwargs={}", "--data.digits=[5,6]")
    assert status == 0, err
    block = dict(re.findall(r"^([a-z ]+?)  +(\S.*)$", err, re.MULTILINE))
    assert block["task"].startswith("digits: 219 train, 72 val (cut from train), 72 test (cut")
    assert block["backbone"].startswith("resnet18, random weights, layer penultimate (512 neurons), 3 x 32 x 32")
    assert block["features"] == "clean view, extracted once"
    assert block["solver"].startswith("SGD (learning_rate 0.1, ")
    assert block["measures"] == "Accuracy, CKA, Inequality"
    assert "random x fractions 0.1, 0.5 x 2 seeds, and the full layer" in block["probes"]
    assert block["own code"] == "own_callbacks.Silent"
    assert block["folder"] == "runs/debug"
    assert err.index("task ") < err.index("Features of train")
    assert re.search(r"extracted in \S+; delete it to clear them\. [\d,]+ images/s; the backbone waited", err)
    assert err.count("\nfolder ") == 1


# -------------------------------------------------------------------------------------------------- the quickstart


def test_quickstart_prints_the_curve_the_answer_and_its_files(quickstart):
    folder, done = quickstart
    row = r"^random +0\.1 +38 +\d+\.\d % ± +\d+\.\d +\d+\.\d % \(\d+\.\d to \d+\.\d\) +█+$"
    assert re.search(row, done.stdout, re.MULTILINE)
    (summary,) = json.loads((folder / "summary.json").read_text())["layers"]
    assert re.fullmatch(
        r"To keep 90 % of the accuracy, 95 % certain on 179 validation images: keep \d+ of 384 neurons \(random\), "
        r"[\d.]+ % of the bytes\. On 179 test images that keeps \d+\.\d % \(\d+\.\d to \d+\.\d\): "
        r"\d+\.\d instead of \d+\.\d %\.",
        summary["answer"],
    )
    assert summary["answer"] in done.stdout
    for name in ("results.csv", "classes.csv", "summary.json", "curve.png", "curve.svg", "report.html"):
        assert f"{folder.parent.name}/{folder.name}/{name}" in done.stdout
        assert (folder / name).stat().st_size > 0
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert (folder / "config.yaml").exists()


def test_quickstart_says_little_where_nobody_watches(quickstart):
    said = quickstart[1].stdout + quickstart[1].stderr
    assert len(said.splitlines()) < 60
    assert "\r" not in said


def test_quickstart_results_are_complete_and_exact(quickstart):
    folder, _ = quickstart
    results, classes = pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "classes.csv")
    assert list(results.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert len(results) == 2 * (9 * 5 + 1)
    assert results["width"].unique().tolist() == [384]
    expected = [max(1, int(fraction * 384 + 1e-9)) for fraction in results["fraction"]]
    assert results["neurons"].tolist() == expected
    for split, rows in results.groupby("split"):
        assert rows["images"].unique().tolist() == [len(digits(split))]
    correct = results["accuracy"] * results["images"]
    np.testing.assert_allclose(correct, correct.round(), atol=1e-9)
    keys = ["selection", "fraction", "seed", "split"]
    summed = classes.groupby(keys)[["correct", "images"]].sum().reset_index()
    merged = results.merge(summed, on=keys, suffixes=("", "_of_classes"))
    assert len(merged) == len(results)
    np.testing.assert_allclose(merged["accuracy"] * merged["images"], merged["correct"], atol=1e-9)
    assert (merged["images"] == merged["images_of_classes"]).all()
    assert sorted(classes["class"].unique()) == [5, 6, 7, 8, 9]


def test_quickstart_learns_and_redundancy_shows(quickstart):
    results = pd.read_csv(quickstart[0] / "results.csv").query("split == 'test'")
    means = results.groupby(["selection", "fraction"])["accuracy"].mean()
    assert means["full", 1.0] > 0.65
    assert means["random", 0.005] < means["random", 0.02] < means["random", 0.1] < means["full", 1.0]
    assert means["random", 0.1] > 0.85 * means["full", 1.0]


def test_quickstart_summary_agrees_with_its_results(quickstart):
    folder, _ = quickstart
    run = json.loads((folder / "summary.json").read_text())
    (summary,) = run["layers"]
    test = pd.read_csv(folder / "results.csv").query("split == 'test'")
    full = test[test["selection"] == "full"]["accuracy"].mean()
    assert summary["full_accuracy"] == pytest.approx(full, abs=1e-12)
    for point in summary["curve"]:
        values = test[(test["selection"] == "random") & (test["fraction"] == point["fraction"])]["accuracy"]
        assert point["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert point["std"] == pytest.approx(np.std(values), abs=1e-12)
    ratios = {point["fraction"]: point["mean"] / full for point in summary["curve"]} | {1.0: 1.0}
    redundancy = summary["diffused_redundancy"]["random"]
    assert redundancy["threshold"]["0.9"] == pytest.approx(1 - min(f for f, r in ratios.items() if r >= 0.9))
    assert redundancy["nearest"]["0.9"] == pytest.approx(1 - min(ratios, key=lambda f: (abs(ratios[f] - 0.9), f)))
    assert set(run["versions"]) >= {"torch", "lightning", "timm"}
    assert run["seconds"]["fit"] > run["seconds"]["extraction"] > 0


def test_quickstart_logs_to_wandb_offline(quickstart):
    folder, done = quickstart
    assert "wandb sync" in done.stderr
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_the_checkpoint_holds_probes_and_indices_but_no_backbone(quickstart):
    checkpoint = torch.load(quickstart[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("backbone" in key for key in checkpoint["state_dict"])
    assert {"grid.banks.0.weight", "grid.kept.0.weight", "grid.kept_score", "grid.kept_epoch"} <= set(
        checkpoint["state_dict"]
    )
    for probe, indices in zip(checkpoint["probes"]["probes"], checkpoint["probes"]["indices"], strict=True):
        if probe[0] == "random":
            expected = torch.randperm(384, generator=torch.Generator().manual_seed(probe[3]))[: probe[2]]
            assert torch.equal(indices, expected)


def test_test_validate_and_predict_write_their_files_and_leave_the_results(quickstart, cli, tmp_path):
    folder, _ = quickstart
    before = (folder / "results.csv").read_bytes()
    common = ("--config", str(folder / "config.yaml"), "--ckpt_path", "last", "--trainer.enable_progress_bar=false")
    common += ("--trainer.default_root_dir", str(folder.parent))
    results = pd.read_csv(folder / "results.csv")
    for verb, split in (("validate", "val"), ("test", "test")):
        assert cli(verb, *common)[0] == 0
        written = pd.read_csv(folder / f"{verb}.csv")
        stored = results[results["split"] == split].reset_index(drop=True)
        pd.testing.assert_frame_equal(written[["accuracy", "images"]], stored[["accuracy", "images"]], atol=1e-12)
        assert list(written.columns) == list(results.columns)
    assert cli("predict", *common)[0] == 0
    predictions = pd.read_csv(folder / "predictions.csv")
    stored = results[results["split"] == "test"]
    for row in stored.itertuples():
        column = f"{row.selection}/{row.fraction:g}/{row.seed}"
        assert (predictions[column] == predictions["label"]).sum() == round(row.accuracy * row.images)
    assert (folder / "results.csv").read_bytes() == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_bar_for_all_epochs(cli, short, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, _, err = cli(*short, "--trainer.enable_progress_bar=true", "--trainer.num_sanity_val_steps=0")
    assert status == 0, err
    bars = [line.split("\r")[-1] for line in terminal.getvalue().split("\n") if "%|" in line]
    names = [line.partition(":")[0] for line in bars]
    assert names == ["Extracting train", "Extracting val", "Extracting test", "Training"]
    assert re.match(r"Training: 100%\|#+\| 27/27 \[", bars[-1])  # 3 epochs of 538 images, in batches of 64


def test_a_run_is_not_lost_to_a_character(cli, short, image_folder, monkeypatch):
    (image_folder / "train" / "cat").rename(image_folder / "train" / "chät")
    ascii_alone = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_alone)
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")  # of files
    status, _, err = cli(*short, "--data=ImageFolder", "--data.root=pets", "--data.num_workers=0", "--name=chäts")
    assert status == 0, err
    ascii_alone.seek(0)
    assert re.search(
        r"^random +0\.5 +192 +\d+\.\d % \+- +\d+\.\d +\d+\.\d % \(\d+\.\d to \d+\.\d\) +#+$",
        ascii_alone.read(),
        re.MULTILINE,
    )
    folder = Path("runs/chäts")
    assert set(pd.read_csv(folder / "classes.csv")["class"]) == {"chät", "dog"}
    assert "±" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", b"## +- ? ?"), ("cp1252", b"## \xb1 \xe9 ?")])
def test_what_a_terminal_lacks_is_printed_in_its_characters(encoding, printed):
    assert "██ ± é 中".encode(encoding, "plain") == printed


def test_a_name_that_is_too_long_for_a_folder_is_cut_and_stays_apart():
    names = [run_name(None, 200 * "é" + ending) for ending in "ab"]
    assert len({*names}) == 2
    assert all(name.startswith(100 * "é") and 240 < len(name.encode()) <= 255 for name in names)
    assert run_name(None, "pets_net_random") == "pets_net_random"


def test_a_bare_off_in_yaml_means_off(cli, short, tmp_path):
    (tmp_path / "off.yaml").write_text("model:\n  features: off\n")
    arguments = ("--config", "off.yaml", "--name=off", "--trainer.max_epochs=1")
    status, _, err = cli(*short, *arguments)
    assert status == 0, err
    assert pd.read_csv(tmp_path / "runs" / "off" / "results.csv")["features"].unique().tolist() == ["off"]
    assert not (tmp_path / "runs" / "feature_cache").exists()


# --------------------------------------------------------------------------------------------------- other runs


def test_an_image_folder_is_probed_with_a_torchvision_backbone(cli, image_folder, tmp_path):
    status, _, err = cli(
        *("fit", "--config", "image_folder.yaml", "--config", "debug.yaml", f"--data.root={image_folder}"),
        *("--model.backbone.name=torchvision.models.squeezenet1_1", "--model.backbone.weights=random"),
        *("--model.backbone.pretrained_cfg_overlay.input_size=[3,32,32]", "--name=pets", "--pictures=[]"),
        *("--model.backbone.pretrained_cfg_overlay.mean=[0.5,0.5,0.5]", "--model.selection=[random,first]"),
        *("--model.backbone.pretrained_cfg_overlay.std=[0.5,0.5,0.5]", "--trainer.enable_progress_bar=false"),
    )
    assert status == 0, err
    results = pd.read_csv(tmp_path / "runs" / "pets" / "results.csv")
    assert results["task"].unique().tolist() == ["pets"]
    assert results["backbone"].unique().tolist() == ["torchvision.models.squeezenet1_1-random"]
    assert results.query("split == 'test'")["images"].unique().tolist() == [8]
    assert results.query("selection == 'first'").groupby(["split", "fraction"]).size().unique().tolist() == [1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real images and weights beside the checkout")
def test_a_real_backbone_on_real_flowers(start, tmp_path):
    import tarfile

    for split in ("train", "test"):
        with tarfile.open(SHARED / "data" / f"flowers12_{split}.tar") as archive:
            archive.extractall(tmp_path / "flowers12" / split, filter="data")
        for folder in (tmp_path / "flowers12" / split).iterdir():
            for surplus in sorted(folder.iterdir())[12 if split == "train" else 8 :]:
                surplus.unlink()
    weights = SHARED / "weights" / "mobilenetv2_100.imagenet1k.safetensors"
    (process,) = start(
        *("fit", "--config", "image_folder.yaml", "--data.root=flowers12", "--model.backbone.name=mobilenetv2_100"),
        *(f"--model.backbone.weights={weights}", "--model.backbone.kwargs={pad_type: same}", "--trainer.logger=false"),
        *("--model.backbone.pretrained_cfg_overlay={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",),
        *("--model.fractions=[0.01,0.2]", "--model.measures=[]", "--trainer.max_epochs=40", "--pictures=[]"),
        cwd=tmp_path,
    )
    done = process.wait()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "flowers12_mobilenetv2_100.imagenet1k_random"
    means = (
        pd.read_csv(folder / "results.csv")
        .query("split == 'test'")
        .groupby(["selection", "fraction"])["accuracy"]
        .mean()
    )
    assert means["full", 1.0] > 0.8
    assert means["random", 0.2] > 0.9 * means["full", 1.0]
    assert means["random", 0.01] < 0.6 * means["full", 1.0]


@pytest.mark.parametrize("asked", ["--help", "", "comparr"], ids=["help", "nothing", "a wrong verb"])
def test_every_verb_is_told_with_a_line_of_what_it_does(cli, asked):
    status, out, err = cli(*asked.split())
    assert status == (0 if asked == "--help" else 2)
    for verb in ("fit", "validate", "test", "predict", "sweep", "compare", "invert", "export"):
        assert re.search(rf"^  {verb} +[A-Z].*\.$", out + err, re.MULTILINE)


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        *(("fit", "--trainer.max_epochs"), ("sweep", "--shard"), ("invert", "--regulariser")),
        *(("compare", "--reference"), ("export", "--fraction")),
    ],
)
def test_the_help_of_a_verb_lists_its_options(cli, verb, option):
    status, out, _ = cli(verb, "--help")
    assert status == 0
    assert option in out
