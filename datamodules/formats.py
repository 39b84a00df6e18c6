"""Open NumPy, safetensors, torch, HDF5, Arrow, Parquet, JSON lines and text files; nothing pickled is loaded.

A file or array that is not there, damaged or of another kind ends in a MisconfigurationException that names it.
"""

import fnmatch
import functools
import glob
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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


class Stacked:
    """Matrices of one width below each other; rows are copied only when they are read, so that mapped files stay so."""

    ndim = 2

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size((int(self.ends[-1]), parts[0].shape[1]))
        types = {part.dtype for part in parts}
        self.dtype = types.pop() if len(types) == 1 else torch.float32

    def __len__(self) -> int:
        return self.shape[0]

    def index_select(self, _: int, rows: Tensor) -> Tensor:
        """Return the rows at these places, shape (b, D), as a tensor does for dimension 0."""
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        which = torch.bucketize(rows, self.ends, right=True)
        for place in which.unique().tolist():
            its, part = which == place, self.parts[place]
            found[its] = part.index_select(0, rows[its] - self.ends[place] + len(part)).to(self.dtype)
        return found


Matrix = Tensor | Stacked


def parts_of(path: Path) -> list[Path]:
    """Return the files that a path stands for: one, those of a folder, or those that a pattern with * matches.

    Several are of one format, in the order of the numbers in their names. None that is not there, or of no known
    format, is opened: a MisconfigurationException says so.
    """
    found = [path]
    if path.is_dir():
        found = [each for each in path.iterdir() if each.suffix in READERS and not each.name.startswith(".")]
    elif "*" in path.name:
        found = list(path.parent.glob(path.name))
    kinds = sorted({each.suffix for each in found})
    known = ", ".join(READERS)
    if not found:
        raise MisconfigurationException(f"{path} holds no files of vectors; give one of {known}.")
    if len(kinds) > 1:
        raise MisconfigurationException(
            f"{path} holds files of several formats ({', '.join(kinds)}); name one kind with a pattern, as "
            f"'{path / f'*{kinds[0]}'}'."
        )
    if kinds[0] not in READERS:
        raise MisconfigurationException(f"{path} is of no known format; give one of {known}.")
    if not found[0].is_file():
        raise MisconfigurationException(f"There is no file {path}.")
    return sorted(found, key=lambda each: [int(word) if word.isdigit() else word for word in NUMBER.split(each.name)])


NUMBER = re.compile(r"(\d+)")


def is_on_hub(root: Path) -> bool:
    """Return whether this is no folder, but may be the name of a data set of the Hugging Face Hub."""
    return not root.is_dir() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)))


def downloaded(root: Path, *further: str) -> Path:
    """Return a folder, or that of a data set of the Hub, of which files of `READERS` and those that match are there.

    A MisconfigurationException is raised if it cannot be had.
    """
    if not is_on_hub(root):
        return root
    from huggingface_hub import snapshot_download

    wanted = [*(f"*{ending}" for ending in READERS), *further]
    with reading(f"data.root is {root}, which", "is no folder and cannot be had from the Hub"):
        return Path(snapshot_download(str(root), repo_type="dataset", allow_patterns=wanted))


def open_arrays(path: Path) -> Arrays:
    """Return the names of the arrays in a file, or in parts of one, and a function that reads one of them."""
    opened = {}
    for file in parts_of(path):
        with reading(file):
            opened[file] = READERS[file.suffix](file)
    first, *others = opened.values()

    def read(name: str) -> Any:
        found = []
        for file, arrays in opened.items():
            with reading(f"{name!r} of {file}" if name else file):
                found.append(arrays.read(name))
        return _joined(found, list(opened))

    return first._replace(read=read) if others else first


def as_tensor(matrix: Any, file: Path) -> Tensor:
    """Return numbers as they are stored, mapped where they were, of one of the types `INDEXED`."""
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind in NUMBERS:
        kind = matrix.dtype.newbyteorder("=") if matrix.itemsize <= 8 else np.float64
        matrix = torch.from_numpy(np.ascontiguousarray(matrix, kind))  # stays mapped where nothing changes
    if not isinstance(matrix, Tensor) or matrix.is_complex():
        kind = str(matrix.dtype).removeprefix("torch.")
        raise MisconfigurationException(f"The vectors of {file} are of type {kind}; they must be numbers.")
    return matrix if matrix.dtype in INDEXED else matrix.float()


def _joined(arrays: Sequence[Any], files: Sequence[Path]) -> Any:
    """Return the arrays of parts below each other."""
    width = np.shape(arrays[0])[1:]
    for file, array in zip(files, arrays, strict=True):
        if np.shape(array)[1:] != width:
            raise MisconfigurationException(
                f"{file} holds rows of shape {tuple(np.shape(array)[1:])}, those of {files[0]} have {tuple(width)}."
            )
    if len(width) == 1 and width[0] > 1:
        return Stacked([as_tensor(array, file) for array, file in zip(arrays, files, strict=True)])
    return np.concatenate([array.numpy() if isinstance(array, Tensor) else array for array in arrays])


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


def _hdf5(file: Path) -> Arrays:
    try:
        import h5py
    except ImportError as error:
        raise MisconfigurationException(
            f"{file} needs h5py, which is not installed; `pip install 'diffused-redundancy[hdf5]'` does it."
        ) from error
    content, names = h5py.File(file), []
    content.visititems(lambda name, each: names.append(name) if isinstance(each, h5py.Dataset) else None)

    def read(name: str) -> np.ndarray:
        array = content[name]
        offset = array.id.get_offset()  # of what lies in one piece, not compressed
        if array.dtype.kind in NUMBERS and offset is not None and not content.userblock_size:
            return np.memmap(file, array.dtype, "c", offset, array.shape)
        return array.asstr()[()].astype(np.str_) if h5py.check_string_dtype(array.dtype) else array[()]

    return Arrays(names, read)


def _arrow_file(file: Path) -> Arrays:
    """Open an Arrow file, which Feather is, too, or stream, as `datasets` writes."""
    source = pyarrow.memory_map(str(file))
    try:
        table = pyarrow.ipc.open_file(source).read_all()
    except pyarrow.ArrowInvalid:
        source.seek(0)
        table = pyarrow.ipc.open_stream(source).read_all()
    return _table(file, table.column_names, table.select)


def _json_lines(file: Path) -> Arrays:
    table = pyarrow.json.read_json(file, pyarrow.json.ReadOptions(block_size=2**24))
    return _table(file, table.column_names, table.select)


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
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".parquet": _parquet,
    ".arrow": _arrow_file,
    ".feather": _arrow_file,
    ".jsonl": _json_lines,
    ".csv": _text,
    ".tsv": _text,
}
"""Formats by ending; a new one is a function above and an entry here."""
SEVERAL = tuple(ending for ending in READERS if ending != ".npy")  # Formats that can hold several arrays by name
