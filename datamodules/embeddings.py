"""One's own vectors: representations that some other program computed, with their labels, from a file."""

import fnmatch
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from torch import Tensor

from datamodules.base import SPLITS, Task

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""What a split column may say, and the split that is meant."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8)
"""How vectors may be stored; they are served as float32."""
SPLIT_KEY = "split"
"""Where splits are looked for; another name must be there."""
CHUNK = 4096
"""Rows that are checked or hashed at once, so that a file larger than memory can be."""


class Vectors:
    """The labelled rows of a file that are one split; read when they are asked for, where the format allows.

    Args:
        file: Where the matrix comes from.
        matrix: All vectors of the file, shape (m, D), of any of `DTYPES`.
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
        for places in torch.arange(len(self)).split(CHUNK):
            seen.update(self[places].numpy().data)
        seen.update(self.labels.numpy().data)
        return seen.hexdigest()

    def check(self) -> None:
        """Read every value once.

        Raises:
            MisconfigurationException: If one is not finite as float32; the message names its row and file.
        """
        for places in torch.arange(len(self)).split(CHUNK):
            bad = (~self[places].isfinite()).nonzero()
            if len(bad):
                row, column = int(self.rows[places[bad[0, 0]]]), int(bad[0, 1])
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
        batch_size: See `Task`.
        seed: See `Task`.

    Raises:
        MisconfigurationException: If a file or a key is not there, or what they hold does not fit together.
    """

    def __init__(
        self,
        features: str | None = None,
        labels: str | None = None,
        splits: str | None = None,
        root: str | None = None,
        feature_key: str = "features",
        label_key: str = "labels",
        split_key: str | None = SPLIT_KEY,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(root or "", batch_size, "none", 0, seed)
        if (features is None) == (root is None):
            raise MisconfigurationException("Give data.features, a file of vectors, or data.root, a folder of splits.")
        if root is not None and (labels or splits):
            raise MisconfigurationException(
                "data.labels and data.splits go with data.features; the files of data.root hold their own labels."
            )
        if features is None:
            parts = {
                split: _read(file, file, feature_key, label_key) for split, file in _split_files(self.root).items()
            }
        else:
            file = Path(features).expanduser()
            label_file = Path(labels).expanduser() if labels else file
            split_file = Path(splits).expanduser() if splits else None
            part = _read(file, label_file, feature_key, label_key)
            parts = _divide(part, split_file, label_file, split_key)
        self.name = self.root.resolve().name if features is None else Path(features).stem
        values = np.unique(parts["train"].labels)
        self.classes = [str(value) for value in values.tolist()]
        self.width = parts["train"].matrix.shape[1]
        self._given = {split: self._vectors(split, part, values) for split, part in parts.items()}

    def load(self) -> dict[str, Vectors]:
        """Return the splits that are given, and cut the others from train."""
        for vectors in self._given.values():
            vectors.check()
        return self.complete(self._given)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits once, and serve the vectors as the representations that they are."""
        super().setup(stage)
        for split, vectors in self.images.items():
            self.represent(split, [cast(Vectors, vectors)])

    def _vectors(self, split: str, part: "_Part", values: np.ndarray) -> Vectors:
        """Return a split with its labels as places among the classes of train, which are `values`."""
        if part.matrix.shape[1] != self.width:
            raise MisconfigurationException(
                f"{part.file} holds vectors of {part.matrix.shape[1]} values, those of train have {self.width}."
            )
        unknown = np.flatnonzero(~np.isin(part.labels, values))
        if len(unknown):
            raise MisconfigurationException(
                f"Label {part.labels[unknown[0]].item()!r} of {split} (row {part.rows[unknown[0]]} of {part.file}) "
                f"never occurs in train; every class must."
            )
        labels = np.searchsorted(values, part.labels)
        return Vectors(part.file, part.matrix, torch.from_numpy(part.rows), torch.from_numpy(labels))


class _Part(NamedTuple):
    """What files hold for one split, before labels are classes."""

    file: Path
    matrix: Tensor
    """All vectors of the file, shape (m, D)."""
    rows: np.ndarray
    """Rows of the split, shape (n,)."""
    labels: np.ndarray
    """Label of each, shape (n,), whole numbers or strings."""


def _split_files(root: Path) -> dict[str, Path]:
    """Return the one file of each split that the folder holds; at least that of train."""
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [root / f"{split}{ending}" for ending in COLUMNS if (root / f"{split}{ending}").is_file()]
        if len(found) > 1:
            raise MisconfigurationException(
                f"{root} holds {' and '.join(path.name for path in found)}; leave one file for each split."
            )
        files |= dict.fromkeys([split] * len(found), *found)
    if "train" not in files:
        raise MisconfigurationException(f"{root} holds no file train ({', '.join(f'train{e}' for e in COLUMNS)}).")
    return files


def _read(file: Path, label_file: Path, feature_key: str, label_key: str) -> _Part:
    """Return all rows of a file of vectors, with their labels."""
    if label_file == file and file.suffix == ".npy":
        raise MisconfigurationException(f"{file} holds one array; name the file of the labels with data.labels.")
    matrix = _column(file, feature_key, "data.feature_key")
    if isinstance(matrix, np.ndarray):
        native = np.ascontiguousarray(matrix, matrix.dtype.newbyteorder("="))  # stays mapped where nothing changes
        kinds = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
        matrix = torch.from_numpy(native) if native.dtype.name in kinds else native
    if not isinstance(matrix, Tensor) or matrix.dtype not in DTYPES:
        said = str(matrix.dtype).removeprefix("torch.")
        right = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise MisconfigurationException(f"The vectors of {file} are {said}; they must be one of {right}.")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MisconfigurationException(
            f"The vectors of {file} have shape {tuple(matrix.shape)}; they must have (vectors, values)."
        )
    labels = _words(label_file, label_key, "data.label_key", len(matrix), file)
    return _Part(file, matrix, np.arange(len(matrix)), labels)


def _divide(part: _Part, split_file: Path | None, label_file: Path, split_key: str | None) -> dict[str, _Part]:
    """Return the rows of each split that the files name, or all of them as train where no file names splits."""
    asked = split_file is not None or split_key not in (SPLIT_KEY, None)
    if split_key is None or not (asked or (label_file.suffix != ".npy" and split_key in _open(label_file)[0])):
        return {"train": part}
    words = _words(split_file or label_file, split_key, "data.split_key", len(part.rows), part.file)
    unknown = np.flatnonzero(~np.isin(words, list(SPLIT_NAMES)))
    if len(unknown):
        raise MisconfigurationException(
            f"Row {unknown[0]} of {split_file or label_file} is of split {words[unknown[0]].item()!r}; it must be one "
            f"of {', '.join(SPLITS)}."
        )
    meant = np.array([SPLIT_NAMES[word] for word in words.tolist()])
    if "train" not in meant:
        raise MisconfigurationException(f"{split_file or label_file} has no row of split train.")
    places = {split: np.flatnonzero(meant == split) for split in SPLITS}
    return {split: part._replace(rows=rows, labels=part.labels[rows]) for split, rows in places.items() if len(rows)}


def _words(file: Path, key: str, option: str, rows: int, features: Path) -> np.ndarray:
    """Return a column of whole numbers or strings, one for each of the `rows` vectors of `features`."""
    column = np.asarray(_column(file, key, option))
    if column.dtype.kind == "S":
        column = np.char.decode(column, "utf-8")
    if column.dtype.kind not in "iubU":
        raise MisconfigurationException(
            f"{key!r} of {file} is of type {column.dtype}; it must be of whole numbers or strings."
        )
    if column.shape != (rows,):
        raise MisconfigurationException(
            f"{key!r} of {file} has shape {column.shape}, {features} has {rows:,} vectors; give one value for each."
        )
    return column


# File formats: each opens a file and returns the names that it holds, and what reads the array of that name.

_Opened = tuple[Sequence[str], Callable[[str], Any]]


def _column(file: Path, key: str, option: str) -> Any:
    """Return the array or tensor of that name, or the only one of a .npy file.

    Raises:
        MisconfigurationException: If the file or the name is not there, or the file is torn or holds pickles.
    """
    names, read = _open(file)
    if names and key not in names and not (file.suffix == ".parquet" and fnmatch.filter(names, key)):
        more = f", ... ({len(names)})" if len(names) > 10 else ""
        raise MisconfigurationException(
            f"{file} has no {key!r}; it holds {', '.join(names[:10])}{more}: name one with {option}."
        )
    try:
        return read(key)
    except MisconfigurationException:
        raise
    except Exception as error:  # what the readers raise on a torn file is anybody's guess
        raise MisconfigurationException(f"{key!r} of {file} cannot be read ({_first_line(error)}).") from error


def _open(file: Path) -> _Opened:
    if file.suffix not in OPEN:
        raise MisconfigurationException(f"{file} is of no known format; give one of {', '.join(OPEN)}.")
    if not file.is_file():
        raise MisconfigurationException(f"There is no file {file}.")
    try:
        return OPEN[file.suffix](file)
    except Exception as error:
        raise MisconfigurationException(f"{file} cannot be read ({_first_line(error)}).") from error


def _open_npy(file: Path) -> _Opened:
    # Copy-on-write, as torch wants writable memory; nothing writes.
    return [], lambda _: np.load(file, mmap_mode="c", allow_pickle=False)


def _open_npz(file: Path) -> _Opened:
    with np.load(file, allow_pickle=False) as arrays:
        names = list(arrays)

    def read(key: str) -> np.ndarray:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[key]

    return names, read


def _open_safetensors(file: Path) -> _Opened:
    tensors = safe_open(file, framework="pt")
    return list(tensors.keys()), tensors.get_tensor


def _open_parquet(file: Path) -> _Opened:
    names = pyarrow.parquet.read_schema(file).names

    def read(key: str) -> np.ndarray:
        several = [key] if key in names else fnmatch.filter(names, key)
        table = pyarrow.parquet.read_table(file, columns=several)
        columns = [_arrow(table[name], f"{name!r} of {file}") for name in several]
        return columns[0] if key in names else np.stack(columns, axis=1)

    return names, read


def _arrow(column: pyarrow.ChunkedArray, said: str) -> np.ndarray:
    """Return a column of numbers or strings, shape (n,), or of lists of one length, shape (n, D)."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise MisconfigurationException(f"{said} is empty in row {row} (from 0); every row needs a value.")
    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=np.str_)
    if not hasattr(kind, "value_type"):
        return column.to_numpy()
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])
    if len(set(lengths.tolist())) > 1:
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise MisconfigurationException(
            f"{said} has {lengths[row]} values in row {row} (from 0), {lengths[0]} in row 0; all must have as many."
        )
    # Chunk by chunk: an Arrow array of lists holds at most 2^31 values.
    values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    return values.reshape(len(lengths), -1)


OPEN: dict[str, Callable[[Path], _Opened]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
}
"""Formats by ending; a new one is a function above and a line here."""
COLUMNS = tuple(ending for ending in OPEN if ending != ".npy")
"""Formats that hold several arrays."""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
