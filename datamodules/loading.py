"""Batches that hold the same images for any number of processes and workers.

A sampler yields a `Request` for each batch, and a data set answers it with a `Batch`. A request carries the epoch, so
that augmentation is a function of (seed, epoch, index) also in worker processes, which are not told the epoch.
"""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datamodules.images import Images
from datamodules.transforms import Preprocessing, Transform, normalise


class Request(NamedTuple):
    """The images that one process needs of one batch."""

    indices: list[int]
    """Indices into the split."""
    total: int
    """Images in the batch, over all processes."""
    epoch: int
    """Which augmentation is drawn, or which view of the features is read."""


class Batch(NamedTuple):
    """What one process gets of one batch."""

    inputs: Tensor
    """Images, shape (b, 3, H, W), or features, shape (b, D)."""
    labels: Tensor
    """Class indices, shape (b,)."""
    indices: Tensor
    """Indices into the split, shape (b,)."""
    total: int
    """Images in the batch, over all processes; b summed over them."""


class Rows(Protocol):
    """A matrix of features, possibly larger than memory, whose rows are read by a tensor of indices."""

    def __getitem__(self, indices: Tensor) -> Tensor: ...

    def __len__(self) -> int: ...


class RequestSampler(Sampler[Request]):
    """Cuts a split into batches and gives this process every `processes`-th image of each.

    Every process makes the same number of requests, also where the last batch has fewer images than there are
    processes and some requests are empty: otherwise some would wait for others in a collective forever.

    Args:
        images: Images in the split.
        batch_size: Images per batch, over all processes.
        process: Rank of this process.
        processes: Number of processes.
        shuffle_seed: Seed of the order, drawn anew for every epoch; None keeps the order of the split.
    """

    def __init__(self, images: int, batch_size: int, process: int, processes: int, shuffle_seed: int | None) -> None:
        self.images = images
        self.batch_size = batch_size
        self.process = process
        self.processes = processes
        self.shuffle_seed = shuffle_seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch; the Trainer calls it before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[Request]:
        if self.shuffle_seed is None:
            order = torch.arange(self.images)
        else:
            seed = zlib.crc32(f"{self.shuffle_seed}/{self.epoch}".encode())
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        for batch in order.split(self.batch_size):
            yield Request(batch[self.process :: self.processes].tolist(), len(batch), self.epoch)


class ImageBatches(Dataset[Batch]):
    """Answers requests with decoded and transformed images, made by as many threads as PyTorch uses.

    Args:
        images: The split.
        transform: From a PIL image to pixels.
        preprocessing: With the `input_size` of an image, and `mean` and `std` of its normalisation.
        seed: Seed of the augmentation.
        random: Whether the transform draws from torch's global generator. It is then seeded for each image by (seed,
            epoch, index) and restored afterwards, and one thread makes all images, as there is one generator.
    """

    def __init__(
        self, images: Images, transform: Transform, preprocessing: Preprocessing, seed: int, random: bool
    ) -> None:
        self.images = images
        self.transform = transform
        self.preprocessing = preprocessing
        self.seed = seed
        self.random = random

    def __getitem__(self, request: Request) -> Batch:
        channels, height, width = self.preprocessing["input_size"]
        pixels = np.empty((len(request.indices), height, width, channels), np.uint8)
        threads = 1 if self.random else torch.get_num_threads()

        def make(thread: int) -> None:
            for row in range(thread, len(pixels), threads):
                index = request.indices[row]
                if self.random:
                    torch.default_generator.manual_seed(zlib.crc32(f"{self.seed}/{request.epoch}/{index}".encode()))
                pixels[row] = self.transform(self.images[index]).permute(1, 2, 0).numpy()

        with torch.random.fork_rng(devices=[], enabled=self.random), ThreadPoolExecutor(threads) as pool:
            list(pool.map(make, range(threads)))
        indices = torch.tensor(request.indices, dtype=torch.int64)
        inputs = normalise(torch.from_numpy(pixels), self.preprocessing)
        return Batch(inputs, self.images.labels[indices], indices, request.total)


class FeatureBatches(Dataset[Batch]):
    """Answers requests with features, at memory speed.

    Args:
        views: One matrix of features per view of the images; epoch e reads view e modulo their number.
        labels: Class indices, shape (n,).
    """

    def __init__(self, views: Sequence[Rows], labels: Tensor) -> None:
        self.views = views
        self.labels = labels

    def __getitem__(self, request: Request) -> Batch:
        indices = torch.tensor(request.indices, dtype=torch.int64)
        inputs = self.views[request.epoch % len(self.views)][indices]
        return Batch(inputs, self.labels[indices], indices, request.total)
