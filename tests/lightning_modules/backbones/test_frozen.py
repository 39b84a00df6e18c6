from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from networks import (
    PLAIN,
    SMALL,
    BatchStatistics,
    Fixed,
    Sequences,
    Stepped,
    Volumes,
    images,
    path_of,
    random_net,
    refusal,
    shaken,
    unweighted_net,
)
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import squeezenet1_1

from lightning_modules.backbones.build import PretrainedCfgOverlay, build
from lightning_modules.backbones.frozen import FrozenBackbone, GivenVectors

SHARED_WEIGHTS = Path(__file__).resolve().parents[4] / "shared" / "weights"
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}


def random_backbone(name, **kwargs):
    return FrozenBackbone(name, **{"weights": "random", "pretrained_cfg_overlay": SMALL, **kwargs})


# The penultimate layer


@pytest.mark.parametrize(
    "name",
    # timm announces another width for lcnet_035 than its classifier takes.
    ["test_resnet", "lcnet_035", "test_vit", "test_convnext", "test_mambaout"],
)
def test_the_penultimate_layer_is_timms_own_before_the_logits(name):
    source = shaken(timm.create_model(name, num_classes=7, pretrained_cfg_overlay={"input_size": (3, 64, 64)}))
    backbone = random_backbone(name)
    backbone.network.load_state_dict(source.state_dict(), strict=False)
    given = backbone(images())
    assert given.dtype == torch.float32
    assert given.shape == (3, source.get_classifier().in_features)
    assert backbone.widths == {"penultimate": given.shape[1]}
    assert backbone.preprocessing["input_size"] == (3, 64, 64)
    with torch.no_grad():
        assert_close(given, source.forward_head(source.forward_features(images()), pre_logits=True))


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
    assert backbone.widths == {"penultimate": 1280}
    assert backbone.label == path.stem
    assert {key: backbone.preprocessing[key] for key in half} == half
    with torch.no_grad():
        features = expected(images(224, 2))
    assert features.std() > 0.01
    assert_close(backbone(images(224, 2)), features, rtol=1e-5, atol=1e-5 * float(features.abs().max()))


def test_of_a_callables_network_the_last_linear_layers_input_is_read():
    backbone = FrozenBackbone(path_of(random_net), weights="random", pretrained_cfg_overlay=PLAIN)
    assert backbone.widths == {"penultimate": 5}
    with torch.no_grad():
        assert_close(backbone(images()), backbone.network.penultimate(images()))


def test_a_network_without_weights_is_read_where_a_layer_is_named():
    name = path_of(unweighted_net)
    backbone = FrozenBackbone(name, weights="random", pretrained_cfg_overlay=PLAIN, layer="0")
    assert_close(backbone(images()), images().mean((2, 3)))
    assert "name a layer" in refusal(name, weights="random", pretrained_cfg_overlay=PLAIN)


def test_a_network_with_kernels_of_five_axes_is_read():
    backbone = FrozenBackbone(path_of(Volumes), weights="random", pretrained_cfg_overlay=PLAIN)
    with torch.no_grad():
        assert_close(backbone(images()), backbone.network.conv(images()[:, None]).mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("layer", "modules"),
    [("penultimate", 0), ("features", 0), ("classifier.1", 2), ("classifier.2", 3), ("classifier", 4)],
)
def test_a_squeezenet_files_features_are_torchvisions_also_behind_its_classifier(tmp_path, layer, modules):
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
        for place in range(modules):
            expected = source.classifier[place](expected).clone()
    assert_close(backbone(images()), expected.mean((2, 3)))


# Named layers


@pytest.mark.parametrize(
    ("name", "layer", "averaged", "kwargs"),
    [
        ("test_resnet", "layer2", (2, 3), {}),
        ("resnet10t", "bn1", (2, 3), {}),  # an activation works in place on what it gives
        ("resnet10t", "layer4.0.bn2", (2, 3), {}),  # so does a residual connection
        ("test_resnet", "fc", (), {}),
        ("test_convnext", "stages.1", (2, 3), {}),
        ("test_convnext", "stages.1.blocks.0.mlp.fc1", (1, 2), {}),  # channels last in a channels-first network
        ("test_convnext", "stages.1.blocks.0.norm", (1, 2), {}),
        ("test_convnext", "stages.1.blocks.0.conv_dw", (2, 3), {}),
        ("swin_tiny_patch4_window7_224", "layers.0", (1, 2), SWIN),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj", (2, 3), SWIN),  # and the other way round
        ("test_vit", "patch_embed", (1, 2), {}),
    ],
)
def test_a_named_layer_is_averaged_over_space(name, layer, averaged, kwargs):
    backbone = random_backbone(name, kwargs=kwargs, layer=layer)
    seen = []
    module = backbone.network.get_submodule(layer)
    module.register_forward_hook(lambda module, arguments, output: seen.append(output.clone()))
    given = backbone(images())
    (output,) = seen
    expected = output.mean(averaged) if averaged else output
    assert_close(given, expected)
    assert backbone.widths == {layer: expected.shape[1]}


@pytest.mark.parametrize(
    ("layer", "prefix"), [("blocks.0", 1), ("norm", 1), ("blocks.1.mlp.fc1", 1), ("patch_embed", 0)]
)
def test_tokens_are_averaged_without_the_class_token(layer, prefix):
    kwargs = {"dynamic_img_size": False}  # as most are: patches leave their embedding as tokens, and not as a map
    backbone = random_backbone("test_vit", kwargs=kwargs, layer=layer)
    seen = []
    backbone.network.get_submodule(layer).register_forward_hook(lambda *hooked: seen.append(hooked[2].clone()))
    given = backbone(images())
    (tokens,) = seen
    assert tokens.shape[1] == 16 + prefix
    assert_close(given, torch.stack([tokens[:, i] for i in range(prefix, 16 + prefix)]).mean(0))


WIDE = PretrainedCfgOverlay(input_size=[3, 64, 32], mean=[0.5] * 3, std=[0.5] * 3)
WIDE_SWIN = SWIN | {"img_size": (64, 32)}


@pytest.mark.parametrize(
    ("name", "layer", "averaged", "kwargs"),
    [
        ("resnet10t", "layer1", (2, 3), {"channels": [16, 32, 64, 128]}),  # a map of 16 x 16 x 8
        ("resnet10t", "layer2.0.act1", (2, 3), {}),
        ("test_convnext", "stages.1.blocks.0.norm", (1, 2), {}),  # channels last in a channels-first network
        ("swin_tiny_patch4_window7_224", "layers.0", (1, 2), WIDE_SWIN),  # 16 x 8 x 8: built for one size
        ("swin_tiny_patch4_window7_224", "patch_embed.proj", (2, 3), WIDE_SWIN),
        ("test_vit", "blocks.0.mlp", (1,), {"img_size": (64, 32), "class_token": False, "global_pool": "avg"}),
        (path_of(Fixed), "stem", (2, 3), {}),  # 16 x 8
        (path_of(Fixed), "turned", (1, 2), {}),
        (path_of(Fixed), "pool", (2, 3), {}),  # as wide for every size of the image
    ],
)
def test_maps_of_any_shape_are_averaged_over_space_alone(name, layer, averaged, kwargs):
    backbone = random_backbone(name, kwargs=kwargs, layer=layer, pretrained_cfg_overlay=WIDE)
    seen = []
    backbone.network.get_submodule(layer).register_forward_hook(lambda *hooked: seen.append(hooked[2].clone()))
    given = backbone(images(64)[..., :32])
    expected = seen[0].numpy().mean(averaged)
    assert backbone.widths == {layer: expected.shape[1]}
    assert_close(given, torch.from_numpy(expected))


def test_the_papers_network_has_64_neurons_in_layer1_for_images_of_any_shape():
    overlay = PretrainedCfgOverlay(input_size=[3, 256, 128])
    assert random_backbone("resnet18", layer="layer1", pretrained_cfg_overlay=overlay).widths == {"layer1": 64}


def test_neurons_that_cannot_be_told_from_positions_are_refused_and_may_be_flattened():
    layers = ["late", "latents"]
    for layer in layers:
        message = refusal(path_of(Fixed), weights="random", pretrained_cfg_overlay=WIDE, layer=layer)
        assert f"layer {layer!r} of {path_of(Fixed)}" in message
        assert "is open" in message
    flat = random_backbone(path_of(Fixed), pretrained_cfg_overlay=WIDE, layer=layers, pooling="flatten")
    assert flat.widths == {"late": 12, "latents": 8 * 16}


def test_finding_the_neurons_draws_nothing_from_global_random_state():
    swin, after = "swin_tiny_patch4_window7_224", []
    for make in (lambda: random_backbone(swin, kwargs=SWIN, layer="layers.0"), lambda: build(swin, False, SWIN, SMALL)):
        torch.manual_seed(0)
        make()
        after.append(torch.rand(3))
    assert torch.equal(*after)


# Rows are images


def test_a_network_of_one_channel_sees_grey_images():
    backbone = FrozenBackbone("test_resnet", "random", {"in_chans": 1}, layer=["layer1", "penultimate"])
    assert backbone.preprocessing["input_size"] == (1, 160, 160)
    assert backbone(images(160)[:, :1]).shape == (3, 32 + 96)


def test_windows_are_no_images():
    swin = "swin_tiny_patch4_window7_224"
    message = refusal(swin, weights="random", pretrained_cfg_overlay=SMALL, kwargs=SWIN, layer="layers.0.blocks.0.attn")
    assert "(32, 16, 8) for 2 images and (16, 16, 8) for one" in message  # 4 x 4 windows of 4 x 4 patches
    assert "'layers.0.blocks.0.attn'" in message


@pytest.mark.parametrize(
    ("network", "layer", "said"),
    [
        (Sequences, "encoder", "other values beside another image"),
        (Sequences, "turned", "(16, 2, 8) for 2 images"),
        (Sequences, "attention", "gives tuple"),
        (Sequences, "named", "gives dict"),
        (BatchStatistics, "norm", "other values beside another image"),
        (BatchStatistics, "squeeze", "gives (3,)"),
    ],
)
def test_a_layer_whose_rows_are_not_the_images_is_refused_by_name(network, layer, said):
    kwargs = {"batch_first": False} if network is Sequences else {}
    message = refusal(path_of(network), weights="random", pretrained_cfg_overlay=PLAIN, kwargs=kwargs, layer=layer)
    assert f"layer {layer!r} of {path_of(network)}" in message
    assert said in message


def test_tokens_are_averaged_where_attention_stays_within_an_image():
    kwargs = {"batch_first": True}
    layer = ["encoder", "penultimate"]  # the classifier is called by keyword
    backbone = random_backbone(path_of(Sequences), kwargs=kwargs, layer=layer, pretrained_cfg_overlay=PLAIN)
    network = backbone.network
    with torch.no_grad():
        expected = network.encoder(network.patches(images()).flatten(2).mT).mean(1)
    assert backbone.widths == {"encoder": 8, "penultimate": 8}
    assert_close(backbone(images()), torch.cat([expected, expected], 1))


def test_rows_are_counted_again_for_every_batch():
    backbone = random_backbone("test_resnet", layer=["layer1", "penultimate"])
    backbone.network.layer1.register_forward_hook(lambda *hooked: hooked[2][:2])
    backbone.network.layer1.register_forward_hook(lambda *hooked: None)
    with pytest.raises(MisconfigurationException, match="'layer1' of test_resnet gives 2 rows for 3 images"):
        backbone(images())


def test_several_layers_are_concatenated_and_flatten_keeps_every_position():
    names = ["layer1", "penultimate", "layer3"]
    alone = [random_backbone("test_resnet", layer=name) for name in names]
    both = random_backbone("test_resnet", layer=names)
    flat = random_backbone("test_resnet", layer="layer3", pooling="flatten")
    for other in (*alone, flat):
        other.network.load_state_dict(both.network.state_dict())
    assert list(both.widths) == names
    assert_close(both(images()), torch.cat([backbone(images()) for backbone in alone], 1))
    positions = flat.widths["layer3"] // both.widths["layer3"]
    assert positions > 1
    pooled = flat(images()).view(3, both.widths["layer3"], positions).mean(2)
    assert_close(pooled, alone[2](images()), atol=1e-5, rtol=1e-4)


def test_penultimate_and_a_layer_behind_the_classifier_are_read_together():
    backbone = FrozenBackbone(
        path_of(random_net), weights="random", pretrained_cfg_overlay=PLAIN, layer=["penultimate", "fc"]
    )
    features, logits = backbone(images()).split([5, 4], dim=1)
    with torch.no_grad():
        assert_close(logits, backbone.network.fc(features))


def test_layers_are_given_once_each():
    assert "each once" in refusal("test_resnet", weights="random", layer=["layer1", "layer1"])
    assert "at least one layer" in refusal("test_resnet", weights="random", layer=[])


@pytest.mark.parametrize("layer", ["penultimate", "conv"])
def test_images_too_small_for_the_network_are_refused(layer):
    overlay = PretrainedCfgOverlay(input_size=[3, 1, 1], mean=[0.5] * 3, std=[0.5] * 3)
    message = refusal(path_of(random_net), weights="random", pretrained_cfg_overlay=overlay, layer=layer)
    assert "(3, 1, 1)" in message
    assert "pretrained_cfg_overlay.input_size" in message


def test_joined_layers_are_one_layer_of_all_their_neurons():
    together = random_backbone("test_resnet", layer=["layer2", "layer2+penultimate+layer1"])
    features = together(images())
    alone = {}
    for layer in ("layer1", "layer2", "penultimate"):
        single = random_backbone("test_resnet", layer=layer)
        single.load_state_dict(together.state_dict())
        alone[layer] = single(images())
    parts = [alone[layer] for layer in ("layer2", "layer2", "penultimate", "layer1")]
    assert together.widths == {
        "layer2": parts[0].shape[1],
        "layer2+penultimate+layer1": sum(part.shape[1] for part in parts[1:]),
    }
    assert torch.equal(features, torch.cat(parts, 1))
    assert "each once" in refusal("test_resnet", weights="random", layer="layer1+layer1")
    assert "no layer 'layer9'" in refusal("test_resnet", weights="random", layer="layer1+layer9")


# Nothing moves


@pytest.mark.parametrize(
    ("name", "kwargs", "layer"),
    [
        ("test_resnet", {"drop_rate": 0.5}, "penultimate"),
        ("test_resnet", {"drop_rate": 0.5}, "layer3"),
        ("test_vit", {"proj_drop_rate": 0.5}, "penultimate"),
        ("test_vit", {"proj_drop_rate": 0.5}, "blocks.1"),
    ],
)
def test_a_frozen_backbone_stays_bit_identical_and_gives_gradients_to_images_alone(name, kwargs, layer):
    backbone = random_backbone(name, kwargs=kwargs, layer=layer)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    once = backbone(images())
    assert backbone.train() is backbone
    parent = nn.Sequential(backbone, nn.Linear(once.shape[1], 2)).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not once.requires_grad
    with torch.enable_grad():
        wanted = images().requires_grad_()
        output = backbone(wanted)
        parent(wanted).sum().backward()
    assert wanted.grad.abs().sum() > 0
    assert torch.equal(output, once)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize(("layer", "reason"), [("conv", None), ("sign", "smoothly"), ("cut", "not require grad")])
def test_a_layer_without_a_gradient_is_named(layer, reason):
    layers = ["conv", layer] if reason else layer
    backbone = FrozenBackbone(path_of(Stepped), "random", pretrained_cfg_overlay=PLAIN, layer=layers)
    if reason is None:
        backbone.check_differentiable()
        return
    with pytest.raises(MisconfigurationException, match=f"Layer '{layer}' of .* has no gradient .*{reason}"):
        backbone.check_differentiable()


# What it says of itself


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def provenance(path, **kwargs):
    return random_backbone("test_resnet", weights=str(path), **kwargs).provenance()


def test_the_provenance_is_that_of_the_weights_and_how_they_are_read(tmp_path, weights):
    same = provenance(weights)
    assert provenance(weights) == same
    state = timm.create_model("test_resnet", checkpoint_path=weights).state_dict()
    torch.save({"model": state}, tmp_path / "copy.pth")
    assert provenance(tmp_path / "copy.pth") == same
    others = [
        provenance(weights, layer="layer3"),
        provenance(weights, pooling="flatten"),
        provenance(weights, kwargs={"output_stride": 16}),
        provenance(weights, pretrained_cfg_overlay=PretrainedCfgOverlay(input_size=[3, 64, 64], crop_pct=0.5)),
    ]
    for key in ("layer1.0.conv1.weight", "layer1.0.bn1.running_mean"):
        changed = {name: value.clone() for name, value in state.items()}
        changed[key].view(-1)[0] += 1e-6
        save_file(changed, tmp_path / "changed.safetensors")
        others.append(provenance(tmp_path / "changed.safetensors"))
    assert all(other != same for other in others)
    assert len({str(other) for other in others}) == len(others)


def test_a_classifier_that_is_not_read_is_no_part_of_the_provenance(tmp_path):
    torch.save(random_net(classes=9).state_dict(), tmp_path / "weights.pth")
    first, second = (
        FrozenBackbone(path_of(random_net), str(tmp_path / "weights.pth"), pretrained_cfg_overlay=PLAIN).provenance()
        for _ in range(2)
    )
    assert first == second


def test_label_and_description_tell_weights_apart(weights):
    mine = random_backbone("test_resnet", weights=str(weights), layer=["layer1", "penultimate"])
    assert (mine.label, random_backbone("test_resnet").label) == ("test_resnet-mine", "test_resnet-random")
    resized = "3 x 64 x 64, bilinear, crop 0.95, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert mine.describe() == (
        f"test_resnet, weights {weights}, layer layer1 (32 neurons) + penultimate (96 neurons), {resized}"
    )
    flat = random_backbone("test_resnet", kwargs={"stem_type": "deep"}, layer="layer1", pooling="flatten")
    assert flat.describe() == (
        f"test_resnet(stem_type=deep), random weights, layer layer1 (8,192 neurons), pooling flatten, {resized}"
    )


def test_vectors_of_the_task_stand_in_for_a_backbone():
    vectors = GivenVectors(1536)
    assert (vectors.label, vectors.widths, vectors.preprocessing) == ("none", {"none": 1536}, {})
    assert vectors.provenance() == {"weights": "none", "preprocessing": {}}
    assert vectors.describe() == "none: vectors of the task (1,536 numbers each)"
