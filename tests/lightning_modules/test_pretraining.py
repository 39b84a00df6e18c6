import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch.nn import functional as F
from torch.testing import assert_close

from datamodules import Digits
from lightning_modules import FrozenBackbone, Pretraining
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.checkpoints import Checkpoints
from lightning_modules.objectives import Adversarial, CrossEntropy, Matryoshka

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAIN = ("--config", "pretrain_digits.yaml", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
FIT = ("fit", *PRETRAIN, "--model.output=remade.safetensors")
SMALL = {"in_chans": 1, "channels": [16, 32, 64, 64], "layers": [1, 1, 1, 1], "output_stride": 8}
GREY = PretrainedCfgOverlay([1, 8, 8], [0.4], [0.3], "bilinear", 1.0)
"""A ResNet-18 for the digits as they are, 8 x 8 pixels."""


def trained(output, objective=None, epochs=1, digits=(3, 5, 8), callbacks=(), kwargs=SMALL, ckpt_path=None, **options):
    """Pre-train on a few digits; return the model, its task and the Trainer."""
    torch.manual_seed(0)
    model = Pretraining("resnet18", str(output), kwargs, GREY, objective, **{"learning_rate": 0.02} | options)
    task = Digits(list(digits), batch_size=64)
    task.preprocessing = model.preprocessing
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, Checkpoints) for each in callbacks),
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        use_distributed_sampler=False,
    )
    trainer.fit(model, task, ckpt_path=ckpt_path)
    return model, task, trainer


def test_two_epochs_are_those_of_a_plain_training_loop_bit_for_bit(cli, tmp_path):
    status, out, err = cli(*FIT, "--trainer.max_epochs=2")
    assert status == 0, err
    config = yaml.safe_load((CONFIGS / "pretrain_digits.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    torch.manual_seed(0)
    network = timm.create_model(
        model["name"], num_classes=5, pretrained_cfg_overlay=model["pretrained_cfg_overlay"], **model["kwargs"]
    )
    task = Digits(**data)
    task.preprocessing = resolve_model_data_config(network)
    task.setup()
    loader = task.train_dataloader()
    rate = model["learning_rate"]
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=model["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=2 * len(loader), pct_start=0.1)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimiser.zero_grad()
            loss = F.cross_entropy(network(batch.inputs), batch.labels, reduction="sum") * (1 / batch.total)
            loss.backward()
            optimiser.step()
            schedule.step()
    remade, expected = load_file(tmp_path / "remade.safetensors"), network.state_dict()
    assert expected.keys() - remade.keys() == {"fc.weight", "fc.bias"}
    assert [name for name, value in remade.items() if not torch.equal(value, expected[name])] == []
    shipped = load_file(CONFIGS / "digits_0to4.safetensors")
    assert {name: value.shape for name, value in remade.items()} == {name: v.shape for name, v in shipped.items()}
    network.eval()
    with torch.no_grad():
        right = torch.cat([network(batch.inputs).argmax(1) == batch.labels for batch in task.test_dataloader()])
    assert len(right) == len(task.images["test"])
    assert float(re.search(r"test/accuracy\D+([\d.]+)", out)[1]) == pytest.approx(right.float().mean().item())


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(cli):
    short = ("--trainer.max_epochs=2", "--data.digits=[0,1]", "--data.batch_size=256")
    status, out, err = cli(*FIT, *short)
    assert status == 0, err
    status, tested, err = cli("test", *PRETRAIN, *short)
    assert status == 0, err
    accuracy = re.search(r"test/accuracy\D+[\d.]+", out)[0]
    assert accuracy in tested
    for change, said in (
        ("--model.objective.label_smoothing=0.1", "objective is CrossEntropy(label_smoothing=0.0), not CrossEntropy("),
        ("--model.learning_rate=0.1", "learning_rate is 0.003, not 0.1"),
        ("--model.kwargs.stem_width=16", "architecture is resnet26(channels="),
        ("--data.digits=[0,2]", "classes is ['0', '1'], not ['0', '2']"),
    ):
        status, _, err = cli(*FIT, *short, change, "--ckpt_path=last")
        assert status == 2
        assert said in err.splitlines()[-1]
    status, _, err = cli(
        "test", "--config", "quickstart.yaml", "--ckpt_path=runs/pretrain_digits/checkpoints/last.ckpt"
    )
    assert status == 2
    assert err.splitlines()[-1].startswith("error: ")


def test_a_checkpoint_of_probes_is_refused():
    model = Pretraining("test_resnet", "weights.safetensors")
    with pytest.raises(MisconfigurationException, match="is not one of Pretraining"):
        model.on_load_checkpoint({"probes": {}})


def test_what_will_be_done_is_known_before_the_network_is_built():
    overlay = PretrainedCfgOverlay([3, 32, 32], crop_pct=1.0)
    model = Pretraining("test_resnet", "out/weights.safetensors", {"stem_type": "deep"}, overlay, learning_rate=0.01)
    assert model.network is None
    assert model.label == "weights"
    network = timm.create_model("test_resnet", pretrained_cfg_overlay=overlay.given())
    assert model.preprocessing == resolve_model_data_config(network)
    assert model.describe(Digits(batch_size=64)) == {
        "network": "test_resnet(stem_type=deep), random weights, 3 x 32 x 32, bilinear, crop 1, mean 0.5 0.5 0.5, "
        "std 0.5 0.5 0.5",
        "objective": "CrossEntropy(label_smoothing=0.0)",
        "optimiser": "AdamW, learning rate up to 0.01 (warm-up, then cosine), weight decay 0.05, batches of 64",
        "output": "out/weights.safetensors",
    }


@pytest.mark.parametrize("name", ["resnt26", "torchvision.models.resnet18", "resnet26.nope"])
def test_an_architecture_that_timm_does_not_have_is_refused(name):
    with pytest.raises(MisconfigurationException, match=f"timm has no .*{name}|{name}.*timm has no"):
        Pretraining(name, "weights.safetensors")


def test_sgd_warms_up_and_then_falls_as_a_cosine(tmp_path):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            (optimiser,) = trainer.optimizers
            assert type(optimiser) is torch.optim.SGD
            (group,) = optimiser.param_groups
            assert (group["momentum"], group["weight_decay"]) == (0.8, 1e-4)
            rates.append(group["lr"])

    settings = {"optimizer": "SGD", "momentum": 0.8, "weight_decay": 1e-4, "learning_rate": 0.1, "warmup_steps": 4}
    model, task, _ = trained(tmp_path / "out.safetensors", epochs=2, callbacks=[Rates()], **settings)
    steps = len(rates)
    assert steps == 2 * len(task.train_dataloader())
    up, down = np.linspace(0, 1, 4), np.linspace(0, 1, steps - 3)
    cosine = [(1 + np.cos(np.pi * each)) / 2 for each in (1 - up, down)]  # the last of one is the first of the other
    expected = np.concatenate([0.004 + 0.096 * cosine[0], (0.1 * cosine[1])[1:]])
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    said = "SGD, momentum 0.8, learning rate up to 0.1 (warm-up of 4 steps, then cosine), weight decay 0.0001"
    assert model.describe(task)["optimiser"] == f"{said}, batches of 64"
    with pytest.raises(
        MisconfigurationException, match="warmup_steps is 6; it must be below 6, the steps of the whole"
    ):
        trained(tmp_path / "out.safetensors", warmup_steps=6)


def test_a_file_says_what_made_it_and_is_enough_for_a_backbone(tmp_path):
    output = tmp_path / "out.safetensors"
    model, task, trainer = trained(output, Adversarial(0.1, "Linf", 1), 2)
    with safe_open(output, "pt") as file:
        made = json.loads(file.metadata()["pretraining"])
    (validated,) = trainer.validate(model, task, verbose=False)
    assert {name: made.pop(name) for name in validated} == validated
    assert validated.keys() == {"val/accuracy", "val/robust_accuracy"}
    assert made == {
        "architecture": "resnet18",
        "kwargs": SMALL,
        "weights": "random",
        "preprocessing": vars(GREY),
        "objective": "Adversarial(eps=0.1, norm='Linf', steps=1, step_size=None, random_start=False)",
        "optimiser": model.describe(task)["optimiser"],
        "data": task.describe(),
        "classes": ["3", "5", "8"],
        "epochs": 2,
    }
    backbone = FrozenBackbone(weights=str(output))
    given = FrozenBackbone("resnet18", str(output), SMALL | {"layers": tuple(SMALL["layers"])}, GREY)
    assert backbone.provenance()["weights"] == given.provenance()["weights"]
    assert (backbone.label, backbone.preprocessing) == (given.label, given.preprocessing)
    assert f"weights {output} of Adversarial(eps=0.1, " in backbone.describe()
    larger = FrozenBackbone(weights=str(output), pretrained_cfg_overlay=PretrainedCfgOverlay([1, 16, 16]))
    assert larger.preprocessing == given.preprocessing | {"input_size": (1, 16, 16)}
    for wrong, said in (
        (
            {"name": "resnet26"},
            f"model.backbone.name is resnet26, but {output} holds the weights of resnet18(in_chans=1",
        ),
        ({"kwargs": SMALL | {"in_chans": 3}}, "model.backbone.kwargs are {'in_chans': 3, "),
    ):
        with pytest.raises(MisconfigurationException, match=re.escape(said)):
            FrozenBackbone(weights=str(output), **wrong)


def test_a_training_starts_from_a_file_with_a_new_classifier(tmp_path):
    first, second = (str(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    trained(first)
    tuned = Pretraining(output=second, weights=first)
    assert (tuned.name, tuned.kwargs, vars(tuned.overlay)) == ("resnet18", SMALL, vars(GREY))
    model, _, _ = trained(second, digits=(0, 1), weights=first, learning_rate=0.0)
    assert model.network.get_classifier().out_features == 2
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    with pytest.raises(MisconfigurationException, match=f"model.name is resnet26, but {first} holds the weights of"):
        Pretraining("resnet26", second, weights=first)


def test_the_file_alone_is_enough_on_the_command_line(cli, tmp_path):
    trained(tmp_path / "out.safetensors")
    given = ("--model.backbone.weights=out.safetensors", "--trainer.logger=false")
    short = ("--model.solver=Ridge", "--model.fractions=0.5", "--model.seeds=1", "--model.measures=[]", "--name=run")
    short += ("--pictures=[]",)
    status, _, err = cli("fit", "--data=Digits", "--data.digits=[0,1]", *given, *short)
    assert status == 0, err
    assert "resnet18(in_chans=1" in err
    assert "digits,resnet18-out,penultimate,full" in (tmp_path / "runs" / "run" / "results.csv").read_text()
    status, _, err = cli("fit", "--config=quickstart.yaml", *given)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: model.backbone.name is resnet26, but out.safetensors holds the wei")
    status, out, err = cli("fit", "--config=quickstart.yaml", "--model.backbone=null", *given, "--print_config")
    assert status == 0, err
    backbone = yaml.safe_load(out)["model"]["init_args"]["backbone"]
    assert (backbone["name"], backbone["kwargs"], backbone["weights"]) == (None, None, "out.safetensors")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "model.backbone.name is null, and weights {} do not say what they are of; name the architecture"),
        ({"architecture": "os.system", "kwargs": {"command": "touch ran"}}, "{} says it is of 'os.system', which timm"),
    ],
)
def test_weights_that_do_not_say_a_timm_architecture_are_not_enough(tmp_path, made, said):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(1)}, path, {"pretraining": json.dumps(made)} if made else None)
    with pytest.raises(MisconfigurationException, match=re.escape(said.format(path))):
        FrozenBackbone(weights=str(path))
    for word in () if made else ("pretrained", "random"):
        with pytest.raises(MisconfigurationException, match=re.escape(said.format(word))):
            FrozenBackbone(weights=word)


def test_adversarial_training_makes_a_network_more_robust(tmp_path):
    attack = Adversarial(0.15, "Linf", 10, 0.03).attack
    accuracies = []
    for objective in (CrossEntropy(), Adversarial(0.15, "Linf")):
        model, task, trainer = trained(tmp_path / "out.safetensors", objective, 4)
        network = model.network.eval()
        clean, robust = [], []
        for batch in task.test_dataloader():
            for found, images in ((clean, batch.inputs), (robust, attack(network, batch.inputs, batch.labels))):
                found.append(network(images).argmax(1) == batch.labels)
        accuracies.append([torch.cat(found).double().mean().item() for found in (clean, robust)])
    (clean, robust), (adversarial_clean, adversarial_robust) = accuracies
    assert min(clean, adversarial_clean) > 0.85
    assert robust < 0.5 < adversarial_robust - 0.05
    (tested,) = trainer.test(model, task, verbose=False)
    assert tested["test/accuracy"] == pytest.approx(adversarial_clean)
    assert adversarial_robust <= tested["test/robust_accuracy"] + 0.02  # of three steps
    assert tested["test/robust_accuracy"] < adversarial_clean


@pytest.mark.parametrize("objective", [lambda: Adversarial(0.1, random_start=True), Matryoshka])
def test_a_killed_training_goes_on_as_one_that_was_not(tmp_path, objective):
    class Kill(Callback):
        def on_train_epoch_start(self, trainer, model):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    last = tmp_path / "last.ckpt"
    given = {"epochs": 2, "digits": (0, 1), "kwargs": SMALL | {"drop_rate": 0.5}}
    trained(tmp_path / "whole.safetensors", objective(), **given)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trained(tmp_path / "killed.safetensors", objective(), callbacks=[Checkpoints(last), Kill()], **given)
    torch.manual_seed(1)
    trained(tmp_path / "killed.safetensors", objective(), ckpt_path=last, **given)
    whole, killed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, killed[name])] == []


@pytest.mark.parametrize("objective", ["DeCov, init_args: {alpha: 1}", "Adversarial, init_args: {eps: 1}"])
def test_two_processes_train_as_one(start, tmp_path, objective):
    (tmp_path / "run.yaml").write_text(f"""
trainer: {{accelerator: cpu, max_epochs: 1, logger: false}}
model:
  class_path: Pretraining
  init_args:
    name: test_vit
    kwargs: {{img_size: 32}}
    pretrained_cfg_overlay: {{input_size: [3, 32, 32]}}
    objective: {{class_path: {objective}}}
    optimizer: SGD  # AdamW makes steps of rounding errors, too
    learning_rate: 0.1
    output: out.safetensors
data: {{class_path: Digits, init_args: {{digits: [0, 1], batch_size: 51, num_workers: 0}}}}
""")
    command, found = ("fit", f"--config={tmp_path / 'run.yaml'}", "--name=run"), []
    for processes in (1, 2):
        (folder := tmp_path / str(processes)).mkdir()
        for process in start(*command, cwd=folder, processes=processes):
            done = process.wait()
            assert done.returncode == 0, done.stderr
        found.append(load_file(folder / "out.safetensors"))
    assert_close(*found, rtol=1e-3, atol=1e-5)


def test_vectors_are_refused(cli, tmp_path):
    np.savez(tmp_path / "vectors.npz", features=np.eye(60, 3, dtype=np.float32), labels=np.arange(60) % 2)
    model = ("--model=Pretraining", "--model.name=test_resnet", "--model.output=out.safetensors")
    status, _, err = cli("fit", *model, "--data=Embeddings", "--data.features=vectors.npz", "--trainer.logger=false")
    assert status == 2
    assert err.splitlines()[-1] == "error: Pre-training needs images of one class each, which vectors has not."
