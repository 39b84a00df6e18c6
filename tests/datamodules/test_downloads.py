"""Downloads: what is published, fetched once, unpacked safely, and not believed where it is altered."""

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from replicas import DOWNLOADED, HUB, NOWHERE, Replica, packed, refusal

import datamodules

KINDS = ("CIFAR10", "Flowers102", "OxfordIIITPet", "Caltech101", "Places365")
"""One archive with known contents; an archive and files; two archives; an archive in a zip; one without a folder."""
TAR = KINDS[:3]
PAUSE = 0.0
"""Seconds before a server answers."""


@pytest.fixture
def replica(request, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    return Replica(request.param, tmp_path, monkeypatch)


def some(*names):
    return pytest.mark.parametrize("replica", names, indirect=True)


@pytest.fixture
def server(replica):
    """Serve the archives; return the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                if not self.headers.get("Method"):  # torchvision first asks, so marked, for redirections
                    asked.append(self.path)
                    time.sleep(PAUSE)
                super().do_GET()

        def log_message(self, *args):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=replica.archives))
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    replica.declare(f"http://127.0.0.1:{serving.server_port}")
    yield asked
    serving.shutdown()
    serving.server_close()


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def leftovers(folder):
    return list(folder.rglob("*.part"))


@pytest.mark.parametrize("name", DOWNLOADED)
def test_files_come_from_an_address_and_have_sums_where_such_are_published(name):
    for download in getattr(datamodules, name).downloads:
        assert download.url.startswith(("http://", "https://"))
        for known in (download.md5, *(known for _, known in download.contents)):
            assert re.fullmatch("[0-9a-f]{32}", known) if name != "KITTIDistance" else known is None


@some(*DOWNLOADED)
def test_archives_put_where_the_message_says_are_enough(replica):
    files = everything(replica.root)
    shutil.rmtree(replica.root)
    missing = replica.task.downloads[0].missing(replica.folder)
    assert refusal(replica.task(root=str(replica.root)).setup).startswith(f"{missing} is missing or altered;")
    message = refusal(replica.load)
    held = missing.relative_to(replica.root).parts[0]
    assert f"into {replica.folder}, or name the folder that holds {held} with --data.root" in message
    assert all(f"{name} from {NOWHERE}/{name}" in message for name in replica.published)
    replica.put_archives()
    replica.check(replica.load())
    assert not files.keys() - everything(replica.root).keys()


@some(*KINDS)
def test_data_that_are_there_are_used_without_a_network_and_without_writing(replica):
    before = everything(replica.root)
    replica.load()
    assert everything(replica.root) == before


@some(*KINDS)
def test_a_task_is_downloaded_and_unpacked_once(replica, server):
    shutil.rmtree(replica.root)
    replica.check(replica.load())
    assert sorted(server) == sorted(f"/{file.name}" for file in replica.archives.iterdir())
    replica.check(replica.load())
    assert len(server) == len(list(replica.archives.iterdir()))
    assert not leftovers(replica.root)


@pytest.mark.parametrize(
    ("replica", "lost", "published"),
    [
        ("Flowers102", "jpg", "102flowers.tgz"),
        ("Flowers102", "setid.mat", "setid.mat"),
        ("OxfordIIITPet", "images", "images.tar.gz"),
        ("OxfordIIITPet", "annotations", "annotations.tar.gz"),
    ],
    indirect=["replica"],
)
def test_only_what_is_missing_is_downloaded(replica, server, lost, published):
    lost = replica.file(lost)
    lost.unlink() if lost.is_file() else shutil.rmtree(lost)
    replica.check(replica.load())
    assert server == [f"/{published}"]


@some(*KINDS[:3])
def test_two_processes_may_download_into_one_folder_at_once(replica, server, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PAUSE", 0.1)
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
    replica.check(replica.load())


@some(*TAR)
def test_what_an_interruption_left_is_not_believed(replica, server):
    folder = min(replica.folders().values())
    replica.put_archives()
    part = folder.with_name(f"{folder.name}.part") / folder.name
    part.mkdir(parents=True)
    (part / "image_00001.jpg").write_bytes(b"half")
    for download in replica.of_source:
        file = replica.folder / download.file
        file.write_bytes(file.read_bytes()[:-40])
    replica.check(replica.load())
    assert b"half" not in [file.read_bytes() for file in folder.iterdir() if file.is_file()]
    assert not leftovers(replica.root)


@some(*TAR)
def test_an_archive_that_breaks_off_leaves_no_half_folder(replica):
    name, folder = next(iter(replica.folders().items()))
    archive = replica.archives / name
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    replica.put_archives()
    replica.declare()
    assert f"{folder.with_name(name)} cannot be unpacked" in refusal(replica.load)
    assert not folder.exists()
    assert not leftovers(replica.root)


ESCAPES = {
    "up": [("../evil", None)],
    "further up": [("../../../evil", None)],
    "through the folder": [("{folder}/../../../evil", None)],
    "by a link": [("{folder}/escape", "../../.."), ("{folder}/escape/evil", None)],
    "by a link to": [("evil", "../../evil_too"), ("evil", None)],
}


@some("OxfordIIITPet")
@pytest.mark.parametrize("members", ESCAPES.values(), ids=ESCAPES)
def test_an_archive_cannot_write_outside_its_folder(replica, members, tmp_path):
    name, folder = next(iter(replica.folders().items()))
    with tarfile.open(replica.archives / name, "w:gz") as archive:
        archive.add(folder, folder.name)
        for path, target in members:
            member = tarfile.TarInfo(path.format(folder=folder.name))
            if target:
                member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    replica.put_archives()
    replica.declare()
    outside = everything(tmp_path).keys()
    if members[0][1]:
        replica.load()
    else:
        assert f"{folder.with_name(name)} cannot be unpacked" in refusal(replica.load)
    written = everything(tmp_path).keys() - outside
    assert all(path.is_relative_to(folder.parent) or path.suffix == ".lock" for path in written)
    assert not [path for path in written if path.name == "evil" and path.parent != folder / "escape"]
    assert not [path for path in written if path.is_symlink()]


@some("EuroSAT")
def test_a_zip_cannot_write_outside_its_folder(replica):
    files = {"2750/River/a.jpg": replica.image(), "../../evil": b"evil"}
    (replica.archives / "EuroSAT.zip").write_bytes(packed("EuroSAT.zip", files))
    replica.put_archives()
    replica.declare()
    assert "'../../evil', which belongs outside" in refusal(replica.load)
    assert not list(replica.root.parent.rglob("evil"))


@some("CIFAR10")
def test_a_python_that_cannot_unpack_safely_does_not(replica, monkeypatch):
    replica.put_archives()
    monkeypatch.delattr("tarfile.data_filter")
    assert "3.11.4" in refusal(replica.load)
    assert not replica.folders()["cifar-10-python.tar.gz"].exists()


# ----------------------------------------------------------------------------------------- what is not as published


def flip(file):
    """Change the last bit of a file."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("replica", "name"),
    [
        *(("CIFAR10", name) for name in ("data_batch_3", "test_batch", "batches.meta")),
        *(("CIFAR100", name) for name in ("train", "test", "meta")),
        *(("Flowers102", name) for name in ("imagelabels.mat", "setid.mat")),
        ("SVHN", "test_32x32.mat"),
        ("Places365", "places365_val.txt"),
    ],
    indirect=["replica"],
)
@pytest.mark.parametrize("alter", [flip, os.unlink])
def test_what_was_altered_or_lost_is_not_used_but_downloaded_again(replica, name, alter):
    file = replica.file(name)
    alter(file)
    message = refusal(replica.load)
    assert f"{file} is missing or altered" in message
    assert f"{NOWHERE}/" in message
    assert f"{file} is missing or altered" in refusal(replica.task(root=str(replica.root)).setup)
    for download in replica.of_source:
        shutil.copy(replica.archives / download.file, replica.folder)
    (file.parent / "notes.txt").write_text("mine")
    replica.check(replica.load())
    assert (file.parent / "notes.txt").read_text() == "mine"


@some(*TAR)
def test_another_archive_than_the_published_one_is_not_used(replica, server):
    shutil.rmtree(replica.root)
    altered = sorted(replica.archives.iterdir())[0]
    altered.write_bytes(altered.read_bytes() + b"\0")
    message = refusal(replica.load)
    assert altered.name in message
    assert "corrupted" in message


@some("Flowers102", "OxfordIIITPet")
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_listed_image_that_is_missing_is_named(replica, part):
    images = replica.load().images[part]
    lost = images.root / images.name(1)
    lost.unlink()
    message = refusal(replica.load)
    assert f"{lost} is missing" in message
    assert f"delete {lost.parent}" in message


# ------------------------------------------------------------------------------------------------- other sources


@some(*HUB)
def test_a_hub_task_that_cannot_be_downloaded_says_what_to_put_where(replica, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = replica.root / HUB[replica.task.__name__][0]
    away = folder.rename(replica.archives / "away")
    message = refusal(replica.load)
    source = f"https://huggingface.co/datasets/clip-benchmark/{folder.name}"
    assert f"put train/*.tar and test/*.tar from {source} into {folder}," in message
    assert "--data.root" in message
    away.rename(folder)
    replica.check(replica.load())
    task = replica.task(root=str(folder))
    task.setup()
    replica.check(task)


def test_imagenet_says_what_to_put_where(tmp_path):
    message = refusal(datamodules.ImageNet1k(root=str(tmp_path)).prepare_data)
    assert "ILSVRC2012_img_train.tar" in message
    assert str(tmp_path) in message
