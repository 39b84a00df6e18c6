"""Several labels and numbers: their metrics against scikit-learn, how they are read, and what they are not."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageColumn
from PIL import Image
from replicas import refusal
from sklearn.metrics import average_precision_score, r2_score

from datamodules import Digits, Embeddings, HuggingFaceImages
from datamodules.outputs import MultiLabel, Regression

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(60, 5)).astype(np.float32)
LABELS = (RANDOM.random((60, 3)) < [0.5, 0.3, 0.1]).astype(int)
NUMBERS = RANDOM.normal(size=(60, 2)) * [1, 100] + [0, 1000]


def judged(target, outputs, labels):
    """The metric of each output, and what each image adds to it, as NumPy arrays, from outputs of shape (n, C)."""
    labels = torch.from_numpy(labels).to(target.dtype)
    target.fit(labels)
    outputs = outputs if isinstance(target, MultiLabel) else target.matrix(torch.from_numpy(outputs))
    (added,) = target.judge(torch.as_tensor(outputs).t().unsqueeze(0), labels).numpy()
    scores = target.scores(1)
    for part in torch.arange(60).split(25):
        scores.update(torch.as_tensor(outputs)[part].t().unsqueeze(0), labels[part])
    assert scores.compute().item() == pytest.approx(np.nanmean(added.mean(1)), abs=1e-12)
    return added.mean(1), added


@pytest.mark.parametrize("decimals", [8, 0])  # of the scores: with few there are ties
def test_average_precision_and_what_each_image_adds_are_scikit_learns(decimals):
    scores = np.round(LABELS + RANDOM.normal(size=LABELS.shape), decimals).astype(np.float32)
    average, added = judged(MultiLabel("abc"), scores, LABELS)
    np.testing.assert_allclose(average, average_precision_score(LABELS, scores, average=None), rtol=1e-12)
    for image in (0, 31):
        weights = np.ones(60)
        weights[image] += 1e-6
        moved = average_precision_score(LABELS, scores, average=None, sample_weight=weights)
        np.testing.assert_allclose(60 * (moved - average) / 1e-6, added[:, image] - average, atol=1e-4)


def test_a_label_that_no_image_has_does_not_count():
    labels = LABELS * [1, 0, 1]
    average, _ = judged(MultiLabel("abc"), RANDOM.normal(size=(60, 3)), labels)
    assert np.isnan(average).tolist() == [False, True, False]


def test_r2_and_what_each_image_adds_are_scikit_learns():
    said = NUMBERS + RANDOM.normal(size=NUMBERS.shape) * [0.5, 80]
    average, added = judged(Regression("ab"), said, NUMBERS)
    np.testing.assert_allclose(average, r2_score(NUMBERS, said, multioutput="raw_values"), rtol=1e-12)
    weights = np.ones(60)
    weights[7] += 1e-6
    moved = r2_score(NUMBERS, said, multioutput="raw_values", sample_weight=weights)
    np.testing.assert_allclose(60 * (moved - average) / 1e-6, added[:, 7] - average, atol=1e-4)


def test_what_is_decided_has_names():
    labels, numbers = MultiLabel(["ant", "bee"]), Regression(["age"])
    numbers.fit(torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    logits = torch.tensor([[[1.0, -1.0, 2.0], [0.5, -1.0, -2.0]]])  # a probe, two labels, three images
    assert labels.name(labels.decide(logits)).tolist() == [["ant;bee", "", "ant"]]
    assert labels.name(torch.tensor([[0.0, 1.0]])).tolist() == ["bee"]
    assert numbers.name(numbers.decide(logits[:, :1])).tolist() == [["3", "1", "4"]]
    assert (labels.describe(), numbers.describe()) == ("2 labels", "1 number to predict")


# How they are read


def embeddings(folder, labels, target, **more):
    np.save(folder / "vectors.npy", VECTORS)
    np.save(folder / "labels.npy", labels)
    task = Embeddings(str(folder / "vectors.npy"), str(folder / "labels.npy"), target=target, **more)
    task.setup()
    return task


def together(task):
    """Names and labels of all splits, in the order of the rows."""
    rows = [int(images.name(i).split()[1]) for images in task.images.values() for i in range(len(images))]
    return torch.cat([images.labels for images in task.images.values()])[np.argsort(rows)].numpy()


def test_a_file_or_columns_of_labels_are_read_and_split(tmp_path):
    task = embeddings(tmp_path, LABELS, "multilabel")
    np.testing.assert_array_equal(together(task), LABELS)
    assert {split: len(images) for split, images in task.images.items()} == {"train": 36, "val": 12, "test": 12}
    assert task.label == "vectors_multilabel"
    assert task.target.chance == pytest.approx(task.images["train"].labels.mean(0).mean().item())
    table = pd.DataFrame(VECTORS).add_prefix("dim_").assign(cat=LABELS[:, 0], dog=LABELS[:, 1] > 0, age=NUMBERS[:, 1])
    for ending, write in ((".csv", table.to_csv), (".parquet", table.to_parquet)):
        write(file := tmp_path / f"table{ending}", index=False)
        for target, key, expected in (
            ("multilabel", ["cat", "dog"], LABELS[:, :2]),
            ("regression", "age", NUMBERS[:, 1:]),
            ("regression", ["age", "dog"], np.c_[NUMBERS[:, 1], LABELS[:, 1]]),
        ):
            task = Embeddings(str(file), feature_key="dim_*", label_key=key, target=target)
            task.setup()
            assert task.target.names == ([key] if isinstance(key, str) else key)
            np.testing.assert_allclose(together(task), expected)


def images_beside(folder, **columns):
    (folder / "train").mkdir(parents=True)
    table = pd.DataFrame(columns).assign(file_name=[f"{place}.png" for place in range(20)])
    for name in table["file_name"]:
        Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "train" / name)
    table.to_csv(folder / "train" / "metadata.csv", index=False)
    return folder


def of_images(folder, target, label_column):
    task = HuggingFaceImages(str(folder), label_column=label_column, root=str(folder / "copy"), target=target)
    task.setup()
    return task


def test_columns_beside_images_are_read(tmp_path):
    folder = images_beside(tmp_path / "beside", cat=LABELS[:20, 0], dog=LABELS[:20, 1], age=NUMBERS[:20, 1])
    task = of_images(folder, "multilabel", ["cat", "dog"])
    for images in task.images.values():
        places = [int(images.name(i).split("/")[-1].removesuffix(".png")) for i in range(len(images))]
        np.testing.assert_array_equal(images.labels, LABELS[places, :2])
    assert task.target.names == ["cat", "dog"]
    assert of_images(folder, "regression", "age").target.names == ["age"]
    pattern = of_images(folder, "multilabel", "[cd]*")
    assert pattern.target.names == ["cat", "dog"]
    assert torch.equal(pattern.images["train"].labels, task.images["train"].labels)
    assert "label_column is 'cow_*'" in refusal(lambda: of_images(folder, "multilabel", "cow_*"))
    assert "label_column is 'cow'" in refusal(lambda: of_images(folder, "multilabel", ["cat", "cow"]))
    assert "'age' of" in refusal(lambda: of_images(folder, "multilabel", ["cat", "age"]))
    assert "data.target regression, several labels with multilabel." in refusal(
        lambda: of_images(folder, "classes", "age")
    )


def test_a_column_of_lists_is_a_row_of_numbers_or_the_labels_that_an_image_has(tmp_path):
    cells = [{"bytes": None, "path": str(images_beside(tmp_path / "a", age=range(20)) / "train" / "0.png")}] * 20
    kinds = {"images": ImageColumn(), "both": List(Value("float32")), "some": List(ClassLabel(names=["ant", "bee"]))}
    rows = {"both": LABELS[:20, :2].tolist(), "some": [np.flatnonzero(row).tolist() for row in LABELS[:20, :2]]}
    table = DatasetDict({"train": Dataset.from_dict({"images": cells, **rows}, Features(kinds))})
    table.save_to_disk(str(tmp_path / "set"))
    for column, names in (("both", ["0", "1"]), ("some", ["ant", "bee"])):
        task = of_images(tmp_path / "set", "multilabel", column)
        assert task.target.names == names
        found = torch.cat([images.labels for images in task.images.values()])
        assert sorted(found.tolist()) == sorted(LABELS[:20, :2].tolist())


# What they are not


@pytest.mark.parametrize(
    ("labels", "target", "said"),
    [
        (NUMBERS[:, 0], "classes", "Numbers are predicted with data.target regression."),
        (LABELS, "classes", "has 3 columns, and one class of several is asked for; set data.target multilabel, where"),
        (
            LABELS * 2,
            "multilabel",
            "with data.target multilabel it must be 0 or 1. Indices of classes are for",
        ),
        (np.where(LABELS > 0, np.nan, 0), "multilabel", "is nan; with data.target multilabel it must be 0 or 1."),
        (
            LABELS.astype(str),
            "multilabel",
            "of type <U21; it must be of numbers. Words are for data.target classes.",
        ),
        (0 * LABELS, "multilabel", "All 3 labels of vectors are the same for all of train; leave those out."),
        (np.where(LABELS > 0, np.nan, NUMBERS[:, :1]), "regression", "is nan; it must be a finite number."),
        (np.c_[NUMBERS[:, 0], np.full(60, 7)], "regression", "'1' is 7 for all of train of vectors, so that nothing"),
        (NUMBERS[:50], "regression", "has shape (50, 2), "),
    ],
)
def test_labels_of_another_kind_are_refused_with_the_right_target(tmp_path, labels, target, said):
    assert said in refusal(lambda: embeddings(tmp_path, labels, target))


def test_what_does_not_go_with_a_target_is_refused(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS)
    vectors = str(tmp_path / "v.npy")
    assert "data.target is 'regression'; it must be one of classes, retrieval." in refusal(
        lambda: Digits(target="regression")
    )
    assert "label_key is a list, and data.target classes takes a single one; set data.target multilabel" in refusal(
        lambda: Embeddings(vectors, vectors, label_key=["a", "b"])
    )
    assert "data.min_images is 3, but data.target multilabel has no classes to leave out" in refusal(
        lambda: Embeddings(vectors, vectors, target="multilabel", min_images=3)
    )
