"""One's own images: a folder of splits, each a folder of classes."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.base import SPLITS, Task
from datamodules.images import FileImages, Images, as_labels
from datamodules.targets import Multiclass


class ImageFolder(Task):
    """Images on disk as `root/<split>/<class>/<image>`; the task is named after the root.

    `train/` must be there; `val/` and `test/` are optional, and each missing one is a seeded stratified fifth of
    train. Classes are the sorted folder names and must be the same in every split.

    Args:
        root: Folder that holds `train/`.
        **kwargs: See `Task`.

    Raises:
        MisconfigurationException: If there is no such folder or, on loading, it is not laid out so.
    """

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.name = self.root.resolve().name
        if not (self.root / "train").is_dir():
            raise MisconfigurationException(
                f"{self.root} has no folder train/; images belong into {self.root}/train/<class>/<image>."
            )

    def load(self) -> dict[str, Images]:
        """Return the splits that are there."""
        classes = _folders(self.root / "train")
        if len(classes) < 2:
            raise MisconfigurationException(
                f"{self.root / 'train'} holds {len(classes)} classes; a task needs at least two folders of images."
            )
        self.target = Multiclass(classes)
        return {split: _read(self.root / split, classes) for split in SPLITS if (self.root / split).is_dir()}


def _read(folder: Path, classes: list[str]) -> FileImages:
    """Return the images of a split, whose folders must be the classes."""
    folders = _folders(folder)
    if folders != classes:
        absent, unknown = set(classes) - set(folders), set(folders) - set(classes)
        differences = [f"lacks {sorted(absent)[:5]}"] * bool(absent) + [f"adds {sorted(unknown)[:5]}"] * bool(unknown)
        raise MisconfigurationException(
            f"Classes must agree between splits: compared with train, {folder} {' and '.join(differences)}."
        )
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        names = [path.relative_to(folder).as_posix() for path in found if not path.is_dir()]
        images = [image for image in names if "/." not in image]  # no hidden files, as macOS leaves beside each image
        if not images:
            raise MisconfigurationException(
                f"{folder / name} holds no images; known endings are {', '.join(IMG_EXTENSIONS)}."
            )
        files += images
        labels += [label] * len(images)
    return FileImages(folder, files, as_labels(labels))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
