"""The natural tasks on small replicas, in the format on disk and in the archives that the sources publish."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import datamodules
from datamodules import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet

NOWHERE = "http://127.0.0.1:9"


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 did, in which CIFAR is published: text and bytes are one kind of string."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


class Replica:
    """A small copy of a data set: on disk below `root`, and as published in `archives`.

    `parts` holds the pixels and label of each image by official part; `train` may yet be cut.
    """

    def __init__(self, tmp_path, monkeypatch):
        self.root, self.archives, self.monkeypatch = tmp_path / "data", tmp_path / "archives", monkeypatch
        self.base = self.root / self.folder
        self.base.mkdir(parents=True)
        self.archives.mkdir()
        self.random = np.random.default_rng(0)
        self.write()
        self.pack()
        self.declare(NOWHERE)

    def set(self, **attributes):
        for name, value in attributes.items():
            self.monkeypatch.setattr(self.source, name, value)

    def pack(self):
        for name, folder in self.packed.items():
            with tarfile.open(self.archives / name, "w:gz") as archive:
                archive.add(folder, folder.name)

    def put_archives(self):
        """Leave only the archives, where the message for want of a network says they belong."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.download_folder.mkdir(parents=True, exist_ok=True)
        for file in self.archives.iterdir():
            shutil.copy(file, self.download_folder)

    def load(self, **arguments):
        task = self.task(root=str(self.root), **arguments)
        task.prepare_data()
        task.setup()
        return task


class CIFAR10Replica(Replica):
    task, source, folder, official_validation = CIFAR10, datasets.CIFAR10, "cifar-10-batches-py", False
    train_files, test_files = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    labels = list(range(10)) * 2
    key, meta_file, meta_key = "labels", "batches.meta", "label_names"

    @property
    def packed(self):
        return {self.source.filename: self.base}

    @property
    def download_folder(self):
        return self.root

    def batch(self):
        data = self.random.integers(0, 256, (len(self.labels), 3072), dtype=np.uint8)
        names = [f"{label}.png" for label in self.labels]
        return {"batch_label": "batch", self.key: self.labels, "data": data, "filenames": names}

    def write(self):
        self.parts = {"train": [], "test": []}
        for name in [*self.train_files, *self.test_files]:
            batch = self.batch()
            (self.base / name).write_bytes(python2_pickle(batch))
            images = [row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for row in batch["data"]]
            self.parts["test" if name in self.test_files else "train"] += zip(images, self.labels, strict=True)
        meta = {self.meta_key: list(self.task.classes), "num_vis": 3072}
        (self.base / self.meta_file).write_bytes(python2_pickle(meta))

    def declare(self, address):
        self.set(url=f"{address}/{self.source.filename}", tgz_md5=md5(self.archives / self.source.filename))
        if self.base.is_dir():
            self.set(train_list=[[name, md5(self.base / name)] for name in self.train_files])
            self.set(test_list=[[name, md5(self.base / name)] for name in self.test_files])
            self.set(meta={"filename": self.meta_file, "key": self.meta_key, "md5": md5(self.base / self.meta_file)})


class CIFAR100Replica(CIFAR10Replica):
    task, source, folder = CIFAR100, datasets.CIFAR100, "cifar-100-python"
    train_files, test_files = ["train"], ["test"]
    labels = [0, 57, 99] * 10
    key, meta_file, meta_key = "fine_labels", "meta", "fine_label_names"

    def batch(self):
        return super().batch() | {"coarse_labels": [label // 5 for label in self.labels]}


class JPEGReplica(Replica):
    def jpeg(self, path):
        """Write a photograph of no particular size; return its pixels."""
        height, width = self.random.integers(20, 60, 2)
        patches = Image.fromarray(self.random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        patches.resize((width, height)).save(path)
        return np.asarray(Image.open(path)).tobytes()

    @property
    def download_folder(self):
        return self.base


class Flowers102Replica(JPEGReplica):
    task, source, folder, official_validation = Flowers102, datasets.Flowers102, "flowers-102", True
    labels = [1, 102, 77] * 8
    numbers = {"trnid": [24, 1, 2, 9, 6], "valid": [4, 23, 5], "tstid": [3, 7, 8, *range(10, 23)]}  # noqa: RUF012

    @property
    def packed(self):
        return {"102flowers.tgz": self.base / "jpg"}

    def write(self):
        (self.base / "jpg").mkdir()
        images = [
            (self.jpeg(self.base / "jpg" / f"image_{number:05d}.jpg"), label - 1)
            for number, label in enumerate(self.labels, start=1)
        ]
        self.parts = {
            split: [images[number - 1] for number in self.numbers[key]]
            for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
        }
        self.write_lists(self.labels, self.numbers)

    def write_lists(self, labels, numbers):
        savemat(self.base / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
        savemat(self.base / "setid.mat", {key: np.array([each], dtype=np.uint16) for key, each in numbers.items()})

    def pack(self):
        super().pack()
        for name in ("imagelabels.mat", "setid.mat"):
            shutil.copy(self.base / name, self.archives)

    def declare(self, address):
        names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
        places = {"image": self.archives, "label": self.base, "setid": self.base}
        places = {key: place if place.is_dir() else self.archives for key, place in places.items()}
        self.set(_download_url_prefix=f"{address}/")
        self.set(_file_dict={key: (name, md5(places[key] / name)) for key, name in names.items()})


class OxfordIIITPetReplica(JPEGReplica):
    task, source, folder, official_validation = OxfordIIITPet, datasets.OxfordIIITPet, "oxford-iiit-pet", False
    packed_names = ("images.tar.gz", "annotations.tar.gz")

    @property
    def packed(self):
        return {name: self.base / name.removesuffix(".tar.gz") for name in self.packed_names}

    def write(self):
        (self.base / "images").mkdir()
        (self.base / "annotations" / "trimaps").mkdir(parents=True)
        (self.base / "annotations" / "list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n")
        self.parts = {}
        for part, listed, places in (("train", "trainval", range(10)), ("test", "test", range(10, 12))):
            lines, self.parts[part] = [], []
            for label, species, name in (
                (1, 1, "Abyssinian"),
                (2, 2, "american_bulldog"),
                (37, 2, "yorkshire_terrier"),
            ):
                for place in places:
                    pixels = self.jpeg(self.base / "images" / f"{name}_{place}.jpg")
                    self.parts[part].append((pixels, label - 1))
                    lines.append(f"{name}_{place} {label} {species} {label}\n")
            (self.base / "annotations" / f"{listed}.txt").write_text("".join(lines))

    def declare(self, address):
        self.set(_RESOURCES=tuple((f"{address}/{name}", md5(self.archives / name)) for name in self.packed_names))


REPLICAS = (CIFAR10Replica, CIFAR100Replica, Flowers102Replica, OxfordIIITPetReplica)
each_task = pytest.mark.parametrize("replica", REPLICAS, ids=lambda kind: kind.task.name, indirect=True)


@pytest.fixture
def replica(request, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    return request.param(tmp_path, monkeypatch)


def some(*kinds):
    return pytest.mark.parametrize("replica", kinds, ids=lambda kind: kind.task.name, indirect=True)


@pytest.fixture
def server(replica):
    """Serve the archives, slowly enough for two downloads to meet; return the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                if not self.headers.get("Method"):  # torchvision first asks, so marked, for redirections
                    asked.append(self.path)
                    time.sleep(0.2)
                super().do_GET()

        def log_message(self, *args):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=replica.archives))
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    replica.declare(f"http://127.0.0.1:{serving.server_port}")
    yield asked
    serving.shutdown()
    serving.server_close()


def refusal(action):
    """Return the message of the one line that the action ends in."""
    with pytest.raises(MisconfigurationException) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


def content(images):
    return [(np.asarray(images[i]).tobytes(), int(images.labels[i])) for i in range(len(images))]


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def check(task, replica):
    """The task holds exactly the replica's images, each in its split."""
    given = {split: content(images) for split, images in task.images.items()}
    assert list(given) == ["train", "val", "test"]
    assert given["test"] == replica.parts["test"]
    if replica.official_validation:
        assert given == replica.parts
    else:
        assert sorted(given["train"] + given["val"]) == sorted(replica.parts["train"])
        assert len(given["val"]) == len(replica.parts["train"]) // 10
        shares = task.images["val"].labels.bincount() * 9 - task.images["train"].labels.bincount()
        assert not shares.any()


# ------------------------------------------------------------------------------------------------- what a task holds


@each_task
def test_a_task_gives_the_images_of_its_source_in_the_official_splits(replica):
    task = replica.load()
    check(task, replica)
    assert all(images[0].mode == "RGB" for images in task.images.values())
    if task.name.startswith("cifar"):
        assert task.images["train"][0].size == (32, 32)


@each_task
def test_a_task_reads_what_torchvision_reads(replica):
    first = {"train": True} if replica.task.name.startswith("cifar") else {"split": "train"}
    second = {"train": False} if replica.task.name.startswith("cifar") else {"split": "test"}
    first = {"split": "trainval"} if replica.task is OxfordIIITPet else first
    for arguments, part in ((first, "train"), (second, "test")):
        read = replica.source(str(replica.root), **arguments)
        assert [(np.asarray(image).tobytes(), label) for image, label in read] == replica.parts[part]


@pytest.mark.parametrize(
    ("task", "name", "number", "some_classes"),
    [
        (CIFAR10, "cifar10", 10, {0: "airplane", 1: "automobile", 3: "cat", 9: "truck"}),
        (CIFAR100, "cifar100", 100, {0: "apple", 23: "cloud", 39: "keyboard", 71: "sea", 99: "worm"}),
        (
            Flowers102,
            "flowers102",
            102,
            {0: "pink primrose", 1: "hard-leaved pocket orchid", 73: "rose", 76: "passion flower"},
        ),
        (
            OxfordIIITPet,
            "oxford_iiit_pet",
            37,
            {0: "Abyssinian", 1: "American Bulldog", 32: "Siamese", 36: "Yorkshire Terrier"},
        ),
    ],
)
def test_names_and_classes_are_known_before_there_is_data(tmp_path, task, name, number, some_classes):
    made = task(root=str(tmp_path / "nowhere"))
    assert made.name == name
    assert made.num_classes == len(set(made.classes)) == number
    assert {place: made.classes[place] for place in some_classes} == some_classes
    if task in (CIFAR10, CIFAR100, OxfordIIITPet):
        assert list(made.classes) == sorted(made.classes)


def test_the_breeds_are_spelt_as_torchvision_spells_them(tmp_path, monkeypatch):
    replica = OxfordIIITPetReplica(tmp_path, monkeypatch)
    spelt = datasets.OxfordIIITPet(str(replica.root)).classes
    assert spelt == [OxfordIIITPet.classes[label] for label in (0, 1, 36)]


@each_task
def test_validation_follows_the_seed_unless_it_is_official(replica):
    first, again, other = (sorted(content(replica.load(seed=seed).images["val"])) for seed in (0, 0, 1))
    assert first == again
    assert (first == other) == replica.official_validation


@each_task
def test_data_that_is_there_is_used_without_a_network_and_without_writing(replica):
    before = everything(replica.root)
    replica.load()
    assert everything(replica.root) == before


# ------------------------------------------------------------------------------------------------------- downloads


@each_task
def test_a_task_is_downloaded_and_unpacked_once(replica, server):
    shutil.rmtree(replica.root)
    check(replica.load(), replica)
    assert sorted(server) == sorted(f"/{file.name}" for file in replica.archives.iterdir())
    check(replica.load(), replica)
    assert len(server) == len(list(replica.archives.iterdir()))
    assert not list(replica.root.rglob("*.part"))


@pytest.mark.parametrize(
    ("replica", "lost", "published"),
    [
        (Flowers102Replica, "jpg", "102flowers.tgz"),
        (Flowers102Replica, "setid.mat", "setid.mat"),
        (OxfordIIITPetReplica, "images", "images.tar.gz"),
        (OxfordIIITPetReplica, "annotations", "annotations.tar.gz"),
    ],
    indirect=["replica"],
    ids=lambda value: getattr(value, "folder", value),
)
def test_only_what_is_missing_is_downloaded(replica, server, lost, published):
    lost = replica.base / lost
    lost.unlink() if lost.is_file() else shutil.rmtree(lost)
    check(replica.load(), replica)
    assert server == [f"/{published}"]


@each_task
def test_two_processes_may_download_into_one_folder_at_once(replica, server):
    shutil.rmtree(replica.root)
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def run():
        together.wait(30)
        replica.task(root=str(replica.root)).prepare_data()

    processes = [context.Process(target=run) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(server) == len(set(server)) == len(list(replica.archives.iterdir()))
    check(replica.load(), replica)


@each_task
def test_archives_put_where_the_message_says_are_enough(replica):
    shutil.rmtree(replica.root)
    message = refusal(replica.load)
    assert f"into {replica.download_folder}," in message
    assert f"holds {replica.folder} with --data.root" in message
    assert not [
        file.name for file in replica.archives.iterdir() if f"{file.name} from {NOWHERE}/{file.name}" not in message
    ]
    replica.put_archives()
    check(replica.load(), replica)


@each_task
def test_what_an_interruption_left_is_not_believed(replica, server):
    folder = min(replica.packed.values())
    shutil.rmtree(replica.root)
    part = folder.with_name(f"{folder.name}.part") / folder.name
    part.mkdir(parents=True)
    (part / "image_00001.jpg").write_bytes(b"half")
    for file in replica.archives.iterdir():
        (replica.download_folder / file.name).write_bytes(file.read_bytes()[:-40])
    check(replica.load(), replica)
    assert b"half" not in [file.read_bytes() for file in folder.iterdir() if file.is_file()]
    assert not list(replica.root.rglob("*.part"))


@each_task
def test_an_archive_that_breaks_off_leaves_no_half_folder(replica):
    archive = replica.archives / next(iter(replica.packed))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    replica.declare(NOWHERE)
    replica.put_archives()
    message = refusal(replica.load)
    assert f"{replica.download_folder / archive.name} cannot be unpacked" in message
    assert not replica.packed[archive.name].exists()
    assert not list(replica.root.rglob("*.part"))


ESCAPES = {
    "up": [("../evil", None)],
    "further up": [("../../../evil", None)],
    "through the folder": [("{folder}/../../../evil", None)],
    "by a link": [("{folder}/escape", "../../.."), ("{folder}/escape/evil", None)],
    "by a link to": [("evil", "../../evil_too"), ("evil", None)],
}


@each_task
@pytest.mark.parametrize("members", ESCAPES.values(), ids=ESCAPES)
def test_an_archive_cannot_write_outside_its_folder(replica, members, tmp_path):
    name, folder = next(iter(replica.packed.items()))
    with tarfile.open(replica.archives / name, "w:gz") as archive:
        archive.add(folder, folder.name)
        for path, target in members:
            member = tarfile.TarInfo(path.format(folder=folder.name))
            if target:
                member.type, member.linkname = tarfile.SYMTYPE, target
                archive.addfile(member)
            else:
                member.size = 4
                archive.addfile(member, io.BytesIO(b"evil"))
    replica.declare(NOWHERE)
    replica.put_archives()
    outside = everything(tmp_path).keys()
    if members[0][1]:
        replica.load()
    else:
        assert f"{replica.download_folder / name} cannot be unpacked" in refusal(replica.load)
    written = everything(tmp_path).keys() - outside
    assert all(path.is_relative_to(replica.base) or path.suffix == ".lock" for path in written)
    assert not [path for path in written if path.name == "evil" and path.parent != folder / "escape"]
    assert not [path for path in written if path.is_symlink()]


def test_a_python_that_cannot_unpack_safely_does_not(tmp_path, monkeypatch):
    replica = CIFAR10Replica(tmp_path, monkeypatch)
    replica.put_archives()
    monkeypatch.delattr("tarfile.data_filter")
    assert "3.11.4" in refusal(replica.load)
    assert not replica.base.exists()


# ----------------------------------------------------------------------------------------- what is not as published


def flip(file):
    """Change the last bit of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


ALTERED = [
    *((CIFAR10Replica, name) for name in ("data_batch_3", "test_batch", "batches.meta")),
    *((CIFAR100Replica, name) for name in ("train", "test", "meta")),
    *((Flowers102Replica, name) for name in ("imagelabels.mat", "setid.mat")),
]


@pytest.mark.parametrize(
    ("replica", "name"), ALTERED, indirect=["replica"], ids=lambda value: getattr(value, "folder", value)
)
@pytest.mark.parametrize("alter", [flip, os.unlink])
def test_what_was_altered_or_lost_is_not_used_but_downloaded_again(replica, name, alter, request):
    alter(replica.base / name)
    message = refusal(replica.load)
    assert f"{replica.base / name} is missing or altered" in message
    assert f"{NOWHERE}/" in message
    assert f"{replica.base / name} is missing or altered" in refusal(replica.task(root=str(replica.root)).setup)
    for file in replica.archives.iterdir():
        shutil.copy(file, replica.download_folder)
    (replica.base / "notes.txt").write_text("mine")
    check(replica.load(), replica)
    assert (replica.base / "notes.txt").read_text() == "mine"


@each_task
def test_another_archive_than_the_published_one_is_not_used(replica, server):
    shutil.rmtree(replica.root)
    altered = sorted(replica.archives.iterdir())[0]
    altered.write_bytes(altered.read_bytes() + b"\0")
    message = refusal(replica.load)
    assert altered.name in message
    assert "corrupted" in message


@some(Flowers102Replica, OxfordIIITPetReplica)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_listed_image_that_is_missing_is_named(replica, part):
    images = replica.load().images[part]
    lost = images.root / images.name(1)
    lost.unlink()
    message = refusal(replica.load)
    assert f"{lost} is missing" in message
    assert f"delete {lost.parent}" in message


# ----------------------------------------------------------------------------------------------------------- pickles


@some(CIFAR10Replica, CIFAR100Replica)
@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_that_a_newer_numpy_wrote_are_read_too(replica, protocol):
    for name in [*replica.train_files, *replica.test_files]:
        file = replica.base / name
        file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes(), encoding="latin1"), protocol=protocol))
    replica.declare(NOWHERE)
    check(replica.load(), replica)


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


@some(CIFAR10Replica, CIFAR100Replica)
@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
@pytest.mark.parametrize("beside", [True, False])
def test_code_in_a_pickle_is_never_run(replica, code, beside, tmp_path):
    ran = tmp_path / "ran.npy"
    file = replica.base / replica.train_files[-1]
    batch = replica.batch()
    malicious = pickle.dumps(batch | {"data": code(ran)} if beside else code(ran), protocol=2)
    pickle.loads(malicious)
    ran.unlink()  # so it would have run
    file.write_bytes(malicious)
    replica.declare(NOWHERE)
    message = refusal(replica.load)
    assert str(file) in message
    assert "code" in message
    assert "never run" in message
    assert not ran.exists()


# ------------------------------------------------------------------------------------------- what cannot be understood


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


@some(CIFAR10Replica, CIFAR100Replica)
@pytest.mark.parametrize(("change", "said"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_is_none_is_named(replica, change, said):
    file = replica.base / replica.test_files[0]
    file.write_bytes(python2_pickle(change(replica.batch(), replica.key)))
    replica.declare(NOWHERE)
    message = refusal(replica.load)
    assert str(file) in message
    assert said in message


@pytest.mark.parametrize("torn", [b"", b"\x80\x02}", b"<html>\n</html>\n", b"\x80\x02cos\nsystem\n"])
def test_a_torn_pickle_is_named(tmp_path, monkeypatch, torn):
    replica = CIFAR10Replica(tmp_path, monkeypatch)
    (replica.base / "data_batch_2").write_bytes(torn)
    replica.declare(NOWHERE)
    assert f"{replica.base / 'data_batch_2'} cannot be read" in refusal(replica.load)


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    return Flowers102Replica(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
@pytest.mark.parametrize("torn", [b"", b"<html>\n</html>\n", "half", "other"])
def test_a_corrupt_matlab_file_is_named(flowers, name, torn):
    file = flowers.base / name
    if torn == "other":
        savemat(file, {"something": [1]})
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if torn == "half" else torn)
    flowers.declare(NOWHERE)
    assert f"{file} cannot be read" in refusal(flowers.load)


@pytest.mark.parametrize("label", [0, 103])
def test_a_flower_of_no_class_is_named(flowers, label):
    flowers.write_lists([label, *flowers.labels[1:]], flowers.numbers)
    flowers.declare(NOWHERE)
    message = refusal(flowers.load)
    assert f"{flowers.base / 'imagelabels.mat'} holds the label {label}" in message
    assert "1 to 102" in message


@pytest.mark.parametrize("number", [0, 25])
def test_a_flower_without_a_label_is_named(flowers, number):
    flowers.write_lists(flowers.labels, flowers.numbers | {"valid": [4, number]})
    flowers.declare(NOWHERE)
    message = refusal(flowers.load)
    assert f"{flowers.base / 'setid.mat'} lists image {number}" in message
    assert "1 to 24" in message


@pytest.fixture
def pets(tmp_path, monkeypatch):
    return OxfordIIITPetReplica(tmp_path, monkeypatch)


@pytest.mark.parametrize("part", ["trainval", "test"])
@pytest.mark.parametrize(
    ("line", "said"),
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
def test_an_annotation_that_makes_no_sense_is_named(pets, part, line, said):
    file = pets.base / "annotations" / f"{part}.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    message = refusal(pets.load)
    assert str(file) in message
    assert said in message


@pytest.mark.parametrize("part", ["trainval", "test"])
@pytest.mark.parametrize("written", [None, b"", b"\xff\xfe\x00"])
def test_a_list_of_pets_that_cannot_be_read_is_named(pets, part, written):
    file = pets.base / "annotations" / f"{part}.txt"
    file.unlink()
    if written is not None:
        file.write_bytes(written)
    assert str(file) in refusal(pets.load)


# ----------------------------------------------------------------------------------------------------- configurations


def fit(replica, cli, *configs, epochs=2):
    """Fit a little with a tiny backbone, and return the results."""
    status, _, err = cli(
        *("fit", *(argument for config in configs for argument in ("--config", config))),
        *("--model.backbone.name", "test_resnet", "--model.backbone.weights", "random", "--data.batch_size=4"),
        *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", f"--trainer.max_epochs={epochs}"),
        *("--data.root", str(replica.root)),
    )
    assert status == 0, err
    results = pd.read_csv("runs/debug/results.csv")
    assert results["task"].unique().tolist() == [replica.task.name]
    assert set(results["fraction"]) == {0.1, 0.5, 1.0}
    images = {"test": len(replica.parts["test"]), "val": len(replica.parts.get("val", replica.parts["train"][::10]))}
    assert {split: rows["images"].unique().tolist() for split, rows in results.groupby("split")} == {
        split: [number] for split, number in images.items()
    }
    return results


@each_task
@pytest.mark.parametrize("config", ["20pct", "curve"])
def test_the_shipped_configurations_fit(replica, cli, config):
    results = fit(replica, cli, f"{replica.task.name}_{config}.yaml", "debug.yaml")
    assert results["features"].unique().tolist() == ["clean"]


@each_task
def test_the_paper_recipe_goes_over_the_shipped_configurations(replica, cli):
    results = fit(replica, cli, f"{replica.task.name}_20pct.yaml", "paper_recipe.yaml", "debug.yaml", epochs=5)
    assert results["augmentation"].unique().tolist() == ["paper"]
    assert results["features"].unique().tolist() == ["off"]


@pytest.mark.parametrize("name", [kind.task.name for kind in REPLICAS])
@pytest.mark.parametrize("config", ["20pct", "curve"])
def test_the_shipped_configurations_are_the_papers(name, config):
    settings = yaml.safe_load((ROOT / "configs" / f"{name}_{config}.yaml").read_text())
    assert settings["model"]["backbone"]["name"].startswith("resnet50.")
    assert settings["model"]["seeds"] == [1, 2, 3, 4, 5]
    assert settings["model"]["weight_decay"] == (5e-4 if name.startswith("cifar") else 1e-4)
    fractions = settings["model"]["fractions"]
    assert fractions == 0.2 if config == "20pct" else (len(fractions) == 14 and 0.2 in fractions)
    assert getattr(datamodules, settings["data"]["class_path"]).name == name
