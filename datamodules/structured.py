"""VTAB's structured tasks: what is where in an image, so images are resized without a crop and never augmented."""

import json
from bisect import bisect_left
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torchvision import datasets

from datamodules.base import SPLITS
from datamodules.downloads import Download, DownloadedTask, listed_images, read_lines
from datamodules.hub import HubTask
from datamodules.images import FileImages, Images, as_labels, reading
from datamodules.splits import Percent

CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)
"""Lower bounds of VTAB's classes of the closest object's distance from CLEVR's camera, after the first (0)."""
KITTI_DISTANCES = (8.0, 20.0, 999.0)
"""Lower bounds of VTAB's classes of the closest vehicle's distance in metres, after the first; the last has none."""
VEHICLES = ("Car", "Van", "Truck")


class CLEVRCount(DownloadedTask):
    """Rendered scenes of 3 to 10 objects: how many? (CLEVR; Johnson et al., 2017.)

    The official 15,000 validation images are the test split, since the official test images have no annotations;
    validation is a seeded stratified tenth of the 70,000 training images.
    """

    name = "clevr_count"
    cut: ClassVar = {"val": Percent(10, up=True)}
    group = "structured"
    classes = tuple(str(number) for number in range(3, 11))
    subfolder = "clevr"
    downloads = (Download(datasets.CLEVRClassification._URL, datasets.CLEVRClassification._MD5, "CLEVR_v1.0"),)

    def read(self) -> dict[str, Images]:
        """Return the official training and validation images as train and test."""
        return {"train": self._part("train"), "test": self._part("val")}

    def label_of(self, objects: list[dict[str, Any]]) -> int:
        """Return the class index of a scene with these objects."""
        return len(objects) - 3

    def _part(self, part: str) -> FileImages:
        """Return the images of a part, in the order of its annotations."""
        folder = self.folder / "CLEVR_v1.0"
        file = folder / "scenes" / f"CLEVR_{part}_scenes.json"
        with reading(file, "holds no annotations of scenes"):
            scenes = json.loads(file.read_text(encoding="utf-8"))["scenes"]
            names = [scene["image_filename"] for scene in scenes]
            labels = self.class_indices([self.label_of(scene["objects"]) for scene in scenes], file)
        return listed_images(folder / "images" / part, names, labels)


class CLEVRDistance(CLEVRCount):
    """CLEVR's scenes, split as for `CLEVRCount`: how far is the closest object from the camera?"""

    name = "clevr_distance"
    classes = ("below 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "above 10")

    def label_of(self, objects: list[dict[str, Any]]) -> int:
        """Return the class index of a scene; a third pixel coordinate is the distance."""
        return bisect_left(CLEVR_DISTANCES, min(thing["pixel_coords"][2] for thing in objects))


class DMLab(HubTask):
    """Frames of a 3D game in VTAB's splits: is the closest reward good, and how far? (Beattie et al., 2016.)"""

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

    Only images for training have annotations, so all splits are cut from those. Neighbouring frames of a drive look
    alike, so all of a drive lie in one split: a tenth of the drives each in validation and test, the very ones of
    TensorFlow Datasets and so of VTAB, whatever the seed.
    """

    name = "kitti_distance"
    group = "structured"
    classes = ("below 8 m", "8 to 20 m", "above 20 m", "no vehicle")
    subfolder = "Kitti/raw"
    downloads = tuple(
        Download(f"{datasets.Kitti.data_url}{archive}.zip", None, unpacks)
        for archive, unpacks in (
            ("data_object_image_2", "training/image_2"),
            ("data_object_label_2", "training/label_2"),
            ("devkit_object", "mapping"),
        )
    )

    def read(self) -> dict[str, Images]:
        """Return the three splits, as TensorFlow Datasets draws the drives of test and, of the rest, of validation."""
        folder = self.folder / "training" / "image_2"
        files = sorted(path.name for path in folder.glob("*.png"))
        labels = [self._label(self.folder / "training" / "label_2" / file.replace(".png", ".txt")) for file in files]
        images = FileImages(folder, files, self.class_indices(labels, folder))
        of_image = self._drives(self.folder / "mapping")
        drives = [of_image[int(file.removesuffix(".png"))] for file in files]
        known, random = set(of_image), np.random.RandomState(123)
        chosen: dict[str, set[str]] = {}
        for split in ("test", "val"):
            left = sorted(known.difference(*chosen.values()))
            chosen[split] = set(random.choice(left, max(1, len(known) // 10), replace=False).tolist())
        chosen["train"] = known.difference(*chosen.values())
        return {
            split: images.subset(as_labels([i for i, drive in enumerate(drives) if drive in chosen[split]]))
            for split in SPLITS
        }

    @staticmethod
    def _label(file: Path) -> int:
        """Return the class index of an annotation; its lines are 15 words, type first and depth z 14th."""
        with reading(file, "holds no annotation of objects"):
            objects = [line.split() for line in read_lines(file)]
            distances = [float(words[13]) for words in objects if words[0] in VEHICLES]
        return bisect_left(KITTI_DISTANCES, min(distances, default=1000.0))

    @staticmethod
    def _drives(folder: Path) -> list[str]:
        """Return the drive of each image: `train_rand.txt` holds its line in `train_mapping.txt`, counted from 1."""
        lines = read_lines(folder / "train_mapping.txt")
        with reading(folder, "does not say which drive each image is of"):
            numbers = " ".join(read_lines(folder / "train_rand.txt")).replace(",", " ").split()
            return [lines[int(number) - 1].split()[1] for number in numbers]


class DSpritesLocation(HubTask):
    """737,280 drawings of 64 x 64 pixels: where is the sprite horizontally, in 16 bins? (Matthey et al., 2017.)

    In VTAB's splits. The Hub's copy has the 32 positions of the original; VTAB merges neighbours.
    """

    name = "dsprites_location"
    group = "structured"
    repository = "clip-benchmark/wds_vtab-dsprites_label_x_position"
    values = 32
    classes = tuple(f"bin {index}" for index in range(16))

    def relabel(self, labels: Tensor) -> Tensor:
        """Return the bin of each original value."""
        return labels * self.target.outputs // self.values


class DSpritesOrientation(DSpritesLocation):
    """dSprites' drawings, split as for `DSpritesLocation`: how is the sprite rotated, in 16 bins?

    The Hub's copy has the 40 angles of the original; VTAB merges two or three neighbours.
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
    """SmallNORB's photographs, split as for `SmallNORBAzimuth`: from which height?"""

    name = "smallnorb_elevation"
    repository = "clip-benchmark/wds_vtab-smallnorb_label_elevation"
    classes = tuple(f"{degrees} degrees" for degrees in range(30, 75, 5))
