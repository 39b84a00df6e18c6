"""What every task shares, digits, and folders of images."""

import os
import shutil

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from replicas import refusal
from sklearn.datasets import load_digits

from datamodules import Digits, Embeddings, HuggingFaceImages, ImageFolder
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


def write_split(folder, sizes, ending="jpg"):
    for brightness, (name, size) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(size):
            Image.new("RGB", (20, 16), (40 * brightness, 5 * i, 0)).save(folder / name / f"{i:02d}.{ending}")


def paths(images):
    return {str(images.root / images.name(i)): int(images.labels[i]) for i in range(len(images))}


# Digits


@pytest.mark.parametrize("digits", [None, [5, 6, 7, 8, 9], [9, 0]])
def test_digits_are_the_chosen_ones_once_each_in_disjoint_splits(digits):
    task = set_up(Digits(digits))
    chosen = list(range(10)) if digits is None else digits
    assert task.name == "digits"
    assert task.target.classes == [str(digit) for digit in chosen]
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


@pytest.mark.parametrize("digits", [[], [3, 3], [1, 2, 10], [-1, 2]])
def test_digits_that_are_no_classes_are_refused(digits):
    assert str(digits) in refusal(lambda: Digits(digits))


# What every task shares


@pytest.mark.parametrize("batch_size", [100, 10_000])
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


@pytest.mark.parametrize("view", [None, "weights", "squash"])
def test_a_view_crops_as_the_weights_were_evaluated_or_squashes_the_whole_image(tmp_path, view):
    pixels = np.random.default_rng(0).integers(0, 256, (36, 90, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    task = set_up(ImageFolder(str(tmp_path), **({"view": view} if view else {})))
    image = Image.fromarray(pixels)
    if view == "squash":
        seen = image.resize((24, 24), Image.Resampling.BICUBIC)
    else:  # the shorter side becomes 24 / 0.8 pixels, and the middle of the rest is cut out
        seen = image.resize((75, 30), Image.Resampling.BICUBIC).crop((26, 3, 50, 27))
    expected = (np.asarray(seen) / 255 - PREPROCESSING["mean"]) / PREPROCESSING["std"]
    for loader in (task.val_dataloader(), task.extraction_loader("train", [[0]], None, 1)):
        for image in next(iter(loader)).inputs:
            np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    told = ", squashed whole" * (view == "squash")
    assert [task.view_provenance(each) for each in (None, 1)] == [f"clean view{told}", f"paper view 1 of seed 0{told}"]


def test_a_view_that_is_none_is_refused():
    assert "data.view is 'crop'; it must be one of weights, squash" in refusal(lambda: Digits(view="crop"))


def test_loaders_yield_features_once_these_are_extracted_and_images_beside_them():
    task = set_up(Digits([0, 1], batch_size=1000))
    (before,) = task.clean_loader("train")
    views = [torch.randn(len(task.images["train"]), 3) for _ in range(2)]
    task.extract = {"train": views}.get
    assert task.features("train") is views
    (images,) = task.clean_loader("train")
    assert torch.equal(images.inputs, before.inputs)
    loader = task.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch.inputs, views[epoch % 2][batch.indices])
        assert torch.equal(batch.labels, task.images["train"].labels[batch.indices])


@pytest.mark.parametrize("view", [None, 0, 2])
def test_images_are_extracted_in_exactly_these_batches_and_this_view(view):
    task = set_up(Digits([0, 1], augmentation="paper", batch_size=7))
    clean = timm.data.create_transform(**PREPROCESSING, is_training=False)
    batches = [[5, 1], [9], [0, 2, 4]]
    seen = list(task.extraction_loader("train", batches, view, 3))
    assert [batch.indices.tolist() for batch in seen] == batches
    assert [batch.total for batch in seen] == [2, 1, 3]
    loader = task.train_dataloader()
    loader.sampler.set_epoch(view or 0)
    augmented = {int(i): image for batch in loader for i, image in zip(batch.indices, batch.inputs, strict=True)}
    for batch in seen:
        for index, image in zip(batch.indices.tolist(), batch.inputs, strict=True):
            assert torch.equal(image, clean(task.images["train"][index]) if view is None else augmented[index])
    assert task.view_provenance(None) == "clean view"
    assert task.view_provenance(2) == "paper view 2 of seed 0"


def test_a_loaded_task_describes_itself_and_says_what_was_cut():
    assert set_up(Digits([5, 6, 7, 8, 9])).describe() == (
        "digits: 538 train, 179 val (cut from train), 179 test (cut from train) images, 5 classes"
    )


def test_any_task_leaves_classes_of_few_images_out():
    values = load_digits(return_X_y=True)[1]
    counts = [int((values == digit).sum()) for digit in (0, 1, 2)]
    assert counts == [178, 182, 177]
    task = set_up(Digits([0, 1, 2], min_images=178))
    assert task.target.classes == ["0", "1"]
    assert sum(images.labels.bincount() for images in task.images.values()).tolist() == counts[:2]


class Two:
    """A Trainer of so many processes."""

    def __init__(self, processes):
        self.world_size = processes


def test_splits_smaller_than_the_number_of_processes_are_refused_also_if_they_were_loaded_before(tmp_path):
    write_split(tmp_path / "pets" / "train", {"a": 5, "b": 5})
    task = set_up(ImageFolder(str(tmp_path / "pets")))
    task.trainer = Two(2)
    task.setup()
    task.trainer = Two(3)
    assert refusal(task.setup) == (
        "The val split of pets has 2 images, fewer than the 3 processes; use at most 2 devices."
    )


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
    assert task.target.classes == ["ants", "cats"]
    given = {split: paths(task.images[split]) for split in ("train", "val", "test")}
    everything = {
        str(root / split / name / f"{i:02d}.{ending}"): task.target.classes.index(name)
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
    [  # more are in test_mistakes.py
        ({"train": {"a": 5, "b": 5}, "val": {"a": 5, "c": 5}}, ["val", "lacks ['b']", "adds ['c']", "train"]),
        ({"train": {"a": 1, "b": 5}, "val": {"a": 1, "b": 1}}, ["'a'", "1 images", "test", "at least 2"]),
    ],
)
def test_a_folder_of_another_layout_is_refused_in_one_line(tmp_path, layout, named):
    for split, sizes in layout.items():
        (tmp_path / split).mkdir()
        write_split(tmp_path / split, sizes)
    message = refusal(lambda: set_up(ImageFolder(str(tmp_path))))
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


# Constructors


def test_constructors_read_no_data_and_refuse_a_wrong_path_at_once(tmp_path):
    torn = tmp_path / "torn.npz"
    torn.write_bytes(b"torn")
    (tmp_path / "set" / "train" / "only").mkdir(parents=True)
    for task, name, wrong in (
        (Embeddings(features=str(torn)), "torn", lambda: Embeddings(features=str(tmp_path / "nowhere.npz"))),
        (ImageFolder(str(tmp_path / "set")), "set", lambda: ImageFolder(str(tmp_path))),
        (HuggingFaceImages("someone/nothing"), "nothing", lambda: HuggingFaceImages(str(tmp_path / "nowhere"))),
    ):
        assert (task.name, task.images, hasattr(task, "target")) == (name, {}, False)
        assert str(tmp_path) in refusal(wrong)
    assert HuggingFaceImages(str(tmp_path / "set")).name == "set"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "torn.npz"]


@pytest.mark.parametrize(
    ("kind", "given"),
    [("ImageFolder", "root"), ("HuggingFaceImages", "name"), ("Embeddings", "features"), ("Digits", "seed")],
)
def test_an_unknown_argument_of_a_constructor_is_refused_by_the_command_line(cli, kind, given):
    status, _, err = cli("fit", f"--data={kind}", f"--data.{given}=1", "--data.nonsense=1")
    assert status == 2
    assert err.splitlines()[-1].startswith("error: There is no option 'data.nonsense'")
