"""Tasks whose data are downloaded as published: each file once, checked by its MD5 sum, and unpacked.

A file that is missing, damaged or not what a task expects ends in a MisconfigurationException that names it.
"""

import codecs
import pickle
import shutil
import tarfile
import zipfile
from abc import abstractmethod
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy._core.multiarray import _reconstruct
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url

from datamodules.base import Task
from datamodules.images import FileImages, Images, as_labels, one_line, reading
from datamodules.targets import Multiclass


class Download(NamedTuple):
    """One published file, called on disk as in its address, and what is unpacked beside it."""

    url: str
    md5: str | None  # None where none is published
    unpacks: str | None = None  # folder in the archive (`.`: files lie at its top); None for a file read as it is
    within: str | None = None  # an archive in the archive that holds that folder, if there is one
    contents: Sequence[Sequence[str]] = ()  # names and MD5 sums of files in that folder, as far as they are published

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]

    def missing(self, folder: Path) -> Path | None:
        """Return a file or folder that `folder` lacks, or that is not as published; None where all are there."""
        if self.unpacks is None:
            return None if _is_intact(folder / self.file, self.md5) else folder / self.file
        unpacked = folder / self.unpacks
        if self.unpacks != "." and not unpacked.is_dir():
            return unpacked
        return next((unpacked / name for name, md5 in self.contents if not _is_intact(unpacked / name, md5)), None)

    def fetch(self, folder: Path) -> None:
        """Download the file to `folder` where it is not there yet, check it and unpack it."""
        download_url(self.url, folder, self.file, self.md5)
        if self.unpacks is not None:
            unpack(folder / self.file, self.unpacks, self.within)


class DownloadedTask(Task):
    """A task whose images are downloaded to `root` on first use; a concrete one lists the files and reads them."""

    target: Multiclass
    downloads: ClassVar[Sequence[Download]] = ()  # The published files
    subfolder: ClassVar[str] = ""  # Folder below `root` that they are downloaded to, as torchvision does

    @abstractmethod
    def read(self) -> dict[str, Images]:
        """Read train and what else is published of val and test; all files are there."""

    @property
    def folder(self) -> Path:
        """Where the published files are downloaded to and unpacked."""
        return self.root / self.subfolder

    def prepare_data(self) -> None:
        """Download what is not there yet; a lock makes other processes wait that use the same folder.

        A MisconfigurationException is raised if that fails; the message says which files to put where.
        """
        missing = self._missing()
        if missing is None:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.name}.lock"):
                for download in self.downloads:
                    if left := download.missing(self.folder):
                        missing = left
                        download.fetch(self.folder)
        except (OSError, RuntimeError, HTTPException) as error:
            raise self._refusal(missing, f" and could not be downloaded ({one_line(error)})") from error

    def load(self) -> dict[str, Images]:
        """Return the published splits, if all files are there as they were published."""
        if missing := self._missing():
            raise self._refusal(missing)
        return self.read()

    def class_indices(self, values: Sequence[int] | np.ndarray, file: Path, first: int = 0) -> Tensor:
        """Return class indices, shape (n,), of the numbers in `file`, where the first class has the number `first`."""
        labels = as_labels(values) - first
        if not len(labels):
            raise MisconfigurationException(f"{file} holds no labels.")
        outside = labels[(labels < 0) | (labels >= self.target.outputs)]
        if len(outside):
            raise MisconfigurationException(
                f"{file} holds the label {outside[0] + first}; the classes of {self.name} are {first} to "
                f"{self.target.outputs - 1 + first}."
            )
        return labels

    def named_class_indices(self, names: Sequence[str], file: Path, classes: Sequence[str] | None = None) -> Tensor:
        """Return class indices, shape (n,), of the class names in `file`, which may name `classes` otherwise."""
        if not names:
            raise MisconfigurationException(f"{file} holds no images.")
        indices = {name: index for index, name in enumerate(classes or self.target.classes)}
        for name in names:
            if name not in indices:
                raise MisconfigurationException(f"{file} names the class {name!r}, which {self.name} has not.")
        return as_labels([indices[name] for name in names])

    def class_folders(self, folder: Path, classes: Sequence[str] | None = None) -> FileImages:
        """Return the images of a folder of classes, `<class>/<image>`, in the order of their names."""
        found = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMG_EXTENSIONS)
        labels = self.named_class_indices([path.parent.name for path in found], folder, classes)
        return FileImages(folder, [str(path.relative_to(folder)) for path in found], labels)

    def read_class_names(self, file: Path, number: int) -> list[str]:
        """Return the class names in a file, one per line; there must be `number` of them."""
        names = [line.strip() for line in read_lines(file) if line.strip()]
        if len(names) != number:
            raise MisconfigurationException(f"{file} names {len(names)} classes; {self.name} has {number}.")
        return names

    def _missing(self) -> Path | None:
        return next((missing for download in self.downloads if (missing := download.missing(self.folder))), None)

    def _refusal(self, missing: Path, reason: str = "") -> MisconfigurationException:
        files = ", ".join(f"{download.file} from {download.url}" for download in self.downloads)
        return MisconfigurationException(
            f"{missing} is missing or altered{reason}; put {files} into {self.folder}, or name the folder that holds "
            f"{missing.relative_to(self.root).parts[0]} with --data.root."
        )


def listed_images(folder: Path, names: Sequence[str], labels: Tensor) -> FileImages:
    """Return the images of a folder that a list names; all must be there."""
    for name in names:
        if not (folder / name).is_file():
            raise MisconfigurationException(
                f"{folder / name} is missing; delete {folder} to have it unpacked or downloaded again."
            )
    return FileImages(folder, names, labels)


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file."""
    with reading(file):
        return file.read_text(encoding="utf-8").splitlines()


def read_matlab(file: Path, name: str) -> np.ndarray:
    """Return a variable of a MATLAB file."""
    from scipy.io import loadmat  # here, as few tasks need what takes half a second to import

    with reading(file):
        return loadmat(file)[name]


def read_pickle(path: Path) -> Any:
    """Return the content of a pickle of NumPy arrays; one that holds code is refused, and the code never run.

    Strings of Python 2 are decoded as Latin-1, as NumPy's bytes need.
    """
    with reading(path), path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, as old and new versions of NumPy pickle them, and Python's own containers, nothing else."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds code, {f'{module}.{name}'!r}, which is never run")
        return self.ALLOWED[module, name]


def unpack(archive: Path, folder: str, within: str | None = None) -> None:
    """Unpack one folder of a tar or zip archive beside it; `within` is an archive in the archive that holds it.

    It is unpacked under another name and then renamed, so that a folder of that name is complete; in one that is there
    already, files are replaced. Only regular files are unpacked, no links and no devices; an archive that holds a file
    which belongs outside is refused.
    """
    if not hasattr(tarfile, "data_filter"):
        raise MisconfigurationException(
            f"This Python cannot unpack archives safely; take 3.11.4 or later, or unpack {archive} in {archive.parent}."
        )
    part, target = archive.with_name(f"{folder.replace('/', '_')}.part"), archive.parent / folder
    shutil.rmtree(part, ignore_errors=True)
    try:
        with reading(archive, "cannot be unpacked"):
            _extract(archive, part)
            if within:
                _extract(part / within, part)
            if target.is_dir():
                for file in (part / folder).iterdir():
                    file.replace(target / file.name)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                (part / folder).rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    """Unpack the regular files of an archive into a folder; raise if one would be written outside."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as members:
            outside = next((name for name in members.namelist() if ".." in Path(name).parts or name[:1] == "/"), None)
            if outside:
                raise zipfile.BadZipFile(f"it holds {outside!r}, which belongs outside")
            members.extractall(folder)  # a link in a zip comes out as a small file
        return
    with tarfile.open(archive) as members:
        members.extractall(folder, (member for member in members if member.isfile()), filter="data")


def _is_intact(path: Path, md5: str | None) -> bool:
    try:
        return check_integrity(path, md5)
    except OSError:
        return False
