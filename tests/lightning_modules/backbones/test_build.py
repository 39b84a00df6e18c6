import sys

import huggingface_hub.constants
import pytest
import timm
import torch
from networks import (
    PLAIN,
    SMALL,
    fixed_net,
    net_by_flag,
    net_by_weights,
    no_net,
    path_of,
    random_net,
    refusal,
)
from timm.data import resolve_model_data_config

from lightning_modules.backbones.build import PretrainedCfgOverlay, build, timm_preprocessing

# timm


@pytest.mark.parametrize(
    ("name", "overlay"),
    [
        ("test_resnet", PretrainedCfgOverlay()),
        ("test_resnet.r160_in1k", SMALL),
        ("test_vit", PLAIN),
        ("resnet10t", PretrainedCfgOverlay(interpolation="bilinear", crop_pct=0.5)),
    ],
)
def test_preprocessing_is_that_of_the_weights_under_the_overlay_and_known_before_building(name, overlay):
    expected = resolve_model_data_config(timm.create_model(name)) | overlay.given()
    assert timm_preprocessing(name, overlay, {}) == expected
    _, preprocessing, _ = build(name, False, {}, overlay)
    assert preprocessing == expected


@pytest.mark.parametrize(
    ("overlay", "mean", "std"),
    [
        (PretrainedCfgOverlay(), 0.449, 0.226),  # the averages of ImageNet's for red, green and blue
        (PretrainedCfgOverlay(mean=[0.5], std=[0.25]), 0.5, 0.25),
        (PretrainedCfgOverlay(input_size=[1, 64, 64], mean=[0.5], std=[0.25]), 0.5, 0.25),
    ],
)
def test_a_timm_model_of_one_channel_has_grey_preprocessing(overlay, mean, std):
    network, preprocessing, _ = build("resnet10t", False, {"in_chans": 1}, overlay)
    assert preprocessing == timm_preprocessing("resnet10t", overlay, {"in_chans": 1})
    assert preprocessing["input_size"] == (1, *(overlay.input_size or (3, 176, 176))[1:])
    assert preprocessing["mean"] == pytest.approx((mean,))
    assert preprocessing["std"] == pytest.approx((std,))
    assert network.conv1[0].weight.shape[1] == 1


@pytest.mark.parametrize(
    ("kwargs", "overlay"),
    [
        ({"in_chans": 13}, PretrainedCfgOverlay()),
        ({"in_chans": 1}, SMALL),
        ({"in_chans": 3}, PretrainedCfgOverlay(input_size=[1, 64, 64])),
    ],
)
def test_channels_that_images_do_not_have_are_refused(kwargs, overlay):
    message = refusal("test_resnet", weights="random", kwargs=kwargs, pretrained_cfg_overlay=overlay)
    assert f"kwargs.in_chans is {kwargs['in_chans']}" in message
    assert "images have 3 channels, or 1 where both say so" in message
    overlay = PretrainedCfgOverlay(input_size=[13, 64, 64], mean=[0.5] * 13, std=[0.5] * 13)
    message = refusal(path_of(random_net), weights="random", pretrained_cfg_overlay=overlay)
    assert "input_size is [13, 64, 64]; it must be channels (3, or 1 for grey)" in message


@pytest.mark.parametrize(("name", "near"), [("resnet10t.nope", "resnet10t.c3_in1k"), ("resnet50.a1_in1", "a1_in1k")])
def test_an_unknown_tag_suggests_near_ones(name, near):
    message = refusal(name, weights="random")
    assert repr(name) in message
    assert near in message.replace(repr(name), "")


@pytest.mark.parametrize(
    "name", ["", "zzz.qqq", "torchvision.models.squeezenet9", "torchvision.nothing.x", "..b", "a..b"]
)
def test_a_name_that_is_nothing_is_refused(name):
    assert repr(name) in refusal(name, weights="random", pretrained_cfg_overlay=PLAIN)


def test_weights_that_cannot_be_downloaded_name_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("test_resnet.r160_in1k")
    assert "test_resnet.r160_in1k" in message
    assert "--model.backbone.weights FILE" in message
    message = refusal("test_resnet.r160_in1k", kwargs={"nope": 3})
    assert "does not take kwargs {'nope': 3}" in message  # whose fault it would have been with the weights, too


# Callables


@pytest.mark.parametrize("given", [{}, {"input_size": [3, 64, 64]}, {"mean": [0.5] * 3, "std": [0.5] * 3}])
def test_a_callable_needs_its_preprocessing(given):
    message = refusal(path_of(random_net), weights="random", pretrained_cfg_overlay=PretrainedCfgOverlay(**given))
    named = message.partition("pretrained_cfg_overlay")[2]
    assert {key for key in ("input_size", "mean", "std") if key in named} == {"input_size", "mean", "std"} - set(given)


def test_a_callables_preprocessing_is_the_overlay_over_torchvisions():
    _, preprocessing, _ = build(path_of(random_net), False, {}, PLAIN)
    half = (0.5, 0.5, 0.5)
    assert preprocessing == {
        **{"input_size": (3, 64, 64), "mean": half, "std": half},
        **{"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"},
    }


@pytest.mark.parametrize(
    ("function", "kwargs"),
    [(random_net, {}), (net_by_weights, {"weights": None}), (net_by_flag, {"pretrained": False})],
)
def test_a_callable_with_random_weights_does_not_count_as_pretrained(function, kwargs):
    torch.manual_seed(0)  # as a seeded run does just before
    message = refusal(path_of(function), kwargs=kwargs, pretrained_cfg_overlay=PLAIN)
    assert "random" in message
    assert "conv.weight" in message
    assert "--model.backbone.weights" in message


@pytest.mark.parametrize("function", [fixed_net, net_by_weights, net_by_flag])
def test_a_callable_that_loads_its_weights_itself_counts_as_pretrained(function):
    network, _, _ = build(path_of(function), True, {}, PLAIN)
    expected = fixed_net().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_a_callable_that_returns_no_network_is_refused():
    message = refusal(path_of(no_net), weights="random", pretrained_cfg_overlay=PLAIN)
    assert f"{path_of(no_net)} returns dict" in message


def test_a_network_beside_ones_data_is_found_from_any_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "beside_data.py").write_text("from torch import nn\n\nclass Net(nn.Conv2d):\n    pass\n")
    (tmp_path / "json.py").write_text("raise ValueError('hides the standard library')\n")
    (tmp_path / "half_written.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    network, _, _ = build("beside_data.Net", False, {"in_channels": 3, "out_channels": 2, "kernel_size": 1}, PLAIN)
    assert type(network).__name__ == "Net"
    message = refusal("half_written.Net", weights="random", pretrained_cfg_overlay=PLAIN)
    assert "'half_written.Net' is neither" in message
    assert f"No module named 'nowhere_to_be_found'; looked for in {tmp_path} and on Python's path" in message
    assert "'json.Net' is neither" in (message := refusal("json.Net", pretrained_cfg_overlay=PLAIN))
    assert "hides" not in message
