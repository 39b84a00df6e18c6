"""Images of the Hugging Face Hub or in its formats: VTAB's tasks as tar files, and any data set of one's own.

An Arrow copy below `root` gives random access, so that evaluation is exact for any number of processes. Images are
decoded when they are needed; no code of a data set is run.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.base import Task
from datamodules.columns import Part, find_columns, read_table
from datamodules.folders import ENDINGS, SPLIT_NAMES, by_split, files_below
from datamodules.images import FileImages, Images, as_labels, printable, reading
from datamodules.outputs import TARGETS, check_columns, of_columns
from datamodules.splits import Percent
from datamodules.streaming import streamed_tables
from datamodules.tables import Table, read_tables
from datamodules.targets import Multiclass


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
            part = read_table(tables[split], split, None, None, source)
            with reading(source, f"holds labels in {split} that are no numbers"):
                images[split] = part.images(self.relabel(as_labels(part.labels)))
        return images

    def relabel(self, labels: Tensor) -> Tensor:
        """Return the class indices that published labels stand for."""
        return labels

    def _tables(self) -> tuple[str, dict[str, Table]]:
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
    """Any image-classification data set of the Hugging Face Hub or on disk.

    On disk it is webdataset tars, Parquet files, what `save_to_disk` wrote, or images in a folder for each class. Of
    its splits train, validation and test, missing ones are a seeded stratified fifth of train each. Class names
    are the data set's own, or the sorted labels of train.

    Args:
        name: A data set of the Hub, for example `zalando-datasets/fashion_mnist`, or a folder.
        image_column: Column of images; null is the one that holds some.
        label_column: Column of labels, as `json.label` within JSON; null takes the first of the usual names. For
            `target` multilabel or regression a list of columns, a pattern of their names such as `tag_*`, or one
            that holds a number or a list in each row.
        streaming: Whether images are read where they are, in order, for `model.features` clean alone, and not
            downloaded or copied; of Parquet files and webdataset tars.
        **kwargs: See `Task`; downloads and a copy with random access go to `root`.
    """

    targets: ClassVar = (*Task.targets, *TARGETS)

    def __init__(
        self,
        name: str,
        image_column: str | None = None,
        label_column: str | list[str] | None = None,
        streaming: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_columns("label_column", label_column, self.asked)
        self.source = name
        self.image_column, self.label_column = image_column, label_column
        self.name = printable(Path(name).resolve().name) if Path(name).is_dir() else name.rpartition("/")[2]
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise MisconfigurationException(f"data.name is {name!r}, but there is no such folder.")
        if streaming and self.num_workers:
            raise MisconfigurationException(
                f"data.num_workers is {self.num_workers}, but with data.streaming each would read all; leave it null."
            )
        self.streaming = streaming
        self.num_workers = 0 if streaming else self.num_workers

    def prepare_data(self) -> None:
        """Download what is not there yet, and make the copy with random access; of what is streamed, read labels."""
        self._tables()

    def load(self) -> dict[str, Images]:
        """Return the splits that are there; a single one is train, whatever it is called.

        Raises:
            MisconfigurationException: If the data set or a column cannot be had, or a label never occurs in train.
        """
        tables = self._tables()
        named = {
            split: tables[name] for split, names in SPLIT_NAMES.items() for name in tables if name.lower() in names
        }
        if len(tables) == 1:
            (only,) = tables.values()
            named = {"train": only}
        numbers = self.asked in TARGETS
        parts = {
            split: read_table(table, split, self.image_column, self.label_column, self.source, numbers=numbers)
            for split, table in named.items()
        }
        if not tables and numbers:
            raise MisconfigurationException(
                f"{self.source} holds images by class, and data.target {self.asked} needs columns, as of a "
                f"metadata.csv beside the images."
            )
        if not tables:
            parts = _class_folders(Path(self.source))
        if "train" not in parts:
            raise MisconfigurationException(
                f"{self.source} has the splits {', '.join(tables or parts)}; one of them must be train."
            )
        self.origins = {split: part.origin for split, part in parts.items()}
        if numbers:
            self.target = target = of_columns(self.asked, {split: part.classes for split, part in parts.items()})
            return {split: part.images(torch.tensor(part.labels, dtype=target.dtype)) for split, part in parts.items()}
        names = parts["train"].classes
        values = list(range(len(names))) if names else sorted(set(parts["train"].labels))
        classes = names or [printable(str(value)) for value in values]
        self.target = Multiclass(classes)
        indices = {value: label for label, value in enumerate(values)}
        images: dict[str, Images] = {}
        for split, part in parts.items():
            unknown = [label for label in part.labels if label not in indices]
            if unknown:
                raise MisconfigurationException(
                    f"The {split} split of {self.source} holds the label {unknown[0]!r}; the classes of train are "
                    f"{', '.join(classes[:10])}{', ...' if len(values) > 10 else ''}."
                )
            images[split] = part.images(as_labels([indices[label] for label in part.labels]))
        return images

    def _tables(self) -> dict[str, Table]:
        advice = "it must be a data set of the Hugging Face Hub or a folder"
        where = (self.source, self.root, f"data.name is {self.source!r}, which", advice)
        numbers = self.asked in TARGETS
        columns = partial(find_columns, self.image_column, self.label_column, self.source, numbers)
        return streamed_tables(*where, columns) if self.streaming else read_tables(*where)


def _class_folders(folder: Path) -> dict[str, Part]:
    """Return the images of each split of a folder, `<class>/<image>` below whatever names the split."""
    images = files_below(folder, ENDINGS)
    depths = {len(file.parts): str(folder / file) for file in images}
    classes = {file.parent.name.lower() for file in images}
    if len(depths) > 1 or classes <= {"", *(name for names in SPLIT_NAMES.values() for name in names)}:
        raise MisconfigurationException(
            f"All images of {folder} must lie there as <class>/<image>, or all as <split>/<class>/<image>; there are "
            f"{' and '.join(map(printable, list(depths.values())[:2]))}."
        )
    found = by_split(images, lambda file: file.parts[:-2])
    if len(found) == 1:
        found = {"train": next(iter(found.values()))}
    return {
        split: Part(
            origin,
            labels=[file.parent.name for file in files],
            classes=[],
            images=partial(FileImages, folder, [file.as_posix() for file in files]),
        )
        for split, (files, origin) in found.items()
    }
