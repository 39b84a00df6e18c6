"""VTAB's natural tasks and CIFAR-10: photographs, downloaded to the folders that torchvision uses."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision import datasets

from datamodules.base import SPLITS
from datamodules.downloads import Download, DownloadedTask, read_lines
from datamodules.images import ArrayImages, FileImages, Images
from datamodules.pickles import unpickle_arrays
from datamodules.splits import Percent, stratified_split
from datamodules.targets import Multiclass


class CIFAR10(DownloadedTask):
    """60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky, 2009).

    The official 10,000 test images are the test split; validation is a seeded stratified tenth of the 50,000 training
    images, as large as the paper's.
    """

    name = "cifar10"
    cut: ClassVar = {"val": 0.1}
    classes: ClassVar[Sequence[str]] = (
        *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
    source: Any = datasets.CIFAR10
    labels_key = "labels"

    def downloads(self) -> list[Download]:
        """Return the archive; the MD5 sum of every file in it is known."""
        source = self.source
        contents = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        return [
            Download(source.url, source.tgz_md5, self.root / source.filename, source.base_folder, contents=contents)
        ]

    def read(self) -> dict[str, Images]:
        """Return the official training and test images."""
        return {"train": self._batches(self.source.train_list), "test": self._batches(self.source.test_list)}

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
    group = "natural"
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
    group = "natural"
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
        labels = self.class_indices(_numbers(labels_file, "labels"), labels_file, first=1)
        images: dict[str, Images] = {}
        for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            numbers = _numbers(splits_file, key)
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
    group = "natural"
    cut: ClassVar = {"val": 0.1}
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
        """Return the official images for training and validation as train, and those for test."""
        return {"train": self._listed("trainval"), "test": self._listed("test")}

    def _listed(self, part: str) -> FileImages:
        """Return the images of a list with lines like `Abyssinian_100 1 1 1`: name, breed, species, breed of it."""
        folder = self.root / "oxford-iiit-pet"
        file = folder / "annotations" / f"{part}.txt"
        names, breeds = [], []
        for number, line in enumerate(read_lines(file), start=1):
            match = re.fullmatch(r"(\w+) (\d+) \d+ \d+", line.strip())
            if not match:
                raise MisconfigurationException(
                    f"Line {number} of {file} is {line!r}; it must be like 'Abyssinian_100 1 1 1'."
                )
            names.append(f"{match[1]}.jpg")
            breeds.append(int(match[2]))
        return self.image_files(folder / "images", names, self.class_indices(breeds, file, first=1))


class Caltech101(DownloadedTask):
    """9,144 photographs in 101 classes of objects and one of clutter (Fei-Fei et al., 2004).

    As in VTAB, 30 images of each class are for training and validation (a tenth of them) and the rest for test, so
    that test is not balanced as train is. Which ones is seeded here; VTAB follows TensorFlow's draw.
    """

    name = "caltech101"
    group = "natural"
    cut: ClassVar = {"val": 0.1}
    classes = (
        *("BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes", "anchor"),
        *("ant", "barrel", "bass", "beaver", "binocular", "bonsai", "brain", "brontosaurus", "buddha", "butterfly"),
        *("camera", "cannon", "car_side", "ceiling_fan", "cellphone", "chair", "chandelier", "cougar_body"),
        *("cougar_face", "crab", "crayfish", "crocodile", "crocodile_head", "cup", "dalmatian", "dollar_bill"),
        *("dolphin", "dragonfly", "electric_guitar", "elephant", "emu", "euphonium", "ewer", "ferry", "flamingo"),
        *("flamingo_head", "garfield", "gerenuk", "gramophone", "grand_piano", "hawksbill", "headphone", "hedgehog"),
        *("helicopter", "ibis", "inline_skate", "joshua_tree", "kangaroo", "ketch", "lamp", "laptop", "llama"),
        *("lobster", "lotus", "mandolin", "mayfly", "menorah", "metronome", "minaret", "nautilus", "octopus", "okapi"),
        *("pagoda", "panda", "pigeon", "pizza", "platypus", "pyramid", "revolver", "rhino", "rooster", "saxophone"),
        *("schooner", "scissors", "scorpion", "sea_horse", "snoopy", "soccer_ball", "stapler", "starfish"),
        *("stegosaurus", "stop_sign", "strawberry", "sunflower", "tick", "trilobite", "umbrella", "watch"),
        *("water_lilly", "wheelchair", "wild_cat", "windsor_chair", "wrench", "yin_yang"),
    )
    url = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
    md5 = "3138e1922a9193bfa496528edbbc45d0"
    per_class = 30
    """Images of each class for training and validation."""

    def downloads(self) -> list[Download]:
        """Return the archive; another one in it holds the images."""
        folder, within = "101_ObjectCategories", "caltech-101/101_ObjectCategories.tar.gz"
        return [Download(self.url, self.md5, self.root / "caltech101" / "caltech-101.zip", folder, within)]

    def read(self) -> dict[str, Images]:
        """Return 30 images of each class as train, and the others as test."""
        images = self.class_folders(self.root / "caltech101" / "101_ObjectCategories")
        each = dict.fromkeys(images.labels.unique().tolist(), self.per_class)
        test, train = (images.subset(piece) for piece in stratified_split(images.labels, [each], self.seed))
        return {"train": train, "test": test}


class DTD(DownloadedTask):
    """5,640 photographs of textures in 47 classes (Cimpoi et al., 2014); the first of its ten official splits."""

    name = "dtd"
    group = "natural"
    classes = (
        *("banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked", "crosshatched"),
        *("crystalline", "dotted", "fibrous", "flecked", "freckled", "frilly", "gauzy", "grid", "grooved"),
        *("honeycombed", "interlaced", "knitted", "lacelike", "lined", "marbled", "matted", "meshed", "paisley"),
        *("perforated", "pitted", "pleated", "polka-dotted", "porous", "potholed", "scaly", "smeared", "spiralled"),
        *("sprinkled", "stained", "stratified", "striped", "studded", "swirly", "veined", "waffled", "woven"),
        *("wrinkled", "zigzagged"),
    )

    def downloads(self) -> list[Download]:
        """Return the archive."""
        source, folder = datasets.DTD, self.root / "dtd"
        return [Download(source._URL, source._MD5, folder / Path(source._URL).name, "dtd")]

    def read(self) -> dict[str, Images]:
        """Return the official splits; a list has lines like `banded/banded_0002.jpg`."""
        folder = self.root / "dtd" / "dtd"
        images: dict[str, Images] = {}
        for split in SPLITS:
            file = folder / "labels" / f"{split}1.txt"
            names = read_lines(file)
            images[split] = self.image_files(
                folder / "images", names, self.named_class_indices([name.partition("/")[0] for name in names], file)
            )
        return images


class SVHN(DownloadedTask):
    """99,289 photographs of house numbers of 32 x 32 pixels, in 10 classes of digits (Netzer et al., 2011).

    The official 26,032 test images are the test split; validation is a seeded stratified tenth of the 73,257 training
    images.
    """

    name = "svhn"
    group = "natural"
    cut: ClassVar = {"val": Percent(10, up=True)}
    classes = tuple("0123456789")

    def downloads(self) -> list[Download]:
        """Return the file of each part."""
        parts = datasets.SVHN.split_list
        return [Download(parts[part][0], parts[part][2], self.root / parts[part][1]) for part in ("train", "test")]

    def read(self) -> dict[str, Images]:
        """Return the official training and test images."""
        train, test = (self._part(download.file) for download in self.downloads())
        return {"train": train, "test": test}

    def _part(self, file: Path) -> ArrayImages:
        """Return the images of a file: an array (32, 32, 3, n), and labels 1 to 10, where 10 is the digit 0."""
        digits = self.class_indices(_numbers(file, "y") % 10, file)
        return ArrayImages(np.ascontiguousarray(_variable(file, "X").transpose(3, 0, 1, 2)), digits)


class SUN397(DownloadedTask):
    """108,754 photographs of scenes in 397 classes (Xiao et al., 2010).

    As in VTAB, 70 % are for training, 10 % for validation and 20 % for test; which ones is seeded here, as VTAB's own
    draw is not part of the source. Class names are read with the data.
    """

    name = "sun397"
    group = "natural"
    cut: ClassVar = {"val": Percent(10), "test": Percent(20)}

    def downloads(self) -> list[Download]:
        """Return the archive."""
        source = datasets.SUN397
        return [Download(source._DATASET_URL, source._DATASET_MD5, self.root / "SUN397.tar.gz", "SUN397")]

    def read(self) -> dict[str, Images]:
        """Return all images as train; `ClassName.txt` has lines like `/a/apartment_building/outdoor`."""
        folder = self.root / "SUN397"
        self.target = Multiclass([name[3:] for name in self.class_names(folder / "ClassName.txt", 397)])
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("sun_*.jpg"))
        labels = self.named_class_indices([file[2 : file.rindex("/")] for file in files], folder)
        return {"train": self.image_files(folder, files, labels)}


def _variable(file: Path, name: str) -> np.ndarray:
    """Return a variable of a MATLAB file."""
    from scipy.io import loadmat  # here, as few tasks need what takes half a second to import

    try:
        return loadmat(file)[name]
    except Exception as error:  # a damaged file may raise anything
        raise MisconfigurationException(f"{file} cannot be read ({error!r}).") from error


def _numbers(file: Path, name: str) -> np.ndarray:
    """Return a variable of a MATLAB file as a flat array of int64."""
    try:
        return _variable(file, name).ravel().astype(np.int64)
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"{file} cannot be read ({error!r}).") from error
