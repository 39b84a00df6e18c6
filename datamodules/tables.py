"""Tables of images and labels, as `datasets` reads them from the Hub or from files, with random access."""

import fnmatch
import glob
import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from datamodules.folders import ENDINGS, by_split, files_below
from datamodules.images import Images, one_line, reading, stamp, to_rgb

if TYPE_CHECKING:  # importing it takes more than a second
    from datasets import Dataset

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "json", "txt")
"""Columns of labels, in order of preference, where `label_column` is null."""
LABEL_KEYS = ("label", "cls", "class")  # Keys of labels in a column of JSON, in order of preference
KINDS = {"webdataset": (".tar",), "parquet": (".parquet",), "imagefolder": ("metadata.csv", "metadata.jsonl")}
"""What `datasets` calls a folder, by the files that make it one."""


class Table(NamedTuple):
    """The rows of a split."""

    rows: "Dataset"
    origin: str  # what put them there
    home: Path  # where the paths of images in cells begin


class Part(NamedTuple):
    """What is found of one split, with labels as they are stored."""

    origin: str  # what put it there
    labels: list[Any]
    classes: list[str]  # what labels are called that are indices, or rows of numbers; else they say it themselves
    images: Callable[[Tensor], Images]  # makes images from their class indices, or rows of numbers


@dataclass(eq=False)
class TableImages(Images):
    """Images in a column of a table, still encoded (PNG, JPEG, WebP, ...); decoded on access."""

    rows: "Dataset"  # whose column holds the bytes of each image, or the path of its file
    column: str
    home: Path  # where those paths begin
    labels: Tensor

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.rows[index][self.column]
        with reading(self._name(cell, index), "is not a readable image"):
            file = self.home / cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
            with Image.open(file) as image:
                return to_rgb(image)

    def subset(self, indices: Tensor) -> "TableImages":
        """Return the images at `indices`, in that order."""
        return TableImages(self.rows.select(indices.tolist()), self.column, self.home, self.labels[indices])

    def name(self, index: int) -> str:
        """Return the name of the image's file, or the image's index."""
        return self._name(self.rows[index][self.column], index)

    def digest(self) -> str:
        """Return a hash of every label and encoded image; of images in files, as `FileImages` does."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        for batch in self.rows.iter(256):
            for cell in batch[self.column]:
                content = cell["bytes"]
                if content is None:
                    digest.update(stamp(self.home / cell["path"], cell["path"]) + b"\n")
                else:
                    digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()

    def _name(self, cell: dict[str, Any], index: int) -> str:
        return cell["path"] or f"image {index}"


def read_tables(
    source: str, root: Path, what: str, advice: str, files: dict[str, str] | None = None
) -> dict[str, Table]:
    """Return the tables of a data set by split, with random access; none of a folder that holds images by class.

    `source` is a name on the Hub, where `files` may say which files are of each split, or a folder: of webdataset tars,
    Parquet files, images with a metadata file, or what `save_to_disk` wrote. Downloads and copies go to `huggingface/`
    below `root`.

    Raises:
        MisconfigurationException: If it cannot be read, or not be had; then the message is of `what`, with `advice`.
    """
    import datasets
    from huggingface_hub.errors import HFValidationError

    cache, folder = root / "huggingface", Path(source).resolve()
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        repository = None if folder.is_dir() or files else _as_a_folder(source)
        folder = repository or folder
        if saved or not folder.is_dir():
            load = partial(datasets.load_dataset, source, data_files=files, cache_dir=str(cache))
            found: Any = datasets.load_from_disk(str(folder)) if saved else load()
            found = found if isinstance(found, dict) else {"train": found}
            return {split: Table(rows, f"split {split}", folder) for split, rows in found.items()}
        for kind, endings in KINDS.items():
            if parts := _files_by_split(folder, kind, endings, cache.resolve()):
                return _load(kind, folder, parts, cache)
        if not files_below(folder, ENDINGS):
            raise FileNotFoundError("it holds no tars, no Parquet files and no images")
        images = by_split(files_below(folder, ENDINGS), _folders)
        return _load("imagefolder", folder, images, cache) if repository else {}
    except MisconfigurationException:
        raise
    except (OSError, HFValidationError) as error:
        raise MisconfigurationException(f"{what} could not be had ({one_line(error)}); {advice}.") from error
    except Exception as error:  # readers raise many kinds for a damaged archive
        reason = error.__cause__ or error
        raise MisconfigurationException(f"{source} cannot be read ({one_line(reason)}).") from error


def _as_a_folder(source: str) -> Path | None:
    """Download a repository of the Hub that declares no splits, and return its folder; None of any other.

    `datasets` would take words in the names of files for splits, and leave out files without one.
    """
    from huggingface_hub import DatasetCard, snapshot_download

    fetch = partial(snapshot_download, source, repo_type="dataset")
    card = Path(fetch(allow_patterns="README.md")) / "README.md"
    if card.is_file() and DatasetCard.load(card).data.to_dict().get("configs"):
        return None
    endings = (*ENDINGS, *(ending for endings in KINDS.values() for ending in endings))
    folder = Path(fetch(allow_patterns=[f"*{name}" for ending in endings for name in (ending, ending.upper())]))
    return (
        folder if folder.is_dir() and files_below(folder, endings) else None
    )  # archives of another kind, which `datasets` unpacks


def _files_by_split(folder: Path, kind: str, endings: Sequence[str], cache: Path) -> dict[str, tuple[list[Path], str]]:
    """Return the files of each split, and what put them there."""
    found = [file for file in files_below(folder, endings) if cache not in (folder / file).parents]
    if kind == "imagefolder":  # metadata say what each image is, and folders alone of which split it is
        return by_split([*found, *files_below(folder, ENDINGS)] if found else [], _folders)
    return by_split(found, lambda file: (*file.parts[:-1], file.stem))


def _folders(file: Path) -> Sequence[str]:
    return file.parts[:-1]


def _load(kind: str, folder: Path, parts: dict[str, tuple[list[Path], str]], cache: Path) -> dict[str, Table]:
    """Return the tables of a folder's files."""
    import datasets

    paths = {split: [glob.escape(str(folder / file)) for file in files] for split, (files, _) in parts.items()}
    try:
        tables = datasets.load_dataset(kind, data_files=paths, cache_dir=str(cache))
    except ValueError:  # of tars whose first samples differ
        for file in (file for files, _ in parts.values() for file in files if kind == "webdataset"):
            _check_samples(folder / file)
        raise
    homes = {split: folder / files[0].parent for split, (files, _) in parts.items()}
    return {split: Table(tables[split], origin, homes[split]) for split, (_, origin) in parts.items()}


def _check_samples(tar: Path) -> None:
    """Name a sample of a tar that has not what its first one has."""
    samples: dict[str, set[str]] = {}
    with tarfile.open(tar) as archive:
        for path in map(Path, archive.getnames()):
            key, _, ending = path.name.partition(".")
            if ending:
                samples.setdefault(str(path.parent / key), set()).add(ending)
    first, expected = next(iter(samples.items()), ("", set()))
    for key, endings in samples.items():
        if endings != expected:
            raise MisconfigurationException(
                f"Sample {key} of {tar} has {' and '.join(sorted(endings))}, where sample {first} has "
                f"{' and '.join(sorted(expected))}; all must have the same endings."
            )


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
    names = [name for name in kinds if not name.startswith("__")]
    there = f"{source} has the columns {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
    listed = label_column if isinstance(label_column, list) else []
    if numbers and isinstance(label_column, str) and label_column not in names:
        listed = fnmatch.filter(names, label_column)
    label, *keys = ("" if listed or not isinstance(label_column, str) else label_column).split(".")
    for option, column in (("image_column", image_column), *(("label_column", each) for each in listed or [label])):
        if column and column not in kinds:
            raise MisconfigurationException(f"data.{option} is {column!r}; {there}.")
    encoded = [  # other libraries write images to Parquet as bytes and a path
        name
        for name, kind in kinds.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})
    ]
    image = image_column or (encoded[0] if encoded else "")
    label = (
        label
        or ", ".join(listed)
        or next((name for usual in LABEL_COLUMNS for name in names if name.lower() == usual), "")
    )
    if not label and "." in image and "__key__" in kinds:
        name, ending = f"{rows[0]['__key__']}.{image}".rsplit(".", 1)
        raise MisconfigurationException(
            f"The samples of {source} have names with dots, and what follows the first one is taken for the ending; "
            f"rename them, as {name}.{ending} to {name.replace('.', '_')}.{ending}."
        )
    if not image or not label:
        option, what = ("label_column", "labels") if image else ("image_column", "images")
        raise MisconfigurationException(f"{there}, none of which is known to hold {what}; name it with data.{option}.")
    if numbers:
        labels, classes = _numbers(rows, listed or [label], source)
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
    return Part(table.origin, labels, classes, partial(TableImages, cells, image, table.home))


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
