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
from datamodules.splits import Percent

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
    parts = {"train": real_images("flowers12", "train", 4), "test": real_images("flowers12", "test", 2)}
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
            *("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--pictures=[]"),
            "--model.backbone.pretrained_cfg_overlay.input_size=[3,32,32]",
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


# -------------------------------------------------------------------------------------------- how files say their split

SHARDS = {
    "shards": (
        ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"],
        "8 train (file train-00000-of-00002.parquet and 1 more), 2 val (cut from train), "
        "5 test (file test-00000-of-00001.parquet)",
    ),
    "names that differ in the split": (
        ["birds-train-0", "birds-train-1", "birds-validation-0"],
        "8 train (file birds-train-0.parquet and 1 more), 5 val (file birds-validation-0.parquet), 2 test (cut",
    ),
    "hashes": (
        ["train-00000-of-00001-a09b74b3ef9c3b56", "test-00000-of-00001-c0ffee00c0ffee00"],
        "4 train (file train-00000-of-00001-a09b74b3ef9c3b56.parquet), 1 val (cut from train), 5 test (file test-0",
    ),
    "folders": (
        ["data/Training/a_test", "data/Testing/b"],
        "4 train (folder Training), 1 val (cut from train), 5 test (",
    ),
    "names that say something else": (["litmus_test", "blots"], "6 train (no split is named), 2 val (cut from train)"),
    "a single file": (["litmus_test"], "3 train (no split is named), 1 val (cut from train), 1 test (cut from train)"),
}


@pytest.mark.parametrize("shards", SHARDS)
def test_a_files_name_counts_where_it_is_that_of_a_split_or_as_one_of_train_but_for_it(tmp_path, shards):
    names, said = SHARDS[shards]
    for name in [*names, "._train", "__MACOSX/test"]:  # the last two are leftovers, and no Parquet files
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"{name}.parquet").write_bytes(b"Mac OS X")
    struct = [{"bytes": image, "path": None} for image in noise(5)]
    for name in names:
        pq.write_table(pa.table({"image": struct, "label": list("aaabb")}), tmp_path / "set" / f"{name}.parquet")
    task = HuggingFaceImages(str(tmp_path / "set"), root=str(tmp_path), seed=0)
    task.cut = {split: Percent(20) for split in ("val", "test")}
    task.setup()
    assert said in task.describe()


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train/**
  - split: test
    path: held_out/**
---
"""
ON_THE_HUB = {
    "nothing but classes": ("", "", "", "8 train (no split is named), 2 val (cut from train), 2 test (cut from train)"),
    "folders of splits": (
        "train/",
        "test/",
        "",
        "6 train (folder train), 2 val (cut from train), 4 test (folder test)",
    ),
    "a card": ("train/", "held_out/", CARD, "6 train (split train), 2 val (cut from train), 4 test (split test)"),
}


@pytest.mark.parametrize("kind", ON_THE_HUB)
def test_names_of_images_say_no_split_on_the_hub_either(kind, hub, tmp_path, monkeypatch):
    train, test, card, said = ON_THE_HUB[kind]
    files = {
        f"{train if i < 8 else test}{'ab'[i % 2]}/{('', 'test_', 'valid_')[i % 3]}{i}.png": image
        for i, image in enumerate(noise())
    }
    hub.files |= files | ({"README.md": card.encode()} if card else {})
    for offline in (False, True):  # once it was downloaded it is at hand
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
        task = HuggingFaceImages("lab/birds", root=str(tmp_path / "data"))
        task.setup()
        assert said in task.describe()
        held = [each for images in task.images.values() for each in content(images)]
        assert sorted(held) == sorted(
            (np.asarray(Image.open(io.BytesIO(image))).tobytes(), "ab".index(name.split("/")[-2]))
            for name, image in files.items()
        )


def test_names_of_files_on_the_hub_count_as_those_in_a_folder_do(hub, tmp_path):
    for place, name in enumerate(("litmus_test", "blots")):
        parquet(tmp_path / name, noise()[6 * place :][:6], label=["a", "b"] * 3)
        hub.files[f"{name}.parquet"] = (tmp_path / name / "all.parquet").read_bytes()
    task = HuggingFaceImages("lab/birds", root=str(tmp_path / "data"))
    task.setup()
    assert "8 train (no split is named), 2 val (cut from train), 2 test (cut from train)" in task.describe()


def test_folders_that_save_to_disk_wrote_are_read_as_they_are(tmp_path):
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_dict({"image": [Image.open(io.BytesIO(each)) for each in noise()], "label": ["a", "b"] * 6})
    test = saved.select([5, 1, 7, 2])
    DatasetDict(train=saved, test=test).save_to_disk(tmp_path / "both")
    saved.save_to_disk(tmp_path / "single")
    both, single = (task_of("saved", tmp_path / name, tmp_path) for name in ("both", "single"))
    assert (
        both.describe() == "both: 10 train (split train), 2 val (cut from train), 4 test (split test) images, 2 classes"
    )
    assert sizes(single) == (8, 2, 2)
    pixels = [np.asarray(Image.open(io.BytesIO(each))).tobytes() for each in noise()]
    assert content(both.images["test"]) == [(pixels[i], i % 2) for i in (5, 1, 7, 2)]
    assert sorted(each for images in single.images.values() for each in content(images)) == sorted(
        (pixels[i], i % 2) for i in range(12)
    )


def test_a_metadata_file_says_the_labels_of_images_beside_it(tmp_path):
    for split, number in (("train", 8), ("test", 4)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for i, image in enumerate(noise(number)):
            (tmp_path / "set" / split / f"valid_{i}.png").write_bytes(image)
        rows = "".join(f"valid_{i}.png,{'ab'[i % 2]}\n" for i in range(number))
        (tmp_path / "set" / split / "metadata.csv").write_text(f"file_name,label\n{rows}")
    task = task_of("metadata", tmp_path / "set", tmp_path)
    assert (
        task.describe() == "set: 6 train (folder train), 2 val (cut from train), 4 test (folder test) images, 2 classes"
    )
    pixels = [np.asarray(Image.open(io.BytesIO(each))).tobytes() for each in noise(4)]
    assert content(task.images["test"]) == [(pixels[i], i % 2) for i in range(4)]


def test_paths_in_parquet_begin_in_the_files_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and not here
    folder = tmp_path / "set" / "data"
    (folder / "images").mkdir(parents=True)
    struct = [{"bytes": None, "path": f"images/{i}.png"} for i in range(12)]
    pq.write_table(pa.table({"image": struct, "label": [0, 1] * 6}), folder / "train-00000-of-00001.parquet")
    for i, image in enumerate(noise()):
        (folder / "images" / f"{i}.png").write_bytes(image)
    images = task_of("parquet", tmp_path / "set", tmp_path).images["train"]
    pixels = [np.asarray(Image.open(io.BytesIO(each))).tobytes() for each in noise()]
    assert content(images) == [(pixels[n := int(images.name(i)[7:-4])], n % 2) for i in range(len(images))]
    images.digest()
    (folder / images.name(1)).unlink()
    for reach in (images.digest, lambda: images[1], lambda: task_of("parquet", tmp_path / "set", tmp_path)):
        assert str(folder / images.name(1)) in refusal(reach)


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("lacking", ["jpg", "cls"])
def test_a_sample_of_a_tar_without_image_or_label_is_named(tmp_path, first, lacking):
    (tmp_path / "set").mkdir()
    files = {
        f"{i:04d}.{end}": image if end == "jpg" else b"01"[i % 2 :][:1]
        for i, image in enumerate(noise())
        for end in ("jpg", "cls")
    }
    del files[f"{first + 1:04d}.{lacking}"]
    (tmp_path / "set" / "train-0.tar").write_bytes(packed("train-0.tar", files))
    message = refusal(lambda: task_of("webdataset", tmp_path / "set", tmp_path))
    assert message.startswith(f"Sample {first + 1:04d} of ")
    assert lacking in message
    assert str(tmp_path / "set") in message


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([0, 1, 0, None], "Row 3 (from 0) of train of"),
        (["a", None, "b", "b"], "Row 1 (from 0) of train of"),
        (["a", "b", " ", "b"], "Row 2 (from 0) of train of"),
        ([0.0, 1.0, float("nan"), 0.0], "Row 2 (from 0) of train of"),
        ([0.0, 1.0, 0.5, 0.0], "holds 0.5"),
    ],
)
def test_a_row_without_a_label_is_named(tmp_path, labels, named):
    parquet(tmp_path / "set", noise(4), label=labels)
    message = refusal(lambda: task_of("parquet", tmp_path / "set", tmp_path))
    assert named in message
    assert str(tmp_path / "set") in message
    assert "'label'" in message


def test_a_row_without_an_image_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    for row, cell in ((2, None), (1, {"bytes": None, "path": None})):
        struct = [{"bytes": image, "path": None} for image in noise(4)]
        struct[row] = cell
        pq.write_table(pa.table({"image": struct, "label": [0, 1, 0, 1]}), tmp_path / "set" / "all.parquet")
        message = refusal(lambda: task_of("parquet", tmp_path / "set", tmp_path))
        assert message.startswith(f"Row {row} (from 0) of train of {tmp_path / 'set'} has no 'image'")


def test_whole_floats_are_labels(tmp_path):
    parquet(tmp_path / "set", noise(), label=[3.0, 7.0] * 6)
    assert task_of("parquet", tmp_path / "set", tmp_path).target.classes == ["3", "7"]


@pytest.mark.parametrize("names", ["upper case", "dots", "two kinds"])
def test_a_tars_names_are_read_or_it_is_said_what_to_rename(tmp_path, names):
    (tmp_path / "set").mkdir()
    files = {}
    for i, image in enumerate(noise()):
        key, ending, label = {
            "upper case": (f"{i:04d}", "PNG", "CLS"),
            "dots": (f"a.b.{i:04d}", "png", "cls"),
            "two kinds": (f"{i:04d}", "png" if i < 9 else "webp", "cls"),
        }[names]
        files |= {f"{key}.{ending}": image, f"{key}.{label}": b"01"[i % 2 :][:1]}
    (tmp_path / "set" / "train-0.tar").write_bytes(packed("train-0.tar", files))
    load = lambda: task_of("webdataset", tmp_path / "set", tmp_path)  # noqa: E731
    if names == "upper case":
        assert sizes(load()) == (8, 2, 2)
    elif names == "dots":
        assert refusal(load).endswith("rename them, as a.b.0000.png to a_b_0000.png.")
    else:
        assert refusal(load).startswith("Sample 0009 of train of ")
