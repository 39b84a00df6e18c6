"""Larger tasks than VTAB's: ImageNet-1k, ImageNetV2 and Places365."""

from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import ImageNetInfo
from torchvision import datasets
from torchvision.datasets.places365 import Places365 as Published

from datamodules.downloads import Download, DownloadedTask, listed_images, read_lines
from datamodules.hub import HubTask
from datamodules.images import FileImages, Images, reading
from datamodules.splits import Percent
from datamodules.targets import Multiclass


class ImageNet1k(DownloadedTask):
    """1.3 million photographs in 1,000 classes (Russakovsky et al., 2015).

    The official 50,000 validation images are the test split; validation is a seeded stratified hundredth of the
    1,281,167 training images. `root` holds `train/<synset>/` and `val/<synset>/`, or the archives of image-net.org,
    which asks for an account.
    """

    name = "imagenet1k"
    cut: ClassVar = {"val": Percent(1, up=True)}

    def prepare_data(self) -> None:
        """Unpack the archives where folders are not there yet."""
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                try:
                    datasets.ImageNet(str(self.root), part)
                except (OSError, RuntimeError) as error:
                    archives = ", ".join(file for file, _ in datasets.imagenet.ARCHIVE_META.values())
                    raise MisconfigurationException(
                        f"{self.root / part} is missing; put {archives} from https://image-net.org into {self.root}, "
                        f"or name the folder that holds train/ and val/ with --data.root."
                    ) from error

    def read(self) -> dict[str, Images]:
        """Return the official training and validation images as train and test."""
        return {"train": self.part("train"), "test": self.part("val")}

    def part(self, folder: str) -> FileImages:
        """Return the images of `train/` or `val/`, and set the target."""
        info = ImageNetInfo()
        synsets = info.label_names()
        names = [f"{info.label_name_to_description(synset)} ({synset})" for synset in synsets]  # two are called "crane"
        self.target = Multiclass(names)
        return self.class_folders(self.root / folder, synsets)


class ImageNetV2(ImageNet1k, HubTask):
    """10,000 new photographs of ImageNet's classes for test (Recht et al., 2019); the rest is ImageNet's."""

    name = "imagenetv2"
    repository = "clip-benchmark/wds_imagenetv2"
    published = ("test",)

    def prepare_data(self) -> None:
        """Unpack ImageNet where it is not yet, and download the new images."""
        ImageNet1k.prepare_data(self)
        HubTask.prepare_data(self)

    def read(self) -> dict[str, Images]:
        """Return ImageNet's training images, and the new ones as test."""
        return {"train": self.part("train"), **HubTask.load(self)}


class Places365(DownloadedTask):
    """1.8 million photographs of 256 x 256 pixels in 365 classes of places (Zhou et al., 2017).

    The official 36,500 validation images are the test split; validation is a seeded stratified hundredth of the
    1,803,460 training images. Class names are read with the data.
    """

    name = "places365"
    cut: ClassVar = {"val": Percent(1, up=True)}
    lists = (Published._CATEGORIES_META, Published._FILE_LIST_META["train-standard"], Published._FILE_LIST_META["val"])
    downloads = tuple(
        Download(Published._BASE_URL + file, md5, unpacks, contents=contents)
        for (file, md5), unpacks, contents in (
            (Published._DEVKIT_META["standard"], ".", lists),
            (Published._IMAGES_META["train-standard", True], "data_256", ()),
            (Published._IMAGES_META["val", True], "val_256", ()),
        )
    )

    def read(self) -> dict[str, Images]:
        """Return the official training and validation images as train and test."""
        categories, train, test = (self.root / name for name, _ in self.lists)
        lines = self.read_class_names(categories, 365)  # `/a/airfield 0`
        self.target = Multiclass([line.split()[0][3:] for line in lines])
        return {"train": self._listed(train, "data_256"), "test": self._listed(test, "val_256")}

    def _listed(self, file: Path, folder: str) -> FileImages:
        """Return the images of a list with lines like `/a/airfield/00000001.jpg 0`: a path and the class index."""
        with reading(file, "is no list of images and classes"):
            names, labels = zip(*(line.strip("/").split() for line in read_lines(file)), strict=True)
            values = [int(label) for label in labels]
        return listed_images(self.root / folder, names, self.class_indices(values, file))
