"""The images of a split by index, from an array in memory or files on disk, and their conversion to RGB."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor


class Labelled(ABC):
    """A labelled, ordered set of images or vectors."""

    labels: Tensor  # Class index of each, shape (n,), int64; of several outputs a row of numbers, shape (n, C)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """Return those at `indices`, in that order."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a user knows it by: its path, or its index in the array or file."""

    @abstractmethod
    def digest(self) -> str:
        """Return a hash that changes when the values, their order or their labels do."""


class Images(Labelled):
    """A labelled, ordered set of images with random access."""

    @abstractmethod
    def __getitem__(self, index: int) -> Image.Image:
        """Return one image, RGB."""

    def ahead(self, indices: Sequence[int]) -> None:
        """Be told which images are asked for next, in any order and by several threads."""


@dataclass(eq=False)
class ArrayImages(Images):
    """Images held in memory as uint8, shape (n, H, W) for grey or (n, H, W, 3) for RGB; uint16 for 16-bit grey."""

    pixels: np.ndarray
    labels: Tensor

    def __getitem__(self, index: int) -> Image.Image:
        with reading(self.name(index), "is not a readable image"):
            return to_rgb(Image.fromarray(self.pixels[index]))

    def subset(self, indices: Tensor) -> "ArrayImages":
        """Return the images at `indices`, in that order."""
        return ArrayImages(self.pixels[indices.numpy()], self.labels[indices])

    def name(self, index: int) -> str:
        """Return the index of the image in its split."""
        return f"image {index}"

    def digest(self) -> str:
        """Return a hash of every pixel and label."""
        digest = hashlib.blake2b(repr(self.pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.pixels).data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()


@dataclass(eq=False)
class FileImages(Images):
    """Images read from files, named below `root`, when they are asked for; one that cannot be read is named then."""

    root: Path
    files: Sequence[str]
    labels: Tensor

    def __getitem__(self, index: int) -> Image.Image:
        path = self.root / self.files[index]
        with reading(path, "is not a readable image"), Image.open(path) as image:
            return to_rgb(image)

    def subset(self, indices: Tensor) -> "FileImages":
        """Return the images at `indices`, in that order."""
        return FileImages(self.root, [self.files[i] for i in indices.tolist()], self.labels[indices])

    def name(self, index: int) -> str:
        """Return the path of the image below its root."""
        return printable(self.files[index])

    def digest(self) -> str:
        """Return a hash of every file's name, size, time of last change and label, without reading them."""
        digest = hashlib.blake2b(digest_size=16)
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            digest.update(stamp(self.root / file, file) + f"|{label}\n".encode())
        return digest.hexdigest()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to RGB, 8 bits a channel, as torchvision and timm do when weights are evaluated.

    Transparency is dropped and the stored colours stay, CMYK is inverted without a colour profile, an animation is its
    first frame, and a camera's EXIF orientation is not applied. (`datasets` applies it when it decodes, so its bytes
    are read with `decode=False`.) 16-bit grey (modes `I;16` and `I`) is scaled to 8 bits, where PIL would clip at 255.

    Raises:
        ValueError: If the pixels' range is unknown: floats, or whole numbers outside 0 to 65,535.
        OSError: If the file is truncated; PIL raises other errors, too (see `reading`).
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is unknown; store 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its pixels lie in {grey.min()} to {grey.max()}; store 8 or 16 bits a channel")
        return Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours; PIL warns on the direct way if the palette has transparency
    if image.mode == "RGB":
        image.load()
        return image  # PIL would copy it
    return image.convert("RGB")


def stamp(path: Path, name: str) -> bytes:
    """Return what tells whether a file, called `name`, is still the same: its size and the time of its last change."""
    with reading(path):
        status = path.stat()
    return f"{name}|{status.st_size}|{status.st_mtime_ns}".encode(errors="surrogateescape")


def printable(name: str) -> str:
    """Return a name of a file or folder as text that any file can hold; bytes that are no UTF-8 become `\\xe9`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


@contextlib.contextmanager
def reading(name: object, failure: str = "cannot be read") -> Iterator[None]:
    """Turn any error into a MisconfigurationException of one line: `name`, what is wrong with it, and the reason."""
    try:
        yield
    except MisconfigurationException:
        raise
    except Exception as error:  # readers raise many kinds
        raise MisconfigurationException(f"{printable(str(name))} {failure} ({one_line(error)}).") from error


def as_labels(values: Sequence[int] | np.ndarray) -> Tensor:
    """Return class indices as an int64 tensor of shape (n,), whatever the shape of an array."""
    return torch.as_tensor(np.ravel(values).astype(np.int64))


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
