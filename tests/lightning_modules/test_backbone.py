import io
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save, save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import squeezenet1_1

from lightning_modules.backbones import weights
from lightning_modules.backbones.frozen import FrozenBackbone, PretrainedCfgOverlay

ROOT = Path(__file__).resolve().parents[2]
SHARED_WEIGHTS = ROOT.parent / "shared" / "weights"
SMALL = PretrainedCfgOverlay(input_size=[3, 64, 64])
PLAIN = PretrainedCfgOverlay(input_size=[3, 64, 64], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
FILED = "test_resnet"  # the architecture that files of weights are made for below


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are too small for more
    yield
    torch.set_num_threads(threads)


def images(size=64, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def refusal(*args, **kwargs):
    with pytest.raises(MisconfigurationException) as error:
        FrozenBackbone(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


def shaken(network):
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) / 50)
    return network.eval()


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.neck = nn.Linear(6, 5)
        self.fc = nn.Linear(5, classes)
        self.spare = nn.Linear(5, 2)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(self.dropout(self.neck(x)))


def random_net(classes=4):
    return Net(classes)


def fixed_net(classes=4):
    net = Net(classes)
    for place, value in enumerate(net.state_dict().values()):
        value.fill_(place / 10)
    return net


def net_by_weights(weights=None):
    assert weights in (None, "DEFAULT")
    return fixed_net() if weights else random_net()


def net_by_flag(pretrained=False):
    return fixed_net() if pretrained else random_net()


def unweighted_net():
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten())


def no_net():
    return {"conv": 1}


def broken_net():
    raise RuntimeError("it broke\nin two lines")


def own(function):
    return f"{__name__}.{function.__name__}"


# What comes out


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "lcnet_035", "test_vit", "test_convnext", "test_mambaout"]
)
def test_the_width_is_what_enters_the_classifier(name):
    backbone = FrozenBackbone(name, weights="random", pretrained_cfg_overlay=SMALL)
    output = backbone(images())
    assert output.shape == (3, backbone.width)
    assert output.dtype == torch.float32
    assert backbone.width == timm.create_model(name, num_classes=7).get_classifier().in_features
    assert backbone.preprocessing["input_size"] == (3, 64, 64)


def test_some_tested_width_is_not_the_one_that_timm_announces():
    backbone = FrozenBackbone("lcnet_035", weights="random", pretrained_cfg_overlay=SMALL)
    assert backbone.network.num_features != backbone.width == backbone.network.head_hidden_size


@pytest.mark.parametrize("name", ["test_resnet", "lcnet_035", "test_vit"])
def test_the_penultimate_layer_is_timms_own_before_the_logits(name, tmp_path):
    source = shaken(timm.create_model(name, num_classes=7, pretrained_cfg_overlay={"input_size": (3, 64, 64)}))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbone = FrozenBackbone(name, weights=str(tmp_path / "weights.safetensors"), pretrained_cfg_overlay=SMALL)
    with torch.no_grad():
        expected = source.forward_head(source.forward_features(images()), pre_logits=True)
    assert_close(backbone(images()), expected)


@pytest.mark.parametrize(
    ("name", "layer", "averaged", "kwargs"),
    [
        ("resnet10t", "layer2", (2, 3), {}),
        ("resnet10t", "bn1", (2, 3), {}),  # an activation works in place on what it gives
        ("resnet10t", "layer4.0.bn2", (2, 3), {}),  # so does a residual connection
        ("test_resnet", "fc", (), {}),
        ("test_convnext", "stages.1", (2, 3), {}),
        ("test_convnext", "stages.1.blocks.0.mlp.fc1", (1, 2), {}),  # channels last in a channels-first network
        ("test_convnext", "stages.1.blocks.0.mlp.act", (1, 2), {}),
        ("test_convnext", "stages.1.blocks.0.norm", (1, 2), {}),
        ("test_convnext", "stages.1.blocks.0.conv_dw", (2, 3), {}),
        ("swin_tiny_patch4_window7_224", "layers.0", (1, 2), SWIN),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj", (2, 3), SWIN),  # and the other way round
        ("test_vit", "patch_embed", (1, 2), {}),
    ],
)
def test_a_named_layer_is_averaged_over_space(name, layer, averaged, kwargs):
    backbone = FrozenBackbone(name, weights="random", kwargs=kwargs, pretrained_cfg_overlay=SMALL, layer=layer)
    seen = []
    module = backbone.network.get_submodule(layer)
    module.register_forward_hook(lambda module, arguments, output: seen.append(output.clone()))
    given = backbone(images())
    (output,) = seen
    expected = output.mean(averaged) if averaged else output
    assert given.shape == expected.shape
    assert_close(given, expected)
    assert backbone.width == expected.shape[1]


@pytest.mark.parametrize(
    ("layer", "prefix"), [("blocks.0", 1), ("norm", 1), ("blocks.1.mlp.fc1", 1), ("patch_embed", 0)]
)
def test_tokens_are_averaged_without_the_class_token(layer, prefix):
    kwargs = {"dynamic_img_size": False}  # as most are: patches leave their embedding as tokens, and not as a map
    backbone = FrozenBackbone("test_vit", weights="random", kwargs=kwargs, pretrained_cfg_overlay=SMALL, layer=layer)
    seen = []
    backbone.network.get_submodule(layer).register_forward_hook(lambda *hooked: seen.append(hooked[2].clone()))
    given = backbone(images())
    (tokens,) = seen
    assert tokens.shape[1] == 16 + prefix
    assert_close(given, torch.stack([tokens[:, i] for i in range(prefix, 16 + prefix)]).mean(0))


@pytest.mark.parametrize("layer", ["spare", "dropout.inner"])
def test_a_layer_that_gives_nothing_is_refused(layer):
    assert layer in refusal(own(random_net), weights="random", pretrained_cfg_overlay=PLAIN, layer=layer)


# Nothing moves


@pytest.mark.parametrize(
    ("name", "kwargs"), [("test_resnet", {"drop_rate": 0.5}), ("test_vit", {"proj_drop_rate": 0.5})]
)
@pytest.mark.parametrize("layer", ["penultimate", "named"])
def test_a_frozen_backbone_stays_bit_identical_and_without_gradients(name, kwargs, layer):
    layer = {"penultimate": layer, "named": "layer3" if name == "test_resnet" else "blocks.1"}[layer]
    backbone = FrozenBackbone(name, weights="random", kwargs=kwargs, pretrained_cfg_overlay=SMALL, layer=layer)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    once = backbone(images())
    assert backbone.train() is backbone
    parent = nn.Sequential(backbone, nn.Linear(backbone.width, 2)).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    with torch.enable_grad():
        output = backbone(images().requires_grad_())
        parent(images()).sum().backward()
    assert not output.requires_grad
    assert torch.equal(output, once)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


# Callables


def test_a_torchvision_network_is_read_before_its_last_weighted_layer():
    name = "torchvision.models.squeezenet1_1"
    backbone = FrozenBackbone(name, weights="random", pretrained_cfg_overlay=PLAIN)
    assert backbone.width == 512
    with torch.no_grad():
        expected = backbone.network.features(images()).mean((2, 3))
    assert_close(backbone(images()), expected)
    preprocessing = backbone.preprocessing
    assert preprocessing["mean"] == preprocessing["std"] == (0.5, 0.5, 0.5)
    assert preprocessing["input_size"] == (3, 64, 64)


def test_of_a_callables_network_the_last_linear_layers_input_is_read():
    backbone = FrozenBackbone(own(random_net), weights="random", pretrained_cfg_overlay=PLAIN)
    net = backbone.network
    with torch.no_grad():
        expected = net.neck(net.bn(net.conv(images())).relu().mean((2, 3)))
    assert backbone.width == 5
    assert_close(backbone(images()), expected)


def test_a_network_without_weights_is_read_where_a_layer_is_named():
    backbone = FrozenBackbone(own(unweighted_net), weights="random", pretrained_cfg_overlay=PLAIN, layer="0")
    assert_close(backbone(images()), images().mean((2, 3)))
    assert "name a layer" in refusal(own(unweighted_net), weights="random", pretrained_cfg_overlay=PLAIN)


@pytest.mark.parametrize("given", [{}, {"input_size": [3, 64, 64]}, {"mean": [0.5] * 3, "std": [0.5] * 3}])
def test_a_callable_needs_its_preprocessing(given):
    message = refusal(own(random_net), weights="random", pretrained_cfg_overlay=PretrainedCfgOverlay(**given))
    assert "pretrained_cfg_overlay" in message
    named = message.partition("pretrained_cfg_overlay")[2]
    assert {key for key in ("input_size", "mean", "std") if key in named} == {"input_size", "mean", "std"} - set(given)


@pytest.mark.parametrize(
    ("build", "kwargs"),
    [(random_net, {}), (net_by_weights, {"weights": None}), (net_by_flag, {"pretrained": False})],
)
def test_a_callable_with_random_weights_does_not_count_as_pretrained(build, kwargs):
    torch.manual_seed(0)  # as a seeded run does just before
    message = refusal(own(build), kwargs=kwargs, pretrained_cfg_overlay=PLAIN)
    assert "random" in message
    assert "conv.weight" in message
    assert "--model.backbone.weights" in message


@pytest.mark.parametrize("build", [fixed_net, net_by_weights, net_by_flag])
def test_a_callable_that_loads_its_weights_itself_counts_as_pretrained(build):
    backbone = FrozenBackbone(own(build), pretrained_cfg_overlay=PLAIN)
    for key, value in fixed_net().state_dict().items():
        assert torch.equal(backbone.network.state_dict()[key], value)


@pytest.mark.parametrize(("build", "named"), [(no_net, "dict"), (broken_net, "it broke")])
def test_a_callable_that_gives_no_network_is_refused(build, named):
    message = refusal(own(build), weights="random", pretrained_cfg_overlay=PLAIN)
    assert own(build) in message
    assert named in message


# Names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnt10t", "resnet10t"),
        ("mobilenetv3_smal_050", "mobilenetv3_small_050"),
        ("resnet10t.nope", "resnet10t.c3_in1k"),
        ("resnet50.a1_in1", "resnet50.a1_in1k"),
    ],
)
def test_an_unknown_timm_name_or_tag_suggests_near_ones(name, near):
    message = refusal(name, weights="random")
    assert repr(name) in message
    assert near in message.replace(repr(name), "")


@pytest.mark.parametrize(
    "name", ["", "zzz.qqq", "torchvision.models.squeezenet9", "torchvision.nothing.x", "..b", "a..b"]
)
def test_a_name_that_is_nothing_is_refused(name):
    assert repr(name) in refusal(name, weights="random", pretrained_cfg_overlay=PLAIN)


@pytest.mark.parametrize(
    ("layer", "near"), [("layer5", "layer4"), ("layer1.0.conv9", "layer1.0.conv1"), ("penultimat", "penultimate")]
)
def test_an_unknown_layer_suggests_near_ones(layer, near):
    message = refusal("resnet10t", weights="random", pretrained_cfg_overlay=SMALL, layer=layer)
    assert repr(layer) in message
    assert near in message.replace(repr(layer), "")


@pytest.mark.parametrize("kwargs", [{"nope": 3}, {"output_stride": 3}])
def test_kwargs_that_the_model_refuses_are_not_blamed_on_pretrained_weights(kwargs):
    message = refusal("resnet10t", weights="random", kwargs=kwargs)
    assert "kwargs" in message
    assert str(kwargs) in message


def test_images_too_small_for_the_network_are_refused():
    overlay = PretrainedCfgOverlay(input_size=[3, 1, 1], mean=[0.5] * 3, std=[0.5] * 3)
    message = refusal(own(random_net), weights="random", pretrained_cfg_overlay=overlay)
    assert "(3, 1, 1)" in message


def test_weights_that_cannot_be_downloaded_name_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("test_resnet.r160_in1k")
    assert "test_resnet.r160_in1k" in message
    assert "--model.backbone.weights FILE" in message


def test_the_label_tells_weights_apart(tmp_path):
    save_file(timm.create_model(FILED).state_dict(), tmp_path / "mine.safetensors")
    for given, label in (("random", f"{FILED}-random"), (tmp_path / "mine.safetensors", f"{FILED}-mine")):
        assert load(given).label == label


# Files of weights


def torch_bytes(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return shaken(timm.create_model(FILED, num_classes=5))


def assert_holds(backbone, source):
    with torch.no_grad():
        expected = source.forward_head(source.forward_features(images()), pre_logits=True)
    assert_close(backbone(images()), expected)
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def load(path, name=FILED):
    return FrozenBackbone(name, weights=str(path), pretrained_cfg_overlay=SMALL)


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
@pytest.mark.parametrize("kind", ["torch", "old torch"])
def test_torch_files_load_in_and_out_of_containers(tmp_path, source, container, kind):
    content = dict(source.state_dict())
    if container:
        content = {container: content, "epoch": 3, "optimizer": {"lr": 0.1}}
    (tmp_path / "weights.pth").write_bytes(torch_bytes(content, zipped=kind == "torch"))
    assert_holds(load(tmp_path / "weights.pth"), source)


@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pth"])
def test_safetensors_files_load_whatever_their_ending(tmp_path, source, ending):
    (tmp_path / f"weights{ending}").write_bytes(save(source.state_dict()))
    assert_holds(load(tmp_path / f"weights{ending}"), source)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "module.model.", "backbone.", "encoder.", "network.", "_orig_mod.", "module._orig_mod."],
)
def test_wrappers_prefixes_are_stripped(tmp_path, source, prefix):
    save_file({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / "weights.safetensors")
    assert_holds(load(tmp_path / "weights.safetensors"), source)


def test_the_entries_of_adversarial_training_are_left_aside(tmp_path, source):
    content = {f"module.model.{key}": value for key, value in source.state_dict().items()}
    content |= {f"module.attacker.model.{key}": value + 1 for key, value in source.state_dict().items()}
    content |= {"module.normalizer.new_mean": torch.ones(3, 1, 1), "module.attacker.normalize.new_std": torch.ones(3)}
    (tmp_path / "weights.ckpt").write_bytes(torch_bytes({"model": content, "epoch": 1}))
    assert_holds(load(tmp_path / "weights.ckpt"), source)


@pytest.mark.parametrize("absent", ["fc.", "num_batches_tracked"])
def test_what_evaluation_never_reads_may_be_absent(tmp_path, source, absent):
    content = {key: value for key, value in source.state_dict().items() if absent not in key}
    assert len(content) < len(source.state_dict())
    save_file(content, tmp_path / "weights.safetensors")
    assert_holds(load(tmp_path / "weights.safetensors"), source)


def test_all_of_a_classifier_of_several_modules_is_ignored(tmp_path):
    save_file(timm.create_model("efficientvit_m0").state_dict(), tmp_path / "weights.safetensors")
    backbone = FrozenBackbone("efficientvit_m0", weights=str(tmp_path / "weights.safetensors"))
    assert backbone.width == 192


@pytest.mark.parametrize("layer", ["fc", "global_pool", "layer4"])
def test_a_classifier_in_the_file_does_not_hinder_reading_beside_it(tmp_path, source, layer):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbone = FrozenBackbone(
        FILED, weights=str(tmp_path / "weights.safetensors"), pretrained_cfg_overlay=SMALL, layer=layer
    )
    with torch.no_grad():
        assert_close(backbone(images()), source.forward_features(images()).mean((2, 3)))


@pytest.mark.parametrize("layer", ["penultimate", "neck"])
def test_a_callables_classifier_may_have_another_size_in_the_file(tmp_path, layer):
    trained = shaken(random_net(classes=9))
    (tmp_path / "weights.pth").write_bytes(torch_bytes(trained.state_dict()))
    path = str(tmp_path / "weights.pth")
    backbone = FrozenBackbone(own(random_net), weights=path, pretrained_cfg_overlay=PLAIN, layer=layer)
    with torch.no_grad():
        assert_close(backbone(images()), trained.neck(trained.bn(trained.conv(images())).relu().mean((2, 3))))


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: without(w, "layer2.0.bn1.running_var"), ["1 missing", "layer2.0.bn1.running_var"]),
        (lambda w: without(w, "conv1.0.weight"), ["1 missing", "conv1.0.weight"]),
        (lambda w: w | {"layer9.weight": torch.ones(1)}, ["1 unknown", "layer9.weight"]),
        (lambda w: w | {"layer1.0.bn1.bias": torch.ones(5)}, ["1 of another shape", "layer1.0.bn1.bias", "(5,)"]),
        (lambda w: {f"strange.{key}": value for key, value in w.items()}, ["missing", "unknown", "strange."]),
        (lambda w: timm.create_model("lcnet_035").state_dict(), ["missing", "unknown", ", ..."]),
        (lambda w: {"fc.weight": w["fc.weight"]}, ["missing", "conv1.0.weight"]),
    ],
    ids=["no statistic", "no parameter", "more", "shape", "wrapper", "architecture", "classifier only"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, source, change, named):
    path = tmp_path / "weights.safetensors"
    save_file(change(dict(source.state_dict())), path)
    message = refusal(FILED, weights=str(path), pretrained_cfg_overlay=SMALL)
    assert str(path) in message
    assert [name for name in named if name not in message] == []
    assert len(message) < 800


WEIGHTS = {"conv.weight": torch.arange(300.0), "conv.bias": torch.arange(3.0)}
NO_WEIGHTS = {
    "page.pth": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "page.safetensors": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "pointer.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "table.pth": b"accuracy,loss\n0.9,0.1\n",
    "empty.pth": b"",
    "empty.safetensors": b"",
    "half.safetensors": save(WEIGHTS)[:700],
    "half-a-head.safetensors": save(WEIGHTS)[:20],
    "half.pth": torch_bytes(WEIGHTS)[:700],
    "list.pth": torch_bytes([1, 2]),
    "numbers.pth": torch_bytes({"epoch": 3, "state_dict": {"lr": 0.1}}),
    "tensor.pth": torch_bytes(torch.ones(3)),
}


@pytest.mark.parametrize(("name", "content"), NO_WEIGHTS.items(), ids=NO_WEIGHTS)
def test_a_file_that_holds_no_weights_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(FILED, weights=str(tmp_path / name), pretrained_cfg_overlay=SMALL)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch"])
def test_a_file_cut_short_anywhere_is_refused_in_one_line(tmp_path, kind):
    whole = save(WEIGHTS) if kind == "safetensors" else torch_bytes(WEIGHTS, zipped=kind == "torch")
    path = tmp_path / "weights.pth"
    path.write_bytes(whole)
    assert weights.read(path).keys() == WEIGHTS.keys()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(MisconfigurationException) as error:
            weights.read(path)
        assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = str(tmp_path / "nothing.pth")
    assert path in refusal(FILED, weights=path, pretrained_cfg_overlay=SMALL)


def test_a_file_is_found_from_the_working_directory(tmp_path, monkeypatch, source):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    assert_holds(load("weights.safetensors"), source)


def leave_a_mark(path):
    Path(path).touch()
    return torch.ones(1)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return leave_a_mark, (str(self.path),)


@pytest.mark.parametrize(
    "pack",
    [
        torch_bytes,
        lambda content: torch_bytes(content, zipped=False),
        lambda content: pickle.dumps(content, protocol=0),
        lambda content: pickle.dumps(content, protocol=2),
        lambda content: pickle.dumps(content, protocol=4),
    ],
    ids=["torch", "old torch", "pickle 0", "pickle 2", "pickle 4"],
)
@pytest.mark.parametrize("place", ["whole", "value", "beside"])
def test_a_pickle_that_holds_code_is_refused_and_the_code_never_runs(tmp_path, pack, place):
    marker = tmp_path / "marker"
    content = {
        "whole": Code(marker),
        "value": {"conv.weight": Code(marker)},
        "beside": {"state_dict": {"conv.weight": torch.ones(1)}, "args": Code(marker)},
    }[place]
    path = tmp_path / "weights.pth"
    path.write_bytes(pack(content))
    message = refusal(FILED, weights=str(path), pretrained_cfg_overlay=SMALL)
    assert str(path) in message
    assert not marker.exists()
    if pack is torch_bytes:
        assert "code" in message
        assert "never run" in message


def test_the_mark_of_code_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


# Identity


def identity(path, **kwargs):
    return FrozenBackbone(FILED, **{"weights": str(path), "pretrained_cfg_overlay": SMALL, **kwargs}).identity()


def test_the_identity_is_that_of_the_weights_and_how_they_are_read(tmp_path, source):
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    same = identity(path)
    assert identity(path) == same
    (tmp_path / "copy.pth").write_bytes(torch_bytes({"model": source.state_dict()}))
    assert identity(tmp_path / "copy.pth") == same
    others = [
        identity(path, layer="layer3"),
        identity(path, kwargs={"output_stride": 16}),
        identity(path, pretrained_cfg_overlay=PretrainedCfgOverlay(input_size=[3, 64, 64], crop_pct=0.5)),
    ]
    for key in ("layer1.0.conv1.weight", "layer1.0.bn1.running_mean"):
        changed = {name: value.clone() for name, value in source.state_dict().items()}
        changed[key].view(-1)[0] += 1e-6
        save_file(changed, tmp_path / "changed.safetensors")
        others.append(identity(tmp_path / "changed.safetensors"))
    assert all(other != same for other in others)
    assert len({str(other) for other in others}) == len(others)


def test_an_ignored_classifier_is_no_part_of_the_identity(tmp_path):
    path = str(tmp_path / "weights.pth")
    Path(path).write_bytes(torch_bytes(random_net(classes=9).state_dict()))
    first, second = (
        FrozenBackbone(own(random_net), weights=path, pretrained_cfg_overlay=PLAIN).identity() for _ in range(2)
    )
    assert first == second


# Weights of this world


@pytest.mark.parametrize(("what", "classes"), [("imagenet1k", 1000), ("inat_birds", 965)])
def test_the_features_of_trained_weights_are_those_that_timm_computes(what, classes):
    path = SHARED_WEIGHTS / f"mobilenetv2_100.{what}.safetensors"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    expected = timm.create_model(
        "mobilenetv2_100", num_classes=classes, pad_type="same", checkpoint_path=path, pretrained_cfg_overlay=half
    ).eval()
    expected.reset_classifier(0)
    backbone = FrozenBackbone(
        "mobilenetv2_100",
        weights=str(path),
        kwargs={"pad_type": "same"},
        pretrained_cfg_overlay=PretrainedCfgOverlay(mean=[0.5] * 3, std=[0.5] * 3),
    )
    assert backbone.width == 1280
    assert backbone.label == path.stem
    assert {key: backbone.preprocessing[key] for key in half} == half
    with torch.no_grad():
        features = expected(images(224, 2))
    assert features.std() > 0.01
    assert_close(backbone(images(224, 2)), features, rtol=1e-5, atol=1e-5 * float(features.abs().max()))


@pytest.mark.parametrize("layer", ["penultimate", "features", "classifier.1", "classifier.2", "classifier"])
def test_a_squeezenet_files_features_are_torchvisions_also_behind_its_classifier(tmp_path, layer):
    source = shaken(squeezenet1_1(num_classes=10))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbone = FrozenBackbone(
        "torchvision.models.squeezenet1_1",
        weights=str(tmp_path / "weights.safetensors"),
        kwargs={"num_classes": 10},
        pretrained_cfg_overlay=PLAIN,
        layer=layer,
    )
    with torch.no_grad():
        expected = source.features(images())
        for place in range({"classifier.1": 2, "classifier.2": 3, "classifier": 4}.get(layer, 0)):
            expected = source.classifier[place](expected).clone()
    assert_close(backbone(images()), expected.mean((2, 3)))


def test_several_layers_stand_side_by_side_and_flatten_keeps_every_place():
    names = ["layer1", "penultimate", "layer3"]
    alone = [FrozenBackbone("resnet10t", weights="random", pretrained_cfg_overlay=SMALL, layer=name) for name in names]
    both = FrozenBackbone("resnet10t", weights="random", pretrained_cfg_overlay=SMALL, layer=names)
    flat = FrozenBackbone(
        "resnet10t", weights="random", pretrained_cfg_overlay=SMALL, layer="layer3", pooling="flatten"
    )
    for other in (*alone, flat):
        other.network.load_state_dict(both.network.state_dict())
    images = torch.randn(2, 3, *both.preprocessing["input_size"][1:])
    assert list(both.widths) == names
    torch.testing.assert_close(both(images), torch.cat([backbone(images) for backbone in alone], 1))
    places = flat(images).shape[1] // both.widths["layer3"]
    assert places > 1
    pooled = flat(images).view(2, both.widths["layer3"], places).mean(2)
    torch.testing.assert_close(pooled, alone[2](images), atol=1e-5, rtol=1e-4)


def test_layers_are_given_once_each():
    assert "each once" in refusal("resnet10t", weights="random", layer=["layer1", "layer1"])
    assert "at least one layer" in refusal("resnet10t", weights="random", layer=[])


# Speed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_the_command_line_does_not_hand_back_what_the_next_map_needs():
    script = """
import contextlib, resource, sys, torch, train
if sys.argv[1] == "run":
    with contextlib.suppress(SystemExit):
        train.main(["--help"])
for repeat in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (60, 20, 100, 40) * 4:
        torch.ones(megabytes, 2**18)
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for how in ("run", "import"):
        done = subprocess.run([sys.executable, "-c", script, how], cwd=ROOT, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout.split("faults")[-1])
    assert 10 * faults["run"] < faults["import"]
