"""One's own vectors: every format gives the same task, and what does not fit is named."""

import json
import sys

import datasets
import h5py
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from replicas import refusal, sizes
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from datamodules import Embeddings

VECTORS = np.random.default_rng(0).normal(size=(100, 12)).astype(np.float32)
LABELS = np.repeat([7, 3], [60, 40])
WORDS = np.array((["train"] * 6 + ["val", "test", "train", "test"]) * 10)


def rows_of(split):
    return np.flatnonzero(np.equal(WORDS, split))


def set_up(**arguments):
    task = Embeddings(**arguments)
    task.setup()
    return task


def write(folder, ending, vectors=VECTORS, labels=LABELS, **more):
    """Write vectors and labels into one file of that format; return its path."""
    file = folder / f"mine{ending}"
    if ending == ".npz":
        np.savez(file, features=vectors, labels=labels, **more)
    elif ending in (".safetensors", ".pt"):
        save = save_file if ending == ".safetensors" else torch.save
        save({"features": torch.from_numpy(vectors), "labels": torch.from_numpy(labels)}, file)
    elif ending in (".h5", "compressed.hdf5"):
        with h5py.File(file, "w") as content:
            content.create_dataset("of/features", data=vectors, compression="gzip" if "c" in ending else None)
            content.create_dataset("labels", data=labels)
    elif ending in (".arrow", ".feather"):
        table = pyarrow.Table.from_pandas(pd.DataFrame({"features": list(vectors), "labels": labels, **more}))
        if ending == ".feather":
            pyarrow.feather.write_feather(table, file)
        else:
            with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
                stream.write_table(table, max_chunksize=32)
    elif ending == ".jsonl":
        pd.DataFrame({"features": list(vectors), "labels": labels}).to_json(
            file, orient="records", lines=True, double_precision=15
        )
    elif ending in (".csv", ".tsv"):  # an index of rows is what pandas leaves
        table = pd.DataFrame(vectors).add_prefix("dim_").assign(labels=labels, **more)
        table.to_csv(file, sep="," if ending == ".csv" else "\t")
    else:
        pd.DataFrame({"features": list(vectors), "labels": labels, **more}).to_parquet(file, row_group_size=32)
    return str(file)


def served(task, split):
    """Return the vectors and labels that a loader yields, in the order of the split."""
    loader = {"train": task.train_dataloader, "val": task.val_dataloader, "test": task.test_dataloader}[split]()
    batches = list(loader)
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.inputs for batch in batches])[order], torch.cat([b.labels for b in batches])[order]


def refused(**arguments):
    return refusal(lambda: set_up(**arguments))


# What is served


FORMATS = [".npz", ".safetensors", ".parquet", ".npy", "columns", ".pt", ".csv", ".tsv"]
FORMATS += [".h5", "compressed.hdf5", ".arrow", ".feather", ".jsonl"]


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_serves_the_same_vectors_labels_and_splits(tmp_path, ending):
    if ending == ".npy":
        np.save(tmp_path / "mine.npy", VECTORS)
        np.save(tmp_path / "labels.npy", LABELS)
        arguments = {"features": str(tmp_path / "mine.npy"), "labels": str(tmp_path / "labels.npy")}
    elif ending == "columns":  # dim_10 comes after dim_9, as in the file
        table = {f"dim_{i}": VECTORS[:, i] for i in range(12)} | {"labels": LABELS, "id": np.arange(100)}
        pd.DataFrame(table).to_parquet(tmp_path / "mine.parquet")
        arguments = {"features": str(tmp_path / "mine.parquet"), "feature_key": "dim_*"}
    else:
        arguments = {"features": write(tmp_path, ending)}
    task = set_up(**arguments, batch_size=32)
    name = "minecompressed" if ending == "compressed.hdf5" else "mine"
    assert (task.name, task.target.classes, task.width, task.vectors) == (name, ["3", "7"], 12, True)
    seen = []
    for split, counts in {"train": [24, 36], "val": [8, 12], "test": [8, 12]}.items():
        vectors, labels = served(task, split)
        rows = [int(task.images[split].name(i).removeprefix("row ")) for i in range(len(labels))]
        assert vectors.dtype == torch.float32
        assert np.array_equal(vectors.numpy(), VECTORS[rows])
        assert [task.target.classes[label] for label in labels] == [str(label) for label in LABELS[rows]]
        assert labels.bincount().tolist() == counts
        assert torch.equal(task.features(split)[0][torch.arange(len(rows))], vectors)
        seen += rows
    assert sorted(seen) == list(range(100))
    reference = set_up(features=write(tmp_path, ".npz"))
    assert {s: i.digest() for s, i in task.images.items()} == {s: i.digest() for s, i in reference.images.items()}


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.int8, ">i2", np.int64, "u2", "u8", np.longdouble])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_of_other_types_are_served_as_float32(tmp_path, dtype, order):
    stored = np.asarray(VECTORS * 10, dtype=dtype, order=order)
    np.save(tmp_path / "v.npy", stored)
    np.save(tmp_path / "l.npy", LABELS)
    task = set_up(features=str(tmp_path / "v.npy"), labels=str(tmp_path / "l.npy"))
    vectors, _ = served(task, "test")
    assert vectors.dtype == torch.float32
    assert np.array_equal(vectors.numpy(), stored[task.images["test"].rows.numpy()].astype(np.float32))


def test_half_precision_of_safetensors_and_arrow_is_read(tmp_path):
    save_file({"x": torch.from_numpy(VECTORS).bfloat16(), "y": torch.from_numpy(LABELS)}, tmp_path / "b.safetensors")
    task = set_up(features=str(tmp_path / "b.safetensors"), feature_key="x", label_key="y")
    rows = task.images["val"].rows
    assert torch.equal(served(task, "val")[0], torch.from_numpy(VECTORS).bfloat16().float()[rows])
    half = VECTORS.astype(np.float16)
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(half.ravel()), 12)
    words = pyarrow.array(np.where(LABELS == 7, "seven", "three")).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"features": lists, "labels": words}), tmp_path / "h.parquet")
    task = set_up(features=str(tmp_path / "h.parquet"))
    assert task.target.classes == ["seven", "three"]
    assert np.array_equal(served(task, "val")[0].numpy(), half[task.images["val"].rows.numpy()].astype(np.float32))


def test_tensors_and_views_of_arrow_are_read(tmp_path):
    file = str(tmp_path / "t.parquet")
    words = pyarrow.array(np.where(LABELS == 7, "seven", "three")).cast(pyarrow.string_view())
    tensors = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(VECTORS)
    pyarrow.parquet.write_table(pyarrow.table({"features": tensors, "labels": words}), file, row_group_size=32)
    task = set_up(features=file)
    assert task.target.classes == ["seven", "three"]
    assert np.array_equal(served(task, "val")[0].numpy(), VECTORS[task.images["val"].rows.numpy()])
    tensors = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(VECTORS.reshape(100, 4, 3))
    pyarrow.parquet.write_table(pyarrow.table({"features": tensors, "labels": words}), file)
    assert "shape (100, 4, 3)" in refused(features=file)


COLUMN = {"id": np.arange(100), "text": np.array(["a"] * 100)}


@pytest.mark.parametrize(
    ("arrays", "taken"),
    [
        ({"X": VECTORS, "y": LABELS}, ("X", "y")),
        (
            {"Embeddings": VECTORS, "image": VECTORS.reshape(100, 4, 3), "Label": LABELS, **COLUMN},
            ("Embeddings", "Label"),
        ),
        ({"features": VECTORS, "raw": VECTORS, "target": LABELS, **COLUMN}, ("features", "target")),
        ({"clip": VECTORS, "breed": LABELS, "class_names": np.array(["a", "b"])}, ("clip", "breed")),
        ({"clip": VECTORS, "breed": LABELS, "words": np.array([["a", "b"]] * 100), "Split": WORDS}, ("clip", "breed")),
        ({"vectors": VECTORS, "classes": np.array(["a", "b"]), "kind": LABELS}, ("vectors", "kind")),
    ],
)
def test_what_is_meant_is_found_where_only_one_can_be_and_an_unusual_name_is_said(tmp_path, caplog, arrays, taken):
    caplog.set_level("INFO")
    np.savez(tmp_path / "a.npz", **arrays)
    task = set_up(features=str(tmp_path / "a.npz"))
    assert np.array_equal(task.images["train"].matrix.numpy(), VECTORS)
    assert task.target.classes == ["3", "7"]
    said = [
        f"The {what} of {tmp_path / 'a.npz'} are {name!r}."
        for what, name in zip(("vectors", "labels"), taken, strict=True)
        if name != "features"
    ]
    said += [f"The split words of {tmp_path / 'a.npz'} are 'Split'."] * ("Split" in arrays)
    assert [message for message in caplog.messages if message.startswith("The ")] == said


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"X": VECTORS, "embeddings": VECTORS, "y": LABELS}, ["vectors", "X, embeddings, y", "data.feature_key"]),
        ({"a": VECTORS, "b": VECTORS, "y": LABELS}, ["vectors", "a, b, y", "data.feature_key"]),
        ({"X": VECTORS, "y": LABELS, "label": LABELS}, ["labels", "X, y, label", "data.label_key"]),
        ({"X": VECTORS, **COLUMN}, ["labels", "X, id, text", "data.label_key"]),
        ({"X": VECTORS}, ["labels", "it holds X", "data.label_key"]),
        ({"X": VECTORS, "labels": LABELS[:90], "id": LABELS[:80]}, ["'labels'", "(90,)", "100 vectors"]),
        ({"X": VECTORS, "labels": LABELS[:90], "id": np.arange(100)}, ["'labels'", "(90,)", "100 vectors"]),
        ({"X": VECTORS[0], "emb": VECTORS, "y": LABELS}, ["shape (12,)"]),
    ],
)
def test_what_could_be_several_is_refused_with_all_that_there_is(tmp_path, arrays, named):
    np.savez(tmp_path / "a.npz", **arrays)
    message = refused(features=str(tmp_path / "a.npz"))
    assert [name for name in named if name not in message] == [], message


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.astype(np.float32), LABELS[:, None].astype(float)])
@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_labels_may_be_a_column_or_whole_floats(tmp_path, labels, ending):
    task = set_up(features=write(tmp_path, ending, labels=labels))
    assert task.target.classes == ["3", "7"]
    rows = task.images["test"].rows.numpy()
    assert [task.target.classes[label] for label in task.images["test"].labels] == [
        str(label) for label in LABELS[rows]
    ]


def test_tensors_that_torch_saved_together_are_told_apart_by_their_shape(tmp_path):
    file = str(tmp_path / "t.pt")
    vectors, labels = torch.from_numpy(VECTORS).requires_grad_(), torch.from_numpy(LABELS)
    np.save(tmp_path / "labels.npy", LABELS)
    for content, arguments in (
        ((vectors, labels), {}),
        ([labels.tolist(), vectors], {"features": None}),
        (list(vectors), {"labels": str(tmp_path / "labels.npy")}),
        (torch.nn.Parameter(vectors), {"labels": str(tmp_path / "labels.npy")}),
        ({"emb": vectors, "word": ["seven" if label == 7 else "three" for label in LABELS]}, {}),
    ):
        torch.save(content, file)
        if "features" in arguments:
            assert "t.pt" in refused(features=file)
            continue
        task = set_up(features=file, **arguments)
        assert np.array_equal(served(task, "test")[0].numpy(), VECTORS[task.images["test"].rows.numpy()])
        assert task.target.classes in (["3", "7"], ["seven", "three"])


def test_text_without_a_header_is_a_matrix_or_a_column_of_labels(tmp_path):
    np.savetxt(tmp_path / "v.csv", VECTORS, delimiter=",")
    np.savetxt(tmp_path / "l.csv", LABELS, fmt="%d")
    task = set_up(features=str(tmp_path / "v.csv"), labels=str(tmp_path / "l.csv"))
    assert np.array_equal(served(task, "test")[0].numpy(), VECTORS[task.images["test"].rows.numpy()])
    assert task.target.classes == ["3", "7"]
    pd.DataFrame(VECTORS).assign(kind=LABELS).to_csv(tmp_path / "n.csv", index=False)  # columns 0 to 11, and kind
    assert set_up(features=str(tmp_path / "n.csv")).width == 12


def test_cells_that_are_empty_or_no_numbers_are_named(tmp_path):
    file = write(tmp_path, ".csv")
    table = pd.read_csv(file)
    for column, value, named in (
        ("labels", None, ["'labels'", "row 3"]),
        ("dim_4", None, ["'dim_4'", "row 3"]),
        ("dim_4", "much", ["type <U", "numbers"]),
        ("labels", 1.5, ["'labels'", "1.5", "row 3"]),
    ):
        changed = table.astype({column: object})
        changed.loc[3, column] = value
        changed.to_csv(file, index=False)
        arguments = {"feature_key": "dim_*"} if column == "dim_4" else {}
        message = refused(features=file, **arguments)
        assert [name for name in named if name not in message] == [], message


@pytest.mark.parametrize("ending", [".npz", ".parquet", "files"])
def test_given_splits_are_kept_row_by_row(tmp_path, ending):
    words = np.where(WORDS == "val", "validation", WORDS)
    words = np.where(np.arange(100) % 2, np.char.upper(words), np.char.capitalize(words))
    words[[0, 6, 16, 7]] = ["training", "dev", " valid", "Testing "]
    arguments = {}
    if ending == "files":
        np.save(tmp_path / "splits.npy", words)
        arguments["splits"] = str(tmp_path / "splits.npy")
        file = write(tmp_path, ".npz")
    else:
        file = write(tmp_path, ending, split=words)
    task = set_up(features=file, **arguments)
    for split in ("train", "val", "test"):
        assert np.array_equal(task.images[split].rows.numpy(), rows_of(split))
    ignored = set_up(features=file, **arguments, split_key=None) if ending != "files" else None
    assert ignored is None or len(ignored.images["train"]) == 60


def test_a_split_that_is_not_given_is_cut_from_train_alone(tmp_path):
    words = np.where(WORDS == "val", "train", WORDS)
    task = set_up(features=write(tmp_path, ".npz", split=words))
    assert np.array_equal(task.images["test"].rows.numpy(), np.flatnonzero(words == "test"))
    assert sizes(task) == (64, 16, 20)
    assert task.describe() == (
        "mine: 64 train (split words of mine.npz), 16 val (cut from train), 20 test (split words of mine.npz) vectors "
        "of 12 values, 2 classes"
    )


def test_a_folder_holds_a_file_for_each_split(tmp_path):
    root = tmp_path / "vectors"
    root.mkdir()
    for split, ending, name in (
        ("train", ".parquet", "Train"),
        ("test", ".npz", "test"),
        ("val", ".csv", "validation"),
    ):
        write(root, ending, VECTORS[rows_of(split)], LABELS[rows_of(split)])
        (root / f"mine{ending}").rename(root / f"{name}{ending}")
    task = set_up(root=str(root))
    assert task.name == "vectors"
    for split in ("val", "test"):
        assert np.array_equal(served(task, split)[0].numpy(), VECTORS[rows_of(split)])
    assert sizes(task) == (70, 10, 20)
    (root / "valid.npz").write_bytes(b"")
    assert "valid.npz and validation.csv" in refused(root=str(root))


def in_parts(folder, names="img_emb_{}.npy"):
    """Write vectors and labels in twelve parts of different sizes, as clip-retrieval leaves them."""
    folder.mkdir()
    for place, rows in enumerate(np.split(np.arange(100), range(3, 36, 3))):
        np.save(folder / names.format(place), VECTORS[rows])
        table = pd.DataFrame({"label": LABELS[rows], "split": WORDS[rows], "caption": ["a pet"] * len(rows)})
        table.to_parquet(folder / f"metadata_{place}.parquet")


def test_parts_are_one_matrix_in_the_order_of_their_numbers(tmp_path, caplog):
    in_parts(tmp_path / "pets")
    features, labels = (str(tmp_path / "pets" / name) for name in ("img_emb_*.npy", "metadata_*.parquet"))
    task = set_up(features=features, labels=labels, label_key="label")
    assert (task.name, task.width) == ("img_emb", 12)
    for split in ("train", "val", "test"):
        vectors, of_split = served(task, split)
        assert np.array_equal(vectors.numpy(), VECTORS[task.images[split].rows.numpy()])
        assert np.array_equal(task.images[split].rows.numpy(), rows_of(split))
        assert [task.target.classes[label] for label in of_split] == [str(label) for label in LABELS[rows_of(split)]]
    (tmp_path / "vectors").mkdir()
    for place in range(12):
        (tmp_path / "pets" / f"img_emb_{place}.npy").rename(tmp_path / "vectors" / f"img_emb_{place}.npy")
    folders = set_up(features=str(tmp_path / "vectors"), labels=str(tmp_path / "pets"), label_key="label")
    assert folders.name == "vectors"
    assert folders.images["test"].digest() == task.images["test"].digest()


def test_parts_that_do_not_fit_are_named(tmp_path):
    in_parts(tmp_path / "pets")
    labels = {"labels": str(tmp_path / "pets" / "metadata_*.parquet"), "label_key": "label"}
    assert "holds files of several formats (.npy, .parquet); name one kind" in refused(
        features=str(tmp_path / "pets"), **labels
    )
    assert "holds no files of vectors" in refused(features=str(tmp_path / "pets" / "text_*.npy"), **labels)
    np.save(tmp_path / "pets" / "img_emb_5.npy", VECTORS[:3, :7])
    message = refused(features=str(tmp_path / "pets" / "img_emb_*.npy"), **labels)
    assert "img_emb_5.npy holds rows of shape (7,), those of" in message
    (tmp_path / "pets" / "img_emb_5.npy").write_bytes(b"torn")
    assert "img_emb_5.npy cannot be read" in refused(features=str(tmp_path / "pets" / "img_emb_*.npy"), **labels)


def test_a_table_may_list_files_of_a_vector_each(tmp_path):
    (tmp_path / "embeddings").mkdir()
    names = [f"embeddings/{row}.pt" for row in range(100)]
    for row, name in enumerate(names):  # as eva writes them: one row, alone or in a list
        vector = torch.from_numpy(VECTORS[row])
        torch.save([vector] if row % 2 else vector.unsqueeze(0), tmp_path / name)
    table = pd.DataFrame({"origin": names, "embeddings": names, "target": LABELS, "split": WORDS})
    table.to_csv(tmp_path / "manifest.csv", index=False)
    task = set_up(features=str(tmp_path / "manifest.csv"))
    for split in ("train", "val", "test"):
        assert np.array_equal(served(task, split)[0].numpy(), VECTORS[rows_of(split)])
    torch.save(torch.zeros(7), tmp_path / names[4])
    assert f"{names[4]} holds 7 values, the first file has 12" in refused(features=str(tmp_path / "manifest.csv"))
    (tmp_path / names[4]).unlink()
    assert f"There is no file {tmp_path / names[4]}" in refused(features=str(tmp_path / "manifest.csv"))


def test_splits_may_lie_in_shards_on_the_hub_or_where_datasets_saved_them(tmp_path, hub):
    folder = tmp_path / "saved"
    for split in ("train", "test"):
        rows = rows_of(split)
        rows = np.sort(np.concatenate([rows, rows_of("val")])) if split == "train" else rows
        for place, some in enumerate(np.array_split(rows, 2)):
            write(tmp_path, ".parquet", VECTORS[some], LABELS[some])
            hub.files[f"data/{split}-0000{place}-of-00002.parquet"] = (tmp_path / "mine.parquet").read_bytes()
        datasets.Dataset.from_dict({"embedding": VECTORS[rows], "label": LABELS[rows]}).save_to_disk(folder / split)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for root, origin in (("lab/birds", "file test-*-of-*.parquet"), (str(folder), "file test")):
        task = Embeddings(root=root)
        task.prepare_data()
        task.setup()
        assert task.name == root.rpartition("/")[2]
        assert sizes(task) == (64, 16, 20)
        assert origin in task.describe()
        assert np.array_equal(served(task, "test")[0].numpy(), VECTORS[rows_of("test")])
    assert "data.root is lab/nowhere, which is no folder and cannot be had from the Hub" in refused(root="lab/nowhere")


def test_hdf5_without_its_library_and_words_that_are_no_files_are_named(tmp_path, monkeypatch):
    file = write(tmp_path, ".h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "mine.h5 needs h5py, which is not installed; `pip install 'diffused-redundancy[hdf5]'`" in refused(
        features=file
    )
    pd.DataFrame({"embeddings": ["a pet"] * 100, "label": LABELS}).to_csv(tmp_path / "w.csv", index=False)
    assert "The vectors of" in (message := refused(features=str(tmp_path / "w.csv")))
    assert "are words, 'a pet' first" in message


@pytest.mark.parametrize("kind", ["npy", "parts", "hdf5"])
def test_files_that_can_be_are_mapped_and_not_read(tmp_path, kind):
    np.save(tmp_path / "l.npy", LABELS)
    names = {"npy": ["v.npy"], "parts": ["v_0.npy", "v_1.npy"]}.get(kind, [])
    for name, rows in zip(names, np.array_split(VECTORS, len(names) or 1), strict=False):
        np.save(tmp_path / name, rows)
    file = write(tmp_path, ".h5") if kind == "hdf5" else str(tmp_path / ("v.npy" if kind == "npy" else "v_*.npy"))
    task = set_up(features=file, labels=str(tmp_path / "l.npy"))
    for name in names:
        np.lib.format.open_memmap(tmp_path / name, "r+")[:] = 5
    if kind == "hdf5":
        with h5py.File(file) as content:
            offset = content["of/features"].id.get_offset()
        np.memmap(file, np.float32, "r+", offset, VECTORS.shape)[:] = 5
    assert (served(task, "test")[0] == 5).all()


@pytest.mark.parametrize("change", ["value", "label", "order"])
def test_the_digest_changes_with_what_is_served(tmp_path, change):
    vectors, labels = VECTORS.copy(), LABELS.copy()
    before = set_up(features=write(tmp_path, ".npz", split=WORDS)).images["train"].digest()
    if change == "value":
        vectors[0, 0] += 1e-6
    elif change == "label":
        labels[0] = 3
    else:
        vectors[[0, 1]] = vectors[[1, 0]]
    assert set_up(features=write(tmp_path, ".npz", vectors, labels, split=WORDS)).images["train"].digest() != before


# What is refused


def test_wrong_arguments_and_files_are_named(tmp_path):
    file = write(tmp_path, ".npz", split=WORDS)
    np.save(tmp_path / "v.npy", VECTORS)
    vectors = str(tmp_path / "v.npy")
    np.save(tmp_path / "few.npy", LABELS[:90])
    np.save(tmp_path / "floats.npy", LABELS / 2)
    np.save(tmp_path / "words.npy", np.where(WORDS == "val", "fold 1", WORDS))
    np.save(tmp_path / "one.npy", np.full(100, 5))
    np.save(tmp_path / "complex.npy", VECTORS.astype(complex))
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ({}, ["data.features", "data.root"]),
        ({"features": file, "root": str(tmp_path)}, ["data.features", "data.root"]),
        ({"root": str(tmp_path), "labels": file}, ["data.labels"]),
        ({"root": str(tmp_path / "empty")}, ["empty", "train.npz"]),
        ({"features": "nowhere.npz"}, ["nowhere.npz"]),
        (
            {"features": "vectors.mat"},
            ["vectors.mat", ".npy, .npz, .safetensors, .pt, .pth, .h5, .hdf5, .parquet, .arrow"],
        ),
        ({"features": vectors}, ["v.npy", "data.labels"]),
        ({"features": file, "feature_key": "x"}, ["'x'", "features, labels, split", "data.feature_key"]),
        ({"features": file, "label_key": "y"}, ["'y'", "features, labels, split", "data.label_key"]),
        ({"features": file, "split_key": "fold"}, ["'fold'", "features, labels, split", "data.split_key"]),
        ({"features": file, "feature_key": "labels"}, ["shape (100,)"]),
        ({"features": vectors, "labels": str(tmp_path / "few.npy")}, ["few.npy", "(90,)", "v.npy", "100"]),
        ({"features": vectors, "labels": str(tmp_path / "floats.npy")}, ["floats.npy", "3.5 in row 0", "string"]),
        ({"features": vectors, "labels": vectors + ".npy"}, ["v.npy.npy"]),
        (
            {"features": file, "splits": str(tmp_path / "words.npy")},
            ["Row 6", "words.npy", "'fold 1'", "train, val, test"],
        ),
        ({"features": vectors, "labels": str(tmp_path / "one.npy")}, ["v has 1 classes (5)", "two"]),
        ({"features": str(tmp_path / "complex.npy"), "labels": file}, ["complex128", "numbers"]),
        ({"features": file, "batch_size": 0}, ["data.batch_size", "0"]),
    ):
        message = refused(**arguments)
        assert [name for name in named if name not in message] == [], message


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (np.inf, "inf"), (1e300, "1e+300")])
def test_a_value_that_is_not_finite_is_named_by_row_and_file(tmp_path, value, said):
    vectors = VECTORS.astype(np.float64)
    vectors[37, 5] = value
    message = refused(features=write(tmp_path, ".parquet", vectors, split=WORDS))
    assert message.startswith(f"{tmp_path / 'mine.parquet'} holds {said} in row 37, column 5")


@pytest.mark.parametrize(("change", "said"), [(0, "every value is the same"), (VECTORS[0], "every vector is the same")])
def test_vectors_that_tell_nothing_are_refused(tmp_path, change, said):
    assert said in refused(features=write(tmp_path, ".npz", np.zeros_like(VECTORS) + change))


def test_a_label_that_train_lacks_is_named(tmp_path):
    labels = np.where(np.arange(100) == 16, 9, LABELS)  # row 16 is val
    message = refused(features=write(tmp_path, ".npz", labels=labels, split=WORDS))
    assert "Label 9 of val (row 16 of " in message


def test_lists_that_differ_in_length_and_empty_cells_are_named_by_row(tmp_path):
    file = str(tmp_path / "p.parquet")
    pd.DataFrame({"features": [[1.0, 2.0], [3.0, 4.0], [5.0]], "labels": ["a", "b", "a"]}).to_parquet(file)
    assert "row 2" in refused(features=file)
    pd.DataFrame({"features": [[1.0], [3.0], [5.0]], "labels": ["a", None, "a"]}).to_parquet(file)
    assert "'labels'" in (message := refused(features=file))
    assert "row 1" in message


def test_a_class_too_small_for_the_splits_is_named(tmp_path):
    message = refused(features=write(tmp_path, ".npz", labels=np.repeat([0, 1], [98, 2])))
    assert "'1'" in message
    assert "at least 3" in message


def test_pickles_are_never_loaded_and_torn_files_are_named(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    np.save(tmp_path / "bomb.npy", np.array([Bomb()] * 100, dtype=object), allow_pickle=True)
    np.savez(tmp_path / "bomb.npz", features=VECTORS, labels=np.array([Bomb()] * 100, dtype=object))
    torch.save({"features": torch.from_numpy(VECTORS), "labels": Bomb()}, tmp_path / "bomb.pt")
    np.save(tmp_path / "v.npy", VECTORS)
    for arguments in (
        {"features": str(tmp_path / "bomb.npy"), "labels": str(tmp_path / "v.npy")},
        {"features": str(tmp_path / "v.npy"), "labels": str(tmp_path / "bomb.npy")},
        {"features": str(tmp_path / "bomb.npz")},
        {"features": str(tmp_path / "bomb.pt")},
    ):
        assert "cannot be read" in refused(**arguments)
    assert not (tmp_path / "exploded").exists()
    for ending in (".npz", ".safetensors", ".parquet", ".pt", ".feather", ".h5"):
        file = tmp_path / f"mine{ending}"
        write(tmp_path, ending)
        file.write_bytes(file.read_bytes()[:-100])
        assert f"mine{ending} cannot be read" in refused(features=str(file))


# From a file of vectors to an answer, and to files for use


def test_vectors_are_measured_without_a_backbone_and_the_exported_subset_says_the_same(cli, tmp_path):
    pixels, digits = load_digits(return_X_y=True)
    np.savez(tmp_path / "pixels.npz", features=pixels, labels=digits)
    arguments = ["--config", "embeddings.yaml", "--data.features", "pixels.npz", "--trainer.logger", "false"]
    arguments += ["--model.fractions", "[0.25, 0.5]", "--model.seeds", "2", "--name", "pixels"]
    arguments += ["--model.selection", "[random, pca]", "--pictures", "[]"]
    status, _, err = cli("fit", *arguments)
    assert status == 0, err
    results = pd.read_csv("runs/pixels/results.csv")
    assert set(results.backbone.fillna("none")) == {"none"}
    assert set(results.width) == {64}
    task = set_up(features="pixels.npz")
    vectors, labels = served(task, "test")
    for selection in ("random", "pca"):
        arguments = ["--selection", selection, "--fraction", "0.25", "--output", selection]
        status, _, err = cli("export", "--run", "runs/pixels", *arguments)
        assert status == 0, err
        card = json.loads((tmp_path / selection / "card.json").read_text())
        subset = load_file(tmp_path / selection / "subset.safetensors")
        kept = (vectors - subset["mean"]) @ subset["basis"] if selection == "pca" else vectors[:, subset["indices"]]
        logits = kept @ subset["weight"].T + subset["bias"]
        row = results[(results.selection == selection) & (results.fraction == 0.25) & (results.seed == 0)]
        row = row[row.split == "test"].iloc[0]
        assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(row.accuracy, abs=1e-12)
        assert row.images == len(labels)
        assert card["accuracy"]["test"] == row.accuracy
        assert row.accuracy > 0.5
        assert not (tmp_path / selection / "backbone.pt2").exists()
