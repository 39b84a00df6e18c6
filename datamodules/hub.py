"""Images of the Hugging Face Hub or in its formats: VTAB's tasks as tar files, and any data set of one's own.

An Arrow copy below `root` gives random access, so that evaluation is exact for any number of processes. Images are
decoded when they are needed; no code of a data set is run.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from datamodules.base import Task
from datamodules.images import Images, as_labels, one_line, reading, to_rgb
from datamodules.splits import Percent
from datamodules.targets import Multiclass

if TYPE_CHECKING:  # importing it takes more than a second
    from datasets import Dataset, DatasetDict

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "json", "txt")
"""Columns of labels, in order of preference, where `label_column` is null."""
LABEL_KEYS = ("label", "cls", "class")  # Keys of labels in a column of JSON, in order of preference
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of each split in folders, file names and on the Hub."""
EMPTY: dict[str, Any] = {"bytes": b"", "path": None}  # what a cell without an image is read as


@dataclass(eq=False)
class HubImages(Images):
    """Images in a column of a table, still encoded (PNG, JPEG, WebP, ...); decoded on access."""

    rows: "Dataset"  # whose column holds the bytes of each image, or the path of its file
    column: str
    labels: Tensor

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.rows[index][self.column] or EMPTY
        with reading(cell["path"] or f"image {index}", "is not a readable image"):
            file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
            with Image.open(file) as image:
                return to_rgb(image)

    def subset(self, indices: Tensor) -> "HubImages":
        """Return the images at `indices`, in that order."""
        return HubImages(self.rows.select(indices.tolist()), self.column, self.labels[indices])

    def name(self, index: int) -> str:
        """Return the name of the image's file, or the image's index."""
        return (self.rows[index][self.column] or EMPTY)["path"] or f"image {index}"

    def digest(self) -> str:
        """Return a hash of every label and encoded image; of images in files, as `FileImages` does."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        for batch in self.rows.iter(256):
            for cell in batch[self.column]:
                content = (cell or EMPTY)["bytes"]
                if content is None:
                    status = Path(cell["path"]).stat()
                    digest.update(f"{cell['path']}|{status.st_size}|{status.st_mtime_ns}\n".encode())
                else:
                    digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()


class HubTask(Task):
    """A task of VTAB in the uniform format of the Hub's `clip-benchmark/wds_vtab-<task>`.

    `train/*.tar` and `test/*.tar` hold an image and a `.cls` for each sample, in VTAB's own splits and with lossless
    images. VTAB's validation split is not among them: validation is a seeded stratified tenth of train. The tar files
    may lie in `root`, or in the repository's folder below it; otherwise they are downloaded.
    """

    cut: ClassVar = {"val": Percent(10)}
    repository: str  # The repository's name on the Hub
    published: ClassVar[Sequence[str]] = ("train", "test")  # The splits that are taken from it

    def prepare_data(self) -> None:
        """Download what is not there yet, and make the copy with random access."""
        self._tables()

    def load(self) -> dict[str, Images]:
        """Return the images of the published splits.

        Raises:
            MisconfigurationException: If they cannot be had (the message says where to put them), or labels read.
        """
        source, tables = self._tables()
        images: dict[str, Images] = {}
        for split in self.published:
            rows, column, values, _ = _columns(tables[split], None, None, source)
            with reading(source, f"holds labels in {split} that are no numbers"):
                images[split] = HubImages(rows, column, self.relabel(as_labels(values)))
        return images

    def relabel(self, labels: Tensor) -> Tensor:
        """Return the class indices that published labels stand for."""
        return labels

    def _tables(self) -> "tuple[str, DatasetDict]":
        """Return the folder or repository that holds the tar files, and their tables."""
        folder, last = self.root / self.repository.partition("/")[2], self.published[-1]
        local = next((each for each in (folder, self.root) if any(each.glob(f"{last}/*.tar"))), None)
        source = str(local) if local else self.repository
        files = {split: f"{split}/*.tar" for split in self.published}
        advice = (
            f"put {' and '.join(files.values())} from https://huggingface.co/datasets/{self.repository} into {folder}, "
            f"or name the folder that holds {last}/ with --data.root"
        )
        return source, read_tables(source, self.root, self.name, advice, files)


class HuggingFaceImages(Task):
    """Any image-classification data set of the Hugging Face Hub or on disk (webdataset tars, Parquet, image folders).

    Of its splits train, validation and test, missing ones are a seeded stratified fifth of train each. Class names
    are the data set's own, or the sorted labels of train.

    Args:
        name: A data set of the Hub, for example `zalando-datasets/fashion_mnist`, or a folder.
        image_column: Column of images; null is the one that holds some.
        label_column: Column of labels, as `json.label` within JSON; null takes the first of the usual names.
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
        """Download what is not there yet, and make the copy with random access."""
        self._tables()

    def load(self) -> dict[str, Images]:
        """Return the splits that are there; a single one is train, whatever it is called.

        Raises:
            MisconfigurationException: If the data set or a column cannot be had, or a label never occurs in train.
        """
        tables = self._tables()
        found = {split: tables[name] for split, names in SPLIT_NAMES.items() for name in names if name in tables}
        if len(tables) == 1:
            found = {"train": next(iter(tables.values()))}
        if "train" not in found:
            raise MisconfigurationException(
                f"{self.source} has the splits {', '.join(tables)}; one of them must be train."
            )
        columns = {
            split: _columns(table, self.image_column, self.label_column, self.source) for split, table in found.items()
        }
        _, _, train_labels, names = columns["train"]
        values = list(range(len(names))) if names else sorted(set(train_labels) - {None})
        classes = names or [str(value) for value in values]
        self.target = Multiclass(classes)
        indices = {value: label for label, value in enumerate(values)}
        images: dict[str, Images] = {}
        for split, (rows, column, labels, _) in columns.items():
            unknown = [label for label in labels if label not in indices]
            if unknown:
                raise MisconfigurationException(
                    f"The {split} split of {self.source} holds the label {unknown[0]!r}; the classes of train are "
                    f"{', '.join(classes[:10])}{', ...' if len(values) > 10 else ''}."
                )
            images[split] = HubImages(rows, column, as_labels([indices[label] for label in labels]))
        return images

    def _tables(self) -> "DatasetDict":
        advice = "it must be a data set of the Hugging Face Hub or a folder"
        return read_tables(self.source, self.root, f"data.name is {self.source!r}, which", advice)


def read_tables(source: str, root: Path, what: str, advice: str, files: dict[str, str] | None = None) -> "DatasetDict":
    """Return the tables of a data set by split, with random access.

    `source` is a name on the Hub, where `files` may say which files are of each split, or a folder of webdataset tars,
    Parquet files or images by class. Downloads and copies go to `huggingface/` below `root`.

    Raises:
        MisconfigurationException: If it cannot be read, or not be had; then the message is of `what`, with `advice`.
    """
    import datasets

    cache, folder = root / "huggingface", Path(source).resolve()
    try:
        if not folder.is_dir():
            return datasets.load_dataset(source, data_files=files, cache_dir=str(cache))
        for kind, pattern in (("webdataset", "*.tar"), ("parquet", "*.parquet")):
            if found := _files_by_split(folder, pattern, cache.resolve()):
                return datasets.load_dataset(kind, data_files=found, cache_dir=str(cache))
        return datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache))
    except OSError as error:
        raise MisconfigurationException(f"{what} could not be had ({one_line(error)}); {advice}.") from error
    except Exception as error:  # readers raise many kinds for a damaged archive
        reason = error.__cause__ or error
        raise MisconfigurationException(f"{source} cannot be read ({one_line(reason)}).") from error


def _files_by_split(folder: Path, pattern: str, cache: Path) -> dict[str, list[str]]:
    """Return files by split, as a word in their folder or name says; files without such a word are train."""
    found: dict[str, list[str]] = {}
    for file in sorted(path for path in folder.rglob(pattern) if cache not in path.parents):
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        split = next((split for split, names in SPLIT_NAMES.items() if set(names) & set(words)), "train")
        found.setdefault(split, []).append(str(file))
    return found


def _columns(
    table: "Dataset", image_column: str | None, label_column: str | None, source: str
) -> "tuple[Dataset, str, list[Any], list[str]]":
    """Return the encoded images of a table, their column, labels and class names; columns given as None are found."""
    import datasets

    kinds = table.features
    there = f"{source} has the columns {', '.join(name for name in kinds if not name.startswith('__'))}"
    label, *keys = (label_column or "").split(".")
    for option, column in (("image_column", image_column), ("label_column", label)):
        if column and column not in kinds:
            raise MisconfigurationException(f"data.{option} is {column!r}; {there}.")
    encoded = [  # other libraries write images to Parquet as bytes and a path
        name
        for name, kind in kinds.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})
    ]
    image = image_column or (encoded[0] if encoded else "")
    label = label or next((name for name in LABEL_COLUMNS if name in kinds), "")
    if not image or not label:
        option, what = ("label_column", "labels") if image else ("image_column", "images")
        raise MisconfigurationException(f"{there}, none of which is known to hold {what}; name it with data.{option}.")
    values = list(table.select_columns([label])[label])
    if not keys and values and isinstance(values[0], dict):
        keys = [key for key in LABEL_KEYS if key in values[0]][:1]
    for key in keys:
        if not all(isinstance(value, dict) and key in value for value in values):
            raise MisconfigurationException(f"data.label_column is {label_column!r}; there is no {key!r} in {label}.")
        values = [value[key] for value in values]
    values = [value.strip() if isinstance(value, str) else value for value in values]
    if not values or not isinstance(values[0], int | str):
        raise MisconfigurationException(
            f"Column {label!r} of {source} holds {values[0] if values else 'nothing'!r:.60}; name the one that holds a "
            f"label, or `{label}.key`, with data.label_column."
        )
    with reading(f"Column {image!r} of {source}", f"holds no images; {there}"):
        rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    classes = list(kinds[label].names) if isinstance(kinds[label], datasets.ClassLabel) and not keys else []
    return rows, image, values, classes
