"""What every task shares: three splits, a target, and loaders that count each image exactly once."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.images import ArrayImages, FileImages, Images, Labelled
from datamodules.loading import (
    Batch,
    FeatureBatches,
    ImageBatches,
    JoinedRows,
    Request,
    RequestSampler,
    Rows,
    affordable,
)
from datamodules.outputs import TARGETS
from datamodules.splits import Part, stratified_split
from datamodules.targets import Multiclass, SameClass, Target
from datamodules.transforms import AUGMENTATIONS, VIEWS, Preprocessing

SPLITS = ("train", "val", "test")
PROTOCOLS: dict[str, dict[str, int]] = {"full": {}, "vtab1k": {"train": 800, "val": 200}}
"""How many images of a split each protocol takes, where not all; VTAB-1k takes all of test (Zhai et al., 2019)."""


def class_names(task: str) -> tuple[str, ...]:
    """Return the class names of a published task, in the order of their indices; `classes/` lists them."""
    return tuple(Path(__file__).with_name("classes").joinpath(f"{task}.txt").read_text(encoding="utf-8").splitlines())


class Task(LightningDataModule, ABC):
    """A downstream data set with the splits `train`, `val` and `test` and a target.

    A concrete task sets `name` and returns in `load` the splits of its source. Class names are an attribute of the
    class where they are fixed; otherwise `load` reads them and sets `target`. Constructors read no data. Validation
    and test images are only ever seen as `view` says.

    Args:
        root: Folder that holds the data, or that they are downloaded to.
        batch_size: Images per batch, over all processes.
        augmentation: How training images are varied where a run asks for more than the clean view (`model.features`):
            `paper` or `none`; null is the task's own default, `none` for specialized and structured tasks.
        view: How an image is fitted to the backbone's input: `weights`, resized and cropped as its weights were
            evaluated, or `squash`, resized whole whatever its shape, as in VTAB; null is the task's own default,
            `squash` for structured tasks, whose labels say where things are, and `weights` for all others.
        num_workers: Processes that load images, for each training process; null takes one per free core, at most 8,
            and none beside a backbone on the CPU, where threads load images while the backbone waits.
        seed: Decides the splits that are cut here, the order of training images, and the augmentation.
        protocol: `full`, or `vtab1k`: a seeded stratified 800 images of train and 200 of val, and all of test.
        min_images: Classes that have fewer images in train, before splits are cut from it, are left out.
        target: What is asked of each image: `classes`, which it is of, or `retrieval`, the images of train that are of
            the same one; of one's own data also `multilabel`, which of several labels it has, or `regression`, numbers.

    Raises:
        MisconfigurationException: If an argument cannot be; the message names it.
    """

    name: str  # What the task is called; known from the constructor on
    group: Literal["natural", "specialized", "structured"] | None = None
    """VTAB's group; None for a task that is not one of VTAB's."""
    classes: ClassVar[Sequence[str]] = ()  # Class names in the order of their indices, where they are fixed
    cut: ClassVar[Mapping[str, Part]] = {"val": 0.2, "test": 0.2}
    """How much of train becomes a split that `load` does not return; see `splits.Part`."""
    streaming = False  # Whether images come in order, and none can be had again without reading others
    vectors: ClassVar[bool] = False  # Whether the task holds vectors, which no backbone takes, and no images
    targets: ClassVar[Sequence[str]] = ("classes", "retrieval")  # What can be asked of its images
    target: Target  # What is to be predicted; known after `setup`
    width: int | None = None  # D of the vectors, after `setup`; None for images
    preprocessing: Preprocessing
    """What the backbone wants of an image (timm's data configuration); set by whoever joins task and backbone."""

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 256,
        augmentation: str | None = None,
        view: str | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        protocol: str = "full",
        min_images: int = 0,
        target: str = "classes",
    ) -> None:
        super().__init__()
        if augmentation is None:
            augmentation = "none" if self.group in ("specialized", "structured") else "paper"
        if view is None:
            view = "squash" if self.group == "structured" else "weights"
        if batch_size < 1:
            raise MisconfigurationException(f"data.batch_size is {batch_size}; it must be at least 1.")
        for option, value, possible in (
            ("augmentation", augmentation, sorted(AUGMENTATIONS)),
            ("view", view, VIEWS),
            ("protocol", protocol, PROTOCOLS),
            ("target", target, self.targets),
        ):
            if value not in possible:
                raise MisconfigurationException(f"data.{option} is {value!r}; it must be one of {', '.join(possible)}.")
        for option, value, needed in (("augmentation", augmentation, "none"), ("view", view, "squash")):
            if self.group == "structured" and value != needed:
                raise MisconfigurationException(
                    f"data.{option} is {value!r}; {self.name} asks where things are, so it must be {needed}."
                )
        if num_workers is not None and num_workers < 0:
            raise MisconfigurationException(f"data.num_workers is {num_workers}; it must be at least 0.")
        for option, number in (("seed", seed), ("min_images", min_images)):
            if number < 0:
                raise MisconfigurationException(f"data.{option} is {number}; it must be 0 or more.")
        if min_images and target in TARGETS:
            raise MisconfigurationException(
                f"data.min_images is {min_images}, but data.target {target} has no classes to leave out; set it 0."
            )
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.view = view
        self.num_workers = num_workers
        self.seed = seed
        self.protocol = protocol
        self.min_images = min_images
        self.asked = target
        self.origins: dict[str, str] = {}
        """What put images into each split, as a run says it at its start; set in `load`, where there is more to say
        than that they were published so."""
        self.images: Mapping[str, Labelled] = {}
        self._features: dict[str, Sequence[Rows]] = {}
        self.extract: Callable[[str], Sequence[Rows]] | None = None
        """Makes the features of a split when they are first asked for; whoever has the backbone sets it."""
        if self.classes:
            self.target = Multiclass(self.classes)

    @abstractmethod
    def load(self) -> Mapping[str, Labelled]:
        """Read train and what else there is of val and test; set `target` where class names are read, too."""

    @property
    def label(self) -> str:
        """What results call the task: its name, with the protocol and target where they are not the usual ones."""
        unusual = [self.protocol] * (self.protocol != "full") + [self.asked] * (self.asked != "classes")
        return "_".join([self.name, *unusual])

    def setup(self, stage: str | None = None) -> None:
        """Load the splits, the first time, and check them.

        Raises:
            MisconfigurationException: If the data cannot be read, a split has fewer images than there are processes,
                or a label cannot be.
        """
        if not self.images:
            images = self._cut_missing(self._without_small_classes(self.load()))
            for split, size in PROTOCOLS[self.protocol].items():
                if len(images[split]) < size:
                    raise MisconfigurationException(
                        f"The {split} split of {self.name} has {len(images[split])} images, fewer than the {size} of "
                        f"data.protocol {self.protocol}; take full."
                    )
                sample = stratified_split(self.target.strata(images[split].labels), [size], self.seed)[1]
                images[split] = images[split].subset(sample)
            for split in SPLITS:
                if not len(images[split]):
                    raise MisconfigurationException(f"The {split} split of {self.name} has no images.")
                self.target.check(images[split], split, self.name)
            self.target.fit(images["train"].labels)
            if self.asked == "retrieval":
                self.target = SameClass({split: images[split].labels for split in SPLITS})
            self.images = images
        processes = self.trainer.world_size if self.trainer else 1
        for split, loaded in self.images.items():
            if len(loaded) < processes:
                raise MisconfigurationException(
                    f"The {split} split of {self.name} has {len(loaded)} {self.target.items}, fewer than the "
                    f"{processes} processes; use at most {len(loaded)} devices."
                )

    def describe(self) -> str:
        """Return the sizes of the splits, what put images there, and the target in one line, after `setup`."""
        origins = {split: f" ({origin})" for split, origin in self.origins.items()}
        sizes = ", ".join(f"{len(self.images[split]):,} {split}{origins.get(split, '')}" for split in SPLITS)
        kind = f"vectors of {self.width:,} values" if self.vectors else "images"
        return f"{self.label}: {sizes} {kind}, {self.target.describe()}"

    def _without_small_classes(self, images: Mapping[str, Labelled]) -> Mapping[str, Labelled]:
        """Return the splits without classes that have fewer than `min_images` images in train, and say which."""
        if not self.min_images or not isinstance(self.target, Multiclass):
            return images
        counts = images["train"].labels.bincount(minlength=self.target.outputs)
        kept = (counts >= self.min_images).nonzero()[:, 0]
        if len(kept) < 2:
            raise MisconfigurationException(
                f"data.min_images is {self.min_images}; {len(kept)} of {len(counts)} classes of {self.name} have so "
                f"many images in train, and a task needs at least two."
            )
        left = [f"{self.target.classes[i]} ({counts[i]})" for i in (counts < self.min_images).nonzero()[:, 0]]
        if not left:
            return images
        rank_zero_info(
            f"{len(left)} of {len(counts)} classes of {self.name} are left out, with fewer than {self.min_images} "
            f"images in train: {', '.join(left[:10])}{', ...' if len(left) > 10 else ''}."
        )
        self.target = Multiclass([self.target.classes[i] for i in kept])
        indices = torch.full((len(counts),), -1).index_copy(0, kept, torch.arange(len(kept)))
        remaining: dict[str, Labelled] = {}
        for split, labelled in images.items():
            remaining[split] = labelled.subset((indices[labelled.labels] >= 0).nonzero()[:, 0])
            remaining[split].labels = indices[remaining[split].labels]
        return remaining

    def _cut_missing(self, images: Mapping[str, Labelled]) -> dict[str, Labelled]:
        """Return all splits; those that are missing are seeded stratified parts of train, as large as `cut` says."""
        missing = {split: self.cut[split] for split in SPLITS if split not in images}
        if not missing:
            return dict(images)
        train, least = images["train"], len(missing) + 1
        strata = self.target.strata(train.labels)
        labels, counts = strata.unique(return_counts=True)
        shares = any(isinstance(part, float) for part in missing.values())
        if isinstance(self.target, Multiclass) and shares and counts.min() < least:
            few = self.target.name(labels[counts < least]).tolist()
            raise MisconfigurationException(
                f"Class {few[0]!r} of {self.name} has {int(counts[counts < least][0])} images in train; to cut "
                f"{' and '.join(missing)} from it, it needs at least {least}. --data.min_images {least} leaves such "
                f"classes out: {', '.join(map(repr, few[:10]))}{', ...' if len(few) > 10 else ''}."
            )
        self.origins |= dict.fromkeys(missing, "cut from train")
        pieces = stratified_split(strata, list(missing.values()), self.seed)
        found = {**images, **dict(zip(("train", *missing), map(train.subset, pieces), strict=True))}
        return {split: found[split] for split in SPLITS}

    # ------------------------------------------------------------------------------------------------- features

    def features(self, split: str) -> Sequence[Rows] | None:
        """Return the features that the loader of `split` yields, one matrix of shape (n, D) per view.

        They are extracted when first asked for; None where nothing extracts them, so that loaders yield images.
        """
        if split not in self._features and self.extract is not None:
            self._features[split] = self.extract(split)
        return self._features.get(split)

    def extraction_loader(
        self, split: str, batches: Iterable[Sequence[int]], view: int | None, largest: int
    ) -> "DataLoader[Batch]":
        """Return a loader of exactly these batches of images, in this order, whatever the process.

        `batches` are indices into the split, at most `largest` each, and are asked for one by one; images are augmented
        as in epoch `view`, or in the clean view where None.
        """
        requests = (Request(list(batch), len(batch), view or 0) for batch in batches)
        return self._loader(self._image_batches(split, augmented=view is not None), requests, largest)

    def clean_loader(self, split: str) -> "DataLoader[Batch]":
        """Return the images of a split in order, in the clean view, also where its loader yields features."""
        return self._loader(self._image_batches(split, augmented=False), self._requests(len(self.images[split])))

    def preprocessed(self, files: Sequence[str]) -> Tensor:
        """Return image files as the backbone takes them, in the clean view, shape (n, C, H, W)."""
        images = FileImages(Path(), files, torch.zeros(len(files), dtype=torch.int64))
        batches = ImageBatches(images, VIEWS[self.view](self.preprocessing), self.preprocessing, self.seed, False)
        return batches[Request(list(range(len(files))), len(files), 0)].inputs

    def view_provenance(self, view: int | None) -> str:
        """Return what a view of an image depends on, beside its preprocessing: what features are checked against."""
        name = "clean view" if view is None else f"{self.augmentation} view {view} of seed {self.seed}"
        return name + ", squashed whole" * (self.view == "squash")

    # -------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> "DataLoader[Batch]":
        """Return shuffled batches of train: augmented images, or features."""
        return self._split_loader("train", self.seed)

    def val_dataloader(self) -> "DataLoader[Batch]":
        """Return the validation split in order."""
        return self._split_loader("val")

    def test_dataloader(self) -> "DataLoader[Batch]":
        """Return the test split in order."""
        return self._split_loader("test")

    predict_dataloader = test_dataloader

    def refit_dataloader(self) -> "DataLoader[Batch]":
        """Return shuffled batches of the features of train and validation together, the latter's indices after train's.

        Of train, as of validation, the first view is read.
        """
        parts = [cast(Sequence[Rows], self.features(split))[0] for split in ("train", "val")]
        labels = torch.cat([self.images[split].labels for split in ("train", "val")])
        return self._loader(FeatureBatches([JoinedRows(*parts)], labels), self._requests(len(labels), self.seed))

    def _split_loader(self, split: str, shuffle_seed: int | None = None) -> "DataLoader[Batch]":
        requests = self._requests(len(self.images[split]), shuffle_seed)
        views = self.features(split)
        if views is not None:
            return self._loader(FeatureBatches(views, self.images[split].labels), requests)
        return self._loader(self._image_batches(split, augmented=split == "train"), requests)

    def _requests(self, images: int, shuffle_seed: int | None = None) -> RequestSampler:
        process, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return RequestSampler(images, self.batch_size, process, processes, shuffle_seed)

    def _image_batches(self, split: str, augmented: bool) -> ImageBatches:
        random = augmented and self.augmentation != "none"
        transform = (AUGMENTATIONS[self.augmentation] if random else VIEWS[self.view])(self.preprocessing)
        return ImageBatches(cast(Images, self.images[split]), transform, self.preprocessing, self.seed, random)

    def _loader(
        self, batches: ImageBatches | FeatureBatches, requests: Iterable[Request], largest: int | None = None
    ) -> "DataLoader[Batch]":
        workers = 0
        if isinstance(batches, ImageBatches):
            size = requests.largest if isinstance(requests, RequestSampler) else largest or 0
            workers = affordable(self._workers(batches), batches, size)
        return DataLoader(
            batches,
            batch_size=None,  # a request already is a batch
            sampler=requests,
            num_workers=workers,
            pin_memory=bool(self.trainer and self.trainer.strategy.root_device.type == "cuda"),
        )

    def _workers(self, batches: ImageBatches) -> int:
        if self.num_workers is not None:
            return self.num_workers
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and not batches.random:
            return 0  # the backbone uses every core; a worker beside it would hold up all its threads
        if isinstance(batches.images, ArrayImages) and batches.images.pixels.nbytes < 2**20:
            return 0  # transforming a handful of tiny images costs less than starting a process
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.num_devices if self.trainer else 1))
        return max(1, min(8, cores // here - 1))
