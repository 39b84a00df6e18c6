"""One's own images: a folder of splits, each a folder of classes."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.base import SPLITS, Task
from datamodules.folders import ENDINGS, files_below, visible
from datamodules.images import FileImages, Images, as_labels, printable
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
        self.name = printable(self.root.resolve().name)
        if not (self.root / "train").is_dir():
            raise MisconfigurationException(
                f"{self.root} has no folder train/; images belong into {self.root}/train/<class>/<image>."
            )

    def load(self) -> dict[str, Images]:
        """Return the splits that are there."""
        files = {split: _by_class(self.root / split) for split in SPLITS if (self.root / split).is_dir()}
        classes = sorted(files["train"])
        if len(classes) < 2:
            raise MisconfigurationException(
                f"{self.root / 'train'} holds {len(classes)} classes; a task needs at least two folders of images."
            )
        required = {name for name in classes if len(files["train"][name]) >= self.min_images}
        for split, found in files.items():
            folder, absent, unknown = (
                self.root / split,
                sorted(required - set(found)),
                sorted(set(found) - set(classes)),
            )
            differences = [f"lacks {absent[:5]}"] * bool(absent) + [f"adds {unknown[:5]}"] * bool(unknown)
            if differences:
                raise MisconfigurationException(
                    f"Classes must agree between splits: compared with train, {folder} {' and '.join(differences)}."
                )
            if empty := [name for name in sorted(required) if not found[name]]:
                raise MisconfigurationException(
                    f"{folder / empty[0]} holds no images; known endings are {', '.join(ENDINGS)}."
                )
        self.target = Multiclass([printable(name) for name in classes])
        self.origins = {split: f"folder {split}" for split in files}
        return {split: self._images(split, classes, found) for split, found in files.items()}

    def _images(self, split: str, classes: list[str], found: dict[str, list[str]]) -> FileImages:
        labels = [label for label, name in enumerate(classes) for _ in found.get(name, [])]
        names = [file for name in classes for file in found.get(name, [])]
        return FileImages(self.root / split, names, as_labels(labels))


def _by_class(folder: Path) -> dict[str, list[str]]:
    """Return the images of each class of a split, named below its folder."""
    classes = visible(path.name for path in folder.iterdir() if path.is_dir())
    return {name: [f"{name}/{file.as_posix()}" for file in files_below(folder / name, ENDINGS)] for name in classes}
