"""VTAB's natural tasks and CIFAR-10: photographs, downloaded to the folders that torchvision uses."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision import datasets

from datamodules.base import SPLITS, class_names
from datamodules.downloads import Download, DownloadedTask, listed_images, read_lines, read_matlab, read_pickle
from datamodules.images import ArrayImages, FileImages, Images, as_labels, reading
from datamodules.splits import Percent, stratified_split
from datamodules.targets import Multiclass

SUN397_ADDRESS = (
    "https://raw.githubusercontent.com/tensorflow/datasets/33ac20e7a393cc07d7dccf96c13f9eaa23a7e4c5/"
    "tensorflow_datasets/image_classification/"
)
SUN397_LISTS = {
    "train": ("sun397_tfds_tr.txt", "2e8dd4c1bc68ece3d8510c22085c3777"),
    "val": ("sun397_tfds_va.txt", "cf69489da6db30ebc6e36730a2fd499b"),
    "test": ("sun397_tfds_te.txt", "2a9dce8a9102a225ab264ae2d8057af8"),
}
"""TensorFlow Datasets' lists of the images of each split, and their MD5 sums."""


def _cifar_archive(source: Any) -> tuple[Download]:
    """Return the archive of CIFAR-10 or CIFAR-100; the MD5 sum of every file in it is known."""
    contents = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    return (Download(source.url, source.tgz_md5, source.base_folder, contents=contents),)


class CIFAR10(DownloadedTask):
    """60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky, 2009).

    Test is the official one; validation is a seeded stratified tenth of train, as large as the paper's.
    """

    name = "cifar10"
    cut: ClassVar = {"val": 0.1}
    classes = class_names("cifar10")
    source: Any = datasets.CIFAR10
    downloads = _cifar_archive(datasets.CIFAR10)
    labels_key = "labels"

    def read(self) -> dict[str, Images]:
        """Return the official training and test images."""
        return {"train": self._batches(self.source.train_list), "test": self._batches(self.source.test_list)}

    def _batches(self, files: Sequence[Sequence[str]]) -> ArrayImages:
        """Return the images of pickled batches; a row holds 1,024 red, then green, then blue values."""
        pixels, labels = [], []
        for file, _ in files:
            path = self.folder / self.source.base_folder / file
            batch = read_pickle(path)
            with reading(path, "is no batch of CIFAR images"):
                labels.append(self.class_indices(batch[self.labels_key], path))
                rows = batch["data"].astype(np.uint8, casting="safe")
                pixels.append(rows.reshape(len(labels[-1]), 3, 32, 32))
        return ArrayImages(np.concatenate(pixels).transpose(0, 2, 3, 1), torch.cat(labels))


class CIFAR100(CIFAR10):
    """60,000 photographs of 32 x 32 pixels in 100 fine classes (Krizhevsky, 2009), split as `CIFAR10` is."""

    name = "cifar100"
    group = "natural"
    classes = class_names("cifar100")
    source = datasets.CIFAR100
    downloads = _cifar_archive(datasets.CIFAR100)
    labels_key = "fine_labels"


class Flowers102(DownloadedTask):
    """8,189 photographs of flowers in 102 classes (Nilsback and Zisserman, 2008).

    All splits are official: 1,020 images for training and 1,020 for validation, ten of each class, and 6,149 for test.
    """

    name = "flowers102"
    group = "natural"
    classes = tuple(datasets.Flowers102.classes)
    subfolder = "flowers-102"
    downloads = tuple(
        Download(datasets.Flowers102._download_url_prefix + file, md5, "jpg" if file.endswith(".tgz") else None)
        for file, md5 in datasets.Flowers102._file_dict.values()
    )

    def read(self) -> dict[str, Images]:
        """Return the official splits; images are numbered from 1, and so are classes."""
        labels_file, splits_file = self.folder / "imagelabels.mat", self.folder / "setid.mat"
        labels = self.class_indices(read_matlab(labels_file, "labels"), labels_file, first=1)
        images: dict[str, Images] = {}
        for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            numbers = as_labels(read_matlab(splits_file, key))
            outside = numbers[(numbers < 1) | (numbers > len(labels))]
            if len(outside):
                raise MisconfigurationException(
                    f"{splits_file} lists image {outside[0]}; {labels_file.name} has labels for 1 to {len(labels)}."
                )
            names = [f"image_{number:05d}.jpg" for number in numbers.tolist()]
            images[split] = listed_images(self.folder / "jpg", names, labels[numbers - 1])
        return images


class OxfordIIITPet(DownloadedTask):
    """7,349 photographs of pets in 37 breeds (Parkhi et al., 2012).

    Test is the official one. Of the official 3,680 images for train and val a seeded stratified part is validation: a
    tenth as in the paper, or with the protocol `vtab1k` a fifth as in VTAB.
    """

    name = "oxford_iiit_pet"
    group = "natural"
    cut: ClassVar = {"val": 0.1}
    classes = class_names("oxford_iiit_pet")
    subfolder = "oxford-iiit-pet"
    downloads = tuple(
        Download(url, md5, unpacks)
        for (url, md5), unpacks in zip(datasets.OxfordIIITPet._RESOURCES, ("images", "annotations"), strict=True)
    )

    def read(self) -> dict[str, Images]:
        """Return the official images for training and validation as train, and those for test."""
        images: dict[str, Images] = {"train": self._listed("trainval"), "test": self._listed("test")}
        if self.protocol == "vtab1k":
            pieces = stratified_split(images["train"].labels, [Percent(20)], self.seed)
            images |= dict(zip(("train", "val"), map(images["train"].subset, pieces), strict=True))
        return images

    def _listed(self, part: str) -> FileImages:
        """Return the images of a list with lines like `Abyssinian_100 1 1 1`: name, breed, species, breed of it."""
        file = self.folder / "annotations" / f"{part}.txt"
        names, breeds = [], []
        for number, line in enumerate(read_lines(file), start=1):
            match = re.fullmatch(r"(\w+) (\d+) \d+ \d+", line.strip())
            if not match:
                raise MisconfigurationException(
                    f"Line {number} of {file} is {line!r}; it must be like 'Abyssinian_100 1 1 1'."
                )
            names.append(f"{match[1]}.jpg")
            breeds.append(int(match[2]))
        return listed_images(self.folder / "images", names, self.class_indices(breeds, file, first=1))


class Caltech101(DownloadedTask):
    """9,144 photographs in 101 classes of objects and one of clutter (Fei-Fei et al., 2004).

    As in VTAB, 30 images of each class are for training and validation (a tenth of them) and the rest for test, so
    that test is not balanced as train is. Which ones is seeded here; VTAB follows TensorFlow's draw.
    """

    name = "caltech101"
    group = "natural"
    cut: ClassVar = {"val": 0.1}
    classes = class_names("caltech101")
    subfolder = "caltech101"
    url = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
    within = "caltech-101/101_ObjectCategories.tar.gz"
    downloads = (Download(url, "3138e1922a9193bfa496528edbbc45d0", "101_ObjectCategories", within),)

    def read(self) -> dict[str, Images]:
        """Return 30 images of each class as train, and the others as test."""
        images = self.class_folders(self.folder / "101_ObjectCategories")
        each = dict.fromkeys(images.labels.unique().tolist(), 30)
        test, train = (images.subset(piece) for piece in stratified_split(images.labels, [each], self.seed))
        return {"train": train, "test": test}


class DTD(DownloadedTask):
    """5,640 photographs of textures in 47 classes (Cimpoi et al., 2014); the first of its ten official splits."""

    name = "dtd"
    group = "natural"
    classes = class_names("dtd")
    subfolder = "dtd"
    downloads = (Download(datasets.DTD._URL, datasets.DTD._MD5, "dtd"),)

    def read(self) -> dict[str, Images]:
        """Return the official splits; a list has lines like `banded/banded_0002.jpg`."""
        images: dict[str, Images] = {}
        for split in SPLITS:
            file = self.folder / "dtd" / "labels" / f"{split}1.txt"
            names = read_lines(file)
            labels = self.named_class_indices([name.partition("/")[0] for name in names], file)
            images[split] = listed_images(self.folder / "dtd" / "images", names, labels)
        return images


class SVHN(DownloadedTask):
    """99,289 photographs of house numbers of 32 x 32 pixels, in 10 classes of digits (Netzer et al., 2011).

    Test is the official one; validation is a seeded stratified tenth of the 73,257 training images.
    """

    name = "svhn"
    group = "natural"
    cut: ClassVar = {"val": Percent(10, up=True)}
    classes = tuple("0123456789")
    downloads = tuple(
        Download(url, md5) for url, _, md5 in (datasets.SVHN.split_list[part] for part in ("train", "test"))
    )

    def read(self) -> dict[str, Images]:
        """Return the official parts, each a file of an array (32, 32, 3, n) and labels 1 to 10: 10 is the digit 0."""
        images: dict[str, Images] = {}
        for part in ("train", "test"):
            file = self.folder / f"{part}_32x32.mat"
            digits = self.class_indices(read_matlab(file, "y") % 10, file)
            images[part] = ArrayImages(np.ascontiguousarray(read_matlab(file, "X").transpose(3, 0, 1, 2)), digits)
        return images


class SUN397(DownloadedTask):
    """108,754 photographs of scenes in 397 classes (Xiao et al., 2010).

    As in VTAB, TensorFlow Datasets' lists say which are for training (70 %), validation (10 %) and test (20 %); they
    lack one image. Class names are read with the data.
    """

    name = "sun397"
    group = "natural"
    downloads = (
        Download(datasets.SUN397._DATASET_URL, datasets.SUN397._DATASET_MD5, "SUN397"),
        *(Download(SUN397_ADDRESS + file, md5) for file, md5 in SUN397_LISTS.values()),
    )

    def read(self) -> dict[str, Images]:
        """Return the listed images; `ClassName.txt` has lines like `/a/apartment_building/outdoor`."""
        folder = self.folder / "SUN397"
        self.target = Multiclass([name[3:] for name in self.read_class_names(folder / "ClassName.txt", 397)])
        return {split: self._listed(self.folder / file) for split, (file, _) in SUN397_LISTS.items()}

    def _listed(self, file: Path) -> FileImages:
        """Return the images of a list with lines like `/a/abbey/sun_aaaulhwrhqgejnyt.jpg`."""
        names = [line.strip("/\n ") for line in read_lines(file)]
        labels = self.named_class_indices([name[2:].rpartition("/")[0] for name in names], file)
        return listed_images(self.folder / "SUN397", names, labels)
