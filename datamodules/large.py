"""Larger tasks than VTAB's: ImageNet-1k, its second test set, and places."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import ImageNetInfo
from torchvision import datasets

from datamodules.downloads import Download, DownloadedTask, read_lines
from datamodules.hub import HubTask
from datamodules.images import FileImages, Images

ARCHIVES = tuple(file for file, _ in datasets.imagenet.ARCHIVE_META.values())
"""What ImageNet is published in."""


class ImageNet1k(DownloadedTask):
    """1.3 million photographs in 1,000 classes (Russakovsky et al., 2015).

    The official 50,000 validation images are the test split; validation is a seeded stratified hundredth of the
    1,281,167 training images. Class names are read with the data. `root` holds `train/<synset>/` and `val/<synset>/`,
    or the archives of image-net.org, which asks for an account.
    """

    name = "imagenet1k"
    classes: Sequence[str] = ("",) * 1000

    def downloads(self) -> list[Download]:
        """Return nothing: who has an account downloads the archives."""
        return []

    def prepare_data(self) -> None:
        """Unpack the archives where folders are not there yet."""
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                try:
                    datasets.ImageNet(str(self.root), part)
                except (OSError, RuntimeError) as error:
                    raise MisconfigurationException(
                        f"{self.root / part} is missing; put {', '.join(ARCHIVES)} from https://image-net.org into "
                        f"{self.root}, or name the folder that holds train/ and val/ with --data.root."
                    ) from error

    def read(self) -> dict[str, Images]:
        """Return the official splits, with validation taken from train."""
        return {**self.train_images(), "test": self._part("val")}

    def train_images(self) -> dict[str, Images]:
        """Return the training images, cut into train and validation."""
        return self.cut(self._part("train"))

    def cut(self, images: Images) -> dict[str, Images]:
        """Cut the training images into train and validation."""
        return self.split_off(images, val=len(images) - len(images) * 99 // 100)

    def _part(self, part: str) -> FileImages:
        """Return the images of a part, and let classes have their names."""
        info = ImageNetInfo()
        synsets = info.label_names()
        self.classes = [f"{info.label_name_to_description(synset)} ({synset})" for synset in synsets]  # two are "crane"
        return self.class_folders(self.root / part, synsets)


class ImageNetV2(ImageNet1k, HubTask):
    """10,000 new photographs of ImageNet's classes for test (Recht et al., 2019); the rest is ImageNet's."""

    name = "imagenetv2"
    repository = "clip-benchmark/wds_imagenetv2"

    def prepare_data(self) -> None:
        """Unpack ImageNet where it is not yet, and download the new images."""
        super().prepare_data()
        self.parts(["test"])

    def read(self) -> dict[str, Images]:
        """Return ImageNet's training images, cut, and the new ones."""
        return {**self.train_images(), **self.parts(["test"])}


class Places365(DownloadedTask):
    """1.8 million photographs of 256 x 256 pixels in 365 classes of places (Zhou et al., 2017).

    The official 36,500 validation images are the test split; validation is a seeded stratified hundredth of the
    1,803,460 training images. Class names are read with the data.
    """

    name = "places365"
    classes: Sequence[str] = ("",) * 365

    def downloads(self) -> list[Download]:
        """Return the lists, and the archives of small images."""
        source = datasets.Places365
        lists = [source._CATEGORIES_META, source._FILE_LIST_META["train-standard"], source._FILE_LIST_META["val"]]
        archives = [(*source._DEVKIT_META["standard"], ".", lists)]
        archives += [(*source._IMAGES_META["train-standard", True], "data_256", ())]
        archives += [(*source._IMAGES_META["val", True], "val_256", ())]
        return [
            Download(source._BASE_URL + file, md5, self.root / file, unpacks, contents=contents)
            for file, md5, unpacks, contents in archives
        ]

    def read(self) -> dict[str, Images]:
        """Return the official splits, with validation taken from train."""
        categories, train, test = (self.root / name for name, _ in self.downloads()[0].contents)
        self.classes = [line.split()[0][3:] for line in self.class_names(categories, 365)]  # `/a/airfield 0`
        return {**self.cut(self._listed(train, "data_256")), "test": self._listed(test, "val_256")}

    def cut(self, images: Images) -> dict[str, Images]:
        """Cut the training images into train and validation."""
        return self.split_off(images, val=len(images) - len(images) * 99 // 100)

    def _listed(self, file: Path, folder: str) -> FileImages:
        """Return the images of a list with lines like `/a/airfield/00000001.jpg 0`: a path and the class index."""
        try:
            names, labels = zip(*(line.strip("/").split() for line in read_lines(file)), strict=True)
            values = [int(label) for label in labels]
        except ValueError as error:
            raise MisconfigurationException(f"{file} is no list of images and classes ({error}).") from error
        return self.image_files(self.root / folder, names, self.class_indices(values, file))
