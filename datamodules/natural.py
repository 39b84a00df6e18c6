"""VTAB's natural tasks and CIFAR-10: photographs, downloaded to where torchvision would, with official test splits."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.io import loadmat
from torchvision import datasets

from datamodules.downloads import Download, DownloadedTask
from datamodules.images import ArrayImages, FileImages, Images
from datamodules.pickles import unpickle_arrays


class CIFAR10(DownloadedTask):
    """60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky, 2009).

    The official 10,000 test images are the test split; validation is a seeded stratified tenth of the 50,000 training
    images, as large as the paper's.
    """

    name = "cifar10"
    classes: Sequence[str] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    source: Any = datasets.CIFAR10
    labels_key = "labels"

    def downloads(self) -> list[Download]:
        """Return the archive; the MD5 sum of every file in it is known."""
        source = self.source
        contents = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        return [Download(source.url, source.tgz_md5, self.root / source.filename, source.base_folder, contents)]

    def read(self) -> dict[str, Images]:
        """Return the official splits, with validation taken from train."""
        train, test = (self._batches(files) for files in (self.source.train_list, self.source.test_list))
        return {**self.split_off(train, val=0.1), "test": test}

    def _batches(self, files: Sequence[Sequence[str]]) -> ArrayImages:
        """Return the images of pickled batches; a row holds 1,024 red, then green, then blue values."""
        pixels, labels = [], []
        for file, _ in files:
            path = self.root / self.source.base_folder / file
            batch = unpickle_arrays(path)
            try:
                labels.append(self.class_indices(batch[self.labels_key], path))
                rows = batch["data"].astype(np.uint8, casting="safe")
                pixels.append(rows.reshape(len(labels[-1]), 3, 32, 32))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise MisconfigurationException(f"{path} is no batch of CIFAR images ({error}).") from error
        return ArrayImages(np.concatenate(pixels).transpose(0, 2, 3, 1), torch.cat(labels))


class CIFAR100(CIFAR10):
    """60,000 photographs of 32 x 32 pixels in 100 fine classes (Krizhevsky, 2009).

    The official 10,000 test images are the test split; validation is a seeded stratified tenth of the 50,000 training
    images.
    """

    name = "cifar100"
    classes = (
        *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle"),
        *("bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle"),
        *("chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur"),
        *("dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard"),
        *("lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain"),
        *("mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck"),
        *("pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket"),
        *("rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel"),
        *("streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor"),
        *("train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm"),
    )
    source = datasets.CIFAR100
    labels_key = "fine_labels"


class Flowers102(DownloadedTask):
    """8,189 photographs of flowers in 102 classes (Nilsback and Zisserman, 2008).

    All splits are official: 1,020 images for training and 1,020 for validation, ten of each class, and 6,149 for test.
    """

    name = "flowers102"
    classes = tuple(datasets.Flowers102.classes)

    def downloads(self) -> list[Download]:
        """Return the archive of images, their labels, and the splits."""
        source, folder = datasets.Flowers102, self.root / "flowers-102"
        return [
            Download(source._download_url_prefix + name, md5, folder / name, unpacks)
            for (name, md5), unpacks in (
                (source._file_dict["image"], "jpg"),
                (source._file_dict["label"], None),
                (source._file_dict["setid"], None),
            )
        ]

    def read(self) -> dict[str, Images]:
        """Return the official splits; images are numbered from 1, and so are classes."""
        archive, labels_file, splits_file = (download.file for download in self.downloads())
        labels = self.class_indices(_variable(labels_file, "labels"), labels_file, first=1)
        images: dict[str, Images] = {}
        for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            numbers = _variable(splits_file, key)
            outside = numbers[(numbers < 1) | (numbers > len(labels))]
            if len(outside):
                raise MisconfigurationException(
                    f"{splits_file} lists image {outside[0]}; {labels_file.name} has labels for 1 to {len(labels)}."
                )
            names = [f"image_{number:05d}.jpg" for number in numbers]
            images[split] = self.image_files(archive.with_name("jpg"), names, labels[torch.from_numpy(numbers - 1)])
        return images


class OxfordIIITPet(DownloadedTask):
    """7,349 photographs of pets in 37 breeds (Parkhi et al., 2012).

    The official 3,669 test images are the test split; validation is a seeded stratified tenth of the official 3,680
    images for training and validation.
    """

    name = "oxford_iiit_pet"
    classes = (
        *("Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Beagle", "Bengal", "Birman"),
        *("Bombay", "Boxer", "British Shorthair", "Chihuahua", "Egyptian Mau", "English Cocker Spaniel"),
        *("English Setter", "German Shorthaired", "Great Pyrenees", "Havanese", "Japanese Chin", "Keeshond"),
        *("Leonberger", "Maine Coon", "Miniature Pinscher", "Newfoundland", "Persian", "Pomeranian", "Pug", "Ragdoll"),
        *("Russian Blue", "Saint Bernard", "Samoyed", "Scottish Terrier", "Shiba Inu", "Siamese", "Sphynx"),
        *("Staffordshire Bull Terrier", "Wheaten Terrier", "Yorkshire Terrier"),
    )

    def downloads(self) -> list[Download]:
        """Return the archive of images and that of annotations."""
        folder = self.root / "oxford-iiit-pet"
        return [
            Download(url, md5, folder / Path(url).name, unpacks)
            for unpacks, (url, md5) in zip(("images", "annotations"), datasets.OxfordIIITPet._RESOURCES, strict=True)
        ]

    def read(self) -> dict[str, Images]:
        """Return the official splits, with validation taken from the images for training and validation."""
        return {**self.split_off(self._listed("trainval"), val=0.1), "test": self._listed("test")}

    def _listed(self, part: str) -> FileImages:
        """Return the images of a list with lines like `Abyssinian_100 1 1 1`: name, breed, species, breed of it."""
        folder = self.root / "oxford-iiit-pet"
        file = folder / "annotations" / f"{part}.txt"
        names, breeds = [], []
        try:
            lines = file.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise MisconfigurationException(f"{file} cannot be read ({error}).") from error
        for number, line in enumerate(lines, start=1):
            match = re.fullmatch(r"(\w+) (\d+) \d+ \d+", line.strip())
            if not match:
                raise MisconfigurationException(
                    f"Line {number} of {file} is {line!r}; it must be like 'Abyssinian_100 1 1 1'."
                )
            names.append(f"{match[1]}.jpg")
            breeds.append(int(match[2]))
        return self.image_files(folder / "images", names, self.class_indices(breeds, file, first=1))


def _variable(file: Path, name: str) -> np.ndarray:
    """Return a variable of a MATLAB file as a flat array of int64."""
    try:
        return loadmat(file)[name].ravel().astype(np.int64)
    except Exception as error:  # a torn file may raise anything
        raise MisconfigurationException(f"{file} cannot be read ({error!r}).") from error
