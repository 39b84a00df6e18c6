"""Data sets of one's own through `datasets`: real images in every kind of source, and what can be wrong with one."""

import io
import json
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from PIL import Image
from replicas import content, packed, refusal, sizes

from datamodules import HuggingFaceImages, ImageFolder

KINDS = ("folder", "webdataset", "parquet", "imagefolder")
real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real images beside the checkout")


def real_images(name, part, each):
    """Return the first images of each class of a shared tar, as (class, name, bytes)."""
    with tarfile.open(SHARED / "data" / f"{name}_{part}.tar") as archive:
        members = sorted(archive.getnames())
        classes = sorted({member.partition("/")[0] for member in members if "/" in member})
        chosen = [
            m for c in classes for m in [m for m in members if m.startswith(f"{c}/") and m.endswith(".jpg")][:each]
        ]
        return [(*member.split("/"), archive.extractfile(member).read()) for member in chosen]


def write(kind, folder, parts):
    """Write images by split as one kind of source; return how the task of it is made."""
    classes = sorted({name for images in parts.values() for name, *_ in images})
    for split, images in parts.items():
        if kind in ("folder", "imagefolder"):
            for name, file, content in images:
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                (folder / split / name / file).write_bytes(content)
        elif kind == "webdataset":
            (folder / split).mkdir(parents=True)
            shards = (images[: len(images) // 2], images[len(images) // 2 :])
            for shard, content in enumerate(shards):
                tar(folder / split / f"{shard}.tar", [(i[2], {"cls": str(classes.index(i[0]))}) for i in content])
        else:
            folder.mkdir(exist_ok=True)
            struct = [{"bytes": content, "path": file} for _, file, content in images]
            labels = pa.array([name for name, *_ in images]).cast(pa.large_string())
            pq.write_table(pa.table({"image": struct, "label": labels}), folder / f"{split}-00000-of-00001.parquet")


def tar(path, samples):
    """Write samples of an image and texts beside it."""
    files = {}
    for i, (image, beside) in enumerate(samples):
        files |= {f"{i:06d}.jpg": image, **{f"{i:06d}.{ending}": text.encode() for ending, text in beside.items()}}
    path.write_bytes(packed(path.name, files))


def task_of(kind, folder, root, **arguments):
    task = (
        ImageFolder(str(folder), **arguments)
        if kind == "folder"
        else HuggingFaceImages(str(folder), root=str(root), **arguments)
    )
    task.setup()
    return task


def noise(number=12, size=(8, 8), seed=0):
    random = np.random.default_rng(seed)
    images = []
    for _ in range(number):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    return images


# ----------------------------------------------------------------------------------------------------- every source


@real
def test_every_kind_of_source_gives_the_same_images_splits_and_results(tmp_path, cli):
    parts = {"train": real_images("flowers12", "train", 8), "test": real_images("flowers12", "test", 4)}
    tasks, results = {}, {}
    for kind in KINDS:
        write(kind, tmp_path / kind, parts)
        tasks[kind] = task_of(kind, tmp_path / kind, tmp_path / "data")
    expected = {split: content(images) for split, images in tasks["folder"].images.items()}
    classes = sorted({name for name, *_ in parts["train"]})
    assert tasks["folder"].target.classes == classes
    for kind in KINDS[1:]:
        assert {split: content(images) for split, images in tasks[kind].images.items()} == expected
        named = [str(i) for i in range(len(classes))] if kind == "webdataset" else classes
        assert tasks[kind].target.classes == named
    for kind, data in (
        ("folder", ("--data", "ImageFolder", "--data.root", "folder")),
        ("parquet", ("--data", "HuggingFaceImages", "--data.name", "parquet", "--data.root", "data")),
    ):
        status, _, err = cli(
            *("fit", "--config", "image_folder.yaml", "--config", "debug.yaml", *data, "--name", kind),
            *("--model.backbone.name", "test_resnet", "--model.backbone.weights=random", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", "--trainer.logger=false"),
        )
        assert status == 0, err
        results[kind] = pd.read_csv(f"runs/{kind}/results.csv").drop(columns="task")
    pd.testing.assert_frame_equal(results["parquet"], results["folder"])


LABELS = {
    "txt": ({"txt": "{name}\n"}, None),
    "json": ({"json": '{{"label": {place}, "width": 8}}'}, None),
    "a key of json": ({"json": '{{"kind": "{name}"}}'}, "json.kind"),
}


@pytest.mark.parametrize(("beside", "column"), LABELS.values(), ids=LABELS)
def test_labels_of_tars_may_be_text_or_json(beside, column, tmp_path):
    (tmp_path / "set").mkdir()
    names = ["cat", "dog"] * 6
    samples = [
        (image, {ending: text.format(name=name, place=names.index(name)) for ending, text in beside.items()})
        for image, name in zip(noise(), names, strict=True)
    ]
    tar(tmp_path / "set" / "all.tar", samples)
    task = task_of("webdataset", tmp_path / "set", tmp_path, label_column=column)
    assert task.target.classes in (["cat", "dog"], ["0", "1"])
    assert sizes(task) == (8, 2, 2)


def parquet(folder, images, **columns):
    folder.mkdir(exist_ok=True)
    struct = [{"bytes": content, "path": None} for content in images]
    pq.write_table(pa.table({"picture": struct, **columns}), folder / "all.parquet")


def test_columns_are_named_and_classes_are_sorted_by_value(tmp_path):
    parquet(tmp_path / "set", noise(), kind=[10, 9, 2] * 4, label=[0] * 12)
    task = task_of("parquet", tmp_path / "set", tmp_path, image_column="picture", label_column="kind")
    assert task.target.classes == ["2", "9", "10"]
    assert task.name == "set"
    assert task.images["train"].name(0).startswith("image ")


def test_the_digest_changes_with_a_pixel_and_a_label_but_not_with_the_way_it_is_read(tmp_path):
    digests = set()
    for i, (seed, labels) in enumerate([(0, [0, 1] * 6), (0, [0, 1] * 6), (1, [0, 1] * 6), (0, [1, 0] * 6)]):
        parquet(tmp_path / str(i), noise(seed=seed), label=labels)
        task = task_of("parquet", tmp_path / str(i), tmp_path / f"data{i}", image_column="picture", seed=0)
        digests.add(task.images["train"].digest())
    assert len(digests) == 3


def test_official_validation_is_found_by_any_of_its_names(tmp_path):
    for split, number in (("train", 8), ("valid", 4), ("test", 4)):
        (tmp_path / "set" / split).mkdir(parents=True)
        tar(tmp_path / "set" / split / "0.tar", [(im, {"cls": str(i % 2)}) for i, im in enumerate(noise(number))])
    task = task_of("webdataset", tmp_path / "set", tmp_path)
    assert sizes(task) == (8, 4, 4)


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_missing_columns_are_named_with_those_that_are_there(tmp_path):
    parquet(tmp_path / "set", noise(), kind=[0, 1] * 6)
    made = lambda **columns: refusal(lambda: task_of("parquet", tmp_path / "set", tmp_path, **columns))  # noqa: E731
    there = "has the columns picture, kind"
    assert there in made()
    assert "data.label_column" in made()
    assert "data.label_column" in made(image_column="picture")
    assert "data.image_column is 'image'" in made(image_column="image", label_column="kind")
    assert there in made(image_column="image", label_column="kind")
    assert "data.label_column is 'label'" in made(image_column="picture", label_column="label")
    assert "Column 'kind'" in made(image_column="kind", label_column="kind")
    assert "Column 'picture'" in made(image_column="picture", label_column="picture")


def test_a_broken_image_is_named_when_it_is_read(tmp_path):
    images = noise()
    images[3] = images[3][:40]
    parquet(tmp_path / "set", images, label=[0, 1] * 6)
    task = task_of("parquet", tmp_path / "set", tmp_path, image_column="picture")
    everything = lambda: [content(images) for images in task.images.values()]  # noqa: E731
    assert "is not a readable image" in refusal(everything)


def test_a_label_that_train_lacks_is_named(tmp_path):
    for split, labels in (("train", [0, 1] * 4), ("test", [0, 1, 2])):
        (tmp_path / "set" / split).mkdir(parents=True)
        tar(tmp_path / "set" / split / "0.tar", [(noise(1)[0], {"cls": str(label)}) for label in labels])
    assert "test split of" in refusal(lambda: task_of("webdataset", tmp_path / "set", tmp_path))
    assert "label 2" in refusal(lambda: task_of("webdataset", tmp_path / "set", tmp_path))


def test_a_single_class_is_refused(tmp_path):
    parquet(tmp_path / "set", noise(), label=["cat"] * 12)
    assert "1 classes" in refusal(lambda: task_of("parquet", tmp_path / "set", tmp_path, image_column="picture"))


@pytest.mark.parametrize("torn", [b"", b"<html>", json.dumps({}).encode()])
def test_a_torn_file_is_named(torn, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(torn)
    assert f"{tmp_path / 'set'} cannot be read" in refusal(lambda: task_of("webdataset", tmp_path / "set", tmp_path))


def test_an_empty_folder_and_an_unknown_name_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    for name in (str(tmp_path / "set"), "someone/nothing"):
        task = HuggingFaceImages(name, root=str(tmp_path))
        assert f"data.name is {name!r}, which could not be had (" in refusal(task.prepare_data)
        assert f"data.name is {name!r}, which could not be had (" in refusal(task.setup)
