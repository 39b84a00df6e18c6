"""Streamed images are the same, in the same splits, as downloaded ones; and what is asked of the Hub for them."""

import io
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from replicas import content, packed, refusal

from datamodules import HuggingFaceImages
from datamodules.row_groups import Parquet

EACH, GROUP = 30, 8  # images in a file, and in its row groups
CLASSES = ["cat", "dog", "eel"]
DECLARED = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/test-*
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': eel
          '1': dog
          '2': cat
---
"""


def noise(seed, side):
    """Images that compression makes no smaller."""
    random = np.random.default_rng(seed)
    for _ in range(EACH):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG", compress_level=1)
        yield file.getvalue()


def parquet(files, side=16, names=("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
    for seed, name in enumerate(names):
        images = [{"bytes": each, "path": f"{seed}_{place}.png"} for place, each in enumerate(noise(seed, side))]
        table = pa.table({"image": images, "label": CLASSES * (EACH // 3)})
        pq.write_table(table, file := io.BytesIO(), row_group_size=GROUP)
        files[f"data/{name}.parquet"] = file.getvalue()


def declared(files):
    parquet(files)
    files["README.md"] = DECLARED.encode()


def tars(files, side=16, names=("train/0", "train/1", "test/0")):
    for seed, name in enumerate(names):
        found = {}
        for place, image in enumerate(noise(seed, side)):
            found |= {f"{place:04d}.json": f'{{"label": "{CLASSES[place % 3]}"}}'.encode(), f"{place:04d}.png": image}
        files[f"{name}.tar"] = packed(f"{name}.tar", found)


def write(folder, add, **arguments):
    add(files := {}, **arguments)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def ready(name, root, **arguments):
    task = HuggingFaceImages(str(name), root=str(root), **arguments)
    task.preprocessing = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    task.preprocessing |= {"crop_pct": 1.0, "crop_mode": "center"}
    task.prepare_data()
    task.setup()
    return task


def extract(task, split):
    """Go through a split as an extraction does; return the indices that came."""
    batches = torch.arange(len(task.images[split])).split(32)
    loader = task.extraction_loader(split, (batch.tolist() for batch in batches), None, 32)
    return torch.cat([batch.indices for batch in loader]).tolist()


@pytest.mark.parametrize("add", [parquet, declared, tars])
def test_streamed_images_and_splits_are_those_of_a_copy(add, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.row_groups.TOGETHER", 5_000)  # a few images of a tar
    add(hub.files)
    downloaded, streamed = (ready("lab/birds", tmp_path, streaming=each) for each in (False, True))
    assert streamed.describe() == downloaded.describe()
    assert streamed.target.classes == downloaded.target.classes
    for split, images in downloaded.images.items():
        found = streamed.images[split]
        assert content(found) == content(images)
        assert list(map(found.name, range(len(found)))) == list(map(images.name, range(len(images))))
    again = ready("lab/birds", tmp_path / "elsewhere", streaming=True)
    assert again.images["val"].digest() == streamed.images["val"].digest()


class Group(list):
    """The images of a row group, of which it can be told whether they are still held."""

    __hash__ = object.__hash__


def test_labels_come_without_images_and_row_groups_once_for_each_split_that_has_rows_of_them(
    hub, tmp_path, monkeypatch
):
    read, held = Parquet.cells, weakref.WeakSet()

    def cells(self, file, group, image):
        assert len(held) < 2
        held.add(found := Group(read(self, file, group, image)))
        return found

    monkeypatch.setattr(Parquet, "cells", cells)
    parquet(hub.files, side=160)
    task = ready("lab/birds", tmp_path, streaming=True)
    asked = sum(stop - start for _, start, stop in hub.sent)
    assert asked < 0.2 * sum(map(len, hub.files.values()))
    hub.sent.clear()
    assert [extract(task, split) == list(range(len(task.images[split]))) for split in task.images] == [True] * 3
    for seed, (name, data) in enumerate(hub.files.items()):
        metadata = pq.read_metadata(io.BytesIO(data))
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(0)  # the bytes of images
            middle = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
            rows = {f"{seed}_{place}.png" for place in range(GROUP * group, GROUP * (group + 1))}
            holding = sum(not rows.isdisjoint(map(images.name, range(len(images)))) for images in task.images.values())
            assert sum(each == name and start <= middle < stop for each, start, stop in hub.sent) == holding
    hub.sent.clear()
    ready("lab/birds", tmp_path, streaming=True)
    assert {file for file, _, _ in hub.sent} <= {min(hub.files)}  # its columns; labels are kept


def test_a_tar_is_read_once_for_its_labels_and_once_for_each_split(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.row_groups.TOGETHER", 5_000)
    tars(hub.files, names=("train/0", "valid/0", "test/0"))
    task = ready("lab/birds", tmp_path, streaming=True)
    for times in (1, 2):
        for name, data in hub.files.items():
            count = np.zeros(len(data))
            for _, start, stop in (each for each in hub.sent if each[0] == name):
                count[start:stop] += 1
            last = np.flatnonzero(np.frombuffer(data, np.uint8))[-1]  # zeros end a tar
            assert set(count[8000:last]) == {times}  # the first samples are looked at once more, to know what they have
        for split in ("train", "val", "test") if times == 1 else ():
            extract(task, split)
    assert max(stop - start for _, start, stop in hub.sent[-5:]) < 10_000


RUN = ("--config", "image_folder.yaml", "--config", "debug.yaml", "--data", "HuggingFaceImages", "--data.root", "data")
RUN += ("--model.backbone.name", "test_resnet", "--model.backbone.weights=random", "--trainer.accelerator=cpu")
RUN += ("--model.fractions=0.5", "--model.seeds=1", "--model.measures=[]", "--pictures=[]")
RUN += ("--model.backbone.pretrained_cfg_overlay.input_size=[3,32,32]",)
RUN += ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--model.cache_dir=features")


def test_a_fit_on_streamed_images_that_broke_off_ends_as_one_on_downloaded_ones(hub, tmp_path, cli, monkeypatch):
    parquet(hub.files)
    read, broken = Parquet.cells, []

    def cells(self, file, group, image):
        if broken and file.path.endswith(broken[0]) and group.start == 2:
            raise OSError("connection reset")
        return read(self, file, group, image)

    monkeypatch.setattr(Parquet, "cells", cells)
    fit = ("fit", *RUN, "--data.name=lab/birds")
    assert cli(*fit, "--name=downloaded")[0] == 0
    broken.append("train-00001-of-00002.parquet")
    status, _, err = cli("extract", *fit[1:], "--data.streaming=true")
    assert status == 2
    assert err.splitlines()[-1].endswith("data/train-00001-of-00002.parquet cannot be streamed (connection reset).")
    broken.clear()
    status, _, err = cli(*fit, "--name=streamed", "--data.streaming=true")
    assert status == 0, err
    assert "completed in" in err  # the first shard of train was there
    for name in ("results.csv", "classes.csv"):
        streamed, downloaded = (tmp_path / "runs" / each / name for each in ("streamed", "downloaded"))
        assert streamed.read_bytes() == downloaded.read_bytes()


# ------------------------------------------------------------------------------------------------------ what is refused

PRETRAINING = ["--model=Pretraining", "--model.name=test_resnet", "--model.output=out.safetensors"]
REFUSED = {
    "no features": (["--model.features=off"], "data.streaming is true, but model.features off visits images more than"),
    "augmented views": (["--model.features=2"], "data.streaming is true, but model.features 2 visits images more than"),
    "attacks": (["--model.measures=Robustness"], "data.streaming is true, but Robustness in model.measures visits"),
    "pre-training": (PRETRAINING, "data.streaming is true, but pre-training visits images in every epoch"),
    "workers": (["--data.num_workers=2"], "data.num_workers is 2, but with data.streaming each would read all"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_would_visit_images_again_is_refused_before_any_is_read(mistake, cli, tmp_path, monkeypatch):
    arguments, said = REFUSED[mistake]
    monkeypatch.setattr(Parquet, "cells", None)
    folder = write(tmp_path / "birds", parquet)
    run = RUN if mistake != "pre-training" else (*RUN[4:8], *RUN[-3:-1])
    status, out, err = cli("fit", *run, f"--data.name={folder}", "--data.streaming=true", *arguments)
    assert status == 2
    assert out == ""
    assert err.splitlines()[-1].startswith(f"error: {said}"), err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.csv"))


def test_images_that_are_files_of_their_own_are_refused(tmp_path):
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "0.png").write_bytes(next(noise(0, 8)))
    message = refusal(lambda: ready(tmp_path / "set", tmp_path / "data", streaming=True))
    assert "holds no Parquet files and no webdataset tars, which alone are streamed; set it false" in message


def test_a_row_without_an_image_in_the_file_is_named(tmp_path):
    images = [{"bytes": each, "path": "there.png"} for each in noise(0, 8)]
    images[4]["bytes"] = None
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": images, "label": CLASSES * (EACH // 3)}), tmp_path / "set" / "all.parquet")
    task = ready(tmp_path / "set", tmp_path / "data", streaming=True)
    message = refusal(lambda: [content(images) for images in task.images.values()])
    assert f"Row 4 (from 0) of train of {tmp_path / 'set'} has no 'image' in the file itself" in message


@pytest.mark.parametrize("lacking", ["png", "json"])
def test_a_sample_of_a_tar_without_image_or_label_is_named(lacking, tmp_path):
    found = {f"{place:04d}.{ending}": b"{}" for place in range(9) for ending in ("json", "png")}
    del found[f"0007.{lacking}"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "all.tar").write_bytes(packed("all.tar", found))
    message = refusal(lambda: ready(tmp_path / "set", tmp_path / "data", streaming=True))
    assert message.startswith(f"Sample 0007 of {tmp_path / 'set' / 'all.tar'} has no {lacking!r}")
