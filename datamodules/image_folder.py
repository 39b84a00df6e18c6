"""One's own images: a folder of splits, each a folder of classes."""

from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.base import SPLITS, Task
from datamodules.images import FileImages


class ImageFolder(Task):
    """Images on disk as `root/<split>/<class>/<image>`; the task is named after the root.

    `train/` must be there; `val/` and `test/` are optional, and each missing one is a seeded stratified fifth of
    train. Classes are the sorted folder names and must be the same in every split.

    Args:
        root: Folder that holds `train/`.
        batch_size: See `Task`.
        augmentation: See `Task`.
        num_workers: See `Task`.
        seed: See `Task`.
        protocol: See `Task`.

    Raises:
        MisconfigurationException: If the folder is not laid out like that; the message names what is wrong.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 256,
        augmentation: str | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        protocol: str = "full",
    ) -> None:
        super().__init__(root, batch_size, augmentation, num_workers, seed, protocol)
        if not (self.root / "train").is_dir():
            raise MisconfigurationException(
                f"{self.root} has no folder train/; images belong into {self.root}/train/<class>/<image>."
            )
        self.name = self.root.resolve().name
        self.classes = _classes(self.root / "train")
        if len(self.classes) < 2:
            raise MisconfigurationException(
                f"{self.root / 'train'} holds {len(self.classes)} classes; a task needs at least two folders of images."
            )

    def load(self) -> dict[str, FileImages]:
        """Return the splits that are there, and cut the others from train."""
        return self.complete({s: self._read(self.root / s) for s in SPLITS if (self.root / s).is_dir()})

    def _read(self, folder: Path) -> FileImages:
        classes = _classes(folder)
        if classes != self.classes:
            absent, unknown = set(self.classes) - set(classes), set(classes) - set(self.classes)
            said = [f"lacks {sorted(absent)[:5]}"] * bool(absent) + [f"adds {sorted(unknown)[:5]}"] * bool(unknown)
            raise MisconfigurationException(
                f"Classes must agree between splits: compared with train, {folder} {' and '.join(said)}."
            )
        files, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(path for path in (folder / name).rglob("*") if _is_image(path, folder))
            if not found:
                raise MisconfigurationException(
                    f"{folder / name} holds no images; known endings are {', '.join(IMG_EXTENSIONS)}."
                )
            files += [str(path.relative_to(folder)) for path in found]
            labels += [label] * len(found)
        return FileImages(folder, files, torch.tensor(labels))


def _is_image(path: Path, folder: Path) -> bool:
    """Return whether a file's name says so; hidden ones, as macOS leaves beside each image, are none."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in IMG_EXTENSIONS and not hidden and not path.is_dir()


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
