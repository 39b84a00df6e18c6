"""One's own vectors: representations that another program computed, with their labels, from files."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.base import SPLITS, Task
from datamodules.readers import SEVERAL, array_names, check_file, read_labels, read_vectors
from datamodules.targets import Multiclass

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Split words in files, and the splits that they stand for."""
SPLIT_KEY = "split"
"""Default name of the split words; such an array may be missing, one of another name must be there."""
CHUNK = 4096
"""Rows that are checked or hashed at once, so that a file may be larger than memory."""


class Vectors:
    """Labelled rows of a matrix that are one split; copied only when they are read.

    Args:
        file: File of the matrix.
        matrix: All vectors of the file, shape (m, D), of one of `readers.DTYPES`.
        rows: The rows of this split, shape (n,).
        labels: Class index of each, shape (n,), int64.
    """

    def __init__(self, file: Path, matrix: Tensor, rows: Tensor, labels: Tensor) -> None:
        self.file = file
        self.matrix = matrix
        self.rows = rows
        self.labels = labels
        self.shape = (len(rows), matrix.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the vectors at `indices`, shape (b, D), float32."""
        return self.matrix.index_select(0, self.rows[indices]).float()

    def subset(self, indices: Tensor) -> "Vectors":
        """Return the vectors at `indices`, in that order."""
        return Vectors(self.file, self.matrix, self.rows[indices], self.labels[indices])

    def name(self, index: int) -> str:
        """Return the row of the vector in its file, from 0."""
        return f"row {int(self.rows[index])}"

    def digest(self) -> str:
        """Return a hash of every value and label."""
        seen = hashlib.blake2b(repr(self.shape).encode(), digest_size=16)
        for chunk in torch.arange(len(self)).split(CHUNK):
            seen.update(self[chunk].numpy().data)
        seen.update(self.labels.numpy().data)
        return seen.hexdigest()

    def check(self) -> None:
        """Read every value once.

        Raises:
            MisconfigurationException: If one is not finite as float32; the message names its row and file.
        """
        for chunk in torch.arange(len(self)).split(CHUNK):
            bad = (~self[chunk].isfinite()).nonzero()
            if len(bad):
                row, column = int(self.rows[chunk[bad[0, 0]]]), int(bad[0, 1])
                raise MisconfigurationException(
                    f"{self.file} holds {self.matrix[row, column].item()} in row {row}, column {column} (from 0); "
                    f"every value must be finite as float32."
                )


class Embeddings(Task):
    """Vectors and their labels from .npy, .npz, safetensors or Parquet; the model runs without a backbone.

    Either `features` names a file, with `labels` and `splits` in it or in files of their own, row by row; or `root` is
    a folder with a file `train` (and `val` and `test`) that holds features and labels. Without given splits, `val` and
    `test` are a seeded stratified fifth each. Classes are the sorted labels of train. A .npy or safetensors file is
    mapped, not read into memory; nothing pickled is loaded. The task is named after the file or folder.

    Args:
        features: File of the vectors, shape (n, D): float16, bfloat16, float32, float64, int8 or uint8.
        labels: File of the n labels, whole numbers or strings; null is the file of the vectors.
        splits: File of n words, `train`, `val` or `test`; null is the file of the labels, if it holds such words.
        root: Folder of one file per split, in place of the three files.
        feature_key: Name of the vectors in a file that holds several arrays; in Parquet, a column of lists, or a
            pattern such as `dim_*` for one column per neuron.
        label_key: Name of the labels there.
        split_key: Name of the split words there; null uses none.
        **kwargs: See `Task`.

    Raises:
        MisconfigurationException: If a file is not there or of no known format, or arguments contradict each other.
    """

    vectors: ClassVar = True

    def __init__(
        self,
        features: str | None = None,
        labels: str | None = None,
        splits: str | None = None,
        root: str | None = None,
        feature_key: str = "features",
        label_key: str = "labels",
        split_key: str | None = SPLIT_KEY,
        **kwargs: Any,
    ) -> None:
        super().__init__(root or "", augmentation="none", num_workers=0, protocol="full", **kwargs)
        if (features is None) == (root is None):
            raise MisconfigurationException("Give data.features, a file of vectors, or data.root, a folder of splits.")
        if root is not None and (labels or splits):
            raise MisconfigurationException(
                "data.labels and data.splits go with data.features; the files of data.root hold their own labels."
            )
        self.feature_file = Path(features).expanduser() if features is not None else None
        self.label_file = Path(labels).expanduser() if labels else self.feature_file
        self.split_file = Path(splits).expanduser() if splits else None
        self.feature_key, self.label_key, self.split_key = feature_key, label_key, split_key
        self.name = self.feature_file.stem if self.feature_file else self.root.resolve().name
        for file in (self.feature_file, self.label_file, self.split_file):
            if file:
                check_file(file)
        if self.label_file and self.label_file == self.feature_file and self.label_file.suffix not in SEVERAL:
            raise MisconfigurationException(
                f"{self.label_file} holds one array; name the file of the labels with data.labels."
            )
        if root is not None:
            self._split_files()

    def load(self) -> dict[str, Vectors]:
        """Return the splits that the files name, or all vectors as train.

        Raises:
            MisconfigurationException: If an array is not there, or what the files hold does not fit together.
        """
        if self.feature_file and self.label_file:
            parts = self._divide(self._read(self.feature_file, self.label_file), self.label_file)
        else:
            parts = {split: self._read(file, file) for split, file in self._split_files().items()}
        classes = np.unique(parts["train"].labels)
        self.target = Multiclass([str(value) for value in classes.tolist()])
        self.width = parts["train"].matrix.shape[1]
        splits = {split: self._encode(split, part, classes) for split, part in parts.items()}
        for vectors in splits.values():
            vectors.check()
        return splits

    def setup(self, stage: str | None = None) -> None:
        """Load the splits, the first time, and serve the vectors as features."""
        super().setup(stage)
        for split, vectors in self.images.items():
            self.serve(split, [cast(Vectors, vectors)])

    def _split_files(self) -> dict[str, Path]:
        """Return the file of each split in `root`; at least that of train."""
        files = {}
        for split in SPLITS:
            found = [path for ending in SEVERAL if (path := self.root / f"{split}{ending}").is_file()]
            if len(found) > 1:
                raise MisconfigurationException(
                    f"{self.root} holds {' and '.join(path.name for path in found)}; leave one file for each split."
                )
            if found:
                files[split] = found[0]
        if "train" not in files:
            names = ", ".join(f"train{ending}" for ending in SEVERAL)
            raise MisconfigurationException(f"{self.root} holds no file train ({names}).")
        return files

    def _read(self, file: Path, label_file: Path) -> "_Part":
        """Return all rows of a file of vectors, with their labels."""
        matrix = read_vectors(file, self.feature_key)
        labels = read_labels(label_file, self.label_key, "data.label_key", len(matrix), file)
        return _Part(file, matrix, np.arange(len(matrix)), labels)

    def _divide(self, part: "_Part", label_file: Path) -> dict[str, "_Part"]:
        """Return the rows of each split that the files name, or all of them as train where no file names splits."""
        file, key = self.split_file or label_file, self.split_key
        optional = self.split_file is None and key == SPLIT_KEY
        if key is None or (optional and key not in array_names(file)):
            return {"train": part}
        words = read_labels(file, key, "data.split_key", len(part.rows), part.file)
        unknown = np.flatnonzero(~np.isin(words, list(SPLIT_NAMES)))
        if len(unknown):
            raise MisconfigurationException(
                f"Row {unknown[0]} of {file} is of split {words[unknown[0]].item()!r}; it must be one of "
                f"{', '.join(SPLITS)}."
            )
        meant = np.array([SPLIT_NAMES[word] for word in words.tolist()])
        if "train" not in meant:
            raise MisconfigurationException(f"{file} has no row of split train.")
        rows = {split: np.flatnonzero(meant == split) for split in SPLITS}
        return {split: part._replace(rows=each, labels=part.labels[each]) for split, each in rows.items() if len(each)}

    def _encode(self, split: str, part: "_Part", classes: np.ndarray) -> Vectors:
        """Return a split with class indices for labels; `classes` are the sorted labels of train."""
        if part.matrix.shape[1] != self.width:
            raise MisconfigurationException(
                f"{part.file} holds vectors of {part.matrix.shape[1]} values, those of train have {self.width}."
            )
        unknown = np.flatnonzero(~np.isin(part.labels, classes))
        if len(unknown):
            raise MisconfigurationException(
                f"Label {part.labels[unknown[0]].item()!r} of {split} (row {part.rows[unknown[0]]} of {part.file}) "
                f"never occurs in train; every class must."
            )
        labels = np.searchsorted(classes, part.labels)
        return Vectors(part.file, part.matrix, torch.from_numpy(part.rows), torch.from_numpy(labels))


class _Part(NamedTuple):
    """What files hold of one split, with labels as they are stored."""

    file: Path
    matrix: Tensor
    """All vectors of the file, shape (m, D)."""
    rows: np.ndarray
    """Rows of the split, shape (n,)."""
    labels: np.ndarray
    """Label of each, shape (n,), whole numbers or strings."""
