"""Tasks whose data are downloaded as published: each file once, checked by its MD5 sum, and unpacked."""

import shutil
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url

from datamodules.base import Task
from datamodules.images import FileImages, Images, as_labels, one_line
from datamodules.targets import Multiclass


class Download(NamedTuple):
    """One published file, and what is unpacked from it."""

    url: str
    md5: str | None
    """None where none is published."""
    file: Path
    """Where it is downloaded to."""
    unpacks: str | None = None
    """The folder in the archive, unpacked beside it (`.` if files lie at its top); None for a file read as it is."""
    within: str | None = None
    """An archive in the archive that holds that folder, if there is one."""
    contents: Sequence[Sequence[str]] = ()
    """Names and MD5 sums of files in that folder, as far as they are published."""

    def missing(self) -> Path | None:
        """Return a file or folder that is missing or not as published; None where all are there."""
        if self.unpacks is None:
            return None if _is_intact(self.file, self.md5) else self.file
        folder = self.file.parent / self.unpacks
        if self.unpacks != "." and not folder.is_dir():
            return folder
        return next((folder / name for name, md5 in self.contents if not _is_intact(folder / name, md5)), None)

    def fetch(self) -> None:
        """Download the file where it is not there yet, check it and unpack it."""
        download_url(self.url, self.file.parent, self.file.name, self.md5)
        if self.unpacks is not None:
            unpack(self.file, self.unpacks, self.within)


class DownloadedTask(Task):
    """A task whose images are downloaded to `root` on first use.

    A concrete one lists in `downloads` the published files, and reads them in `read`.
    """

    target: Multiclass

    @abstractmethod
    def downloads(self) -> Sequence[Download]:
        """Return the published files; all of them go into one folder."""

    @abstractmethod
    def read(self) -> dict[str, Images]:
        """Read train and what else is published of val and test; all files are there."""

    def prepare_data(self) -> None:
        """Download what is not there yet; a lock makes other processes wait that use the same folder.

        Raises:
            MisconfigurationException: If that fails; the message says which files belong where.
        """
        missing = self._missing()
        if missing is None:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.name}.lock"):
                for download in self.downloads():
                    if left := download.missing():
                        missing = left
                        download.fetch()
        except (OSError, RuntimeError, HTTPException) as error:
            raise MisconfigurationException(
                f"{missing} is missing or altered and could not be downloaded ({one_line(error)}); "
                f"{self._advice(missing)}"
            ) from error

    def load(self) -> dict[str, Images]:
        """Return the published splits.

        Raises:
            MisconfigurationException: If a file is missing, altered or corrupt; the message names it.
        """
        if missing := self._missing():
            raise MisconfigurationException(f"{missing} is missing or altered; {self._advice(missing)}")
        return self.read()

    def class_indices(self, values: Sequence[int] | np.ndarray, file: Path, first: int = 0) -> Tensor:
        """Return class indices, shape (n,), of the numbers in `file`, where the first class has the number `first`.

        Raises:
            MisconfigurationException: If there are none, or one that belongs to no class; the message names the file.
        """
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
        """Return class indices, shape (n,), of the class names in `file`, which may name `classes` otherwise.

        Raises:
            MisconfigurationException: If there are none, or one that is no class; the message names the file.
        """
        indices = {name: index for index, name in enumerate(classes or self.target.classes)}
        if not names:
            raise MisconfigurationException(f"{file} holds no images.")
        unknown = next((name for name in names if name not in indices), None)
        if unknown is not None:
            raise MisconfigurationException(f"{file} names the class {unknown!r}, which {self.name} has not.")
        return as_labels([indices[name] for name in names])

    def class_folders(self, folder: Path, classes: Sequence[str] | None = None) -> FileImages:
        """Return the images of a folder of classes, `<class>/<image>`, in the order of their names.

        Raises:
            MisconfigurationException: If a folder is no class; the message names it.
        """
        found = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMG_EXTENSIONS)
        labels = self.named_class_indices([path.parent.name for path in found], folder, classes)
        return FileImages(folder, [str(path.relative_to(folder)) for path in found], labels)

    def class_names(self, file: Path, number: int) -> list[str]:
        """Return the class names in a file, one per line.

        Raises:
            MisconfigurationException: If there are more or fewer; the message names the file.
        """
        names = [line.strip() for line in read_lines(file) if line.strip()]
        if len(names) != number:
            raise MisconfigurationException(f"{file} names {len(names)} classes; {self.name} has {number}.")
        return names

    @staticmethod
    def image_files(folder: Path, names: Sequence[str], labels: Tensor) -> FileImages:
        """Return the named images of a folder.

        Raises:
            MisconfigurationException: If one is not there; the message names it.
        """
        missing = next((name for name in names if not (folder / name).is_file()), None)
        if missing is not None:
            raise MisconfigurationException(
                f"{folder / missing} is missing; delete {folder} to have it unpacked or downloaded again."
            )
        return FileImages(folder, names, labels)

    def _missing(self) -> Path | None:
        return next((missing for download in self.downloads() if (missing := download.missing())), None)

    def _advice(self, missing: Path) -> str:
        downloads = self.downloads()
        files = ", ".join(f"{download.file.name} from {download.url}" for download in downloads)
        return (
            f"put {files} into {downloads[0].file.parent}, or name the folder that holds "
            f"{missing.relative_to(self.root).parts[0]} with --data.root."
        )


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        MisconfigurationException: If it cannot be read; the message names it.
    """
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise MisconfigurationException(f"{file} cannot be read ({one_line(error)}).") from error


def unpack(archive: Path, folder: str, within: str | None = None) -> None:
    """Unpack one folder of a tar or zip archive beside it.

    It is unpacked under another name and then renamed, so that a folder of that name is complete; in one that is there
    already, files are replaced. Only regular files are unpacked, no links and no devices.

    Args:
        archive: The file.
        folder: The folder's path in the archive.
        within: Path of an archive in the archive that holds the folder.

    Raises:
        MisconfigurationException: If the archive is damaged, lacks the folder, or holds a file that belongs outside.
    """
    if not hasattr(tarfile, "data_filter"):
        raise MisconfigurationException(
            f"This Python cannot unpack archives safely; take 3.11.4 or later, or unpack {archive} in {archive.parent}."
        )
    part, target = archive.with_name(f"{folder.replace('/', '_')}.part"), archive.parent / folder
    try:
        shutil.rmtree(part, ignore_errors=True)
        _extract(archive, part)
        if within:
            _extract(part / within, part)
        if target.is_dir():
            for file in (part / folder).iterdir():
                file.replace(target / file.name)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / folder).rename(target)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise MisconfigurationException(f"{archive} cannot be unpacked ({one_line(error)}).") from error
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
