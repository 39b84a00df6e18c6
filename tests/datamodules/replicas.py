"""Small replicas of every published data set, as their sources publish them; and what tests of tasks share."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo

import datamodules
from datamodules.natural import SUN397_LISTS

NOWHERE = "http://127.0.0.1:9"
"""An address that nothing answers at."""


def refusal(action):
    """Return the message of the one line that the action ends in."""
    with pytest.raises(MisconfigurationException) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


def content(images):
    """Return pixels and label of each image."""
    return [(np.asarray(images[i]).tobytes(), int(images.labels[i])) for i in range(len(images))]


def sizes(task):
    """Return the number of images of train, validation and test."""
    return tuple(len(task.images[split]) for split in ("train", "val", "test"))


def md5(data):
    return hashlib.md5(data).hexdigest()


def packed(name, files):
    """Return an archive of files by path, or the bytes of a file that is none."""
    if isinstance(files, bytes):
        return files
    files = {path: packed(path, data) for path, data in files.items()}
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if name.endswith("gz") else "w") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


class Replica:
    """A task with few images: `archives` holds what its source publishes, `root` what is unpacked from it.

    The task looks for the archives at an address where nothing answers until `declare` is given another.

    Attributes:
        published: Content of each published file by its name: bytes, or those of an archive by path.
        parts: Pixels and label of each image by official part, where the test compares them.
        sizes: Images of train, validation and test.
    """

    def __init__(self, name, folder, monkeypatch):
        self.task, self.monkeypatch = getattr(datamodules, name), monkeypatch
        self.root, self.archives = folder / "data", folder / "archives"
        self.root.mkdir(exist_ok=True)
        self.archives.mkdir(exist_ok=True)
        self.random = np.random.default_rng(0)
        self.published, self.parts = {}, {}
        self.of_source = getattr(self.task, "downloads", ())
        self.sizes = WRITERS[name](self)
        for file, files in self.published.items():
            (self.archives / file).write_bytes(packed(file, files))
        self.folder = self.root / getattr(self.task, "subfolder", "")
        for download in self.of_source:
            files = self.published[download.file]
            if download.unpacks is None:
                self.write({self.folder / download.file: files})
                continue
            files = files[download.within] if download.within else files
            inside = "" if download.unpacks == "." else f"{download.unpacks}/"
            self.write({self.folder / path: data for path, data in files.items() if path.startswith(inside)})
        if self.published:
            self.declare()

    def write(self, files):
        for path, data in files.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(data)

    def image(self, kind="JPEG", size=None, **options):
        """Return an encoded image, of no particular size unless one is given."""
        height, width = size or self.random.integers(16, 40, 2)
        file = io.BytesIO()
        pixels = Image.fromarray(self.random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((int(width), int(height))).save(file, kind, **options)
        return file.getvalue()

    def folders(self):
        """Return the folder that each archive is unpacked to, by the archive's name."""
        return {d.file: self.folder / d.unpacks for d in self.of_source if d.unpacks}

    def file(self, name):
        """Return the path of an unpacked file."""
        return next(path for path in self.root.rglob("*") if path.name == name)

    def declare(self, address=NOWHERE):
        """Let the task look for the archives at an address, and take what is there now for what is published."""
        downloads = []
        for d in self.of_source:
            there = {name: self.folder / d.unpacks / name for name, _ in d.contents}
            contents = [(n, md5(there[n].read_bytes()) if there[n].is_file() else known) for n, known in d.contents]
            file = self.archives / d.file if d.unpacks or not (self.folder / d.file).is_file() else self.folder / d.file
            known = d.md5 and md5(file.read_bytes())
            downloads.append(d._replace(url=f"{address}/{d.file}", md5=known, contents=contents))
        self.monkeypatch.setattr(self.task, "downloads", downloads)

    def put_archives(self):
        """Leave only the archives, where they would be downloaded to."""
        shutil.rmtree(self.root)
        self.folder.mkdir(parents=True)
        for download in self.of_source:
            shutil.copy(self.archives / download.file, self.folder)

    def load(self, **arguments):
        task = self.task(root=str(self.root), **arguments)
        task.prepare_data()
        task.setup()
        return task

    def check(self, task):
        """The task holds exactly the images of the replica, each in its official part."""
        assert list(task.images) == ["train", "val", "test"]
        assert sizes(task) == self.sizes
        given = {split: content(images) for split, images in task.images.items() if self.parts}
        if "val" in self.parts:
            assert given == self.parts
        elif self.parts:
            assert given["test"] == self.parts["test"]
            assert sorted(given["train"] + given["val"]) == sorted(self.parts["train"])
            shares = task.images["val"].labels.bincount() * 9 - task.images["train"].labels.bincount()
            assert not shares.any()


# --------------------------------------------------------------------------------------------------- natural tasks


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 did, in which CIFAR is published: text and bytes are one kind of string."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def cifar_batch(random, key, labels):
    data = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {"batch_label": "batch", key: labels, "data": data, "filenames": [f"{label}.png" for label in labels]}


def cifar(replica, folder, train, test, meta, key, labels):
    replica.parts = {"train": [], "test": []}
    files = {f"{folder}/{meta[0]}": python2_pickle({meta[1]: list(replica.task.classes), "num_vis": 3072})}
    for part, names in (("train", train), ("test", test)):
        for name in names:
            batch = cifar_batch(replica.random, key, labels)
            files[f"{folder}/{name}"] = python2_pickle(batch)
            images = [row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for row in batch["data"]]
            replica.parts[part] += zip(images, labels, strict=True)
    replica.published[replica.task.source.filename] = files
    number = len(replica.parts["train"])
    return number * 9 // 10, number // 10, len(labels)


def cifar10(replica):
    batches, meta = [f"data_batch_{i}" for i in range(1, 6)], ("batches.meta", "label_names")
    return cifar(replica, "cifar-10-batches-py", batches, ["test_batch"], meta, "labels", list(range(10)) * 2)


def cifar100(replica):
    labels, meta = [0, 57, 99] * 10, ("meta", "fine_label_names")
    return cifar(replica, "cifar-100-python", ["train"], ["test"], meta, "fine_labels", labels)


FLOWERS = [1, 102, 77] * 8
FLOWER_SPLITS = {"trnid": [24, 1, 2, 9, 6], "valid": [4, 23, 5], "tstid": [3, 7, 8, *range(10, 23)]}


def matlab(**variables):
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def flower_lists(labels=FLOWERS, splits=FLOWER_SPLITS):
    """Return labels and splits of flowers as files."""
    numbers = {key: np.array([each], dtype=np.uint16) for key, each in splits.items()}
    labels = np.array([labels], dtype=np.uint8)
    return {"imagelabels.mat": matlab(labels=labels), "setid.mat": matlab(**numbers)}


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded))).tobytes()


def flowers102(replica):
    images = [(replica.image(), label - 1) for label in FLOWERS]
    replica.published["102flowers.tgz"] = {f"jpg/image_{i:05d}.jpg": data for i, (data, _) in enumerate(images, 1)}
    replica.published |= flower_lists()
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        chosen = [images[number - 1] for number in FLOWER_SPLITS[key]]
        replica.parts[split] = [(pixels(data), label) for data, label in chosen]
    return 5, 3, 16


def oxford_iiit_pet(replica):
    images, lists = {}, {"annotations/list.txt": b"#Image CLASS-ID SPECIES BREED ID\n"}
    for part, listed, numbers in (("train", "trainval", range(10)), ("test", "test", range(10, 12))):
        lines, replica.parts[part] = [], []
        for label, species, name in ((1, 1, "Abyssinian"), (2, 2, "american_bulldog"), (37, 2, "yorkshire_terrier")):
            for i in numbers:
                images[f"images/{name}_{i}.jpg"] = data = replica.image()
                replica.parts[part].append((pixels(data), label - 1))
                lines.append(f"{name}_{i} {label} {species} {label}\n")
        lists[f"annotations/{listed}.txt"] = "".join(lines).encode()
    replica.published = {"images.tar.gz": images, "annotations.tar.gz": lists}
    return 27, 3, 6


def caltech101(replica):
    folder, names = "101_ObjectCategories", ("ant", "BACKGROUND_Google", "yin_yang")
    images = {f"{folder}/{name}/image_{i:04d}.jpg": replica.image() for name in names for i in range(1, 33)}
    files = {f"caltech-101/{folder}.tar.gz": images, "caltech-101/Annotations.tar": b"-"}
    replica.published["caltech-101.zip"] = files
    return 3 * 27, 3 * 3, 3 * 2


def dtd(replica):
    files = {}
    for split, numbers in {"train": (1, 2, 3), "val": (4, 5), "test": (6,)}.items():
        names = [f"{name}/{name}_{i:04d}.jpg" for name in ("banded", "polka-dotted", "zigzagged") for i in numbers]
        files |= {f"dtd/images/{name}": replica.image() for name in names}
        files[f"dtd/labels/{split}1.txt"] = "\n".join([*names, ""]).encode()
        files[f"dtd/labels/{split}2.txt"] = b"another split"
    replica.published["dtd-r1.0.1.tar.gz"] = files
    return 9, 6, 3


def svhn(replica):
    for part, number in (("train", 40), ("test", 7)):
        images = replica.random.integers(0, 256, (32, 32, 3, number), dtype=np.uint8)
        labels = np.arange(number, dtype=np.uint8)[:, None] % 10 + 1
        replica.published[f"{part}_32x32.mat"] = matlab(X=images, y=labels)
    return 36, 4, 7


def sun397(replica):
    names = ["/a/abbey", "/a/apartment_building/outdoor", *(f"/z/zoo{i:03d}" for i in range(395))]
    files, lists = {}, {split: [] for split in SUN397_LISTS}
    for label, name in ((0, names[0]), (1, names[1]), (396, names[-1])):
        for i, split in enumerate(["train"] * 7 + ["val", "test", "test"]):
            path = f"{name}/sun_{i:032x}.jpg"
            files[f"SUN397{path}"] = data = replica.image()
            lists[split].append(path)
            replica.parts.setdefault(split, []).append((pixels(data), label))
    files["SUN397/a/abbey/sun_unlisted.jpg"] = replica.image()
    replica.published["SUN397.tar.gz"] = {"SUN397/ClassName.txt": "\n".join([*names, ""]).encode(), **files}
    for split, (file, _) in SUN397_LISTS.items():
        replica.published[file] = "".join(f"{path}\n" for path in lists[split]).encode()
    return 21, 3, 6


# ----------------------------------------------------------------------------------- specialized, structured, large


def eurosat(replica):
    names = ("AnnualCrop", "River", "SeaLake")
    files = {f"2750/{name}/{name}_{i}.jpg": replica.image(size=(64, 64)) for name in names for i in range(10)}
    replica.published["EuroSAT.zip"] = files
    return 18, 6, 6


def clevr(replica):
    files = {}
    for part, number in (("train", 20), ("val", 5)):
        scenes = []
        for i in range(number):
            name = f"CLEVR_{part}_{i:06d}.png"
            files[f"CLEVR_v1.0/images/{part}/{name}"] = replica.image("PNG", (32, 48))
            depths = [8.5 + i * 0.1 + thing for thing in range(3 + i % 8)]
            scenes.append({"image_filename": name, "objects": [{"pixel_coords": [1, 2, z]} for z in reversed(depths)]})
        files[f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json"] = json.dumps({"info": {}, "scenes": scenes}).encode()
    replica.published["CLEVR_v1.0.zip"] = files
    return 18, 2, 5


KITTI = {
    "Car 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 7.99 -1.5": 0,
    "Van 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 19.5 -1.5\nTruck 0.00 0 0 1 2 3 4 2 2 9 0 1 55.0 0": 1,
    "Truck 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 20.01 -1.5\nPedestrian 0 0 0 1 2 3 4 2 2 9 0 1 3.0 0": 2,
    "Tram 0.00 0 -1.57 1 2 3 4 1.5 1.6 4.0 -2.0 1.7 5.0 -1.5\nDontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -9 -9 -1000 -10": 3,
}
"""Annotations and their class."""


def kitti(replica):
    images = {f"training/image_2/{i:06d}.png": replica.image("PNG", (18, 60)) for i in range(20)}
    labels = {f"training/label_2/{i:06d}.txt": list(KITTI)[i % 4].encode() for i in range(20)}
    lines = [f"2011_09_26 2011_09_26_drive_{line // 2:04d}_sync {line:010d}\n" for line in range(20)]
    mapping = {
        "mapping/train_rand.txt": ",".join(str((7 * i) % 20 + 1) for i in range(20)).encode(),
        "mapping/train_mapping.txt": "".join(lines).encode(),
    }
    replica.published = {
        "data_object_image_2.zip": images | {"testing/image_2/000000.png": replica.image("PNG")},
        "data_object_label_2.zip": labels,
        "devkit_object.zip": {**mapping, "readme.txt": b"-"},
    }
    return 16, 2, 2


def imagenet(replica):
    synsets = ImageNetInfo().label_names()
    for part, number in (("train", 11), ("val", 2)):
        names = [f"{synset}/{synset}_{i}.JPEG" for synset in (*synsets[:5], *synsets[-5:]) for i in range(number)]
        replica.write({f"{part}/{name}": replica.image() for name in names})
    return 108, 2, 20


def imagenetv2(replica):
    imagenet(replica)
    hub(replica, "wds_imagenetv2", [0, 999, 7], splits=["test"])
    return 108, 2, 3


def places(replica):
    names = [f"/{'ab'[i % 2]}/place{i:03d}" for i in range(365)]
    lists = {"categories_places365.txt": "".join(f"{name} {i}\n" for i, name in enumerate(names))}
    lists["places365_train_standard.txt"] = "".join(f"{names[i % 4]}/{i:08d}.jpg {i % 4}\n" for i in range(100))
    lists["places365_val.txt"] = "".join(f"Places365_val_{i:08d}.jpg {i}\n" for i in range(5))
    devkit, train, test = (download.file for download in replica.of_source)
    replica.published = {
        devkit: {name: text.encode() for name, text in lists.items()},
        train: {f"data_256{names[i % 4]}/{i:08d}.jpg": replica.image() for i in range(100)},
        test: {f"val_256/Places365_val_{i:08d}.jpg": replica.image() for i in range(5)},
    }
    return 99, 1, 5


def hub(replica, repository, labels, size=None, splits=("train", "test")):
    """Write an image and a label for each sample, as `clip_benchmark` exports them."""
    for split in splits:
        files = {}
        for i, label in enumerate(labels):
            files[f"s{i:07d}.webp"] = replica.image("WEBP", size, lossless=True, quality=0, method=0)
            files[f"s{i:07d}.cls"] = str(label).encode()
        replica.write({f"{repository}/{split}/0.tar": packed("0.tar", files)})
        replica.write({f"{repository}/{split}/nshards.txt": b"1\n"})
    replica.write({f"{repository}/classnames.txt": b"one\nanother\n"})


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


def hub_task(replica):
    repository, values, size = HUB[replica.task.__name__]
    hub(replica, repository, [i * (values - 1) // 19 for i in range(20)], size)
    return 18, 2, 20


DOWNLOADED = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "Flowers102": flowers102,
    "OxfordIIITPet": oxford_iiit_pet,
    "Caltech101": caltech101,
    "DTD": dtd,
    "SVHN": svhn,
    "SUN397": sun397,
    "EuroSAT": eurosat,
    "CLEVRCount": clevr,
    "CLEVRDistance": clevr,
    "KITTIDistance": kitti,
    "Places365": places,
}
WRITERS = {**DOWNLOADED, "ImageNet1k": imagenet, "ImageNetV2": imagenetv2, **dict.fromkeys(HUB, hub_task)}
"""By the task's class, what writes a replica and returns the sizes of its splits."""
