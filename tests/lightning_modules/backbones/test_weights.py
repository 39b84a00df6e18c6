import io
import pickle
from pathlib import Path

import pytest
import timm
import torch
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
