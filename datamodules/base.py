"""What every task shares: named splits, a seeded validation split, and loaders that count each image exactly once."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from datamodules.images import ArrayImages, Images
from datamodules.loading import Batch, ImageBatches, RepresentationBatches, Request, RequestSampler, Rows
from datamodules.splits import stratified_split
from datamodules.transforms import AUGMENTATIONS, Preprocessing, Transform, evaluation

SPLITS = ("train", "val", "test")


class Task(LightningDataModule, ABC):
    """A downstream data set with its splits and classes.

    A concrete task sets `name` and `classes` and says in `load` which images belong to which split. Validation and
    test images are only ever seen through the backbone's own evaluation view.

    Args:
        root: Folder that holds the data, or that it is downloaded to.
        batch_size: Images per batch, over all processes.
        augmentation: How training images are varied where a run asks for more than the clean view (`model.features`):
            `paper` or `none`.
        num_workers: Processes that load images, for each training process; null takes one per free core, at most 8.
        seed: Decides the splits that are cut here, the order of training images, and the augmentation.

    Raises:
        MisconfigurationException: If an argument cannot be; the message names it.
    """

    name: str
    """How results call the task."""
    classes: Sequence[str]
    """Class names; the place is the class index."""
    preprocessing: Preprocessing
    """What the backbone wants of an image (timm's data configuration); whoever joins the two sets it."""

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 256,
        augmentation: str = "paper",
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise MisconfigurationException(f"data.batch_size is {batch_size}; it must be at least 1.")
        if augmentation not in AUGMENTATIONS:
            raise MisconfigurationException(
                f"data.augmentation is {augmentation!r}; it must be one of {', '.join(sorted(AUGMENTATIONS))}."
            )
        if num_workers is not None and num_workers < 0:
            raise MisconfigurationException(f"data.num_workers is {num_workers}; it must be at least 0.")
        if seed < 0:
            raise MisconfigurationException(f"data.seed is {seed}; it must be 0 or more.")
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.seed = seed
        self.images: dict[str, Images] = {}
        self._representations: dict[str, Sequence[Rows]] = {}

    @abstractmethod
    def load(self) -> dict[str, Images]:
        """Return the images of `train` and, where the task has them, `val` and `test`."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits once and check them."""
        if self.images:
            return
        images = self.load()
        processes = self.trainer.world_size if self.trainer else 1
        for split in SPLITS:
            if len(images[split]) < processes:
                raise MisconfigurationException(
                    f"The {split} split of {self.name} has {len(images[split])} images, fewer than the {processes} "
                    f"processes; use at most {len(images[split])} devices."
                )
        self.images = images

    def split_off(self, images: Images, **parts: float) -> dict[str, Images]:
        """Cut `images` into `train` and seeded stratified parts, for example `split_off(images, val=0.2)`."""
        pieces = stratified_split(images.labels, list(parts.values()), self.seed)
        return {name: images.subset(piece) for name, piece in zip(("train", *parts), pieces, strict=True)}

    def represent(self, split: str, views: Sequence[Rows]) -> None:
        """Let the loader of `split` yield these representations from now on, one matrix per view, and not images."""
        self._representations[split] = views

    def image_batches(self, split: str, augmented: bool = False) -> ImageBatches:
        """Return what answers requests for images of `split`, in the clean or the augmented view."""
        transform: Transform
        if augmented:
            transform = AUGMENTATIONS[self.augmentation](self.preprocessing)
        else:
            transform = evaluation(self.preprocessing)
        return ImageBatches(self.images[split], transform, self.seed, tuple(self.preprocessing["input_size"]))

    @staticmethod
    def request(indices: Sequence[int], epoch: int) -> Request:
        """Return a request for exactly these images, augmented (if at all) as in that epoch."""
        return Request(list(indices), len(indices), epoch)

    def loader(
        self, batches: ImageBatches | RepresentationBatches, requests: RequestSampler | Sequence[Request]
    ) -> "DataLoader[Batch]":
        """Return a loader of exactly these requests, in this order."""
        return DataLoader(
            batches,
            batch_size=None,  # a request is a whole batch
            sampler=requests,
            num_workers=self._workers(batches.images) if isinstance(batches, ImageBatches) else 0,
            pin_memory=bool(self.trainer and self.trainer.strategy.root_device.type == "cuda"),
        )

    def train_dataloader(self) -> "DataLoader[Batch]":
        """Return shuffled batches of the train split; images are augmented, representations already were."""
        return self._split_loader("train", shuffle_seed=self.seed)

    def val_dataloader(self) -> "DataLoader[Batch]":
        """Return the validation split in order."""
        return self._split_loader("val")

    def test_dataloader(self) -> "DataLoader[Batch]":
        """Return the test split in order."""
        return self._split_loader("test")

    def predict_dataloader(self) -> "DataLoader[Batch]":
        """Return the test split in order."""
        return self._split_loader("test")

    def _split_loader(self, split: str, shuffle_seed: int | None = None) -> "DataLoader[Batch]":
        process, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        images = self.images[split]
        requests = RequestSampler(len(images), self.batch_size, process, processes, shuffle_seed)
        if split in self._representations:
            return self.loader(RepresentationBatches(self._representations[split], images.labels), requests)
        return self.loader(self.image_batches(split, augmented=split == "train"), requests)

    def _workers(self, images: Images) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if isinstance(images, ArrayImages) and images.pixels[0].nbytes * len(images) < 2**20:
            return 0  # transforming a handful of tiny images costs less than starting a process
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.num_devices if self.trainer else 1))
        return max(1, min(8, cores // here - 1))
