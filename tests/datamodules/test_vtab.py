"""Every task beyond the paper's on a small replica, in the format on disk that its source publishes."""

import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo
from torchvision import datasets

import datamodules
from datamodules.base import VTAB1K
from datamodules.hub import HubTask

FULL = {
    "Caltech101": (102, "natural", 2754, 306, 6084),
    "CIFAR10": (10, None, 45000, 5000, 10000),
    "CIFAR100": (100, "natural", 45000, 5000, 10000),
    "DTD": (47, "natural", 1880, 1880, 1880),
    "Flowers102": (102, "natural", 1020, 1020, 6149),
    "OxfordIIITPet": (37, "natural", 3312, 368, 3669),
    "SVHN": (10, "natural", 65931, 7326, 26032),
    "SUN397": (397, "natural", 76129, 10875, 21750),
    "PatchCamelyon": (2, "specialized", 235930, 26214, 32768),
    "EuroSAT": (10, "specialized", 16200, 5400, 5400),
    "RESISC45": (45, "specialized", 17010, 1890, 6300),
    "DiabeticRetinopathy": (5, "specialized", 31614, 3512, 42670),
    "CLEVRCount": (8, "structured", 63000, 7000, 15000),
    "CLEVRDistance": (6, "structured", 63000, 7000, 15000),
    "DMLab": (6, "structured", 58995, 6555, 22735),
    "KITTIDistance": (4, "structured", None, None, None),  # by drives: 7,481 together
    "DSpritesLocation": (16, "structured", 530842, 58982, 73728),
    "DSpritesOrientation": (16, "structured", 530842, 58982, 73728),
    "SmallNORBAzimuth": (18, "structured", 21870, 2430, 12150),
    "SmallNORBElevation": (9, "structured", 21870, 2430, 12150),
    "ImageNet1k": (1000, None, 1268355, 12812, 50000),
    "ImageNetV2": (1000, None, 1268355, 12812, 10000),
    "Places365": (365, None, 1785425, 18035, 36500),
}
"""Classes, group, and images of train, validation and test."""
each_task = pytest.mark.parametrize("name", FULL)


class Labels:
    """As many images as a data set has, without any."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return Labels(self.labels[indices])


class Source:
    """Writes what a source publishes."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        self.random = np.random.default_rng(0)

    def image(self, kind="JPEG", size=None, **options):
        height, width = size or self.random.integers(16, 40, 2)
        file = io.BytesIO()
        pixels = Image.fromarray(self.random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((int(width), int(height))).save(file, kind, **options)
        return file.getvalue()

    def pack(self, path, contents):
        """Write an archive; return its MD5 sum."""
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(path.name, contents))
        return hashlib.md5(path.read_bytes()).hexdigest()

    def hub(self, repository, labels, splits=("train", "test"), size=None):
        """Write an image and a label for each sample, as `clip_benchmark` exports them."""
        for split in splits:
            content = {}
            for i, label in enumerate(labels):
                content[f"s{i:07d}.webp"] = self.image("WEBP", size, lossless=True)
                content[f"s{i:07d}.cls"] = str(label).encode()
            self.pack(f"{repository}/{split}/0.tar", content)
            (self.root / repository / split / "nshards.txt").write_text("1\n")
        (self.root / repository / "classnames.txt").write_text("one\nanother\n")


def packed(name, contents):
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for path, content in contents.items():
                archive.writestr(path, content)
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if name.endswith("gz") else "w") as archive:
            for path, content in contents.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def caltech101(source):
    folder = "101_ObjectCategories"
    images = {
        f"{folder}/{name}/image_{i:04d}.jpg": source.image()
        for name in ("ant", "BACKGROUND_Google", "yin_yang")
        for i in range(1, 33)
    }
    contents = {
        "caltech-101/101_ObjectCategories.tar.gz": packed("x.tar.gz", images),
        "caltech-101/Annotations.tar": b"-",
    }
    source.monkeypatch.setattr(datamodules.Caltech101, "md5", source.pack("caltech101/caltech-101.zip", contents))
    return 3 * 27, 3 * 3, 3 * 2


def dtd(source):
    contents, places = {}, {"train": (1, 2, 3), "val": (4, 5), "test": (6,)}
    for split, numbers in places.items():
        names = [f"{name}/{name}_{i:04d}.jpg" for name in ("banded", "polka-dotted", "zigzagged") for i in numbers]
        contents |= {f"dtd/images/{name}": source.image() for name in names}
        contents[f"dtd/labels/{split}1.txt"] = "\n".join([*names, ""]).encode()
        contents[f"dtd/labels/{split}2.txt"] = b"another split"
    source.monkeypatch.setattr(datasets.DTD, "_MD5", source.pack("dtd/dtd-r1.0.1.tar.gz", contents))
    return 9, 6, 3


def svhn(source):
    parts = {}
    for part, number in (("train", 40), ("test", 7)):
        pixels = source.random.integers(0, 256, (32, 32, 3, number), dtype=np.uint8)
        labels = np.arange(number, dtype=np.uint8)[:, None] % 10 + 1
        file = source.root / f"{part}_32x32.mat"
        savemat(file, {"X": pixels, "y": labels})
        parts[part] = [f"http://127.0.0.1:9/{file.name}", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    source.monkeypatch.setattr(datasets.SVHN, "split_list", parts)
    return 36, 4, 7


def sun397(source):
    names = ["/a/abbey", "/a/apartment_building/outdoor", *(f"/z/zoo{i:03d}" for i in range(395))]
    contents = {"SUN397/ClassName.txt": "\n".join([*names, ""]).encode()}
    contents |= {
        f"SUN397{name}/sun_{i:032x}.jpg": source.image() for name in (*names[:2], names[-1]) for i in range(10)
    }
    source.monkeypatch.setattr(datasets.SUN397, "_DATASET_MD5", source.pack("SUN397.tar.gz", contents))
    return 21, 3, 6


def eurosat(source):
    contents = {
        f"2750/{n}/{n}_{i}.jpg": source.image(size=(64, 64))
        for n in ("AnnualCrop", "River", "SeaLake")
        for i in range(10)
    }
    source.monkeypatch.setattr(datamodules.EuroSAT, "md5", source.pack("eurosat/EuroSAT.zip", contents))
    return 18, 6, 6


def clevr(source):
    contents = {}
    for part, number in (("train", 20), ("val", 5)):
        scenes = []
        for i in range(number):
            name = f"CLEVR_{part}_{i:06d}.png"
            contents[f"CLEVR_v1.0/images/{part}/{name}"] = source.image("PNG", (32, 48))
            depths = [8.5 + i * 0.1 + place for place in range(3 + i % 8)]
            scenes.append({"image_filename": name, "objects": [{"pixel_coords": [1, 2, z]} for z in reversed(depths)]})
        contents[f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json"] = json.dumps({"info": {}, "scenes": scenes}).encode()
    source.monkeypatch.setattr(datasets.CLEVRClassification, "_MD5", source.pack("clevr/CLEVR_v1.0.zip", contents))
    return 18, 2, 5


KITTI = {
    "Car 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 7.99 -1.5": 0,
    "Van 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 19.5 -1.5\nTruck 0.00 0 0 1 2 3 4 2 2 9 0 1 55.0 0": 1,
    "Truck 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 20.01 -1.5\nPedestrian 0 0 0 1 2 3 4 2 2 9 0 1 3.0 0": 2,
    "Tram 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 5.0 -1.5\nDontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -9 -9 -1000 -10": 3,
}


def kitti(source):
    images, labels = {}, {}
    for i in range(20):
        images[f"training/image_2/{i:06d}.png"] = source.image("PNG", (18, 60))
        labels[f"training/label_2/{i:06d}.txt"] = list(KITTI)[i % 4].encode()
    images["testing/image_2/000000.png"] = source.image("PNG")
    rand = [(7 * i) % 20 + 1 for i in range(20)]
    mapping = "".join(f"2011_09_26 2011_09_26_drive_{line // 2:04d}_sync {line:010d}\n" for line in range(20))
    contents = {
        "mapping/train_rand.txt": ",".join(map(str, rand)).encode(),
        "mapping/train_mapping.txt": mapping.encode(),
    }
    source.pack("Kitti/raw/data_object_image_2.zip", images)
    source.pack("Kitti/raw/data_object_label_2.zip", labels)
    source.pack("Kitti/raw/devkit_object.zip", {**contents, "readme.txt": b"-"})
    return 16, 2, 2


def imagenet(source):
    same = source.image()
    for part, number in (("train", 2), ("val", 1)):
        for synset in ImageNetInfo().label_names():
            folder = source.root / part / synset
            folder.mkdir(parents=True)
            for i in range(number):
                (folder / f"{synset}_{i}.JPEG").write_bytes(same)
    return 1980, 20, 1000


def imagenetv2(source):
    imagenet(source)
    source.hub("wds_imagenetv2", [0, 999, 7], ["test"])
    return 1980, 20, 3


def places(source):
    names = [f"/{'ab'[i % 2]}/place{i:03d}" for i in range(365)]
    lists = {"categories_places365.txt": "".join(f"{name} {i}\n" for i, name in enumerate(names))}
    lists["places365_train_standard.txt"] = "".join(f"{names[i % 4]}/{i:08d}.jpg {i % 4}\n" for i in range(100))
    lists["places365_val.txt"] = "".join(f"Places365_val_{i:08d}.jpg {i}\n" for i in range(5))
    contents = {name: content.encode() for name, content in lists.items()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    train = {f"data_256{names[i % 4]}/{i:08d}.jpg": source.image() for i in range(100)}
    test = {f"val_256/Places365_val_{i:08d}.jpg": source.image() for i in range(5)}
    packed = {
        name: (name, source.pack(name, c))
        for name, c in (("lists.tar", contents), ("train.tar", train), ("val.tar", test))
    }
    for name, value in {
        "_DEVKIT_META": {"standard": packed["lists.tar"]},
        "_CATEGORIES_META": ("categories_places365.txt", sums["categories_places365.txt"]),
        "_FILE_LIST_META": {
            k: (n, sums[n])
            for k, n in (("train-standard", "places365_train_standard.txt"), ("val", "places365_val.txt"))
        },
        "_IMAGES_META": {("train-standard", True): packed["train.tar"], ("val", True): packed["val.tar"]},
    }.items():
        source.monkeypatch.setattr(datasets.Places365, name, value)
    return 99, 1, 5


HUB = {  # labels as published, of which each split has 20, and sizes of images
    "PatchCamelyon": ("wds_vtab-pcam", 2, (96, 96)),
    "RESISC45": ("wds_vtab-resisc45", 45, (64, 64)),
    "DiabeticRetinopathy": ("wds_vtab-diabetic_retinopathy", 5, None),
    "DMLab": ("wds_vtab-dmlab", 6, (36, 48)),
    "DSpritesLocation": ("wds_vtab-dsprites_label_x_position", 32, (64, 64)),
    "DSpritesOrientation": ("wds_vtab-dsprites_label_orientation", 40, (64, 64)),
    "SmallNORBAzimuth": ("wds_vtab-smallnorb_label_azimuth", 18, (96, 96)),
    "SmallNORBElevation": ("wds_vtab-smallnorb_label_elevation", 9, (96, 96)),
}
SOURCES = {
    "Caltech101": caltech101,
    "DTD": dtd,
    "SVHN": svhn,
    "SUN397": sun397,
    "EuroSAT": eurosat,
    "CLEVRCount": clevr,
    "CLEVRDistance": clevr,
    "KITTIDistance": kitti,
    "ImageNet1k": imagenet,
    "ImageNetV2": imagenetv2,
    "Places365": places,
}


def write(name, source):
    """Write a replica; return the images of train, validation and test."""
    if name not in HUB:
        return SOURCES[name](source)
    repository, values, size = HUB[name]
    source.hub(repository, [i * (values - 1) // 19 for i in range(20)], size=size)
    return 18, 2, 20


def load(name, root, **arguments):
    task = getattr(datamodules, name)(root=str(root), **arguments)
    task.prepare_data()
    task.setup()
    return task


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "data").mkdir()
    return Source(tmp_path / "data", monkeypatch)


def refusal(action):
    with pytest.raises(MisconfigurationException) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- what a task holds


def test_vtab_is_19_tasks_in_three_groups():
    groups = [getattr(datamodules, name).group for name in datamodules.VTAB]
    assert {group: groups.count(group) for group in groups} == {"natural": 7, "specialized": 4, "structured": 8}
    assert set(datamodules.VTAB) | {"CIFAR10", "ImageNet1k", "ImageNetV2", "Places365"} == set(FULL)


@each_task
def test_classes_are_counted_before_there_is_data(name, tmp_path):
    task = getattr(datamodules, name)(root=str(tmp_path / "nowhere"))
    classes, group, *_ = FULL[name]
    assert (task.num_classes, task.group) == (classes, group)
    assert len(set(task.classes)) in (1, classes)  # names that are read with the data are yet empty
    assert task.augmentation == ("none" if group in ("specialized", "structured") else "paper")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*SOURCES, *HUB])
def test_a_replica_is_read_into_disjoint_splits(name, source):
    expected = write(name, source)
    task = load(name, source.root)
    assert tuple(len(task.images[split]) for split in ("train", "val", "test")) == expected
    assert task.num_classes == FULL[name][0]
    assert len(set(task.classes)) == task.num_classes
    assert all(task.classes)
    for images in task.images.values():
        assert len(images) == len(images.labels)
        assert 0 <= int(images.labels.min()) <= int(images.labels.max()) < task.num_classes
        assert images[0].mode == "RGB"
        assert min(images[len(images) - 1].size) >= 16
    if not name.startswith("ImageNet"):  # whose replica has one image
        seen = [images[i].tobytes() for images in task.images.values() for i in range(len(images))]
        assert len(seen) == len(set(seen)) == sum(expected)
    again, other = (load(name, source.root, seed=seed).images["train"].digest() for seed in (0, 1))
    assert again == task.images["train"].digest()
    assert (other == again) == (name == "DTD")


@each_task
def test_the_published_numbers_of_images_are_cut_as_the_table_says(name, tmp_path):
    task = getattr(datamodules, name)(root=str(tmp_path))
    classes, _, *sizes = FULL[name]
    train, val, test = sizes
    if name in ("DTD", "Flowers102", "KITTIDistance", "OxfordIIITPet"):
        return  # official, by drives, or rounded in each class
    everything = name in ("Caltech101", "SUN397", "EuroSAT")
    total = sum(sizes) if everything else train + val
    images = Labels(torch.arange(total) % classes)
    if hasattr(task, "cut"):
        splits = task.cut(images)
    elif isinstance(task, HubTask):
        task.parts = lambda: {"train": images, "test": Labels(torch.zeros(test))}
        splits = task.load()
    else:
        splits = task.split_off(images, val=0.1)
    assert [len(splits[split]) for split in splits] == sizes[: len(splits)]
    assert len(splits) == 3 or not everything


def test_vtab1k_takes_800_and_200_of_every_task_and_test_whole(tmp_path):
    for name, (classes, group, train, val, test) in FULL.items():
        if train is None or group is None:
            continue
        task = getattr(datamodules, name)(root=str(tmp_path), protocol="vtab1k")
        size = {"train": train, "val": val, "test": test}
        task.load = lambda size=size, classes=classes: {s: Labels(torch.arange(n) % classes) for s, n in size.items()}
        task.setup()
        assert {split: len(images) for split, images in task.images.items()} == {**VTAB1K, "test": test}
        counts = task.images["train"].labels.bincount(minlength=classes)
        assert counts.max() - counts.min() <= 1  # as balanced as the whole


def test_vtab1k_of_too_few_images_is_refused(source):
    write("DTD", source)
    assert "train split of dtd has 9 images, fewer than the 800" in refusal(
        lambda: load("DTD", source.root, protocol="vtab1k")
    )
    assert "data.protocol is 'vtab'" in refusal(lambda: datamodules.DTD(protocol="vtab"))


# ------------------------------------------------------------------------------------------------------------- labels


def test_clevrs_labels_are_vtabs(source):
    write("CLEVRCount", source)
    count, distance = load("CLEVRCount", source.root), load("CLEVRDistance", source.root)
    assert count.images["test"].labels.tolist() == [0, 1, 2, 3, 4]
    assert [count.classes[i] for i in (0, 7)] == ["3", "10"]
    assert distance.images["test"].labels.tolist() == [1, 2, 2, 2, 2]  # 8.5 belongs below, 8.6 to 8.9 above


def test_kittis_labels_are_vtabs_and_drives_stay_together(source):
    write("KITTIDistance", source)
    task = load("KITTIDistance", source.root)
    rand = [(7 * i) % 20 for i in range(20)]
    drives = []
    for images in task.images.values():
        for i in range(len(images)):
            assert int(images.labels[i]) == int(images.name(i)[:6]) % 4
        drives.append({rand[int(images.name(i)[:6])] // 2 for i in range(len(images))})
    assert [len(each) for each in drives] == [8, 1, 1]
    assert len(set.union(*drives)) == 10


@pytest.mark.parametrize(("name", "values"), [("DSpritesLocation", 32), ("DSpritesOrientation", 40)])
def test_dsprites_values_fall_into_16_bins(name, values):
    bins = getattr(datamodules, name)().relabel(torch.arange(values)).tolist()
    assert bins == [int(value // (values / 16)) for value in range(values)]
    assert set(bins) == set(range(16))


def test_a_label_of_no_class_is_named(source):
    source.hub("wds_vtab-dmlab", [0, 1, 6])
    assert "holds the label 6 in train; the classes of dmlab are 0 to 5" in refusal(lambda: load("DMLab", source.root))


# ------------------------------------------------------------------------------------------------------- whole images


def test_structured_images_are_squashed_whole(source):
    write("KITTIDistance", source)
    task = load("KITTIDistance", source.root)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    task.preprocessing = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": mean, "std": std}
    task.preprocessing |= {"crop_pct": 0.875, "crop_mode": "center"}
    view = task.image_batches("test")[task.request([0], 0)].inputs[0]
    whole = task.images["test"][0].resize((32, 32), Image.Resampling.BICUBIC)
    assert (view - torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255).abs().max() < 1e-6


def test_structured_images_are_not_augmented():
    assert "must be none" in refusal(lambda: datamodules.DMLab(augmentation="paper"))
    assert datamodules.EuroSAT(augmentation="paper").augmentation == "paper"


# ---------------------------------------------------------------------------------------------------- where to get it


@pytest.mark.parametrize("name", HUB)
def test_a_hub_task_that_cannot_be_had_says_what_to_put_where(name, source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal(lambda: load(name, source.root))
    assert (
        f"put train/*.tar and test/*.tar from https://huggingface.co/datasets/clip-benchmark/{HUB[name][0]}" in message
    )
    assert f"into {source.root / HUB[name][0]}," in message
    assert "--data.root" in message
    write(name, source)
    load(name, source.root)
    load(name, source.root / HUB[name][0])


@pytest.mark.parametrize(
    "name", ["Caltech101", "DTD", "SVHN", "SUN397", "EuroSAT", "CLEVRCount", "KITTIDistance", "Places365"]
)
def test_a_download_that_fails_says_what_to_put_where(name, source, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("datamodules.downloads.download_url", unreachable)
    task = getattr(datamodules, name)(root=str(source.root))
    message = refusal(task.prepare_data)
    assert all(f"{download.file.name} from {download.url}" in message for download in task.downloads())
    assert f"into {task.downloads()[0].file.parent}" in message


def test_imagenet_says_what_to_put_where(source):
    message = refusal(lambda: load("ImageNet1k", source.root))
    assert "ILSVRC2012_img_train.tar" in message
    assert str(source.root) in message


def test_a_zip_cannot_write_outside_its_folder(source):
    contents = {"2750/River/a.jpg": source.image(), "../../evil": b"evil"}
    source.monkeypatch.setattr(datamodules.EuroSAT, "md5", source.pack("eurosat/EuroSAT.zip", contents))
    assert "'../../evil', which belongs outside" in refusal(lambda: load("EuroSAT", source.root))
    assert not list(source.root.parent.rglob("evil"))


def test_a_mistyped_task_is_answered_with_the_nearest(cli):
    status, _, err = cli("fit", "--config", "quickstart.yaml", "--data", "CIFAR11")
    assert status == 2
    assert "did you mean CIFAR10?" in err


@pytest.mark.network
@each_task
def test_the_published_data_have_the_sizes_of_the_table(name, tmp_path):
    task = load(name, tmp_path)
    sizes = [len(task.images[split]) for split in ("train", "val", "test")]
    assert sizes == list(FULL[name][2:]) or (name == "KITTIDistance" and sum(sizes) == 7481)
    assert all(images[0].mode == "RGB" for images in task.images.values())
