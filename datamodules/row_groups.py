"""Files that are read some rows at a time: Parquet files by row group, webdataset tars by samples beside each other."""

import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

TOGETHER = 2**23  # Bytes of a tar that are read together; the last sample may go beyond
Cell = dict[str, Any]
"""The `bytes` of an image, or None, and the `path` that its table knows it by, or None."""
Sample = tuple[str, int, dict[str, bytes | None]]
"""A sample of a tar: its key, its first byte in the tar, and its contents by ending, None where they are not wanted."""


class RowGroup(NamedTuple):
    """Rows of a file that are read together: of Parquet its row groups, of a tar samples beside each other."""

    start: int  # the number of the row group, or the first byte in the tar
    stop: int  # the number of the next row group, or the byte after the last
    rows: int


Labels = tuple[Any, list[str | None], list[RowGroup]]
"""Columns of labels, as an Arrow table, the path of each image or None, and the row groups of a file."""


class Format(ABC):
    """How the files of one format are read, opened by fsspec as binary files with random access."""

    buffering: Mapping[str, Any] = {}
    """How a file is opened of which labels are read."""

    @abstractmethod
    def columns(self, file: Any) -> tuple[dict[str, Any], str]:
        """Return the kinds of columns, as `datasets` has them or None where rows say it, and a tar's first key."""

    @abstractmethod
    def labels(self, file: Any, path: str, kinds: Mapping[str, Any], image: str) -> Labels:
        """Return the columns of labels, of these kinds, the path of each image or None, and the row groups of the file.

        `path` is what the file is called in messages.
        """

    @abstractmethod
    def cells(self, file: Any, group: RowGroup, image: str) -> list[Cell]:
        """Return the images of a row group."""


class Parquet(Format):
    """Parquet files: only the columns that are asked for are read."""

    buffering: Mapping[str, Any] = {"cache_type": "none"}  # what lies between the columns is not read along

    def __init__(self) -> None:
        self._footer: tuple[str, Any] = ("", None)  # of the file of which images were read last

    def columns(self, file: Any) -> tuple[dict[str, Any], str]:
        """Return what the file declares; there are no keys."""
        import datasets
        import pyarrow.parquet as pq

        return datasets.Features.from_arrow_schema(pq.read_schema(file)), ""

    def labels(self, file: Any, path: str, kinds: Mapping[str, Any], image: str) -> Labels:
        """Return the labels, cast to their kinds, of every row group."""
        import datasets
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
        from datasets.table import table_cast

        parquet = pq.ParquetFile(file, pre_buffer=True)  # columns that lie together are read at once
        table = parquet.read([*kinds, f"{image}.path"])
        there = image in table.column_names  # as bytes with a path, and not as bytes alone
        names = pc.struct_field(table[image], "path").to_pylist() if there else [None] * len(table)
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        groups = [RowGroup(place, place + 1, number) for place, number in enumerate(rows)]
        return table_cast(table.select([*kinds]), datasets.Features(kinds).arrow_schema), names, groups

    def cells(self, file: Any, group: RowGroup, image: str) -> list[Cell]:
        """Return the images of a row group."""
        import datasets
        import pyarrow.parquet as pq

        if self._footer[0] != file.path:
            self._footer = (file.path, pq.read_metadata(file))
        column = pq.ParquetFile(file, metadata=self._footer[1]).read_row_group(group.start, [image])[image]
        return datasets.Image().cast_storage(column.combine_chunks()).to_pylist()


class Tars(Format):
    """Webdataset tars, where labels lie between the images: all of a file is read for them, in order."""

    def columns(self, file: Any) -> tuple[dict[str, Any], str]:
        """Return what the first sample has."""
        import datasets

        with tarfile.open(fileobj=file, mode="r:") as archive:
            key, _, found = next(_samples(archive))
        return {
            "__key__": None,
            **{name: datasets.Image() if each is None else None for name, each in found.items()},
        }, key

    def labels(self, file: Any, path: str, kinds: Mapping[str, Any], image: str) -> Labels:
        """Return the labels of every sample, each as its ending says; refuse one that lacks its image or label."""
        import datasets
        import pyarrow as pa
        from datasets.packaged_modules.webdataset.webdataset import WebDataset
        from datasets.table import table_cast

        decoders = {name: WebDataset.DECODERS.get(name.rsplit(".", 1)[-1].lower(), bytes) for name in kinds}
        rows: list[dict[str, Any]] = []
        starts: list[tuple[int, int]] = []  # of each row group: its first byte, and how many samples come before it
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for key, start, contents in _samples(archive):
                if lacking := {image, *kinds} - contents.keys():
                    raise MisconfigurationException(
                        f"Sample {key} of {path} has no {min(lacking)!r}; every one needs an image and a label, under "
                        f"the same endings."
                    )
                if not starts or start - starts[-1][0] >= TOGETHER:
                    starts.append((start, len(rows)))
                rows.append({"__key__": key, **{name: decode(contents[name]) for name, decode in decoders.items()}})
            ends = [*starts[1:], (archive.offset, len(rows))]
        groups = [
            RowGroup(start, stop, after - before) for (start, before), (stop, after) in zip(starts, ends, strict=True)
        ]
        table = pa.Table.from_pylist(rows)
        known = {name: kind for name, kind in kinds.items() if kind is not None}
        schema = datasets.Features({**datasets.Features.from_arrow_schema(table.schema), **known}).arrow_schema
        return table_cast(table, schema), [f"{row['__key__']}.{image}" for row in rows], groups

    def cells(self, file: Any, group: RowGroup, image: str) -> list[Cell]:
        """Return the images of samples beside each other, by one read."""
        file.seek(group.start)
        with tarfile.open(fileobj=io.BytesIO(file.read(group.stop - group.start)), mode="r:") as archive:
            samples = _samples(archive, lambda ending: ending == image)
            return [{"bytes": found[image], "path": f"{key}.{image}"} for key, _, found in samples]


FORMATS: dict[str, type[Format]] = {"webdataset": Tars, "parquet": Parquet}
"""By what `datasets` calls a folder of such files; of a folder that holds both kinds the first is read."""


def _samples(archive: tarfile.TarFile, wanted: Callable[[str], bool] | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar, told apart as `datasets` does; contents are `wanted` by their endings.

    Where it is None, contents of all but images are.
    """
    from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

    wanted = wanted or (lambda ending: ending.rsplit(".", 1)[-1].lower() not in WebDataset.IMAGE_EXTENSIONS)
    begun: Sample | None = None
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # otherwise the archive would keep all
        key, ending = base_plus_ext(member.name)
        if key is None or not member.isreg() or PurePath(member.name).name.startswith((".", "__")):
            continue
        if begun and begun[0] != key:
            yield begun
            begun = None
        begun = begun or (key, member.offset, {})
        begun[2][ending] = archive.extractfile(member).read() if wanted(ending) else None  # type: ignore[union-attr]
    if begun:
        yield begun
