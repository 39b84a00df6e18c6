"""Where the images of a split come from: an array in memory, or files on disk. Both give PIL images by index."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor


class Images(Protocol):
    """A labelled, ordered set of images with random access."""

    labels: Tensor
    """Class index of each image, shape (n,), int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image, RGB."""
        ...

    def subset(self, indices: Tensor) -> Self:
        """Return the images at `indices`, in that order."""
        ...

    def name(self, index: int) -> str:
        """Return what a person would call the image: its path, or its place in the array."""
        ...

    def digest(self) -> str:
        """Return a hash that changes when the images, their order or their labels do."""
        ...


class ArrayImages:
    """Images held in memory as uint8, shape (n, H, W) for grey or (n, H, W, 3) for RGB."""

    def __init__(self, pixels: np.ndarray, labels: Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def subset(self, indices: Tensor) -> "ArrayImages":
        """Return the images at `indices`, in that order."""
        return ArrayImages(self.pixels[indices.numpy()], self.labels[indices])

    def name(self, index: int) -> str:
        """Return the place of the image in its split."""
        return f"image {index}"

    def digest(self) -> str:
        """Return a hash of every pixel and label."""
        seen = hashlib.blake2b(repr(self.pixels.shape).encode(), digest_size=16)
        seen.update(np.ascontiguousarray(self.pixels).data)
        seen.update(self.labels.numpy().data)
        return seen.hexdigest()


class FileImages:
    """Images read from files when they are asked for.

    Raises:
        MisconfigurationException: On access to a file that holds no readable image; the message names it.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Tensor) -> None:
        self.root = root
        self.files = files
        self.labels = labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        path = self.root / self.files[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits a pixel; PIL would clip to 255 instead of scaling
                    grey = (np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)
                    return Image.fromarray(grey).convert("RGB")
                return image.convert("RGB")
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise MisconfigurationException(f"{path} is not a readable image ({error}).") from error

    def subset(self, indices: Tensor) -> "FileImages":
        """Return the images at `indices`, in that order."""
        return FileImages(self.root, [self.files[i] for i in indices.tolist()], self.labels[indices])

    def name(self, index: int) -> str:
        """Return the path of the image below its root."""
        return self.files[index]

    def digest(self) -> str:
        """Return a hash of every file's name, size, time of last change and label (reading all would cost a pass)."""
        seen = hashlib.blake2b(digest_size=16)
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            status = (self.root / file).stat()
            seen.update(f"{file}|{status.st_size}|{status.st_mtime_ns}|{label}\n".encode())
        return seen.hexdigest()


def as_labels(values: Sequence[int] | np.ndarray) -> Tensor:
    """Return class indices as an int64 tensor of shape (n,)."""
    return torch.as_tensor(np.asarray(values), dtype=torch.int64)
