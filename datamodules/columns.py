"""Labels and images in the columns of a table: which columns hold them, and what every row must have."""

import fnmatch
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.images import Images, reading
from datamodules.tables import Table

if TYPE_CHECKING:  # importing it takes more than a second
    from datasets import Dataset

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "json", "txt")
"""Columns of labels, in order of preference, where `label_column` is null."""
LABEL_KEYS = ("label", "cls", "class")  # Keys of labels in a column of JSON, in order of preference


class Part(NamedTuple):
    """What is found of one split, with labels as they are stored."""

    origin: str  # what put it there
    labels: list[Any]
    classes: list[str]  # what labels are called that are indices, or rows of numbers; else they say it themselves
    images: Callable[[Tensor], Images]  # makes images from their class indices, or rows of numbers


def read_table(
    table: Table,
    split: str,
    image_column: str | None,
    label_column: str | list[str] | None,
    source: str,
    *,
    numbers: bool = False,
) -> Part:
    """Return the labels and images of a split; columns given as None are found.

    With `numbers` labels are rows of numbers, of columns that are listed or match a pattern, or of a single one, which
    may itself hold lists.
    A MisconfigurationException is raised if a column is not there, or a row has no label or no image; it is named.
    """
    import datasets

    rows, kinds = table.rows, table.rows.features
    key = rows[0]["__key__"] if "__key__" in kinds and len(rows) else ""
    image, listed = find_columns(image_column, label_column, source, numbers, kinds, key)
    label, keys = ", ".join(listed), label_column.split(".")[1:] if isinstance(label_column, str) else []
    there = _there(kinds, source)
    if numbers:
        labels, classes = _numbers(rows, listed, source)
    else:
        labels, classes = _labels(rows, label, keys, source)
    with reading(f"Column {image!r} of {source}", f"holds no images; {there}"):
        cells = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        encoded_cells = cells.with_format("arrow")[:][image]
    unlabelled = labels.index(None) if None in labels else -1
    for column, row in ((label, unlabelled), (image, _first_empty(encoded_cells))):
        if row >= 0:
            sample = f"Sample {rows[row]['__key__']}" if "__key__" in kinds else f"Row {row} (from 0)"
            raise MisconfigurationException(
                f"{sample} of {split} of {source} has no {column!r}; every one needs an image and a label, under the "
                f"same names or endings."
            )
    _check_files(encoded_cells, table.home)
    return Part(table.origin, labels, classes, partial(table.images, cells, image, table.home))


def find_columns(
    image_column: str | None,
    label_column: str | list[str] | None,
    source: str,
    numbers: bool,
    kinds: Mapping[str, Any],
    key: str,
) -> tuple[str, list[str]]:
    """Return the column of images and those of labels; the ones given as None are found by their kinds and names.

    With `numbers` the label column may be a pattern of several. `key` is that of the first sample of a tar, and empty
    for other tables. A MisconfigurationException is raised if a column is not there.
    """
    import datasets

    names, there = _visible(kinds), _there(kinds, source)
    listed = label_column if isinstance(label_column, list) else [(label_column or "").partition(".")[0]]
    if numbers and isinstance(label_column, str) and label_column not in names:
        listed = fnmatch.filter(names, label_column) or listed
    for option, column in (("image_column", image_column), *(("label_column", each) for each in listed)):
        if column and column not in kinds:
            raise MisconfigurationException(f"data.{option} is {column!r}; {there}.")
    encoded = [  # other libraries write images to Parquet as bytes and a path
        name
        for name, kind in kinds.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})
    ]
    image = image_column or (encoded[0] if encoded else "")
    usual = [name for usual in LABEL_COLUMNS for name in names if name.lower() == usual][:1]
    listed = usual if listed == [""] else listed
    if not listed and "." in image and key:
        name, ending = f"{key}.{image}".rsplit(".", 1)
        raise MisconfigurationException(
            f"The samples of {source} have names with dots, and what follows the first one is taken for the ending; "
            f"rename them, as {name}.{ending} to {name.replace('.', '_')}.{ending}."
        )
    if not image or not listed:
        option, what = ("label_column", "labels") if image else ("image_column", "images")
        raise MisconfigurationException(f"{there}, none of which is known to hold {what}; name it with data.{option}.")
    return image, listed


def _visible(kinds: Mapping[str, Any]) -> list[str]:
    return [name for name in kinds if not name.startswith("__")]


def _there(kinds: Mapping[str, Any], source: str) -> str:
    names = _visible(kinds)
    return f"{source} has the columns {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"


def _labels(rows: "Dataset", column: str, keys: list[str], source: str) -> tuple[list[Any], list[str]]:
    """Return the label of each row, None where it has none, and class names if labels are indices of declared ones."""
    import datasets

    values = list(rows.select_columns([column])[column])
    if not keys and values and isinstance(values[0], dict):
        keys = [key for key in LABEL_KEYS if key in values[0]][:1]
    for key in keys:
        if not any(isinstance(value, dict) and key in value for value in values):
            raise MisconfigurationException(
                f"data.label_column is {'.'.join([column, *keys])!r}; there is no {key!r} in {column}."
            )
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    kind = rows.features[column]
    classes = list(kind.names) if isinstance(kind, datasets.ClassLabel) and not keys else []
    labels = [_label(value, bool(classes)) for value in values]
    strange = [label for label in labels if not isinstance(label, int | str | None)]
    if strange or not labels:
        raise MisconfigurationException(
            f"Column {column!r} of {source} holds {strange[0] if strange else 'nothing'!r:.60}; name the one that "
            f"holds a label, or `{column}.key`, with data.label_column. Numbers are predicted with data.target "
            f"regression, several labels with multilabel."
        )
    return labels, classes


def _numbers(rows: "Dataset", columns: list[str], source: str) -> tuple[list[Any], list[str]]:
    """Return the numbers of each row, None where one is missing, and what each is called.

    A single column may hold lists: of numbers, as many in each row, or of those classes that an image has.
    """
    import datasets

    kind, values = getattr(rows.features[columns[0]], "feature", None), [list(rows[name]) for name in columns]
    found = [list(row) for row in zip(*values, strict=True)]
    if len(columns) == 1 and any(isinstance(row[0], list) for row in found):
        found, columns = [row[0] or [] for row in found], []
    if isinstance(kind, datasets.ClassLabel):
        return [[float(place in set(row)) for place in range(len(kind.names))] for row in found], list(kind.names)
    names = columns or [str(place) for place in range(len(found[0]))]
    for place, row in enumerate(found):
        wrong = next((each for each in row if not isinstance(each, int | float | None)), None)
        if wrong is not None or len(row) != len(names):
            said = f"holds {len(row)} numbers, not {len(names)}" if wrong is None else f"holds {wrong!r:.60}"
            raise MisconfigurationException(
                f"Row {place} (from 0) of {source} {said}; name columns of numbers, or one of lists that are as long, "
                f"with data.label_column. One class of several is data.target classes."
            )
    return [None if None in row else row for row in found], names


def _label(value: Any, is_index: bool) -> Any:
    """Return a label as a whole number or word, None where there is none, and anything else as it is."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float):  # how whole numbers are stored beside missing ones
        return int(value) if value.is_integer() else None if value != value else value
    return None if is_index and value == -1 else value  # how `datasets` writes that there is none


def _first_empty(column: Any) -> int:
    """Return the first row of an Arrow column without an image, or -1."""
    import pyarrow.compute as pc

    missing = pc.and_(*(pc.is_null(pc.struct_field(column, part)) for part in ("bytes", "path")))
    return int(pc.index(missing, True).as_py())


def _check_files(column: Any, home: Path) -> None:
    """Refuse an Arrow column that names a file which is not there."""
    import pyarrow.compute as pc

    paths = pc.struct_field(column, "path").filter(pc.is_null(pc.struct_field(column, "bytes")))
    for path in paths.to_pylist():
        if not (home / path).is_file():
            raise MisconfigurationException(f"{home / path} is missing; paths of images begin in {home}.")
