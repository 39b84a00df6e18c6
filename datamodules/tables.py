"""Tables of images and labels, as `datasets` reads them from the Hub or from files, with random access."""

import contextlib
import glob
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
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

KINDS = {"webdataset": (".tar",), "parquet": (".parquet",), "imagefolder": ("metadata.csv", "metadata.jsonl")}
"""What `datasets` calls a folder, by the files that make it one."""


@dataclass(eq=False)
class TableImages(Images):
    """Images in a column of a table, still encoded (PNG, JPEG, WebP, ...); decoded on access."""

    rows: "Dataset"  # whose column holds the bytes of each image, or the path of its file
    column: str
    home: Path  # where those paths begin
    labels: Tensor

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.cell(index)
        with reading(self._name(cell, index), "is not a readable image"):
            file = self.home / cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
            with Image.open(file) as image:
                return to_rgb(image)

    def cell(self, index: int) -> dict[str, Any]:
        """Return an image as it is stored: its `bytes`, or None, and the `path` of its file, or None."""
        return self.rows[index][self.column]

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


class Table(NamedTuple):
    """The rows of a split."""

    rows: "Dataset"
    origin: str  # what put them there
    home: Path  # where the paths of images in cells begin
    images: Callable[..., Images] = TableImages  # of the cells, their column, `home` and labels


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

    cache, folder = root / "huggingface", Path(source).resolve()
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    with obtaining(source, what, advice):
        repository = None if folder.is_dir() or files else _as_a_folder(source)
        folder = repository or folder
        if saved or not folder.is_dir():
            load = partial(datasets.load_dataset, source, data_files=files, cache_dir=str(cache))
            found: Any = datasets.load_from_disk(str(folder)) if saved else load()
            found = found if isinstance(found, dict) else {"train": found}
            return {split: Table(rows, f"split {split}", folder) for split, rows in found.items()}
        for kind, endings in KINDS.items():
            if parts := files_by_split(folder, kind, endings, cache.resolve()):
                return _load(kind, folder, parts, cache)
        if not files_below(folder, ENDINGS):
            raise FileNotFoundError("it holds no tars, no Parquet files and no images")
        images = by_split(files_below(folder, ENDINGS), _folders)
        return _load("imagefolder", folder, images, cache) if repository else {}


@contextlib.contextmanager
def obtaining(source: str, what: str, advice: str) -> Iterator[None]:
    """Turn any error into a MisconfigurationException of one line: of `what`, with `advice`, if it is not to be had."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
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
    from huggingface_hub import snapshot_download

    if card(source)[1]:
        return None
    endings = (*ENDINGS, *(ending for endings in KINDS.values() for ending in endings))
    patterns = [f"*{name}" for ending in endings for name in (ending, ending.upper())]
    folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    return (
        folder if folder.is_dir() and files_below(folder, endings) else None
    )  # archives of another kind, which `datasets` unpacks


def card(source: str) -> tuple[str, bool]:
    """Return the commit of a repository of the Hub, and whether its card declares splits."""
    from huggingface_hub import DatasetCard, snapshot_download

    folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns="README.md"))
    file = folder / "README.md"
    return folder.name, file.is_file() and bool(DatasetCard.load(file).data.to_dict().get("configs"))


def files_by_split(folder: Path, kind: str, endings: Sequence[str], cache: Path) -> dict[str, tuple[list[Path], str]]:
    """Return the files of each split, and what put them there."""
    found = [file for file in files_below(folder, endings) if cache not in (folder / file).parents]
    if kind == "imagefolder":  # metadata say what each image is, and folders alone of which split it is
        return by_split([*found, *files_below(folder, ENDINGS)] if found else [], _folders)
    return by_split(found, naming_parts)


def naming_parts(file: Path) -> Sequence[str]:
    """Return the parts of the path of a tar or Parquet file that may name its split."""
    return (*file.parts[:-1], file.stem)


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
