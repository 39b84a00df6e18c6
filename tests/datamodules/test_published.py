"""Every task of a published data set on a small replica: what it reads, how it cuts it, and what it cannot read."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from replicas import (
    FLOWER_SPLITS,
    FLOWERS,
    WRITERS,
    Replica,
    cifar_batch,
    flower_lists,
    hub,
    matlab,
    python2_pickle,
    refusal,
    sizes,
)
from torchvision import datasets

import datamodules
from datamodules.base import PROTOCOLS
from datamodules.splits import Percent

FULL = {
    "Caltech101": (102, "natural", 2754, 306, 6084),
    "CIFAR10": (10, None, 45000, 5000, 10000),
    "CIFAR100": (100, "natural", 45000, 5000, 10000),
    "DTD": (47, "natural", 1880, 1880, 1880),
    "Flowers102": (102, "natural", 1020, 1020, 6149),
    "OxfordIIITPet": (37, "natural", 3312, 368, 3669),
    "SVHN": (10, "natural", 65931, 7326, 26032),
    "SUN397": (397, "natural", 76128, 10875, 21750),
    "PatchCamelyon": (2, "specialized", 235930, 26214, 32768),
    "EuroSAT": (10, "specialized", 16200, 5400, 5400),
    "RESISC45": (45, "specialized", 17010, 1890, 6300),
    "DiabeticRetinopathy": (5, "specialized", 31614, 3512, 42670),
    "CLEVRCount": (8, "structured", 63000, 7000, 15000),
    "CLEVRDistance": (6, "structured", 63000, 7000, 15000),
    "DMLab": (6, "structured", 58995, 6555, 22735),
    "KITTIDistance": (4, "structured", 6347, 423, 711),
    "DSpritesLocation": (16, "structured", 530842, 58982, 73728),
    "DSpritesOrientation": (16, "structured", 530842, 58982, 73728),
    "SmallNORBAzimuth": (18, "structured", 21870, 2430, 12150),
    "SmallNORBElevation": (9, "structured", 21870, 2430, 12150),
    "ImageNet1k": (1000, None, 1268355, 12812, 50000),
    "ImageNetV2": (1000, None, 1268355, 12812, 10000),
    "Places365": (365, None, 1785425, 18035, 36500),
}
"""Classes, group, and images of train, validation and test."""
READ_WITH_THE_DATA = ("SUN397", "ImageNet1k", "ImageNetV2", "Places365")
"""Tasks whose class names are not fixed here."""
CLASSES = {
    "CIFAR10": {0: "airplane", 1: "automobile", 3: "cat", 9: "truck"},
    "CIFAR100": {0: "apple", 23: "cloud", 39: "keyboard", 71: "sea", 99: "worm"},
    "Flowers102": {0: "pink primrose", 1: "hard-leaved pocket orchid", 73: "rose", 76: "passion flower"},
    "OxfordIIITPet": {0: "Abyssinian", 1: "American Bulldog", 32: "Siamese", 36: "Yorkshire Terrier"},
}
PAPER = tuple(CLASSES)
each_task = pytest.mark.parametrize("name", FULL)

VTAB = yaml.safe_load((ROOT / "configs" / "sweep_vtab.yaml").read_text())["vary"]["data"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """What makes the replica of a task."""
    return lambda name: Replica(name, tmp_path, monkeypatch)


def some(*names):
    return pytest.mark.parametrize("name", names)


class Labels:
    """As many images as a data set has, without any."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return Labels(self.labels[indices])


# ------------------------------------------------------------------------------------------------- what a task holds


def test_vtab_is_19_tasks_in_three_groups():
    groups = [getattr(datamodules, name).group for name in VTAB]
    assert {group: groups.count(group) for group in groups} == {"natural": 7, "specialized": 4, "structured": 8}
    assert set(VTAB) | {"CIFAR10", "ImageNet1k", "ImageNetV2", "Places365"} == set(FULL) == set(WRITERS)
    settings = yaml.safe_load((ROOT / "configs" / "vtab1k.yaml").read_text())["data"]["init_args"]
    assert (settings["protocol"], settings["view"]) == ("vtab1k", "squash")


@each_task
def test_the_page_of_tasks_tells_classes_and_sizes(name):
    lines = (ROOT / "datamodules" / "README.md").read_text().splitlines()
    (row,) = (line.split("|") for line in lines if f"`{name}`" in line.partition("|")[2].partition("|")[0])
    classes, _, train, val, test = FULL[name]
    assert f"{classes:,}" in row[2]
    assert f"{train:,} / {val:,} / {f'50,000, {test:,}' if name == 'ImageNetV2' else f'{test:,}'}" in row[3]


@each_task
def test_name_group_and_fixed_classes_are_known_before_there_is_data(name, tmp_path):
    task = getattr(datamodules, name)(root=str(tmp_path / "nowhere"))
    classes, group, *_ = FULL[name]
    assert (task.label, task.group, task.vectors) == (task.name, group, False)
    assert len(set(task.classes)) == len(task.classes) == (0 if name in READ_WITH_THE_DATA else classes)
    assert {index: task.target.classes[index] for index in CLASSES.get(name, {})} == CLASSES.get(name, {})
    if name in ("CIFAR10", "CIFAR100", "OxfordIIITPet"):
        assert list(task.classes) == sorted(task.classes)
    assert task.augmentation == ("none" if group in ("specialized", "structured") else "paper")
    assert not list(tmp_path.iterdir())


@each_task
def test_a_replica_is_read_into_disjoint_splits(name, made):
    replica = made(name)
    task = replica.load()
    replica.check(task)
    classes = task.target.classes
    assert len(classes) == len(set(classes)) == task.target.outputs == FULL[name][0]
    assert all(classes)
    for images in task.images.values():
        assert len(images) == len(images.labels)
        assert 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(classes)
        assert images[0].mode == "RGB"
        assert min(images[len(images) - 1].size) >= 16
    seen = [images[i].tobytes() for images in task.images.values() for i in range(len(images))]
    assert len(seen) == len(set(seen)) == sum(replica.sizes)
    first, again, other = (
        [images.digest() for images in each.images.values()]
        for each in (task, replica.load(seed=0), replica.load(seed=1))
    )
    assert first == again
    assert (other[0] == first[0]) == (name in ("DTD", "Flowers102", "SUN397", "KITTIDistance"))
    assert (other[2] == first[2]) == (name not in ("Caltech101", "EuroSAT"))
    train, val, test = replica.sizes
    described = task.describe().replace(" (cut from train)", "")
    assert described == f"{task.name}: {train:,} train, {val} val, {test:,} test images, {len(classes):,} classes"


@some(*PAPER)
def test_a_task_reads_what_torchvision_reads(name, made, monkeypatch):
    replica = made(name)
    for module in (datasets.cifar, datasets.flowers102):  # which know the MD5 sums of the published files
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    cifar = name.startswith("CIFAR")
    first, second = ({"train": True}, {"train": False}) if cifar else ({"split": "train"}, {"split": "test"})
    first = {"split": "trainval"} if name == "OxfordIIITPet" else first
    for arguments, part in ((first, "train"), (second, "test")):
        read = getattr(datasets, name)(str(replica.root), **arguments)
        assert [(np.asarray(image).tobytes(), label) for image, label in read] == replica.parts[part]
    if name == "OxfordIIITPet":
        assert read.classes == [replica.task.classes[label] for label in (0, 1, 36)]


@each_task
def test_the_published_numbers_of_images_are_cut_as_the_table_says(name, tmp_path):
    classes, _, train, val, test = FULL[name]
    if name in ("DTD", "Flowers102", "SUN397", "KITTIDistance", "OxfordIIITPet"):
        return  # official, listed, by drives, or rounded in each class
    task = getattr(datamodules, name)(root=str(tmp_path))
    total = train + val + (test if "test" in task.cut else 0)
    if all(isinstance(part, Percent) for part in task.cut.values()):  # of which `test_splits` asks that they be exact
        assert {split: part.of(total) for split, part in task.cut.items()} == (
            {"val": val, "test": test} if "test" in task.cut else {"val": val}
        )
        return
    task.load = lambda: {"train": Labels(torch.arange(total) % classes), "test": Labels(torch.arange(test) % classes)}
    task.setup()
    assert sizes(task) == (train, val, test)


def test_vtab1k_takes_800_and_200_of_every_task_and_all_of_test(tmp_path):
    for name in VTAB:
        classes, _, train, val, test = FULL[name]
        task = getattr(datamodules, name)(root=str(tmp_path), protocol="vtab1k")
        numbers = {"train": train, "val": val, "test": test}
        labels = {split: Labels(torch.arange(n) % classes) for split, n in numbers.items()}
        task.target = datamodules.targets.Multiclass([str(i) for i in range(classes)])
        task.load = lambda labels=labels: labels
        task.setup()
        assert sizes(task) == (*PROTOCOLS["vtab1k"].values(), test)
        assert task.label == f"{task.name}_vtab1k"
        counts = task.images["train"].labels.bincount(minlength=classes)
        assert counts.max() - counts.min() <= 1  # as balanced as all of it


def test_vtab1k_of_too_few_images_is_refused(made):
    assert "train split of dtd has 9 images, fewer than the 800" in refusal(lambda: made("DTD").load(protocol="vtab1k"))
    assert "data.protocol is 'vtab'" in refusal(lambda: datamodules.DTD(protocol="vtab"))


# ------------------------------------------------------------------------------------------------------------- labels


def test_clevrs_labels_are_vtabs(made):
    count, distance = made("CLEVRCount").load(), made("CLEVRDistance").load()
    assert count.images["test"].labels.tolist() == [0, 1, 2, 3, 4]
    assert [count.target.classes[i] for i in (0, 7)] == ["3", "10"]
    assert distance.images["test"].labels.tolist() == [1, 2, 2, 2, 2]  # 8.5 belongs below, 8.6 to 8.9 above


def test_kittis_labels_are_vtabs_and_drives_stay_together(made):
    task = made("KITTIDistance").load()
    rand = [(7 * i) % 20 for i in range(20)]
    drives = []
    for images in task.images.values():
        for i in range(len(images)):
            assert int(images.labels[i]) == int(images.name(i)[:6]) % 4
        drives.append({rand[int(images.name(i)[:6])] // 2 for i in range(len(images))})
    assert [len(each) for each in drives] == [8, 1, 1]
    assert len(set.union(*drives)) == 10


def test_kittis_drives_are_those_of_tensorflow_datasets_whatever_the_seed(made):
    replica = made("KITTIDistance")
    of_image = [(5 * i) % 141 for i in range(141)]  # of KITTI's 141 drives, one image each
    lines = [f"2011_09_26 2011_09_26_drive_{drive:04d}_sync 0000000000\n" for drive in reversed(range(141))]
    replica.file("train_mapping.txt").write_text("".join(lines))
    replica.file("train_rand.txt").write_text(",".join(str(141 - drive) for drive in of_image))
    for i in range(20, 141):
        replica.write({f"Kitti/raw/training/image_2/{i:06d}.png": b"", f"Kitti/raw/training/label_2/{i:06d}.txt": b""})
    task = replica.load(seed=3)
    there = {
        split: sorted(of_image[int(images.name(i)[:6])] for i in range(len(images)))
        for split, images in task.images.items()
    }
    # What `np.random.seed(123)` and two calls of `np.random.choice` give of sorted drives, a tenth of them each.
    assert there["test"] == [0, 4, 31, 35, 45, 63, 74, 79, 104, 112, 120, 127, 129, 140]
    assert there["val"] == [14, 18, 24, 26, 32, 33, 47, 48, 54, 97, 99, 101, 109, 110]
    assert sorted([*there["train"], *there["val"], *there["test"]]) == list(range(141))


def test_vtabs_pets_are_cut_at_80_percent_and_the_papers_at_90(tmp_path, monkeypatch):
    labels = {"trainval": torch.arange(3680) % 37, "test": torch.arange(3669) % 37}
    pets = datamodules.OxfordIIITPet
    monkeypatch.setattr(pets, "_listed", lambda self, part: Labels(labels[part]))
    monkeypatch.setattr(pets, "downloads", ())
    cut = {split: len(part) for split, part in pets(root=str(tmp_path), protocol="vtab1k").load().items()}
    assert cut == {"train": 2944, "val": 736, "test": 3669}
    task = pets(root=str(tmp_path))
    task.setup()
    assert sizes(task)[2] == 3669
    assert abs(sizes(task)[1] - 368) <= 37 // 2  # rounded in each class


def test_a_list_of_scenes_that_is_missing_is_named_with_where_to_put_it(made):
    replica = made("SUN397")
    replica.file("sun397_tfds_va.txt").unlink()
    message = refusal(replica.load)
    assert f"{replica.root / 'sun397_tfds_va.txt'} is missing" in message
    assert "sun397_tfds_va.txt from http://127.0.0.1:9/sun397_tfds_va.txt, " in message


@pytest.mark.parametrize(("name", "values"), [("DSpritesLocation", 32), ("DSpritesOrientation", 40)])
def test_dsprites_values_fall_into_16_bins(name, values):
    bins = getattr(datamodules, name)().relabel(torch.arange(values)).tolist()
    assert bins == [int(value // (values / 16)) for value in range(values)]
    assert set(bins) == set(range(16))


def test_a_label_of_no_class_is_named(made):
    replica = made("DMLab")
    hub(replica, "wds_vtab-dmlab", [0, 1, 6])
    assert refusal(replica.load) == (
        "The label of s0000002.webp in train of dmlab is 6; it must be a class index from 0 to 5."
    )


# ---------------------------------------------------------------------------------------------------- structured tasks


def test_structured_images_are_squashed_without_a_crop(made):
    task = made("KITTIDistance").load()
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    task.preprocessing = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": mean, "std": std}
    task.preprocessing |= {"crop_pct": 0.875, "crop_mode": "center"}
    (batch,) = task.extraction_loader("test", [[0]], None, 1)
    squashed = task.images["test"][0].resize((32, 32), Image.Resampling.BICUBIC)
    assert (batch.inputs[0] - torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255).abs().max() < 1e-6
    assert task.view_provenance(None) == "clean view, squashed whole"


def test_structured_images_are_neither_augmented_nor_cropped():
    assert "must be none" in refusal(lambda: datamodules.DMLab(augmentation="paper"))
    assert "must be squash" in refusal(lambda: datamodules.DMLab(view="weights"))
    assert datamodules.EuroSAT(augmentation="paper").augmentation == "paper"


# ------------------------------------------------------------------------------------------------- pickles of CIFAR


@some("CIFAR10", "CIFAR100")
@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_that_a_newer_numpy_wrote_are_read_too(name, made, protocol):
    replica = made(name)
    for file, _ in [*replica.task.source.train_list, *replica.task.source.test_list]:
        file = replica.file(file)
        file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes(), encoding="latin1"), protocol=protocol))
    replica.declare()
    replica.check(replica.load())


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CODE = {
    "os.system": lambda file: Call(os.system, f"touch {file}"),
    "eval": lambda file: Call(eval, f"open({str(file)!r}, 'w').close()"),
    "numpy": lambda file: Call(np.save, str(file), np.zeros(1)),
    "inside an array": lambda file: np.array([Call(os.system, f"touch {file}")], dtype=object),
}


@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
@pytest.mark.parametrize("beside", [True, False])
def test_code_in_a_pickle_is_never_run(made, code, beside, tmp_path):
    replica, ran = made("CIFAR10"), tmp_path / "ran.npy"
    file = replica.file("data_batch_5")
    batch = cifar_batch(replica.random, "labels", [0, 1])
    malicious = pickle.dumps(batch | {"data": code(ran)} if beside else code(ran), protocol=2)
    pickle.loads(malicious)
    ran.unlink()  # so it would have run
    file.write_bytes(malicious)
    replica.declare()
    message = refusal(replica.load)
    assert str(file) in message
    assert "code" in message
    assert "never run" in message
    assert not ran.exists()


BATCHES = {
    "no batch": (lambda batch, key: [1, 2], "no batch"),
    "no data": (lambda batch, key: {key: batch[key]}, "'data'"),
    "no labels": (lambda batch, key: {"data": batch["data"]}, "labels'"),
    "fewer rows": (lambda batch, key: batch | {"data": batch["data"][1:]}, "no batch"),
    "other numbers": (lambda batch, key: batch | {"data": batch["data"] / 255}, "float64"),
    "a label too many": (lambda batch, key: batch | {key: [*batch[key][1:], 100]}, "label 100"),
    "a negative label": (lambda batch, key: batch | {key: [*batch[key][1:], -1]}, "label -1"),
    "nothing": (lambda batch, key: batch | {key: [], "data": batch["data"][:0]}, "no labels"),
}


@pytest.mark.parametrize(("change", "named"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_is_none_is_named(made, change, named):
    replica = made("CIFAR100")
    file = replica.file("test")
    file.write_bytes(python2_pickle(change(cifar_batch(replica.random, "fine_labels", [0, 57, 99]), "fine_labels")))
    replica.declare()
    message = refusal(replica.load)
    assert str(file) in message
    assert named in message


@pytest.mark.parametrize("torn", [b"", b"\x80\x02}", b"<html>\n</html>\n", b"\x80\x02cos\nsystem\n"])
def test_a_torn_pickle_is_named(made, torn):
    replica = made("CIFAR10")
    file = replica.file("data_batch_2")
    file.write_bytes(torn)
    replica.declare()
    assert f"{file} cannot be read" in refusal(replica.load)


# -------------------------------------------------------------------------------------------------- lists of others


@some("imagelabels.mat", "setid.mat")
@pytest.mark.parametrize("torn", [b"", b"<html>\n</html>\n", "half", "other"])
def test_a_corrupt_matlab_file_is_named(made, name, torn):
    replica = made("Flowers102")
    file = replica.file(name)
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes({"half": half, "other": matlab(something=[1])}.get(torn, torn))
    replica.declare()
    assert f"{file} cannot be read" in refusal(replica.load)


@pytest.mark.parametrize("label", [0, 103])
def test_a_flower_of_no_class_is_named(made, label):
    replica = made("Flowers102")
    file = replica.file("imagelabels.mat")
    file.write_bytes(flower_lists([label, *FLOWERS[1:]])[file.name])
    replica.declare()
    message = refusal(replica.load)
    assert f"{file} holds the label {label}" in message
    assert "1 to 102" in message


@pytest.mark.parametrize("number", [0, 25])
def test_a_flower_without_a_label_is_named(made, number):
    replica = made("Flowers102")
    file = replica.file("setid.mat")
    file.write_bytes(flower_lists(FLOWERS, FLOWER_SPLITS | {"valid": [4, number]})[file.name])
    replica.declare()
    message = refusal(replica.load)
    assert f"{file} lists image {number}" in message
    assert "1 to 24" in message


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("Abyssinian_11 1 1", "Line 3"),
        ("Abyssinian_11 one 1 1", "Line 3"),
        ("Abyssinian 11 1 1 1", "Line 3"),
        ("../images/Abyssinian_11 1 1 1", "Line 3"),
        ("", "Line 3"),
        ("Abyssinian_11 0 1 1", "label 0; the classes of oxford_iiit_pet are 1 to 37"),
        ("Abyssinian_11 38 1 1", "label 38; the classes of oxford_iiit_pet are 1 to 37"),
    ],
)
def test_an_annotation_that_makes_no_sense_is_named(made, line, named):
    replica = made("OxfordIIITPet")
    file = replica.file("trainval.txt")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    message = refusal(replica.load)
    assert str(file) in message
    assert named in message


@pytest.mark.parametrize("part", ["trainval", "test"])
@pytest.mark.parametrize("written", [None, b"", b"\xff\xfe\x00"])
def test_a_list_of_pets_that_cannot_be_read_is_named(made, part, written):
    replica = made("OxfordIIITPet")
    file = replica.file(f"{part}.txt")
    file.unlink()
    if written is not None:
        file.write_bytes(written)
    assert str(file) in refusal(replica.load)


# ----------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "configs", "epochs", "augmentation", "features"),
    [
        ("CIFAR10", ["{}_curve.yaml"], 2, "none", "clean"),
        ("OxfordIIITPet", ["{}_20pct.yaml"], 2, "none", "clean"),
        ("Flowers102", ["{}_20pct.yaml", "paper_recipe.yaml"], 5, "paper", "off"),
    ],
)
def test_the_shipped_configurations_fit(name, configs, epochs, augmentation, features, made, cli):
    replica = made(name)
    files = [file.format(replica.task.name) for file in (*configs, "debug.yaml")]
    status, _, err = cli(
        *("fit", *(argument for file in files for argument in ("--config", file))),
        *("--model.backbone.name", "test_resnet", "--model.backbone.weights", "random", "--data.batch_size=4"),
        *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", f"--trainer.max_epochs={epochs}"),
        *("--data.root", str(replica.root), "--pictures=[]"),
    )
    assert status == 0, err
    results = pd.read_csv("runs/debug/results.csv")
    assert results["task"].unique().tolist() == [replica.task.name]
    assert results["augmentation"].unique().tolist() == [augmentation]
    assert results["features"].unique().tolist() == [features]
    assert set(results["fraction"]) == {0.1, 0.5, 1.0}
    assert {split: rows["images"].unique().tolist() for split, rows in results.groupby("split")} == {
        "val": [replica.sizes[1]],
        "test": [replica.sizes[2]],
    }


@some(*PAPER)
@pytest.mark.parametrize("config", ["20pct", "curve"])
def test_the_shipped_configurations_are_the_papers(name, config):
    task = getattr(datamodules, name).name
    text = (ROOT / "configs" / f"{task}_{config}.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["data"]["class_path"] == name
    assert settings["model"]["backbone"]["name"].startswith("resnet50.")
    assert settings["model"]["seeds"] == [1, 2, 3, 4, 5]
    assert f"weight_decay: {'5.0e-4' if task.startswith('cifar') else '1.0e-4'}" in text
    fractions = settings["model"]["fractions"]
    assert fractions == 0.2 if config == "20pct" else (len(fractions) == 14 and 0.2 in fractions)


@pytest.mark.network
@each_task
def test_the_published_data_have_the_sizes_of_the_table(name, tmp_path):
    task = getattr(datamodules, name)(root=str(tmp_path))
    task.prepare_data()
    task.setup()
    assert sizes(task) == FULL[name][2:]
    assert all(images[0].mode == "RGB" for images in task.images.values())
