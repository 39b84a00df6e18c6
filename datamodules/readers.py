"""Read arrays by name from .npy, .npz, safetensors and Parquet files; nothing pickled is loaded.

A file or array that is not there, damaged or of another kind ends in a MisconfigurationException that names it.
"""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from torch import Tensor

from datamodules.images import reading

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8)
"""How vectors may be stored."""
DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)

Arrays = tuple[Sequence[str], Callable[[str], Any]]
"""The names of a file's arrays (none where it holds a single one), and what reads one of them."""


def check_file(file: Path) -> None:
    """Refuse a file that is not there or of no known format, without opening it."""
    if file.suffix not in READERS:
        raise MisconfigurationException(f"{file} is of no known format; give one of {', '.join(READERS)}.")
    if not file.is_file():
        raise MisconfigurationException(f"There is no file {file}.")


def open_arrays(file: Path) -> Arrays:
    """Return the names of the arrays in a file, none for .npy, and a function that reads one of them."""
    check_file(file)
    with reading(file):
        return READERS[file.suffix](file)


def read_array(file: Path, key: str, option: str) -> Any:
    """Return the array or tensor called `key`, or the only one of a .npy file; `option` is what names it.

    In Parquet, `key` may be a pattern of columns that become the columns of a matrix.
    """
    names, read = open_arrays(file)
    if names and key not in names and not (file.suffix == ".parquet" and fnmatch.filter(names, key)):
        more = f", ... ({len(names)})" if len(names) > 10 else ""
        raise MisconfigurationException(
            f"{file} has no {key!r}; it holds {', '.join(names[:10])}{more}: name one with {option}."
        )
    with reading(f"{key!r} of {file}"):
        return read(key)


def read_vectors(file: Path, key: str) -> Tensor:
    """Return a matrix of vectors, shape (n, D), of one of `DTYPES`; mapped into memory where the format allows."""
    matrix = read_array(file, key, "data.feature_key")
    if isinstance(matrix, np.ndarray):
        native = np.ascontiguousarray(matrix, matrix.dtype.newbyteorder("="))  # stays mapped where nothing changes
        matrix = torch.from_numpy(native) if native.dtype.name in DTYPE_NAMES else native
    if not isinstance(matrix, Tensor) or matrix.dtype not in DTYPES:
        raise MisconfigurationException(
            f"The vectors of {file} are {str(matrix.dtype).removeprefix('torch.')}; they must be one of "
            f"{', '.join(DTYPE_NAMES)}."
        )
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MisconfigurationException(
            f"The vectors of {file} have shape {tuple(matrix.shape)}; they must have (vectors, values)."
        )
    return matrix


def read_labels(file: Path, key: str, option: str, number: int, features: Path) -> np.ndarray:
    """Return whole numbers or strings, shape (number,), one for each vector of `features`."""
    labels = np.asarray(read_array(file, key, option))
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "iubU":
        raise MisconfigurationException(
            f"{key!r} of {file} is of type {labels.dtype}; it must be of whole numbers or strings."
        )
    if labels.shape != (number,):
        raise MisconfigurationException(
            f"{key!r} of {file} has shape {labels.shape}, {features} has {number:,} vectors; give one value for each."
        )
    return labels


def _npy(file: Path) -> Arrays:
    # Copy-on-write, as torch expects writable memory; nothing writes.
    return [], lambda _: np.load(file, mmap_mode="c", allow_pickle=False)


def _npz(file: Path) -> Arrays:
    arrays = np.load(file, allow_pickle=False)  # reads an array when asked for it
    return arrays.files, arrays.__getitem__


def _safetensors(file: Path) -> Arrays:
    tensors = safe_open(file, framework="pt")
    return list(tensors.keys()), tensors.get_tensor


def _parquet(file: Path) -> Arrays:
    names = pyarrow.parquet.read_schema(file).names

    def read(key: str) -> np.ndarray:
        chosen = [key] if key in names else fnmatch.filter(names, key)
        table = pyarrow.parquet.read_table(file, columns=chosen)
        columns = [_arrow(table[name], f"{name!r} of {file}") for name in chosen]
        return columns[0] if key in names else np.stack(columns, axis=1)

    return names, read


def _arrow(column: pyarrow.ChunkedArray, source: str) -> np.ndarray:
    """Return a column of numbers or strings, shape (n,), or of lists of one length, shape (n, D)."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise MisconfigurationException(f"{source} is empty in row {row} (from 0); every row needs a value.")
    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=np.str_)
    if not hasattr(kind, "value_type"):
        return column.to_numpy()
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])
    if len(set(lengths.tolist())) > 1:
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise MisconfigurationException(
            f"{source} has {lengths[row]} values in row {row} (from 0), {lengths[0]} in row 0; all must have as many."
        )
    # Chunk by chunk: an Arrow array of lists holds at most 2^31 values.
    values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    return values.reshape(len(lengths), -1)


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
"""Formats by ending; a new one is a function above and an entry here."""
SEVERAL = tuple(ending for ending in READERS if ending != ".npy")  # Formats that hold several arrays by name
