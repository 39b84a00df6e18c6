import io
import os
import shutil

import numpy as np
import pytest
import timm.data
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import Digits, ImageFolder
from datamodules.images import ArrayImages, FileImages

PREPROCESSING = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.8,
    "crop_mode": "center",
}


def set_up(task):
    task.preprocessing = PREPROCESSING
    task.prepare_data()
    task.setup()
    return task


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def write_split(folder, sizes, ending="jpg"):
    for brightness, (name, size) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(size):
            Image.new("RGB", (20, 16), (40 * brightness, 5 * i, 0)).save(folder / name / f"{i:02d}.{ending}")


def paths(images):
    return {str(images.root / images.name(i)): int(images.labels[i]) for i in range(len(images))}


def encoded(mode, colour, fmt, **options):
    file = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(file, fmt, **options)
    return file.getvalue()


# Digits


@pytest.mark.parametrize("digits", [None, [5, 6, 7, 8, 9], [9, 0]])
def test_digits_are_the_chosen_ones_once_each_in_disjoint_splits(digits):
    task = set_up(Digits(digits))
    chosen = list(range(10)) if digits is None else digits
    assert task.name == "digits"
    assert task.classes == [str(digit) for digit in chosen]
    assert task.num_classes == len(chosen)
    pixels, values = load_digits(return_X_y=True)
    wanted = sorted(
        (np.round(image * 255 / 16).astype("uint8").tobytes(), chosen.index(value))
        for image, value in zip(pixels, values.tolist(), strict=True)
        if value in chosen
    )
    given = sorted(
        (np.asarray(images[i].convert("L")).tobytes(), int(images.labels[i]))
        for images in task.images.values()
        for i in range(len(images))
    )
    assert given == wanted
    assert len(wanted) == {10: 1797, 5: 896, 2: 358}[len(chosen)]
    for split in ("val", "test"):
        shares = task.images[split].labels.bincount() / torch.tensor([(values == digit).sum() for digit in chosen])
        assert ((shares - 0.2).abs() < 0.004).all()


def test_digits_splits_follow_the_seed():
    def digest(seed):
        return {split: images.digest() for split, images in set_up(Digits(seed=seed)).images.items()}

    assert digest(0) == digest(0)
    assert not digest(0).items() & digest(1).items()


@pytest.mark.parametrize("digits", [[], [3], [3, 3], [1, 2, 10], [-1, 2]])
def test_digits_that_are_no_classes_are_refused(digits):
    with pytest.raises(MisconfigurationException) as error:
        Digits(digits)
    assert str(digits) in one_line(error)


@pytest.mark.parametrize(
    ("argument", "value"), [("batch_size", 0), ("augmentation", "papers"), ("num_workers", -1), ("batch_size", -5)]
)
def test_arguments_that_cannot_be_are_refused_by_name(argument, value):
    with pytest.raises(MisconfigurationException) as error:
        Digits(**{argument: value})
    assert f"data.{argument}" in one_line(error)
    assert str(value) in one_line(error)


# What every task shares


@pytest.mark.parametrize("batch_size", [100, 1, 10_000])
def test_every_loader_sees_each_image_of_its_split_once(batch_size):
    task = set_up(Digits([0, 1], batch_size=batch_size))
    for split, loader in (
        ("train", task.train_dataloader()),
        ("val", task.val_dataloader()),
        ("test", task.test_dataloader()),
        ("test", task.predict_dataloader()),
    ):
        images = task.images[split]
        indices = torch.cat([batch.indices for batch in loader])
        in_order = torch.arange(len(images))
        assert torch.equal(indices.sort().values, in_order)
        assert torch.equal(indices, in_order) == (split != "train")
        assert torch.equal(torch.cat([batch.labels for batch in loader]), images.labels[indices])


@pytest.mark.parametrize("augmentation", ["paper", "none"])
def test_validation_and_test_see_timms_own_evaluation_view(augmentation):
    task = set_up(Digits([0, 1], batch_size=1000, augmentation=augmentation))
    transform = timm.data.create_transform(**PREPROCESSING, is_training=False)
    for split, loader in (
        ("val", task.val_dataloader()),
        ("test", task.test_dataloader()),
        ("test", task.predict_dataloader()),
        ("train", task.train_dataloader()),
    ):
        for epoch in (0, 3):
            loader.sampler.set_epoch(epoch)
            (batch,) = loader
            expected = torch.stack([transform(task.images[split][i]) for i in batch.indices.tolist()])
            assert torch.equal(batch.inputs, expected) == (split != "train" or augmentation == "none")


def test_loaders_yield_representations_once_they_are_there():
    task = set_up(Digits([0, 1], batch_size=1000))
    views = [torch.randn(len(task.images["train"]), 3) for _ in range(2)]
    task.represent("train", views)
    loader = task.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch.inputs, views[epoch % 2][batch.indices])
        assert torch.equal(batch.labels, task.images["train"].labels[batch.indices])


@pytest.mark.parametrize("change", ["pixel", "label", "order", "fewer"])
def test_the_digest_of_an_array_changes_with_what_is_in_it(change):
    def images(pixels, labels):
        return ArrayImages(pixels, torch.tensor(labels))

    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    before = images(pixels, [0, 1, 1]).digest()
    assert images(pixels.copy(), [0, 1, 1]).digest() == before
    other = pixels.copy()
    other[2, 3, 3] ^= 1
    after = {
        "pixel": images(other, [0, 1, 1]),
        "label": images(pixels, [0, 1, 0]),
        "order": images(pixels, [0, 1, 1]).subset(torch.tensor([0, 2, 1])),
        "fewer": images(pixels, [0, 1, 1]).subset(torch.tensor([0, 1])),
    }[change]
    assert after.digest() != before


# ImageFolder


@pytest.mark.parametrize("there", [("train",), ("train", "test"), ("train", "val"), ("train", "val", "test")])
@pytest.mark.parametrize("ending", ["jpg", "PNG"])
def test_a_folders_missing_splits_are_stratified_fifths_of_train(tmp_path, there, ending):
    sizes = {"train": {"cats": 20, "ants": 10}, "val": {"cats": 2, "ants": 3}, "test": {"cats": 4, "ants": 1}}
    root = tmp_path / "pets"
    for split in there:
        write_split(root / split, sizes[split], ending)
    (root / "train" / "cats" / "notes.txt").write_text("no image")
    (root / "train" / ".hidden").mkdir()
    task = set_up(ImageFolder(str(root)))
    assert task.name == "pets"
    assert task.classes == ["ants", "cats"]
    given = {split: paths(task.images[split]) for split in ("train", "val", "test")}
    everything = {
        str(root / split / name / f"{i:02d}.{ending}"): task.classes.index(name)
        for split in there
        for name, size in sizes[split].items()
        for i in range(size)
    }
    assert {path: label for split in given.values() for path, label in split.items()} == everything
    assert sum(map(len, given.values())) == len(everything)
    missing = [split for split in ("val", "test") if split not in there]
    for split in ("val", "test"):
        counts = task.images[split].labels.bincount().tolist()
        assert counts == ([2, 4] if split in missing else [sizes[split]["ants"], sizes[split]["cats"]])
        assert all(f"/{'train' if split in missing else split}/" in path for path in given[split])
    assert task.images["train"].labels.bincount().tolist() == [10 - 2 * len(missing), 20 - 4 * len(missing)]


def test_a_folders_splits_follow_the_seed(tmp_path):
    write_split(tmp_path / "train", {"a": 20, "b": 20})
    first, again, other = (set_up(ImageFolder(str(tmp_path), seed=seed)).images["val"] for seed in (0, 0, 1))
    assert paths(first) == paths(again)
    assert paths(first) != paths(other)


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"test": {"a": 5, "b": 5}}, ["train/"]),
        ({"train": {"a": 5}}, ["1 classes", "train", "two"]),
        ({"train": {}}, ["0 classes", "train", "two"]),
        ({"train": {"a": 5, "b": 0}}, ["train/b", "no images", ".jpg"]),
        ({"train": {"a": 5, "b": 5}, "test": {"a": 5, "b": 0}}, ["test/b", "no images"]),
        ({"train": {"a": 5, "b": 5}, "val": {"a": 5, "c": 5}}, ["val", "lacks ['b']", "adds ['c']", "train"]),
        ({"train": {"a": 5, "b": 5}, "test": {"a": 5}}, ["test", "lacks ['b']"]),
        ({"train": {"a": 5, "b": 5}, "test": {"a": 5, "b": 5, "c": 5}}, ["test", "adds ['c']"]),
        ({"train": {"a": 5, "b": 2}}, ["'b'", "2 images", "val and test", "at least 3"]),
        ({"train": {"a": 1, "b": 5}, "val": {"a": 1, "b": 1}}, ["'a'", "1 images", "test", "at least 2"]),
    ],
)
def test_a_folder_of_another_layout_is_refused_in_one_line(tmp_path, layout, named):
    for split, sizes in layout.items():
        (tmp_path / split).mkdir()
        write_split(tmp_path / split, sizes)
    with pytest.raises(MisconfigurationException) as error:
        set_up(ImageFolder(str(tmp_path)))
    message = one_line(error)
    assert tmp_path.name in message
    assert [name for name in named if name not in message] == []


@pytest.mark.parametrize(
    "layout",
    [
        {"train": {"a": 3, "b": 3}},
        {"train": {"a": 2, "b": 3}, "test": {"a": 1, "b": 1}},
        {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}},
    ],
)
def test_the_smallest_classes_that_suffice_reach_every_split(tmp_path, layout):
    for split, sizes in layout.items():
        write_split(tmp_path / split, sizes)
    images = set_up(ImageFolder(str(tmp_path))).images
    assert all(images[split].labels.bincount(minlength=2).min() >= 1 for split in ("train", "val", "test"))


CORRUPT = {
    "empty": b"",
    "text": b"this is no image",
    "page": b"<!DOCTYPE html>\n<html></html>\n",
    "half": encoded("RGB", (1, 2, 3), "PNG")[:-30],
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_image_is_named_when_it_is_reached(tmp_path, content):
    write_split(tmp_path / "train", {"a": 5, "b": 5}, "png")
    images = set_up(ImageFolder(str(tmp_path))).images["train"]
    corrupt = images.root / images.name(2)
    corrupt.write_bytes(content)
    assert images[1].size == (20, 16)
    with pytest.raises(MisconfigurationException) as error:
        images[2]
    assert str(corrupt) in one_line(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_in_the_last_line_whichever_process_reads_it(tmp_path, workers):
    write_split(tmp_path / "train", {"a": 5, "b": 5})
    task = set_up(ImageFolder(str(tmp_path), num_workers=workers))
    corrupt = task.images["val"].root / task.images["val"].name(1)
    corrupt.write_bytes(b"this is no image")
    with pytest.raises(MisconfigurationException) as error:
        list(task.val_dataloader())
    assert str(corrupt) in str(error.value).strip().splitlines()[-1]


def test_an_image_that_vanished_is_named(tmp_path):
    write_split(tmp_path / "train", {"a": 5, "b": 5})
    task = set_up(ImageFolder(str(tmp_path)))
    (tmp_path / "train" / task.images["val"].name(0)).unlink()
    with pytest.raises(MisconfigurationException) as error:
        task.images["val"][0]
    assert task.images["val"].name(0) in one_line(error)


PALETTE = [value for i in range(256) for value in (i, 255 - i, 7)]
MODES = {
    "grey": (encoded("L", 200, "PNG"), (200, 200, 200)),
    "grey jpeg": (encoded("L", 200, "JPEG"), (200, 200, 200)),
    "grey and alpha": (encoded("LA", (200, 255), "PNG"), (200, 200, 200)),
    "one bit": (encoded("1", 1, "PNG"), (255, 255, 255)),
    "rgb": (encoded("RGB", (200, 30, 90), "PNG"), (200, 30, 90)),
    "rgba": (encoded("RGBA", (200, 30, 90, 255), "PNG"), (200, 30, 90)),
    "cmyk": (encoded("CMYK", (0, 55, 165, 0), "JPEG", quality=100, subsampling=0), (255, 200, 90)),
    "16 bit": (encoded("I;16", 200 * 257, "PNG"), (200, 200, 200)),
    "16 bit black": (encoded("I;16", 100, "PNG"), (0, 0, 0)),
    "16 bit white": (encoded("I;16", 65535, "PNG"), (255, 255, 255)),
}


@pytest.mark.parametrize(("content", "colour"), MODES.values(), ids=MODES)
def test_every_kind_of_image_comes_out_rgb_and_as_bright_as_it_is(tmp_path, content, colour):
    (tmp_path / "image.png").write_bytes(content)
    image = FileImages(tmp_path, ["image.png"], torch.tensor([0]))[0]
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("transparency", [None, 3, b"\x00" * 256])
@pytest.mark.filterwarnings("ignore:Palette images")
def test_a_palette_image_comes_out_in_its_colours(tmp_path, transparency):
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette(PALETTE)
    image.save(tmp_path / "image.png", **({} if transparency is None else {"transparency": transparency}))
    given = np.asarray(FileImages(tmp_path, ["image.png"], torch.tensor([0]))[0])
    assert np.array_equal(given, np.stack([indices, 255 - indices, np.full_like(indices, 7)], axis=-1))


def test_sixteen_bits_are_scaled_over_their_whole_range(tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "image.png")
    given = np.asarray(FileImages(tmp_path, ["image.png"], torch.tensor([0]))[0])
    assert np.abs(given.astype(float) - values[..., None] / 65535 * 255).max() <= 1


@pytest.mark.parametrize("change", ["content", "time", "label", "order", "name"])
def test_the_digest_of_files_changes_with_them_and_not_with_their_place(tmp_path, change):
    write_split(tmp_path / "here", {"a": 4})
    files, labels = [f"a/{i:02d}.jpg" for i in range(4)], [0, 1, 0, 1]

    def digest(root="here", files=files, labels=labels):
        return FileImages(tmp_path / root, files, torch.tensor(labels)).digest()

    before = digest()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert digest() == digest("there") == before
    changed = tmp_path / "here" / files[2]
    status = changed.stat()
    if change == "content":
        changed.write_bytes(changed.read_bytes() + b"\0")
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    elif change == "label":
        labels[2] = 1
    elif change == "order":
        files[:] = [files[2], files[1], files[0], files[3]]
    else:
        changed.rename(changed.with_name("z.jpg"))
        files[2] = "a/z.jpg"
    assert digest() != before


# What every task is checked for


class Labels(Digits):
    """Digits with other labels."""

    def __init__(self, classes, labels):
        super().__init__()
        self.classes = classes
        self.given = torch.tensor(labels)

    def load(self):
        pixels = np.zeros((len(self.given), 8, 8), np.uint8)
        return dict.fromkeys(("train", "val", "test"), ArrayImages(pixels, self.given))


@pytest.mark.parametrize(
    ("classes", "labels", "named"),
    [
        (["a"], [0, 0], ["digits has 1 classes (a)", "two"]),
        (["a", "b", "c"], [1, 1, 1], ["digits", "'b'", "two"]),
        (["a", "b"], [0, 1, 2], ["image 2 in train of digits is 2", "0 to 1"]),
        (["a", "b"], [0, -1, 1], ["image 1 in train of digits is -1", "0 to 1"]),
    ],
)
def test_a_task_of_one_class_or_with_labels_that_are_none_is_refused(classes, labels, named):
    with pytest.raises(MisconfigurationException) as error:
        Labels(classes, labels).setup()
    message = one_line(error)
    assert [name for name in named if name not in message] == []


def test_classes_without_a_training_image_are_named(caplog):
    Labels([f"c{i}" for i in range(9)], [0, 8]).setup()
    (said,) = [message for message in caplog.messages if "not in train" in message]
    assert "7 of 9 classes of digits" in said
    assert "c1, c2, c3, c4, c5, ..." in said
