"""Find vectors, labels and other arrays in files by their usual names, or by those that are given.

A file or array that is not there, damaged or of another kind ends in a MisconfigurationException that names it.
"""

import fnmatch
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.formats import NUMBERS, Matrix, Stacked, as_tensor, open_arrays
from datamodules.images import reading


class Wanted(NamedTuple):
    """An array that is looked for in a file."""

    what: str  # in words
    option: str  # that names it
    usual: Sequence[str]  # names that it usually has, in any case


VECTORS = Wanted("vectors", "data.feature_key", ("features", "embeddings", "embedding", "vectors", "x"))
LABELS = Wanted("labels", "data.label_key", ("labels", "label", "targets", "target", "class", "y"))
WORDS = Wanted("split words", "data.split_key", ("split", "splits"))


def read_vectors(file: Path, key: str | None) -> tuple[str, Matrix]:
    """Return the name and the values of a matrix of numbers, shape (n, D); mapped where the format allows.

    `key` is its name, or a pattern of a table's columns; None takes one of a usual name, or the only matrix there is.
    A column of words names files of a vector each.
    """
    name, matrix = _find(file, key, VECTORS, _is_matrix)
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind == "U" and matrix.ndim == 1:
        return name, _listed(file, matrix)
    matrix = matrix if isinstance(matrix, Stacked) else as_tensor(matrix, file)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MisconfigurationException(
            f"The vectors of {file} have shape {tuple(matrix.shape)}; they must have (vectors, values)."
        )
    return name, matrix


def _listed(file: Path, names: np.ndarray) -> Tensor:
    """Return the vectors in files that a table lists, a vector each, from the folder of the table."""
    rows: list[Tensor] = []
    for row, name in enumerate(names.tolist()):
        if row == 0 and not (file.parent / name).is_file():
            raise MisconfigurationException(
                f"The vectors of {file} are words, {name!r} first; they must be numbers, or name files beside it."
            )
        part = file.parent / name
        arrays = open_arrays(part)
        with reading(part):
            vector = as_tensor(arrays.read(arrays.names[0] if arrays.names else ""), part).flatten()
        if rows and vector.shape != rows[0].shape:
            raise MisconfigurationException(f"{part} holds {len(vector)} values, the first file has {len(rows[0])}.")
        rows.append(vector)
    return torch.stack(rows)


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
        if isinstance(values, Stacked):
            values = values.index_select(0, torch.arange(number))
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
    numbers = isinstance(array, Tensor | Stacked) or array.dtype.kind in NUMBERS
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
