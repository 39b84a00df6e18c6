"""One's own vectors: representations that another program computed, with their labels, from files."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.base import SPLITS, Task
from datamodules.folders import SPLIT_NAMES
from datamodules.formats import SEVERAL, Matrix, downloaded, is_on_hub, open_arrays, parts_of
from datamodules.images import Labelled
from datamodules.outputs import TARGETS, Outputs, check_columns, of_columns
from datamodules.readers import LABELS, WORDS, read_columns, read_labels, read_vectors
from datamodules.targets import Multiclass

SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}
"""The split that each word stands for, in rows and as a file's name."""
CHUNK = 4096  # Rows that are checked or hashed at once, so that a file may be larger than memory


@dataclass(eq=False)
class Vectors(Labelled):
    """Labelled rows of a matrix that are one split; copied only when they are read."""

    matrix: Matrix  # all vectors of the file, shape (m, D), of one of the types `formats.INDEXED`
    rows: Tensor  # those of this split, shape (n,)
    labels: Tensor

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the vectors at `indices`, shape (b, D), float32."""
        return self.matrix.index_select(0, self.rows[indices]).float()

    def subset(self, indices: Tensor) -> "Vectors":
        """Return the vectors at `indices`, in that order."""
        return Vectors(self.matrix, self.rows[indices], self.labels[indices])

    def name(self, index: int) -> str:
        """Return the row of the vector in its file, from 0."""
        return f"row {int(self.rows[index])}"

    def digest(self) -> str:
        """Return a hash of every value and label."""
        digest = hashlib.blake2b(repr((len(self), self.matrix.shape[1])).encode(), digest_size=16)
        for chunk in torch.arange(len(self)).split(CHUNK):
            digest.update(self[chunk].numpy().data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()


def finite(file: Path, matrix: Matrix, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of a file's matrix, some at once, with their vectors as float32; refuse what is not finite."""
    for some in rows.split(CHUNK):
        vectors = matrix.index_select(0, some).float()
        bad = (~vectors.isfinite()).nonzero()
        if len(bad):
            row, column = int(some[bad[0, 0]]), int(bad[0, 1])
            raise MisconfigurationException(
                f"{file} holds {matrix.index_select(0, some[bad[0, :1]])[0, column].item()} in row {row}, column "
                f"{column} (from 0); every value must be finite as float32."
            )
        yield some, vectors


class Embeddings(Task):
    """Vectors and labels from files of the formats `READERS`; the model runs without a backbone.

    Either `features` names a file, with `labels` and `splits` in it or in files of their own, row by row; or `root` is
    a folder with a file `train` (and `val` and `test`) that holds vectors and labels. Without given splits, `val` and
    `test` are a seeded stratified fifth each. Classes are the sorted labels of train. A .npy, safetensors or torch
    file, and what lies in one piece in HDF5, is mapped, not read into memory; nothing pickled is loaded. The task is
    named after the file or folder.

    Args:
        features: File of the vectors, shape (n, D), numbers of any type; or a folder of parts of one, or a pattern of
            their names with *, in the order of the numbers in them; or a table that lists files of a vector each.
        labels: File of the n labels, whole numbers or strings; for `target` multilabel or regression of numbers of
            shape (n,) or (n, C). Null is the file of the vectors.
        splits: File of n words, `train`, `val` or `test`; null is the file of the labels, if it holds such words.
        root: Folder of one file per split, or a folder of its parts, in place of the three files; or the name of a data
            set of the Hugging Face Hub that has such files.
        feature_key: Name of the vectors in a file of several arrays; in a table a column of lists, or a pattern such as
            `dim_*` for one column per value. Null takes the array of a usual name (`features`, `embeddings`, `X`), or
            the only matrix, and says which.
        label_key: Name of the labels there; of several labels or numbers also a list of columns, or a pattern of them.
            Null takes the array of a usual name (`labels`, `target`, `y`), or the only one beside the vectors that has
            a value for each, and says which.
        split_key: Name of the split words there, `split` in any case if it is there; null uses none.
        **kwargs: See `Task`.

    Raises:
        MisconfigurationException: If a file is not there or of no known format, or arguments contradict each other.
    """

    vectors: ClassVar = True
    targets: ClassVar = (*Task.targets, *TARGETS)

    def __init__(
        self,
        features: str | None = None,
        labels: str | None = None,
        splits: str | None = None,
        root: str | None = None,
        feature_key: str | None = None,
        label_key: str | list[str] | None = None,
        split_key: str | None = "split",
        **kwargs: Any,
    ) -> None:
        super().__init__(root or "", augmentation="none", view="weights", num_workers=0, protocol="full", **kwargs)
        if (features is None) == (root is None):
            raise MisconfigurationException("Give data.features, a file of vectors, or data.root, a folder of splits.")
        if root is not None and (labels or splits):
            raise MisconfigurationException(
                "data.labels and data.splits go with data.features; the files of data.root hold their own labels."
            )
        check_columns("label_key", label_key, self.asked)
        self.feature_file = Path(features).expanduser() if features is not None else None
        self.label_file = Path(labels).expanduser() if labels else self.feature_file
        self.split_file = Path(splits).expanduser() if splits else None
        self.feature_key, self.label_key, self.split_key = feature_key, label_key, split_key
        self.name = self.root.resolve().name
        if self.feature_file:
            named = self.feature_file.stem.replace("*", "").strip("_-.")
            self.name = named or self.feature_file.resolve().parent.name
        parts = {file: parts_of(file) for file in (self.feature_file, self.label_file, self.split_file) if file}
        alone = self.label_file and self.label_file == self.feature_file and parts[self.label_file][0].suffix
        if alone and alone not in SEVERAL:
            raise MisconfigurationException(
                f"{self.label_file} holds one array; name the file of the labels with data.labels."
            )
        if root is not None and not is_on_hub(self.root):
            self._split_files()

    def prepare_data(self) -> None:
        """Download a data set of the Hub, as far as it is not there yet."""
        if not self.feature_file:
            self._split_files()

    def load(self) -> dict[str, Vectors]:
        """Return the splits that the files name, or all vectors as train.

        A MisconfigurationException is raised if an array is not there, or what the files hold does not fit together.
        """
        if self.feature_file and self.label_file:
            words = self.split_file or self.label_file
            parts = self._divide(self._read(self.feature_file, self.label_file), words)
            origin = f"split words of {words.name}" if len(parts) > 1 else f"file {self.feature_file.name}"
            self.origins = dict.fromkeys(parts, origin)
        else:
            parts = {split: self._read(file, file) for split, file in self._split_files().items()}
            self.origins = {split: f"file {part.file.name}" for split, part in parts.items()}
        classes = np.unique(parts["train"].labels)
        self.target = Multiclass([str(value) for value in classes.tolist()])
        if self.asked in TARGETS:
            self.target = of_columns(self.asked, {split: part.names for split, part in parts.items()})
        self.width = parts["train"].matrix.shape[1]
        return {split: self._checked(split, part, classes) for split, part in parts.items()}

    def features(self, split: str) -> Sequence[Vectors]:
        """Return the vectors of a split, which its loader yields."""
        return [cast(Vectors, self.images[split])]

    def _split_files(self) -> dict[str, Path]:
        """Return the file of each split in `root`, or the pattern of its parts; at least that of train."""
        files: dict[str, Path] = {}
        folder = downloaded(self.root)
        for path in sorted([*folder.glob("*"), *folder.glob("data/*")]):
            part = re.fullmatch(r"(.+)-\d+-of-\d+", path.stem)
            file = path.with_name(f"{part[1]}-*-of-*{path.suffix}") if part else path
            split = SPLIT_OF.get((part[1] if part else path.stem).lower())
            if split is None or not (path.suffix in SEVERAL or path.is_dir()):
                continue
            if files.setdefault(split, file) != file:
                raise MisconfigurationException(
                    f"{self.root} holds {files[split].name} and {path.name}; leave one file for each split."
                )
        if "train" not in files:
            names = ", ".join(f"train{ending}" for ending in SEVERAL)
            raise MisconfigurationException(f"{self.root} holds no file train ({names}).")
        return files

    def _read(self, file: Path, label_file: Path) -> "_Part":
        """Return all rows of a file of vectors, with their labels."""
        name, matrix = read_vectors(file, self.feature_key)
        others = [*self._word_keys(label_file), *[name] * (file == label_file)]
        names: list[str] = []
        if self.asked in TARGETS:
            names, labels = read_columns(label_file, self.label_key, len(matrix), file, others)
        else:
            key = cast(str | None, self.label_key)  # lists were refused
            labels = read_labels(label_file, key, LABELS, len(matrix), file, others)
        return _Part(file, matrix, np.arange(len(matrix)), labels, names)

    def _word_keys(self, file: Path) -> list[str]:
        """Return the names of the arrays in a file that are split words."""
        usual = WORDS.usual if self.split_key in ("split", None) else [self.split_key]
        return [name for name in open_arrays(file).names if name in usual or name.lower() in usual]

    def _divide(self, part: "_Part", file: Path) -> dict[str, "_Part"]:
        """Return the rows of each split that the words in `file` name, or all of them as train where it has none."""
        key = None if self.split_key == "split" else self.split_key
        if self.split_key is None or (key is None and self.split_file is None and not self._word_keys(file)):
            return {"train": part}
        words = read_labels(file, key, WORDS, len(part.rows), part.file)
        named = np.array([SPLIT_OF.get(str(word).strip().lower(), "") for word in words.tolist()])
        unknown = np.flatnonzero(named == "")
        if len(unknown):
            raise MisconfigurationException(
                f"Row {unknown[0]} of {file} is of split {words[unknown[0]].item()!r}; it must be one of "
                f"{', '.join(SPLITS)}."
            )
        if "train" not in named:
            raise MisconfigurationException(f"{file} has no row of split train.")
        rows = {split: np.flatnonzero(named == split) for split in SPLITS}
        return {split: part._replace(rows=each, labels=part.labels[each]) for split, each in rows.items() if len(each)}

    def _checked(self, split: str, part: "_Part", classes: np.ndarray) -> Vectors:
        """Return a split with class indices, or several outputs, for labels; `classes` are the sorted ones of train."""
        if part.matrix.shape[1] != self.width:
            raise MisconfigurationException(
                f"{part.file} holds vectors of {part.matrix.shape[1]} values, those of train have {self.width}."
            )
        if isinstance(self.target, Outputs):
            labels = torch.from_numpy(part.labels).to(self.target.dtype)
        else:
            labels = torch.from_numpy(self._indices(split, part, classes))
        first = part.matrix.index_select(0, torch.from_numpy(part.rows[:1])).float()
        alike = split == "train"
        for _, vectors in finite(part.file, part.matrix, torch.from_numpy(part.rows)):
            alike = alike and bool((vectors == first).all())
        if alike:
            what = "value" if bool((first == first[0, 0]).all()) else "vector"
            raise MisconfigurationException(f"{part.file}: every {what} is the same, so nothing can be told from them.")
        return Vectors(part.matrix, torch.from_numpy(part.rows), labels)

    def _indices(self, split: str, part: "_Part", classes: np.ndarray) -> np.ndarray:
        """Return the places of a split's labels among the classes, shape (n,)."""
        unknown = np.flatnonzero(~np.isin(part.labels, classes))
        if len(unknown):
            raise MisconfigurationException(
                f"Label {part.labels[unknown[0]].item()!r} of {split} (row {part.rows[unknown[0]]} of {part.file}) "
                f"never occurs in train; every class must."
            )
        return np.searchsorted(classes, part.labels)


class _Part(NamedTuple):
    """What files hold of one split, with labels as they are stored."""

    file: Path
    matrix: Matrix  # all vectors of the file, shape (m, D)
    rows: np.ndarray  # those of the split, shape (n,)
    labels: np.ndarray  # whole numbers or strings, shape (n,); of several outputs numbers, shape (n, C)
    names: list[str]  # of these outputs
