"""Data sets as they are published: files that are downloaded once, checked, and unpacked whole or not at all."""

import shutil
import tarfile
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
from torchvision.datasets.utils import check_integrity, download_url

from datamodules.base import Task
from datamodules.images import FileImages, Images, as_labels


class Download(NamedTuple):
    """One published file, and what is made of it."""

    url: str
    md5: str
    file: Path
    """Where it is put."""
    unpacks: str | None = None
    """The folder that an archive holds, unpacked beside it; None for a file that is read as it is."""
    contents: Sequence[Sequence[str]] = ()
    """Names and MD5 sums of files in that folder, as far as they are known."""

    def missing(self) -> Path | None:
        """Return what is not there, or not as it was published; None where nothing is amiss."""
        if self.unpacks is None:
            return None if _is_whole(self.file, self.md5) else self.file
        folder = self.file.with_name(self.unpacks)
        if not folder.is_dir():
            return folder
        return next((folder / name for name, md5 in self.contents if not _is_whole(folder / name, md5)), None)

    def fetch(self) -> None:
        """Download the file where it is not there yet, check it and unpack it."""
        download_url(self.url, self.file.parent, self.file.name, self.md5)
        if self.unpacks is not None:
            unpack(self.file, self.unpacks)


class DownloadedTask(Task):
    """A task whose images are downloaded to `root` on first use.

    A concrete one says in `downloads` what is published where, and in `read` which images belong to which split.
    """

    @abstractmethod
    def downloads(self) -> Sequence[Download]:
        """Return the published files; all of them go into one folder."""

    @abstractmethod
    def read(self) -> dict[str, Images]:
        """Return the images of each split; every download is there."""

    def prepare_data(self) -> None:
        """Download what is not there yet; others may be doing the same in the same folder.

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
                f"{missing} is missing or altered and could not be downloaded ({_one_line(error)}); "
                f"{self._advice(missing)}"
            ) from error

    def load(self) -> dict[str, Images]:
        """Return the images of each split.

        Raises:
            MisconfigurationException: If a file is missing, altered or corrupt; the message names it.
        """
        if missing := self._missing():
            raise MisconfigurationException(f"{missing} is missing or altered; {self._advice(missing)}")
        return self.read()

    def class_indices(self, values: Sequence[int] | np.ndarray, file: Path, first: int = 0) -> Tensor:
        """Return labels as they stand in `file`, where those of the first class are `first`, as class indices.

        Raises:
            MisconfigurationException: If there are none, or one that belongs to no class; the message names the file.
        """
        labels = as_labels(values) - first
        if not len(labels):
            raise MisconfigurationException(f"{file} holds no labels.")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise MisconfigurationException(
                f"{file} holds the label {outside[0] + first}; the classes of {self.name} are {first} to "
                f"{self.num_classes - 1 + first}."
            )
        return labels

    @staticmethod
    def image_files(folder: Path, names: Sequence[str], labels: Tensor) -> FileImages:
        """Return images of a folder.

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


def unpack(archive: Path, folder: str) -> None:
    """Unpack one folder of a tar archive beside it.

    The folder appears whole or not at all; in one that is there already, files are replaced. Only regular files are
    taken, no links and no devices.

    Raises:
        MisconfigurationException: If the archive is damaged, lacks the folder, or holds a file that belongs outside.
    """
    if not hasattr(tarfile, "data_filter"):
        raise MisconfigurationException(
            f"This Python cannot unpack archives safely; take 3.11.4 or later, or unpack {archive} in {archive.parent}."
        )
    part, target = archive.with_name(f"{folder}.part"), archive.with_name(folder)
    try:
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(archive) as members:
            members.extractall(part, (member for member in members if member.isfile()), filter="data")
        if target.is_dir():
            for file in (part / folder).iterdir():
                file.replace(target / file.name)
        else:
            (part / folder).rename(target)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise MisconfigurationException(f"{archive} cannot be unpacked ({_one_line(error)}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_whole(path: Path, md5: str) -> bool:
    try:
        return check_integrity(path, md5)
    except OSError:
        return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
