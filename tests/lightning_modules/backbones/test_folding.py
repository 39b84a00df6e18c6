"""Batch norms are folded into what precedes them where that changes nothing, and nowhere else."""

import pytest
import timm
import torch
from networks import PLAIN, Net, images, path_of, random_net, shaken
from timm.layers import Conv2dSame
from torch import nn
from torch.testing import assert_close

from lightning_modules.backbones.folding import folded
from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.backbones.layers import read_layers


def norms(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def read(network, *layers):
    return read_layers(network, images(), {name: (name, False) for name in layers}, lambda _, output: output.clone())


def fold(network, *layers):
    return folded(network, {name: (name, False) for name in layers}, (3, 64, 64))


@pytest.mark.parametrize(
    ("name", "left"),
    [("test_resnet", 0), ("test_byobnet", 0), ("densenet121", 62), ("test_vit", 0), ("levit_128s", 46)],
)
def test_a_folded_network_gives_what_it_gave_with_fewer_batch_norms(name, left):
    torch.manual_seed(0)
    kwargs = {"img_size": 64} if name == "levit_128s" else {}
    network = shaken(timm.create_model(name, num_classes=0, **kwargs))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    prepared = fold(network, "")
    assert len(norms(prepared)) == left
    assert (prepared is network) == (len(norms(network)) == 0)
    assert_close(read(prepared, "")[""], read(network, "")[""], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_convolution_that_applies_its_activation_gives_the_same_in_every_precision():
    torch.manual_seed(0)
    network = shaken(timm.create_model("mobilenetv2_035", num_classes=0))
    prepared, alone, runs = fold(network, ""), {}, []
    for name, module in prepared.named_modules():
        if isinstance(module, nn.ReLU6):
            module.register_forward_hook(lambda *_: runs.append("activation"))
        if type(module).__name__ == "_Activated":
            module.register_forward_hook(
                lambda module, inputs, output, name=name: alone.update(
                    {name: (module, inputs[0].clone(), output.clone())}
                )
            )
    with torch.no_grad():
        prepared(images())
        assert len(alone) == 35
        assert not runs
        for module, seen, made in alone.values():
            assert_close(made, module.activation(module.convolution(seen)), rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = prepared(images()), network(images())
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("side", [64, 63, 61])
def test_padding_as_of_tensorflow_is_folded_at_every_size(side):
    network = shaken(timm.create_model("mobilenetv2_035", num_classes=0, pad_type="same"))
    pictures = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    prepared = folded(network, {"": ("", False)}, (3, side, side))
    assert not any(isinstance(module, Conv2dSame) for module in prepared.modules())
    with torch.no_grad():
        assert_close(prepared(pictures), network(pictures), rtol=1e-4, atol=1e-4)


def test_a_backbone_folds_its_network_once_and_runs_it_outside_of_inference():
    backbone, runs = FrozenBackbone(path_of(random_net), "random", pretrained_cfg_overlay=PLAIN), []
    with backbone.inference():
        once = backbone(images())
    backbone.network.register_forward_hook(lambda *_: runs.append("network"))
    with backbone.inference():
        assert torch.equal(backbone(images()), once)
    assert not runs
    backbone(images())
    assert runs


@pytest.mark.parametrize(("layer", "left"), [("conv", ["bn"]), ("bn", []), ("act", []), ("neck", [])])
def test_every_module_that_is_read_gives_the_same(layer, left):
    network = shaken(Net(4))
    prepared = fold(network, layer)
    assert norms(prepared) == left
    assert_close(read(prepared, layer), read(network, layer), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Something else than the batch norm sees what the convolution returns, or it runs twice, or nothing is kept."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3, track_running_stats=kind != "statistics of the batch")

    def forward(self, x):
        seen = self.conv(input=x) if self.kind == "an input by name" else self.conv(x)
        if self.kind == "two passes":
            return self.bn(seen) + self.conv(seen)
        return self.bn(seen) + (seen if self.kind == "a sum" else self.bn.eps)


@pytest.mark.parametrize(
    "kind", ["a sum", "two passes", "statistics of the batch", "the norm's own numbers", "an input by name"]
)
def test_a_batch_norm_that_cannot_be_folded_stays(kind):
    network = shaken(Shared(kind))
    assert fold(network, "") is network or norms(fold(network, "")) == ["bn"]


class Tokens(nn.Module):
    """A linear layer over tokens, and a batch norm of which each token is a channel."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 5)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.linear(x[..., 0]))


def test_a_batch_norm_over_another_axis_stays():
    network = shaken(Tokens())
    assert fold(network, "") is network
