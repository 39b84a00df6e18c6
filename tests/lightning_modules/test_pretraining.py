import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch.nn import functional as F

from datamodules import Digits
from lightning_modules import Pretraining
from lightning_modules.backbones.build import PretrainedCfgOverlay

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAIN = ("--config", "pretrain_digits.yaml", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
FIT = ("fit", *PRETRAIN, "--model.output=remade.safetensors")


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
    assert model.label == "test_resnet_pretraining"
    network = timm.create_model("test_resnet", pretrained_cfg_overlay=overlay.given())
    assert model.preprocessing == resolve_model_data_config(network)
    assert model.describe(Digits(batch_size=64)) == {
        "network": "test_resnet(stem_type=deep), 3 x 32 x 32, bilinear, crop 1, mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        "objective": "CrossEntropy(label_smoothing=0.0)",
        "optimiser": "AdamW, learning rate up to 0.01 (warm-up, then cosine), weight decay 0.05, batches of 64",
        "output": "out/weights.safetensors",
    }


@pytest.mark.parametrize("name", ["resnt26", "torchvision.models.resnet18", "resnet26.nope"])
def test_an_architecture_that_timm_does_not_have_is_refused(name):
    with pytest.raises(MisconfigurationException, match=f"timm has no .*{name}|{name}.*timm has no"):
        Pretraining(name, "weights.safetensors")
