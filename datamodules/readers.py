"""Read arrays by name from NumPy, safetensors, torch, Parquet, CSV and TSV files; nothing pickled is loaded.

A file or array that is not there, damaged or of another kind ends in a MisconfigurationException that names it.
"""

import fnmatch
import functools
import glob
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import safe_open
from torch import Tensor

from datamodules.images import reading

INDEXED = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
)
"""Types of which torch can take rows; numbers of any other type become float32 when they are read."""

NUMBERS = "biuf"  # the same, as NumPy's kinds


class Arrays(NamedTuple):
    """What a file holds."""

    names: Sequence[str]  # of its arrays; none where it holds a single one
    read: Callable[[str], Any]  # returns the array of a name
    columns: Sequence[str] = ()  # of a table; a pattern of them stands for the matrix that they make


class Wanted(NamedTuple):
    """An array that is looked for in a file."""

    what: str  # in words
    option: str  # that names it
    usual: Sequence[str]  # names that it usually has, in any case


VECTORS = Wanted("vectors", "data.feature_key", ("features", "embeddings", "embedding", "vectors", "x"))
LABELS = Wanted("labels", "data.label_key", ("labels", "label", "targets", "target", "class", "y"))
WORDS = Wanted("split words", "data.split_key", ("split", "splits"))


def check_file(file: Path) -> None:
    """Refuse a file that is not there or of no known format, without opening it."""
    if file.suffix not in READERS:
        raise MisconfigurationException(f"{file} is of no known format; give one of {', '.join(READERS)}.")
    if not file.is_file():
        raise MisconfigurationException(f"There is no file {file}.")


def open_arrays(file: Path) -> Arrays:
    """Return the names of the arrays in a file, and a function that reads one of them."""
    check_file(file)
    with reading(file):
        return READERS[file.suffix](file)


def read_vectors(file: Path, key: str | None) -> tuple[str, Tensor]:
    """Return the name and the values of a matrix of numbers, shape (n, D); mapped where the format allows.

    `key` is its name, or a pattern of a table's columns; None takes one of a usual name, or the only matrix there is.
    """
    name, matrix = _find(file, key, VECTORS, _is_matrix)
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind in NUMBERS:
        kind = matrix.dtype.newbyteorder("=") if matrix.itemsize <= 8 else np.float64
        matrix = torch.from_numpy(np.ascontiguousarray(matrix, kind))  # stays mapped where nothing changes
    if not isinstance(matrix, Tensor) or matrix.is_complex():
        kind = str(matrix.dtype).removeprefix("torch.")
        raise MisconfigurationException(f"The vectors of {file} are of type {kind}; they must be numbers.")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MisconfigurationException(
            f"The vectors of {file} have shape {tuple(matrix.shape)}; they must have (vectors, values)."
        )
    return name, matrix if matrix.dtype in INDEXED else matrix.float()


def read_labels(
    file: Path, key: str | None, wanted: Wanted, number: int, features: Path, others: Collection[str] = ()
) -> np.ndarray:
    """Return whole numbers or strings, shape (number,), one for each vector of `features`.

    A `key` of None takes an array of a usual name, or the only one of that length that is none of the `others`. Floats
    must be whole; shape (number, 1) will do.
    """
    name, labels = _find(file, key, wanted, lambda array: np.shape(array) in ((number,), (number, 1)), others)
    if isinstance(labels, Tensor):
        labels = (labels.double() if labels.is_floating_point() else labels).numpy()
    source = f"{name!r} of {file}" if name else str(file)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "iubUf":
        raise MisconfigurationException(f"{source} is of type {labels.dtype}; it must be of whole numbers or strings.")
    if wanted is LABELS and labels.ndim == 2 and len(labels) == number and labels.shape[1] > 1:
        raise MisconfigurationException(
            f"{source} has {labels.shape[1]} columns, and one class of several is asked for; set data.target "
            f"multilabel, where they are 0 and 1, or regression."
        )
    if labels.shape not in ((number,), (number, 1)):
        raise MisconfigurationException(
            f"{source} has shape {labels.shape}, {features} has {number:,} vectors; give one of the {wanted.what} for "
            f"each."
        )
    labels = labels.reshape(number)
    if labels.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(labels) | (labels % 1 != 0))
        if len(wrong):
            raise MisconfigurationException(
                f"{source} is {labels[wrong[0]]:g} in row {wrong[0]} (from 0); it must be a whole number or a string."
                + " Numbers are predicted with data.target regression." * (wanted is LABELS)
            )
        labels = labels.astype(np.int64)
    return labels


def read_columns(
    file: Path, key: str | Sequence[str] | None, number: int, features: Path, others: Collection[str] = ()
) -> tuple[list[str], np.ndarray]:
    """Return the names and the values of several labels or numbers for each vector, shape (number, C), float64.

    `key` is the name of a matrix or column, a pattern of columns or a list of these; None takes what `read_labels`
    would, also of shape (number, C).
    """

    def fits(array: Any) -> bool:
        return array.ndim in (1, 2) and len(array) == number

    names: list[str] = []
    columns: list[np.ndarray] = []
    for each in [key] if key is None or isinstance(key, str) else key:
        name, values = _find(file, each, LABELS, fits, others)
        values = values.double().numpy() if isinstance(values, Tensor) else np.asarray(values)
        source = f"{name!r} of {file}" if name else str(file)
        if values.dtype.kind not in NUMBERS:
            raise MisconfigurationException(
                f"{source} is of type {values.dtype}; it must be of numbers. Words are for data.target classes."
            )
        if not fits(values):
            raise MisconfigurationException(
                f"{source} has shape {values.shape}, {features} has {number:,} vectors; give a row for each."
            )
        matched = fnmatch.filter(open_arrays(file).columns, name)
        if values.ndim == 1 or values.shape[1] == 1:
            names.append(matched[0] if matched else name or "label")
        else:
            names += matched or [f"{name} {place}".strip() for place in range(values.shape[1])]
        columns.append(values.reshape(number, -1).astype(np.float64))
    return names, np.concatenate(columns, axis=1)


def _is_matrix(array: Any) -> bool:
    numbers = isinstance(array, Tensor) or array.dtype.kind in NUMBERS
    return numbers and array.ndim == 2 and array.shape[1] > 1


def _find(
    file: Path, key: str | None, wanted: Wanted, fits: Callable[[Any], bool], others: Collection[str] = ()
) -> tuple[str, Any]:
    """Return the name and the values of the array that `key` names; None finds it among those that fit.

    That is the only one of a usual name, or the only one at all, and is said where it is not the first of those names.
    The name is empty where the file holds a single array.
    """
    arrays = open_arrays(file)

    def read(name: str) -> Any:
        with reading(f"{name!r} of {file}" if name else file):
            return arrays.read(name)

    if not arrays.names:
        return "", read("")
    more = f", ... ({len(arrays.names)})" if len(arrays.names) > 10 else ""
    there = f"it holds {', '.join(arrays.names[:10])}{more}"
    if key is not None:
        if key not in (*arrays.names, *arrays.columns) and not fnmatch.filter(arrays.columns, key):
            raise MisconfigurationException(f"{file} has no {key!r}; {there}: name one with {wanted.option}.")
        return key, read(key)
    names = [name for name in arrays.names if name not in others]
    some = [name for name in names if name.lower() in wanted.usual] or names
    found = {}
    for name in some:
        try:
            array = read(name)
        except MisconfigurationException as error:  # it might have been the one, so no other is taken in its place
            raise MisconfigurationException(
                f"{error} If it is not the {wanted.what}, name them with {wanted.option}."
            ) from error
        if len(some) == 1 or fits(array):  # of a single one, whoever asked says what is wrong with it
            found[name] = array
    if len(found) != 1:
        raise MisconfigurationException(
            f"It is not clear which are the {wanted.what} of {file}; {there}: name one with {wanted.option}."
        )
    name, array = found.popitem()
    if name != wanted.usual[0]:
        rank_zero_info(f"The {wanted.what} of {file} are {name!r}.")
    return name, array


def _npy(file: Path) -> Arrays:
    # Copy-on-write, as torch expects writable memory; nothing writes.
    return Arrays([], lambda _: np.load(file, mmap_mode="c", allow_pickle=False))


def _npz(file: Path) -> Arrays:
    arrays = np.load(file, allow_pickle=False)  # reads an array when asked for it
    return Arrays(arrays.files, arrays.__getitem__)


def _safetensors(file: Path) -> Arrays:
    tensors = safe_open(file, framework="pt")
    return Arrays(list(tensors.keys()), tensors.get_tensor)


def _torch(file: Path) -> Arrays:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds
        raise MisconfigurationException(
            f"{file} cannot be read: it is damaged, or holds more than tensors and plain values, which is never loaded."
        ) from error
    if isinstance(content, list | tuple) and all(isinstance(each, Tensor) for each in content):
        alike = len({each.shape for each in content}) == 1
        content = torch.stack(list(content)) if alike else dict(enumerate(content))
    named = {str(name): each for name, each in content.items()} if isinstance(content, dict) else {}

    def read(name: str) -> Any:
        array = named[name] if named else content
        return array.detach() if isinstance(array, Tensor) else np.asarray(array)

    return Arrays(list(named), read)


def _parquet(file: Path) -> Arrays:
    return _table(
        file,
        pyarrow.parquet.read_schema(file).names,
        lambda names: pyarrow.parquet.read_table(file, columns=names),
    )


def _text(file: Path) -> Arrays:
    """Open a text file of commas or tabs; where its first row holds numbers only, it is a matrix without a header."""
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",")
    convert = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
    with pyarrow.csv.open_csv(file, pyarrow.csv.ReadOptions(block_size=2**24), parse) as reader:
        names = reader.schema.names
    numbers = all(re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", name.lower()) for name in names)
    bare = numbers and (len(names) == 1 or names != [str(index) for index in range(len(names))])
    options = pyarrow.csv.ReadOptions(block_size=2**24, autogenerate_column_names=bare)
    read = functools.cache(lambda: pyarrow.csv.read_csv(file, options, parse, convert))
    if bare:
        return Arrays([], lambda _: np.stack([_arrow(each, str(file)) for each in read().columns], axis=1))
    return _table(file, names, lambda names: read().select(names))


def _table(file: Path, columns: Sequence[str], read: Callable[[list[str]], pyarrow.Table]) -> Arrays:
    """Return the columns of a table; those that are numbered, as `dim_0` and `dim_1`, are a matrix `dim_[0-9]*`."""
    stems = [match[1] if (match := re.fullmatch(r"(.*?)\d+", name)) else None for name in columns]
    counts = Counter(stem for stem in stems if stem is not None)
    numbered = {stem: f"{glob.escape(stem)}[0-9]*" for stem, count in counts.items() if count > 1}
    names = [numbered.get(stem, name) for stem, name in zip(stems, columns, strict=True)]

    def read_array(key: str) -> np.ndarray:
        chosen = [key] if key in columns else fnmatch.filter(columns, key)
        table = read(chosen)
        arrays = [_arrow(table[name], f"{name!r} of {file}") for name in chosen]
        return arrays[0] if key in columns else np.stack(arrays, axis=1)

    return Arrays(list(dict.fromkeys(names)), read_array, columns)


def _arrow(column: pyarrow.ChunkedArray, source: str) -> np.ndarray:
    """Return a column of numbers or strings, shape (n,), or of lists or tensors of one shape, shape (n, D)."""
    kind, shape = column.type, [-1]
    if isinstance(kind, pyarrow.BaseExtensionType):
        shape = getattr(kind, "shape", shape)
        column = column.cast(kind.storage_type)
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise MisconfigurationException(f"{source} is empty in row {row} (from 0); every row needs a value.")
    kind = column.type
    if any(is_kind(kind) for is_kind in STRINGS):
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
    return values.reshape(len(lengths), *shape)


STRINGS = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".parquet": _parquet,
    ".csv": _text,
    ".tsv": _text,
}
"""Formats by ending; a new one is a function above and an entry here."""
SEVERAL = tuple(ending for ending in READERS if ending != ".npy")  # Formats that can hold several arrays by name
