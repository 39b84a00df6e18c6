"""What every task shares: named splits, a seeded validation split, and loaders that count each image exactly once."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.images import ArrayImages, Images, Labelled
from datamodules.loading import Batch, ImageBatches, RepresentationBatches, Request, RequestSampler, Rows
from datamodules.splits import stratified_split
from datamodules.transforms import AUGMENTATIONS, Preprocessing, evaluation, squashed

SPLITS = ("train", "val", "test")
LabelledT = TypeVar("LabelledT", bound=Labelled)
PROTOCOLS = ("full", "vtab1k")
VTAB1K = {"train": 800, "val": 200}
"""Images that VTAB-1k takes of each split; test stays whole (Zhai et al., 2019)."""


class Task(LightningDataModule, ABC):
    """A downstream data set with its splits and classes.

    A concrete task sets `name` and `classes` and says in `load` which images belong to which split. Validation and
    test images are only ever seen through the backbone's own evaluation view.

    Args:
        root: Folder that holds the data, or that it is downloaded to.
        batch_size: Images per batch, over all processes.
        augmentation: How training images are varied where a run asks for more than the clean view (`model.features`):
            `paper` or `none`; null is the task's own default, `none` for specialized and structured tasks.
        num_workers: Processes that load images, for each training process; null takes one per free core, at most 8,
            and none beside a backbone on the CPU, where threads make the images in its pauses.
        seed: Decides the splits that are cut here, the order of training images, and the augmentation.
        protocol: `full`, or `vtab1k`: a seeded stratified 800 images of train and 200 of val, and the whole test split.

    Raises:
        MisconfigurationException: If an argument cannot be; the message names it.
    """

    name: str
    """What the task is called."""
    classes: Sequence[str]
    """Class names; the place is the class index."""
    width: int | None = None
    """D, where the task holds representations and no images."""
    group: Literal["natural", "specialized", "structured"] | None = None
    """VTAB's group; None for a task that is not one of VTAB's."""
    preprocessing: Preprocessing
    """What the backbone wants of an image (timm's data configuration); whoever joins the two sets it."""

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 256,
        augmentation: str | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        protocol: str = "full",
    ) -> None:
        super().__init__()
        if augmentation is None:
            augmentation = "none" if self.group in ("specialized", "structured") else "paper"
        if batch_size < 1:
            raise MisconfigurationException(f"data.batch_size is {batch_size}; it must be at least 1.")
        if augmentation not in AUGMENTATIONS:
            raise MisconfigurationException(
                f"data.augmentation is {augmentation!r}; it must be one of {', '.join(sorted(AUGMENTATIONS))}."
            )
        if self.whole_image and augmentation != "none":
            raise MisconfigurationException(
                f"data.augmentation is {augmentation!r}; {self.name} asks where things are, so it must be none."
            )
        if protocol not in PROTOCOLS:
            raise MisconfigurationException(f"data.protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}.")
        if num_workers is not None and num_workers < 0:
            raise MisconfigurationException(f"data.num_workers is {num_workers}; it must be at least 0.")
        if seed < 0:
            raise MisconfigurationException(f"data.seed is {seed}; it must be 0 or more.")
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.seed = seed
        self.images: Mapping[str, Labelled] = {}
        self.protocol = protocol
        self._representations: dict[str, Sequence[Rows]] = {}

    @abstractmethod
    def load(self) -> Mapping[str, Labelled]:
        """Return the images (or vectors) of `train`, `val` and `test`."""

    @property
    def label(self) -> str:
        """How results call the task: with its protocol, since another one makes other numbers."""
        return self.name if self.protocol == "full" else f"{self.name}_{self.protocol}"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def whole_image(self) -> bool:
        """Whether labels say where things are: such images are squashed to the input size whole, never cropped."""
        return self.group == "structured"

    def setup(self, stage: str | None = None) -> None:
        """Load the splits once and check them.

        Raises:
            MisconfigurationException: If there are fewer than two classes, or a label is none of them.
        """
        if self.images:
            return
        if self.num_classes < 2:
            raise MisconfigurationException(
                f"{self.name} has {self.num_classes} classes ({', '.join(self.classes) or 'none'}); a task needs at "
                f"least two."
            )
        images = self.load()
        if self.protocol == "vtab1k":
            images = {**images, **{split: self._sample(images[split], split, size) for split, size in VTAB1K.items()}}
        processes = self.trainer.world_size if self.trainer else 1
        for split in SPLITS:
            if len(images[split]) < processes:
                raise MisconfigurationException(
                    f"The {split} split of {self.name} has {len(images[split])} images, fewer than the {processes} "
                    f"processes; use at most {len(images[split])} devices."
                )
            self._check_labels(split, images[split])
        self.images = images

    def _check_labels(self, split: str, images: Labelled) -> None:
        """Refuse labels that are no classes, and a train split without contrast; name classes that it lacks."""
        wrong = ((images.labels < 0) | (images.labels >= self.num_classes)).nonzero()
        if len(wrong):
            index = int(wrong[0])
            raise MisconfigurationException(
                f"The label of {images.name(index)} in {split} of {self.name} is {int(images.labels[index])}; it must "
                f"be a class index from 0 to {self.num_classes - 1}."
            )
        absent = [self.classes[i] for i in (images.labels.bincount(minlength=self.num_classes) == 0).nonzero()[:, 0]]
        if split != "train" or not absent:
            return
        if len(absent) == self.num_classes - 1:
            raise MisconfigurationException(
                f"All of train of {self.name} is of class {self.classes[int(images.labels[0])]!r}; a probe needs at "
                f"least two classes."
            )
        more = ", ..." if len(absent) > 5 else ""
        rank_zero_info(
            f"{len(absent)} of {self.num_classes} classes of {self.name} are not in train, so that no probe can learn "
            f"them: {', '.join(absent[:5])}{more}."
        )

    def complete(self, images: Mapping[str, LabelledT]) -> dict[str, LabelledT]:
        """Cut the splits that are missing from train, a seeded stratified fifth each.

        Raises:
            MisconfigurationException: If a class of train is too small to reach all of them.
        """
        missing = {split: 0.2 for split in SPLITS if split not in images}
        counts = images["train"].labels.bincount(minlength=self.num_classes)
        if missing and counts.min() <= len(missing):
            raise MisconfigurationException(
                f"Class {self.classes[int(counts.argmin())]!r} of {self.name} has {int(counts.min())} images in train; "
                f"to cut {' and '.join(missing)} from it, it needs at least {len(missing) + 1}."
            )
        return {**images, **self.split_off(images["train"], **missing)}

    def split_off(self, images: LabelledT, **parts: float) -> dict[str, LabelledT]:
        """Cut `images` into `train` and seeded stratified parts, shares, `val=0.2`, or numbers of images, `val=20`."""
        pieces = stratified_split(images.labels, list(parts.values()), self.seed)
        return {name: images.subset(piece) for name, piece in zip(("train", *parts), pieces, strict=True)}

    def _sample(self, images: LabelledT, split: str, size: int) -> LabelledT:
        """Return a seeded stratified sample."""
        if len(images) < size:
            raise MisconfigurationException(
                f"The {split} split of {self.name} has {len(images)} images, fewer than the {size} of "
                f"data.protocol vtab1k; take full."
            )
        return images.subset(stratified_split(images.labels, [size], self.seed)[1])

    def represent(self, split: str, views: Sequence[Rows]) -> None:
        """Let the loader of `split` yield these representations from now on, one matrix per view, and not images."""
        self._representations[split] = views

    def representations(self, split: str) -> Sequence[Rows]:
        """Return the representations that the loader of `split` yields, one matrix per view."""
        return self._representations[split]

    @property
    def view(self) -> Preprocessing:
        """What becomes of an image on its way to the backbone: its preprocessing, without its crop where labels ask."""
        return squashed(self.preprocessing) if self.whole_image else self.preprocessing

    def image_batches(self, split: str, augmented: bool = False) -> ImageBatches:
        """Return what answers requests for images of `split`, in the clean or the augmented view."""
        varied = augmented and self.augmentation != "none"
        transform = (AUGMENTATIONS[self.augmentation] if varied else evaluation)(self.view)
        return ImageBatches(cast(Images, self.images[split]), transform, self.view, self.seed, varied)

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
            num_workers=self._workers(batches) if isinstance(batches, ImageBatches) else 0,
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

    def clean_loader(self, split: str) -> "DataLoader[Batch]":
        """Return the images of a split in order, in the clean view, also where its loader yields representations."""
        return self.loader(self.image_batches(split), self._requests(split))

    def _requests(self, split: str, shuffle_seed: int | None = None) -> RequestSampler:
        process, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return RequestSampler(len(self.images[split]), self.batch_size, process, processes, shuffle_seed)

    def _split_loader(self, split: str, shuffle_seed: int | None = None) -> "DataLoader[Batch]":
        images = self.images[split]
        requests = self._requests(split, shuffle_seed)
        if split in self._representations:
            return self.loader(RepresentationBatches(self._representations[split], images.labels), requests)
        return self.loader(self.image_batches(split, augmented=split == "train"), requests)

    def _workers(self, batches: ImageBatches) -> int:
        if self.num_workers is not None:
            return self.num_workers
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and not batches.varied:
            return 0  # the backbone wants every core; a worker beside it holds up all its threads
        images = batches.images
        if isinstance(images, ArrayImages) and images.pixels[0].nbytes * len(images) < 2**20:
            return 0  # transforming a handful of tiny images costs less than starting a process
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.num_devices if self.trainer else 1))
        return max(1, min(8, cores // here - 1))
