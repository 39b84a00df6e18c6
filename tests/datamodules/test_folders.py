"""Which files of a folder are images, and which splits the names of folders and files put them into."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from replicas import content, refusal, sizes

from datamodules import HuggingFaceImages, ImageFolder

BAD = os.fsdecode(b"caf\xe9")  # a name that is no UTF-8


def pixels(number):
    """Return a grey image's pixels, others for each number."""
    return np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)


def write(folder, names):
    """Write an image under each name, each another one, in the format of its ending."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(folder / name)
    return folder


def loaded(folder, **arguments):
    task = HuggingFaceImages(str(folder), root=str(folder.parent / "data"), **arguments)
    task.prepare_data()
    task.setup()
    return task


def of_classes(below, classes=("cat", "dog"), number=5, name="{}.png"):
    return [f"{below}{label}/{name.format(i)}" for label in classes for i in range(number)]


# Where images lie, and how many of train, val and test are found of 10 (or 20, 30) and why.
LAYOUTS = {
    "words in file names": (
        of_classes("", name="a_test_{}.png"),
        "6 train (no split is named), 2 val (cut from train)",
    ),
    "mixed file names": (
        [*of_classes("", name="valid {}.png"), *of_classes("", name="{}.png")],
        "12 train (no split is named), 4 val (cut from train), 4 test (cut from train)",
    ),
    "folders": (
        [*of_classes("train/"), *of_classes("Valid/"), *of_classes("test/")],
        "10 train (folder train), 10 val (folder Valid), 10 test (folder test)",
    ),
    "deeper folders": (
        [*of_classes("data/train2017/"), *of_classes("data/val2017/")],
        "8 train (folder train2017), 10 val (folder val2017), 2 test (cut from train)",
    ),
    "folders that differ in the split": (
        [*of_classes("birds_train/"), *of_classes("birds_test/")],
        "8 train (folder birds_train), 2 val (cut from train), 10 test (folder birds_test)",
    ),
    "folders that say something else": (
        [*of_classes("rorschach_test/"), *of_classes("drawings/")],
        "12 train (no split is named), 4 val (cut from train), 4 test (cut from train)",
    ),
    "a folder beside others": (
        [*of_classes("images/"), *of_classes("test/")],
        "8 train (no split is named), 2 val (cut from train), 10 test (folder test)",
    ),
    "classes called as splits": (
        of_classes("", ("valid", "invalid")),
        "6 train (no split is named), 2 val (cut from train), 2 test (cut from train)",
    ),
    "a single split": (of_classes("test/"), "6 train (folder test), 2 val (cut from train), 2 test (cut from train)"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_folders_above_the_classes_name_the_splits_of_images_and_a_run_says_so(tmp_path, layout):
    names, said = LAYOUTS[layout]
    task = loaded(write(tmp_path / "set", names))
    assert said in task.describe()
    for split, number in zip(("train", "val", "test"), sizes(task), strict=True):
        assert f"{number} {split} (" in task.describe()
    given = [(images.name(i), int(images.labels[i])) for images in task.images.values() for i in range(len(images))]
    assert sorted(name for name, _ in given) == sorted(names)
    assert all(task.target.classes[label] == name.split("/")[-2] for name, label in given)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/1.png", "test/2.png"], "train/1.png"),
        (["1.png", "2.png"], "set/2.png"),
        ([*of_classes("train/"), "train/1.png"], "train/1.png and "),
    ],
)
def test_images_without_a_folder_for_their_class_are_refused(tmp_path, names, said):
    message = refusal(lambda: loaded(write(tmp_path / "set", names)))
    assert "<split>/<class>/<image>" in message
    assert said in message


@pytest.mark.parametrize("kind", [ImageFolder, HuggingFaceImages])
def test_leftovers_are_no_images_and_names_may_be_of_any_bytes(tmp_path, kind):
    names = [*of_classes("train/", (f"{BAD}$", "a_b^c")), f"train/a_b^c/{BAD}.GIF"]
    root = write(tmp_path / BAD, names)
    for litter in ("__MACOSX/._0.png", "train/__MACOSX/x/._0.png", "train/.cache/1.png", "train/a_b^c/._0.png"):
        (root / litter).parent.mkdir(parents=True, exist_ok=True)
        (root / litter).write_bytes(b"Mac OS X")
    (root / "train" / "a_b^c" / "again").symlink_to(root / "train")  # a loop
    task = kind(str(root))
    task.setup()
    assert task.target.classes == ["a_b^c", "caf\\xe9$"]
    assert sum(sizes(task)) == len(names)
    assert sorted(colours for images in task.images.values() for colours, _ in content(images)) == sorted(
        np.repeat(pixels(number)[..., None], 3, axis=2).tobytes() for number in range(len(names))
    )
    said = [task.name, *task.target.classes]
    said += [images.name(i) for images in task.images.values() for i in range(len(images))]
    "".join(said).encode()  # none is left that a file could not hold
    assert all(len(images.digest()) == 32 for images in task.images.values())


@pytest.mark.parametrize("kind", [ImageFolder, HuggingFaceImages])
def test_a_link_to_nowhere_and_a_file_that_vanished_are_named(tmp_path, kind):
    root = write(tmp_path / "set", of_classes("train/"))
    link = root / "train" / "cat" / "gone.png"
    link.symlink_to("nowhere.png")
    assert refusal(kind(str(root)).setup) == f"{link} is a link to nowhere.png, which is not there."
    link.with_name("nowhere.png").symlink_to("nowhere.png")  # to itself
    assert refusal(kind(str(root)).setup).startswith(f"{link.parent} cannot be read (")
    link.with_name("nowhere.png").unlink()
    link.with_name("nowhere.png").symlink_to("1.png")
    task = kind(str(root))
    task.setup()
    assert sum(sizes(task)) == 12
    link.unlink()
    for reach in (lambda images: images.digest(), content):
        message = refusal(lambda reach=reach: [reach(images) for images in task.images.values()])
        assert message.startswith(f"{link} ")


def test_links_to_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere", of_classes(""))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    assert sum(sizes(loaded(tmp_path / "set"))) == 10


# Classes of a few images


@pytest.mark.parametrize("kind", [ImageFolder, HuggingFaceImages])
def test_classes_of_a_few_images_are_named_and_left_out_on_request(tmp_path, kind, caplog):
    names = [*of_classes("train/", ("ant", "bee")), "train/cow/1.png", "train/dog/1.png", "train/dog/2.png"]
    root = write(tmp_path / "set", names)
    message = refusal(kind(str(root)).setup)
    assert message.startswith("Class 'cow' of set has 1 images in train; to cut val and test from it, it needs at ")
    assert message.endswith("least 3. --data.min_images 3 leaves such classes out: 'cow', 'dog'.")
    task = kind(str(root), min_images=3)
    task.setup()
    assert "2 of 4 classes of set are left out, with fewer than 3 images in train: cow (1), dog (2)." in caplog.text
    assert task.target.classes == ["ant", "bee"]
    assert sizes(task) == (6, 2, 2)
    for images in task.images.values():
        for i in range(len(images)):
            assert images.name(i).split("/")[-2] == task.target.classes[int(images.labels[i])]
    assert "data.min_images is 6; 0 of 4 classes" in refusal(kind(str(root), min_images=6).setup)
    assert "data.min_images is -1; it must be 0 or more" in refusal(lambda: kind(str(root), min_images=-1))


def test_a_class_that_is_left_out_may_lack_in_other_splits_and_is_left_out_of_them(tmp_path):
    names = [*of_classes("train/", ("bee", "cow")), "train/ant/1.png", "train/dog/1.png"]
    names += [*of_classes("test/", ("ant", "bee", "cow"), 2)]
    root = write(tmp_path / "set", names)
    (root / "train" / "empty").mkdir()
    assert "train/empty holds no images" in refusal(ImageFolder(str(root)).setup)
    assert "lacks ['dog']" in refusal(ImageFolder(str(root), min_images=1).setup)
    task = ImageFolder(str(root), min_images=2)
    task.setup()
    assert task.target.classes == ["bee", "cow"]
    assert sizes(task) == (8, 2, 4)
    test = task.images["test"]
    assert [test.name(i) for i in range(4)] == ["bee/0.png", "bee/1.png", "cow/0.png", "cow/1.png"]
    assert test.labels.tolist() == [0, 0, 1, 1]


def test_splits_too_small_to_mean_much_are_said(tmp_path, caplog):
    root = write(
        tmp_path / "set", [*of_classes("train/"), *of_classes("val/", number=1), *of_classes("test/", number=4)]
    )
    ImageFolder(str(root)).setup()
    assert (
        "val of set is small: one of its 2 images is 50 % of the accuracy, and 2 of 2 classes have at most one image."
        in (caplog.messages)
    )
    assert "test of set is small: one of its 8 images is 12 % of the accuracy." in caplog.messages
    assert len(caplog.messages) == 2


# A whole run


def test_class_names_are_text_everywhere_and_files_may_be_called_by_any_bytes(cli, tmp_path):
    classes = ("5$ US^$", "a_b^c", "%d {x}", "_hidden", BAD)
    said = {"5$ US^$", "a_b^c", "%d {x}", "_hidden", "caf\\xe9"}
    write(tmp_path / "set", of_classes("train/", classes, name=f"{BAD}{{}}.png"))
    run = ("--data.root=set", "--name=odd", "--model.backbone.name=test_resnet", "--model.backbone.weights=random")
    run += (
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--pictures=svg",
    )
    status, out, err = cli("fit", "--config", "image_folder.yaml", "--config", "debug.yaml", *run)
    assert status == 0, err
    f"{out}{err}".encode()
    assert "set: 15 train (folder train), 5 val (cut from train), 5 test (cut from train) images, 5 classes" in err
    assert set(pd.read_csv("runs/odd/classes.csv")["class"]) == said
    drawn = Path("runs/odd/classes.svg").read_text()
    assert [name for name in said if f"<!-- {name} -->" not in drawn] == []
    status, _, err = cli("predict", "--config", "runs/odd/config.yaml", "--name=odd")
    assert status == 0, err
    predictions = pd.read_csv("runs/odd/predictions.csv")
    assert set(predictions["label"]) == said
    assert all(re.fullmatch(r".+/caf\\xe9\d\.png", image) for image in predictions["image"])
    assert [image.split("/")[0] for image in predictions["image"]] == list(predictions["label"])
