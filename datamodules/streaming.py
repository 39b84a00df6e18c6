"""Images that stay where they are, on the Hub or in files: read in order, some rows at a time, and never copied.

A first pass reads the labels, from which splits are cut as they are of a copy, and notes the row groups of the
files. An extraction, which goes through a split in order, then reads those that hold rows of it, one by one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.folders import by_split, visible
from datamodules.images import reading
from datamodules.row_groups import FORMATS, Cell, Format, RowGroup
from datamodules.tables import KINDS, Table, TableImages, card, files_by_split, naming_parts, obtaining

if TYPE_CHECKING:  # importing it takes more than a second
    from datasets import Dataset

READERS = 8  # Files of which labels are read at the same time
Choose = Callable[[Mapping[str, Any], str], tuple[str, list[str]]]
"""From the kinds of columns, and the key of a tar's first sample, to the column of images and those of labels."""
Found = dict[str, dict[str, tuple[list[str], str]]]
"""By kind of files and split: the paths of files, and what put them there."""


@dataclass(eq=False)
class Stream:
    """The encoded images of all rows of a published split."""

    name: str  # what messages call it
    system: Any  # the file system of `paths`, as of fsspec
    format: Format
    paths: Sequence[str]
    column: str  # of images
    held: dict[tuple[str, RowGroup], Future[list[Cell]]]  # of all streams of a data set together; two at most

    def __post_init__(self) -> None:
        files = [self.system.info(path) for path in self.paths]
        self.size = sum(file["size"] for file in files)  # in bytes
        known = [(Path(file["name"]).name, file["size"], file.get("blob_id") or file["mtime"]) for file in files]
        self.identity = json.dumps([self.column, known])
        """Changes when the files do, wherever they are."""
        self._thread = ThreadPoolExecutor(1)  # reads the next row group while the backbone is at this one

    def read_labels(self, kinds: Mapping[str, Any], directory: Path) -> "Dataset":
        """Return the rows with columns of labels, of such kinds, and images without bytes; learn the row groups.

        What is found is kept in `directory`, where other processes and runs find it.
        """
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq

        about = json.dumps([self.identity, {name: repr(kind) for name, kind in kinds.items()}])
        kept = directory / f"{hashlib.blake2b(about.encode(), digest_size=16).hexdigest()}.parquet"
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                size = f"{len(self.paths)} files of {self.size / 1e6:,.1f} MB together"
                rank_zero_info(f"Reading the labels of {self.name} ({size}); images are streamed.")
                with ThreadPoolExecutor(READERS) as pool:
                    found = list(pool.map(partial(self._labels, kinds), self.paths))
                table = pa.concat_tables([table for table, _ in found], promote_options="permissive")
                groups = [(file, *group) for file, (_, groups) in enumerate(found) for group in groups]
                metadata = {**(table.schema.metadata or {}), b"row groups": json.dumps(groups).encode()}
                pq.write_table(table.replace_schema_metadata(metadata), written := kept.with_suffix(".tmp"))
                written.replace(kept)
        table = pq.read_table(kept)
        self.groups = [(file, RowGroup(*group)) for file, *group in json.loads(table.schema.metadata[b"row groups"])]
        self.ends = np.cumsum([group.rows for _, group in self.groups])
        return datasets.Dataset(table)

    def _labels(self, kinds: Mapping[str, Any], path: str) -> tuple[Any, list[RowGroup]]:
        import pyarrow as pa

        with self.system.open(path, "rb", **self.format.buffering) as file:
            table, names, groups = self.format.labels(file, path, kinds, self.column)
        cells = [pa.array([b""] * len(names), pa.binary()), pa.array(names, pa.string())]
        return table.append_column(self.column, pa.StructArray.from_arrays(cells, ["bytes", "path"])), groups

    def ask(self, row: int) -> tuple[Future[list[Cell]], range]:
        """Let the row group that holds a row be read, unless it is held; return its images to come, and its rows."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        file, group = self.groups[number]
        key = (self.paths[file], group)
        if key not in self.held:
            if len(self.held) > 1:
                del self.held[next(iter(self.held))]
            self.held[key] = self._thread.submit(self._read, *key)
        return self.held[key], range(int(self.ends[number]) - group.rows, int(self.ends[number]))

    def _read(self, path: str, group: RowGroup) -> list[Cell]:
        with reading(path, "cannot be streamed"), self.system.open(path, "rb", cache_type="none") as opened:
            return self.format.cells(opened, group, self.column)


@dataclass(eq=False)
class StreamedImages(TableImages):
    """Images at some places of a stream; their `rows` hold no bytes."""

    stream: Stream
    places: Tensor  # ascending, shape (n,)
    next_ones: dict[int, Cell] = field(default_factory=dict)

    def ahead(self, indices: Sequence[int]) -> None:
        """Read these images, and meanwhile let the row group be read that is needed after each one's own."""
        self.next_ones = {}
        for index in indices:
            found, rows = self.stream.ask(int(self.places[index]))
            self.next_ones[index] = found.result()[int(self.places[index]) - rows.start]
            after = int(torch.searchsorted(self.places, rows.stop))
            if after < len(self):
                self.stream.ask(int(self.places[after]))

    def cell(self, index: int) -> Cell:
        """Return an image as it is stored; refuse a row without one."""
        if index not in self.next_ones:
            self.ahead([index])
        cell = self.next_ones[index]
        if cell["bytes"] is None:
            raise MisconfigurationException(
                f"Row {self.places[index]} (from 0) of {self.stream.name} has no {self.column!r} in the file itself, "
                f"where data.streaming needs it."
            )
        return cell

    def subset(self, indices: Tensor) -> "StreamedImages":
        """Return the images at `indices`, in that order."""
        rows, labels = self.rows.select(indices.tolist()), self.labels[indices]
        return StreamedImages(rows, self.column, self.home, labels, self.stream, self.places[indices])

    def digest(self) -> str:
        """Return a hash of every label, of the places, and of what tells whether the files are still the same."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        digest.update(self.places.numpy().tobytes() + self.stream.identity.encode())
        return digest.hexdigest()


def streamed_tables(source: str, root: Path, what: str, advice: str, choose: Choose) -> dict[str, Table]:
    """Return the tables of a data set by split, as `read_tables` does, with images that are streamed.

    Labels are read the first time, and kept in `huggingface/streaming/` below `root`.

    Raises:
        MisconfigurationException: If it cannot be read, or not be had, or is not in Parquet files or tars.
    """
    cache, folder = root / "huggingface", Path(source).resolve()
    with obtaining(source, what, advice):
        found, system, declared = _in_folder(folder, cache) if folder.is_dir() else _on_the_hub(source, cache)
        kind = next((kind for kind in FORMATS if found.get(kind)), None)
        if kind is None:
            raise MisconfigurationException(
                f"data.streaming is true, but {source} holds no Parquet files and no webdataset tars, which alone are "
                f"streamed; set it false."
            )
        with system.open(next(iter(found[kind].values()))[0][0], "rb", cache_type="none") as file:
            kinds, key = FORMATS[kind]().columns(file)
        kinds = declared or kinds
        image, labels = choose(kinds, key)
        tables: dict[str, Table] = {}
        held: dict[Any, Any] = {}
        for split, (paths, origin) in found[kind].items():
            stream = Stream(f"{split} of {source}", system, FORMATS[kind](), paths, image, held)
            rows = stream.read_labels({label: kinds[label] for label in labels}, cache / "streaming")
            images = partial(StreamedImages, stream=stream, places=torch.arange(len(rows)))
            tables[split] = Table(rows, origin, folder, images)
    return tables


def _in_folder(folder: Path, cache: Path) -> tuple[Found, Any, None]:
    """Return the files of a folder, and their file system; they declare their columns themselves."""
    import fsspec

    found = {kind: files_by_split(folder, kind, KINDS[kind], cache.resolve()) for kind in FORMATS}
    return _paths(found, f"{folder}/"), fsspec.filesystem("file"), None


def _on_the_hub(source: str, cache: Path) -> tuple[Found, Any, Any]:
    """Return the files of a repository, their file system, and the columns that the repository declares, or None."""
    import datasets
    from huggingface_hub import HfFileSystem

    system, (commit, declares) = HfFileSystem(), card(source)
    if declares:
        builder = datasets.load_dataset_builder(source, cache_dir=str(cache))
        splits = {str(split): ([*paths], f"split {split}") for split, paths in builder.config.data_files.items()}
        return {builder.name: splits}, system, builder.info.features
    prefix = f"datasets/{source}@{commit}/"
    every = sorted(Path(path.removeprefix(prefix)) for path in system.find(prefix))
    seen = [path for path in every if visible(path.parts) == [*path.parts]]
    below = {kind: [path for path in seen if path.name.lower().endswith(KINDS[kind])] for kind in FORMATS}
    return _paths({kind: by_split(files, naming_parts) for kind, files in below.items()}, prefix), system, None


def _paths(found: Mapping[str, Mapping[str, tuple[Sequence[Path], str]]], prefix: str) -> Found:
    return {
        kind: {split: ([f"{prefix}{file.as_posix()}" for file in files], why) for split, (files, why) in parts.items()}
        for kind, parts in found.items()
    }
