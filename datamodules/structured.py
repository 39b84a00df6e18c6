"""VTAB's structured tasks: what is where in an image, so images are squashed whole and never cropped or flipped."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchvision import datasets

from datamodules.downloads import Download, DownloadedTask, read_lines
from datamodules.hub import HubTask
from datamodules.images import FileImages, Images

CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)
"""Where VTAB's classes of the closest object's distance from CLEVR's camera begin, after the first (at 0)."""
KITTI_DISTANCES = (8.0, 20.0, 999.0)
"""Where VTAB's classes of the closest vehicle's distance begin, after the first, in metres; the last is no vehicle."""
VEHICLES = ("Car", "Van", "Truck")


class CLEVRCount(DownloadedTask):
    """Rendered scenes of 3 to 10 objects: how many? (CLEVR; Johnson et al., 2017.)

    The official 15,000 validation images are the test split, since the official test images have no annotations;
    validation is a seeded stratified tenth of the 70,000 training images.
    """

    name = "clevr_count"
    group: Literal["structured"] = "structured"
    classes = tuple(str(number) for number in range(3, 11))

    def downloads(self) -> list[Download]:
        """Return the archive."""
        source, folder = datasets.CLEVRClassification, self.root / "clevr"
        return [Download(source._URL, source._MD5, folder / Path(source._URL).name, "CLEVR_v1.0")]

    def read(self) -> dict[str, Images]:
        """Return the official splits, with validation taken from train."""
        train, test = (self._part(part) for part in ("train", "val"))
        return {**self.cut(train), "test": test}

    def cut(self, images: Images) -> dict[str, Images]:
        """Cut the training images into train and validation."""
        return self.split_off(images, val=len(images) - len(images) * 90 // 100)

    def label_of(self, objects: list[dict[str, Any]]) -> int:
        """Return the class index of a scene with these objects."""
        return len(objects) - 3

    def _part(self, part: str) -> FileImages:
        """Return the images of a part, in the order of its annotations."""
        folder = self.root / "clevr" / "CLEVR_v1.0"
        file = folder / "scenes" / f"CLEVR_{part}_scenes.json"
        try:
            scenes = json.loads(file.read_text())["scenes"]
            names = [scene["image_filename"] for scene in scenes]
            labels = self.class_indices([self.label_of(scene["objects"]) for scene in scenes], file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MisconfigurationException(f"{file} holds no annotations of scenes ({error!r}).") from error
        return self.image_files(folder / "images" / part, names, labels)


class CLEVRDistance(CLEVRCount):
    """CLEVR's scenes: how far is the closest object from the camera?

    Splits are those of `CLEVRCount`.
    """

    name = "clevr_distance"
    classes = ("below 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "above 10")

    def label_of(self, objects: list[dict[str, Any]]) -> int:
        """Return the class index of a scene; a third pixel coordinate is the distance."""
        return _bin(min(thing["pixel_coords"][2] for thing in objects), CLEVR_DISTANCES)


class DMLab(HubTask):
    """Frames of a 3D game of 360 x 480 pixels: is the closest reward good, and how far? (Beattie et al., 2016.)

    In VTAB's splits.
    """

    name = "dmlab"
    group = "structured"
    repository = "clip-benchmark/wds_vtab-dmlab"
    classes = tuple(
        f"{reward} reward, {distance}"
        for reward in ("positive", "negative")
        for distance in ("close", "far", "very far")
    )


class KITTIDistance(DownloadedTask):
    """7,481 photographs from a car: how far is the closest vehicle? (Geiger et al., 2012.)

    Only images for training have annotations, so all splits are cut from them. Neighbouring frames of a drive look
    alike: as in VTAB a drive lies in one split as a whole, a tenth of the drives each in validation and test. Which
    ones is seeded here.
    """

    name = "kitti_distance"
    group: Literal["structured"] = "structured"
    classes = ("below 8 m", "8 to 20 m", "above 20 m", "no vehicle")

    def downloads(self) -> list[Download]:
        """Return the archives of images, of annotations, and of what tells an image's drive."""
        folder, url = self.root / "Kitti" / "raw", datasets.Kitti.data_url
        parts = {"image_2": "training/image_2", "label_2": "training/label_2"}
        files = [
            Download(f"{url}data_object_{p}.zip", None, folder / f"data_object_{p}.zip", at) for p, at in parts.items()
        ]
        return [*files, Download(f"{url}devkit_object.zip", None, folder / "devkit_object.zip", "mapping")]

    def read(self) -> dict[str, Images]:
        """Return the splits, cut by drives."""
        folder = self.root / "Kitti" / "raw"
        files = sorted((folder / "training" / "image_2").glob("*.png"))
        labels = [self._label(folder / "training" / "label_2" / f"{file.stem}.txt") for file in files]
        images = FileImages(files[0].parent, [file.name for file in files], self.class_indices(labels, folder))
        drives = self._drives(folder / "mapping")
        return self.cut(images, [drives[int(file.stem)] for file in files])

    def cut(self, images: Images, drives: list[str]) -> dict[str, Images]:
        """Cut all images into the splits, given the drive of each."""
        known = sorted(set(drives))
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(self.seed)).tolist()
        part = max(1, len(known) // 10)
        split = {
            known[drive]: ("test" if i < part else "val" if i < 2 * part else "train") for i, drive in enumerate(order)
        }
        places = {
            name: [i for i, drive in enumerate(drives) if split[drive] == name] for name in ("train", "val", "test")
        }
        return {name: images.subset(torch.tensor(found, dtype=torch.int64)) for name, found in places.items()}

    @staticmethod
    def _label(file: Path) -> int:
        """Return the class index of an annotation, whose lines are 15 words: a type first, a depth z the 14th."""
        try:
            objects = [line.split() for line in read_lines(file)]
            return _bin(
                min([float(words[13]) for words in objects if words[0] in VEHICLES], default=1000.0), KITTI_DISTANCES
            )
        except (IndexError, ValueError) as error:
            raise MisconfigurationException(f"{file} holds no annotation of objects ({error}).") from error

    @staticmethod
    def _drives(folder: Path) -> list[str]:
        """Return the drive of each image: `train_rand.txt` has the line, from 1, that it has in `train_mapping.txt`."""
        lines = read_lines(folder / "train_mapping.txt")
        try:
            places = [
                int(number) for number in " ".join(read_lines(folder / "train_rand.txt")).replace(",", " ").split()
            ]
            return [lines[place - 1].split()[1] for place in places]
        except (IndexError, ValueError) as error:
            raise MisconfigurationException(f"{folder} does not say which drive each image is of ({error}).") from error


class DSpritesLocation(HubTask):
    """737,280 drawings of 64 x 64 pixels: where is the sprite horizontally, in 16 bins? (Matthey et al., 2017.)

    In VTAB's splits. The Hub's copy has the 32 places of the original; VTAB merges neighbours.
    """

    name = "dsprites_location"
    group = "structured"
    repository = "clip-benchmark/wds_vtab-dsprites_label_x_position"
    values = 32
    classes = tuple(f"bin {place}" for place in range(16))

    def relabel(self, labels: Tensor) -> Tensor:
        """Return the bin of each of the original values."""
        inside = (labels >= 0) & (labels < self.values)
        return torch.where(inside, labels * self.num_classes // self.values, -1)


class DSpritesOrientation(DSpritesLocation):
    """dSprites' drawings: how is the sprite rotated, in 16 bins?

    In VTAB's splits. The Hub's copy has the 40 angles of the original; VTAB merges two or three neighbours.
    """

    name = "dsprites_orientation"
    repository = "clip-benchmark/wds_vtab-dsprites_label_orientation"
    values = 40


class SmallNORBAzimuth(HubTask):
    """48,600 photographs of toys of 96 x 96 pixels: from which side? (LeCun et al., 2004.)

    Test is VTAB's half of the official test images; validation is cut from train, where VTAB takes the other half.
    """

    name = "smallnorb_azimuth"
    group = "structured"
    repository = "clip-benchmark/wds_vtab-smallnorb_label_azimuth"
    classes = tuple(f"{degrees} degrees" for degrees in range(0, 360, 20))


class SmallNORBElevation(SmallNORBAzimuth):
    """SmallNORB's photographs: from which height?

    Splits are those of `SmallNORBAzimuth`.
    """

    name = "smallnorb_elevation"
    repository = "clip-benchmark/wds_vtab-smallnorb_label_elevation"
    classes = tuple(f"{degrees} degrees" for degrees in range(30, 75, 5))


def _bin(value: float, starts: tuple[float, ...]) -> int:
    """Return how many classes begin below a value, whose own class that is."""
    return int(np.searchsorted(starts, value, side="left"))
