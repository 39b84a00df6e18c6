"""Images of the Hugging Face Hub or in its formats: VTAB's tasks as tar files, and any data set of one's own.

An Arrow copy below `root` gives random access, so that evaluation is exact for any number of processes. Images are
decoded when they are needed; no code of a data set is run.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from datamodules.base import Task
from datamodules.images import Images, as_labels, one_line, readable, to_rgb
from datamodules.splits import Percent
from datamodules.targets import Multiclass

if TYPE_CHECKING:  # importing it takes more than a second
    from datasets import Dataset, DatasetDict

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "json", "txt")
"""Columns of labels, in order of preference, where `label_column` is null."""
LABEL_KEYS = ("label", "cls", "class")
"""Keys of labels in a column of JSON, in order of preference."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of each split in folders, file names and on the Hub."""


class HubImages:
    """Images in a column of a table, still encoded (PNG, JPEG, WebP, ...); decoded on access.

    Args:
        rows: The table; the column holds the bytes of each image, or the path of its file.
        column: The column's name.
        labels: Class index of each image, shape (n,).
    """

    def __init__(self, rows: "Dataset", column: str, labels: Tensor) -> None:
        self.rows = rows
        self.column = column
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.rows[index][self.column] or {"bytes": b"", "path": None}
        with readable(self._name(cell, index)):
            file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
            with Image.open(file) as image:
                return to_rgb(image)

    def subset(self, indices: Tensor) -> "HubImages":
        """Return the images at `indices`, in that order."""
        return HubImages(self.rows.select(indices.tolist()), self.column, self.labels[indices])

    def name(self, index: int) -> str:
        """Return the name of the image's file, or the image's index."""
        return self._name(self.rows[index][self.column], index)

    def digest(self) -> str:
        """Return a hash of every label and encoded image; of images in files, as `FileImages` does."""
        seen = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        for batch in self.rows.iter(256):
            for cell in batch[self.column]:
                if cell and cell["bytes"] is None:
                    status = Path(cell["path"]).stat()
                    seen.update(f"{cell['path']}|{status.st_size}|{status.st_mtime_ns}\n".encode())
                else:
                    content = cell["bytes"] if cell else b""
                    seen.update(len(content).to_bytes(8, "big") + content)
        return seen.hexdigest()

    @staticmethod
    def _name(cell: dict[str, Any] | None, index: int) -> str:
        return (cell and cell["path"]) or f"image {index}"


class HubTask(Task):
    """A task of VTAB in the uniform format of the Hub's `clip-benchmark/wds_vtab-<task>`.

    `train/*.tar` and `test/*.tar` hold an image and a `.cls` for each sample, in VTAB's own splits and with lossless
    images. VTAB's validation split is not among them: validation is a seeded stratified tenth of train. The tar files
    may lie in `root`, or in the repository's folder below it; otherwise they are downloaded.
    """

    cut: ClassVar = {"val": Percent(10)}
    repository: str
    """The repository's name on the Hub."""
    published: ClassVar[Sequence[str]] = ("train", "test")
    """The splits that are taken from it."""

    def prepare_data(self) -> None:
        """Download what is not there yet, and make the copy with random access."""
        self._tables()

    def load(self) -> Mapping[str, Images]:
        """Return the published train and test images."""
        return self.parts()

    def relabel(self, labels: Tensor) -> Tensor:
        """Return the class indices that published labels stand for; -1 for a label of no class."""
        return labels

    def parts(self) -> dict[str, HubImages]:
        """Return the images of the repository's splits.

        Raises:
            MisconfigurationException: If they cannot be downloaded (the message says which files belong where), or a
                label is of no class.
        """
        source, tables = self._tables()
        images = {}
        for split in self.published:
            rows, column, values, _ = _columns(tables[split], None, None, source)
            if not all(isinstance(value, int) for value in values):
                raise MisconfigurationException(
                    f"{source} holds the label {values[0]!r} in {split}; it must be a number."
                )
            labels = self.relabel(as_labels(values))
            outside = labels[(labels < 0) | (labels >= self.target.outputs)]
            if len(outside):
                raise MisconfigurationException(
                    f"{source} holds the label {int(outside[0])} in {split}; the classes of {self.name} are 0 to "
                    f"{self.target.outputs - 1}."
                )
            images[split] = HubImages(rows, column, labels)
        return images

    def _tables(self) -> "tuple[str, DatasetDict]":
        """Return the folder or repository that holds the tar files, and their tables."""
        folder, last = self.root / self.repository.partition("/")[2], self.published[-1]
        local = next((each for each in (folder, self.root) if any(each.glob(f"{last}/*.tar"))), None)
        source = str(local) if local else self.repository
        files = {split: f"{split}/*.tar" for split in self.published}
        try:
            return source, read(source, self.root, files)
        except OSError as error:
            raise MisconfigurationException(
                f"{self.name} could not be had ({one_line(error)}); put {' and '.join(files.values())} from "
                f"https://huggingface.co/datasets/{self.repository} into {folder}, or name the folder that holds "
                f"{last}/ with --data.root."
            ) from error


class HuggingFaceImages(Task):
    """Any image-classification data set of the Hugging Face Hub or on disk (webdataset tars, Parquet, image folders).

    Of its splits train, validation and test, missing ones are a seeded stratified fifth of train each. Class names
    are the data set's own, or the sorted labels of train.

    Args:
        name: A data set of the Hub, for example `zalando-datasets/fashion_mnist`, or a folder.
        image_column: Column of images; null is the one that holds some.
        label_column: Column of labels, as `json.label` within JSON; null looks for one of the usual names.
        **kwargs: See `Task`; downloads and a copy with random access go to `root`.
    """

    def __init__(
        self, name: str, image_column: str | None = None, label_column: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.source = name
        self.image_column, self.label_column = image_column, label_column
        self.name = Path(name).resolve().name if Path(name).is_dir() else name.rpartition("/")[2]
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise MisconfigurationException(f"data.name is {name!r}, but there is no such folder.")

    def prepare_data(self) -> None:
        """Download what is not there yet, and make the copy with random access.

        Raises:
            MisconfigurationException: If that fails.
        """
        self._tables()

    def load(self) -> dict[str, Images]:
        """Return the splits that are there.

        Raises:
            MisconfigurationException: If the data set is not available, has no such column (the message names those it
                has), or a label of a split never occurs in train.
        """
        columns = {
            split: _columns(table, self.image_column, self.label_column, self.source)
            for split, table in _by_split(self._tables(), self.source).items()
        }
        names = columns["train"].classes
        values = list(range(len(names))) if names else sorted(set(columns["train"].labels) - {None})
        classes = names or [str(value) for value in values]
        self.target = Multiclass(classes)
        indices = {value: label for label, value in enumerate(values)}
        images: dict[str, Images] = {}
        for split, (rows, column, labels, _) in columns.items():
            unknown = next((label for label in labels if label not in indices), None)
            if unknown is not None or None in labels:
                raise MisconfigurationException(
                    f"The {split} split of {self.source} holds the label {unknown!r}; the classes of train are "
                    f"{', '.join(classes[:10])}{', ...' if len(values) > 10 else ''}."
                )
            images[split] = HubImages(rows, column, as_labels([indices[label] for label in labels]))
        return images

    def _tables(self) -> "DatasetDict":
        try:
            return read(self.source, self.root)
        except OSError as error:
            raise MisconfigurationException(
                f"data.name is {self.source!r}, which could not be had ({one_line(error)}); it must be a data set of "
                f"the Hugging Face Hub or a folder."
            ) from error


class _Columns(NamedTuple):
    """What a table holds of one split."""

    rows: "Dataset"
    """The table with the column of images alone, not decoded."""
    column: str
    labels: list[Any]
    """Label of each image, whole numbers or strings."""
    classes: list[str]
    """Class names, where the table has them."""


def read(source: str, root: Path, files: dict[str, str] | None = None) -> "DatasetDict":
    """Return the tables of a data set by split, with random access.

    Args:
        source: Name on the Hub, or a folder: of webdataset tars, of Parquet files, or of images by class.
        root: Folder for downloads and copies, in `huggingface/`.
        files: Patterns of the files of each split; None finds them.

    Raises:
        OSError: If it is not there and cannot be downloaded.
        MisconfigurationException: If it cannot be read; the message names it.
    """
    import datasets

    try:
        cache = str(root / "huggingface")
        if not Path(source).is_dir():
            return datasets.load_dataset(source, data_files=files, cache_dir=cache)
        for kind, pattern in (("webdataset", "*.tar"), ("parquet", "*.parquet")):
            found = sorted(
                str(path.resolve()) for path in Path(source).rglob(pattern) if root / "huggingface" not in path.parents
            )
            if found:
                return datasets.load_dataset(kind, data_files=_files_by_split(found, source), cache_dir=cache)
        return datasets.load_dataset("imagefolder", data_dir=str(Path(source).resolve()), cache_dir=cache)
    except OSError:
        raise
    except Exception as error:  # readers raise many kinds for a damaged archive
        reason = error.__cause__ or error
        raise MisconfigurationException(f"{source} cannot be read ({one_line(reason)}).") from error


def _files_by_split(files: Sequence[str], source: str) -> dict[str, list[str]]:
    """Return the files of each split, told by a word in their folder or name; files without one belong to train."""
    found: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(Path(file).relative_to(Path(source).resolve())).lower())
        split = next((split for split, names in SPLIT_NAMES.items() if set(names) & set(words)), "train")
        found.setdefault(split, []).append(file)
    return found


def _by_split(tables: "DatasetDict", source: str) -> "dict[str, Dataset]":
    """Return the tables under our names of splits; a single one is train, whatever it is called."""
    found = {s: tables[name] for s, names in SPLIT_NAMES.items() for name in names if name in tables}
    if len(tables) == 1:
        found = {"train": next(iter(tables.values()))}
    if "train" not in found:
        raise MisconfigurationException(f"{source} has the splits {', '.join(tables)}; one of them must be train.")
    return found


def _columns(table: "Dataset", image_column: str | None, label_column: str | None, source: str) -> _Columns:
    """Return the columns of images and labels, found where they are not named."""
    from datasets import ClassLabel
    from datasets import Image as Images

    columns = list(table.features)
    there = f"{source} has the columns {', '.join(name for name in columns if not name.startswith('__'))}"
    label, *keys = (label_column or "").split(".")
    for option, column in (("image_column", image_column), ("label_column", label)):
        if column and column not in columns:
            raise MisconfigurationException(f"data.{option} is {column!r}; {there}.")
    image = image_column or next((name for name in columns if _holds_images(table.features[name])), None)
    label = label or next((name for name in LABEL_COLUMNS if name in columns), "")
    if image is None or not label:
        option, kind = ("image_column", "images") if image is None else ("label_column", "labels")
        raise MisconfigurationException(f"{there}, none of which is known to hold {kind}; name it with data.{option}.")
    values = list(table.select_columns([label])[label])
    if not keys and values and isinstance(values[0], dict):
        keys = [key for key in LABEL_KEYS if key in values[0]][:1]
    for key in keys:
        if not all(isinstance(value, dict) and key in value for value in values):
            raise MisconfigurationException(f"data.label_column is {label_column!r}; there is no {key!r} in {label}.")
        values = [value[key] for value in values]
    if values and isinstance(values[0], str):
        values = [value.strip() if isinstance(value, str) else value for value in values]
    if not values or not isinstance(values[0], int | str):
        raise MisconfigurationException(
            f"Column {label!r} of {source} holds {values[0] if values else 'nothing'!r:.60}; name the one that holds a "
            f"label, or `{label}.key`, with data.label_column."
        )
    feature = table.features[label]
    try:
        rows = table.select_columns([image]).cast_column(image, Images(decode=False))
    except Exception as error:
        raise MisconfigurationException(f"Column {image!r} of {source} holds no images; {there}.") from error
    classes = list(feature.names) if isinstance(feature, ClassLabel) and not keys else []
    return _Columns(rows, image, values, classes)


def _holds_images(feature: Any) -> bool:
    """Return whether a column holds images, also as other libraries write them to Parquet: bytes and a path."""
    from datasets import Image as Images

    return isinstance(feature, Images) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
