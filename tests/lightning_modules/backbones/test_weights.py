import hashlib
import io
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from networks import PLAIN, SMALL, images, path_of, random_net, refusal, shaken
from safetensors.torch import save, save_file
from torch.testing import assert_close

from lightning_modules.backbones import weights
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.backbones.frozen import FrozenBackbone

NAME = "test_resnet"


def torch_bytes(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return shaken(timm.create_model(NAME, num_classes=5))


def assert_holds(backbone, source):
    with torch.no_grad():
        expected = source.forward_head(source.forward_features(images()), pre_logits=True)
    assert_close(backbone(images()), expected)
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def load(path, name=NAME, overlay=SMALL, layer="penultimate"):
    return FrozenBackbone(name, weights=str(path), pretrained_cfg_overlay=overlay, layer=layer)


@pytest.mark.parametrize("kind", ["torch", "old torch"])
def test_torch_files_load_in_and_out_of_containers(tmp_path, source, kind):
    for content in (source.state_dict(), {"model": source.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}):
        (tmp_path / "weights.pth").write_bytes(torch_bytes(content, zipped=kind == "torch"))
        assert_holds(load(tmp_path / "weights.pth"), source)


@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pth"])
def test_safetensors_files_load_whatever_their_ending(tmp_path, source, ending):
    (tmp_path / f"weights{ending}").write_bytes(save(source.state_dict()))
    assert_holds(load(tmp_path / f"weights{ending}"), source)


def under(prefix, state, change=0):
    return {prefix + key: value + change for key, value in state.items()}


# What frameworks leave, and what is said of it: what was taken, and what was left.
FORMS = {
    "plain": (lambda w: w, None),
    "timm with averaged weights": (
        lambda w: {"state_dict": under("", w, 1), "state_dict_ema": w, "epoch": 3},
        "took what is under 'state_dict_ema', averaged over training; left state_dict.",
    ),
    "averaged weights in a wrapper": (
        lambda w: {"model": under("module.", w, 1), "model_ema": under("module.", w)},
        "took what is under 'model_ema.module', averaged over training; left model.",
    ),
    "student and teacher": (
        lambda w: {
            "student": under("module.backbone.", w, 1),
            "teacher": under("backbone.", w) | {"dino_head.mlp.weight": torch.ones(2)},
        },
        "took what is under 'teacher.backbone', averaged over training; left student, teacher.dino_head.",
    ),
    "averaged by torch": (
        lambda w: under("module.", w) | {"n_averaged": torch.tensor(5)},
        "took what is under 'module'; left n_averaged.",
    ),
    "further entries": (
        lambda w: {"model": w | {"mask_token": torch.ones(1), "decoder.0.weight": torch.ones(2)}},
        "took what is under 'model'; left model.mask_token, model.decoder.",
    ),
    "beside a text encoder": (
        lambda w: {"state_dict": under("module.visual.", w) | {"module.logit_scale": torch.ones(())}},
        "took what is under 'state_dict.module.visual'; left state_dict.module.logit_scale.",
    ),
    "Lightning": (
        lambda w: {"state_dict": under("net.", w) | {"criterion.weight": torch.ones(3)}, "loops": {}},
        "took what is under 'state_dict.net'; left state_dict.criterion.",
    ),
    "sharded and compiled": (
        lambda w: under("_fsdp_wrapped_module._orig_mod.", w),
        "took what is under '_fsdp_wrapped_module._orig_mod'; left nothing.",
    ),
    "nested": (
        lambda w: {"model": {"state_dict": w}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        "took what is under 'model.state_dict'; left optimizer.",
    ),
    "adversarial training": (  # the attacked network is the network
        lambda w: {
            "model": under("module.model.", w)
            | under("module.attacker.model.", w)
            | {"module.normalizer.new_mean": torch.ones(3, 1, 1), "module.attacker.normalize.new_std": torch.ones(3)}
        },
        "took what is under 'model.module.model'; left model.module.attacker, model.module.normalizer.",
    ),
    "many entries": (
        lambda w: w | {f"entry{i}": torch.ones(1) for i in range(7)},
        "took all that the backbone has; left entry0, entry1, entry2, entry3, entry4, ....",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_part_that_covers_the_network_is_taken_and_the_rest_is_named(tmp_path, source, monkeypatch, form):
    said: list[str] = []
    monkeypatch.setattr(weights, "rank_zero_info", said.append)
    make, line = FORMS[form]
    (tmp_path / "weights.pth").write_bytes(torch_bytes(make(source.state_dict())))
    assert_holds(load(tmp_path / "weights.pth"), source)
    assert said == ([f"Weights of weights.pth: {line}"] if line else [])


def test_two_parts_that_differ_are_refused_and_both_are_named(tmp_path, source):
    state = source.state_dict()
    for content in (
        {"encoder_q": state, "encoder_k": under("", state, 1)},
        {"ema": state, "teacher": under("", state, 1), "model": state},
    ):
        path = tmp_path / "weights.pth"
        path.write_bytes(torch_bytes(content))
        message = refusal(NAME, weights=str(path), pretrained_cfg_overlay=SMALL)
        first, second, *_ = content
        assert f"twice, and they differ: under {first!r} and under {second!r}" in message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_loads_the_files_that_it_names(tmp_path, source, kind):
    names = list(source.state_dict())
    parts = {name: f"part-{place % 3}.{kind}" for place, name in enumerate(names)}
    for part in set(parts.values()):
        held = {name: source.state_dict()[name] for name in names if parts[name] == part}
        (tmp_path / part).write_bytes(save(held) if kind == "safetensors" else torch_bytes(held))
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": parts}))
    assert_holds(load(index), source)
    (tmp_path / f"part-1.{kind}").unlink()
    assert f"part-1.{kind} is not there" in refusal(NAME, weights=str(index), pretrained_cfg_overlay=SMALL)
    for content in ("[1]", '{"weight_map": 3}', "{"):
        index.write_text(content)
        assert "is no index of weights" in refusal(NAME, weights=str(index), pretrained_cfg_overlay=SMALL)


@pytest.mark.parametrize("absent", ["fc.", "num_batches_tracked"])
def test_what_evaluation_never_reads_may_be_absent(tmp_path, source, absent):
    content = {key: value for key, value in source.state_dict().items() if absent not in key}
    assert len(content) < len(source.state_dict())
    save_file(content, tmp_path / "weights.safetensors")
    assert_holds(load(tmp_path / "weights.safetensors"), source)


def test_all_of_a_classifier_of_several_modules_is_ignored(tmp_path):
    save_file(timm.create_model("efficientvit_m0").state_dict(), tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", name="efficientvit_m0", overlay=PretrainedCfgOverlay())
    assert backbone.widths == {"penultimate": 192}


@pytest.mark.parametrize("layer", ["fc", "global_pool", "layer4"])
def test_a_classifier_in_the_file_does_not_hinder_reading_beside_it(tmp_path, source, layer):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", layer=layer)
    with torch.no_grad():
        assert_close(backbone(images()), source.forward_features(images()).mean((2, 3)))


@pytest.mark.parametrize("layer", ["penultimate", "neck"])
def test_a_callables_classifier_may_have_another_size_in_the_file(tmp_path, layer):
    trained = shaken(random_net(classes=9))
    (tmp_path / "weights.pth").write_bytes(torch_bytes(trained.state_dict()))
    backbone = load(tmp_path / "weights.pth", path_of(random_net), PLAIN, layer)
    with torch.no_grad():
        assert_close(backbone(images()), trained.penultimate(images()))


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: without(w, "layer2.0.bn1.running_var"), ["1 missing", "layer2.0.bn1.running_var"]),
        (lambda w: without(w, "conv1.0.weight"), ["1 missing", "conv1.0.weight"]),
        (lambda w: w | {"layer2.3.weight": torch.ones(1)}, ["1 unknown", "layer2.3.weight"]),
        (lambda w: w | {"layer1.0.conv1.bias": torch.ones(1)}, ["1 unknown", "layer1.0.conv1.bias"]),
        (lambda w: w | {"layer1.0.bn1.bias": torch.ones(5)}, ["1 of another shape", "layer1.0.bn1.bias", "(5,)"]),
        (lambda w: {"a": dict(list(w.items())[:9]), "b": dict(list(w.items())[9:])}, ["missing", "conv1.0.weight"]),
        (lambda w: timm.create_model("lcnet_035").state_dict(), ["missing", "unknown", ", ..."]),
        (lambda w: {"fc.weight": w["fc.weight"]}, ["missing", "conv1.0.weight"]),
    ],
    ids=["no statistic", "no parameter", "a block", "a bias", "shape", "apart", "architecture", "classifier only"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, source, change, named):
    path = tmp_path / "weights.pth"
    path.write_bytes(torch_bytes(change(dict(source.state_dict()))))
    message = refusal(NAME, weights=str(path), pretrained_cfg_overlay=SMALL)
    assert str(path) in message
    assert [name for name in named if name not in message] == []
    assert len(message) < 800


WEIGHTS = {"conv.weight": torch.arange(300.0), "conv.bias": torch.arange(3.0)}
NO_WEIGHTS = {
    "pointer.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "table.pth": b"accuracy,loss\n0.9,0.1\n",
    "empty.safetensors": b"",
    "half-a-head.safetensors": save(WEIGHTS)[:20],
    "list.pth": torch_bytes([1, 2]),
    "numbers.pth": torch_bytes({"epoch": 3, "state_dict": {"lr": 0.1}}),
    "tensor.pth": torch_bytes(torch.ones(3)),
}


@pytest.mark.parametrize(("name", "content"), NO_WEIGHTS.items(), ids=NO_WEIGHTS)
def test_a_file_that_holds_no_weights_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(NAME, weights=str(tmp_path / name), pretrained_cfg_overlay=SMALL)


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


def test_a_file_is_found_from_the_working_directory(tmp_path, monkeypatch, source):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    assert_holds(load("weights.safetensors"), source)


# The Hub


def test_a_file_of_the_hub_is_downloaded_once_and_then_needs_no_network(hub, source, monkeypatch):
    state = source.state_dict()
    hub.files["l2/eps3.ckpt"] = torch_bytes({"model": under("module.model.", state), "epoch": 1})
    hub.files["net.safetensors"] = save(under("", state, 1))
    backbone = load("hf-hub:lab/nets/l2/eps3.ckpt")
    assert_holds(backbone, source)
    assert backbone.label == "test_resnet-eps3"
    other = load("hf-hub:lab/nets@v2/net.safetensors")
    assert other.label == "test_resnet-net"
    assert other.provenance() != backbone.provenance()
    assert hub.asked.count("GET l2/eps3.ckpt") == 1
    hub.asked.clear()
    load("hf-hub:lab/nets/l2/eps3.ckpt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_holds(load("hf-hub:lab/nets/l2/eps3.ckpt"), source)
    assert [each for each in hub.asked if each.startswith("GET")] == []


def test_an_index_of_the_hub_brings_its_files(hub, source):
    parts = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(source.state_dict())}
    for part in set(parts.values()):
        hub.files[f"big/{part}"] = save({name: source.state_dict()[name] for name in parts if parts[name] == part})
    hub.files["big/model.safetensors.index.json"] = json.dumps({"weight_map": parts}).encode()
    assert_holds(load("hf-hub:lab/nets/big/model.safetensors.index.json"), source)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf-hub:lab/nets/none.ckpt", "lab/nets has no file none.ckpt"),
        ("hf-hub:lab/none/net.ckpt", "there is no repository lab/none"),
        ("hf-hub:lab/nets@v3/net.ckpt", "lab/nets has no revision v3"),
        ("hf-hub:lab/nets", "a file of the Hub is hf-hub:<owner>/<name>/<file>"),
        ("hf-hub:lab/n ets/net.ckpt", "cannot be had"),
    ],
)
def test_what_the_hub_has_not_is_named(hub, address, said):
    message = refusal(NAME, weights=address, pretrained_cfg_overlay=SMALL)
    assert address in message
    assert said in message


def test_what_is_not_in_the_cache_is_named_where_the_hub_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(NAME, weights="hf-hub:lab/nets/net.ckpt", pretrained_cfg_overlay=SMALL)
    assert f"it is not in {tmp_path}, and the Hub is out of reach or switched off" in message


def test_a_file_in_the_cache_that_is_not_the_hubs_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    content = save(source.state_dict())
    repository, commit = tmp_path / "models--lab--nets", "c" * 40
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repository / "snapshots" / commit / "net.safetensors"
    for path, value in {blob: content, repository / "refs" / "main": commit.encode()}.items():
        path.parent.mkdir(parents=True)
        path.write_bytes(value)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(blob)
    assert_holds(load("hf-hub:lab/nets/net.safetensors"), source)
    blob.write_bytes(content[:-4] + bytes(4))
    message = refusal(NAME, weights="hf-hub:lab/nets/net.safetensors", pretrained_cfg_overlay=SMALL)
    assert f"is not what the Hub has; delete {blob}" in message


# No code is run


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
    message = refusal(NAME, weights=str(path), pretrained_cfg_overlay=SMALL)
    assert str(path) in message
    assert not marker.exists()
    if pack is torch_bytes:
        assert "code" in message
        assert "never run" in message


def test_the_mark_of_code_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
