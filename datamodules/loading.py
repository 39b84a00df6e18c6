"""Batches that hold the same images for any number of processes and workers.

A sampler yields a `Request` for each batch, and a data set answers it with a `Batch`. A request carries the epoch, so
that augmentation is a function of (seed, epoch, index) also in worker processes, which are not told the epoch.
"""

import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datamodules.images import Images
from datamodules.transforms import Preprocessing, Transform, normalise

SHARED = Path("/dev/shm")
"""Shared memory, where Linux has it, through which workers hand over their batches."""


class Request(NamedTuple):
    """The images that one process needs of one batch."""

    indices: list[int]  # into the split
    total: int  # images in the batch, over all processes
    epoch: int  # which augmentation is drawn, or which view of the features is read


class Batch(NamedTuple):
    """What one process gets of one batch."""

    inputs: Tensor  # images, shape (b, 3, H, W), or features, shape (b, D)
    labels: Tensor  # as the images of the split have them, class indices of shape (b,) or shape (b, C)
    indices: Tensor  # into the split, shape (b,)
    total: int  # images in the batch, over all processes; b summed over them


class Rows(Protocol):
    """A matrix of features, possibly larger than memory, whose rows are read by a tensor of indices."""

    def __getitem__(self, indices: Tensor) -> Tensor: ...

    def __len__(self) -> int: ...


@dataclass(eq=False)
class JoinedRows:
    """The rows of two matrices, those of the second after those of the first."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, indices: Tensor) -> Tensor:
        before = indices < len(self.first)
        parts = self.first[indices[before]], self.second[indices[~before] - len(self.first)]
        rows = torch.empty(len(indices), parts[0].shape[1], dtype=parts[0].dtype)
        rows[before], rows[~before] = parts
        return rows


@dataclass(eq=False)
class RequestSampler(Sampler[Request]):
    """Cuts a split into batches and gives this process every `processes`-th image of each.

    Every process makes the same number of requests, also where the last batch has fewer images than there are
    processes and some requests are empty: otherwise some would wait for others in a collective forever.
    """

    images: int  # in the split
    batch_size: int  # over all processes
    process: int
    processes: int
    shuffle_seed: int | None  # of the order, drawn anew for every epoch; None keeps the order of the split
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch; the Trainer calls it before each one."""
        self.epoch = epoch

    @property
    def largest(self) -> int:
        """How many images a request has at most."""
        return -(-self.batch_size // self.processes)

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[Request]:
        order = torch.arange(self.images)
        if self.shuffle_seed is not None:
            seed = zlib.crc32(f"{self.shuffle_seed}/{self.epoch}".encode())
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        for batch in order.split(self.batch_size):
            yield Request(batch[self.process :: self.processes].tolist(), len(batch), self.epoch)


@dataclass(eq=False)
class ImageBatches(Dataset[Batch]):
    """Answers requests with decoded and transformed images, made by as many threads as PyTorch uses.

    Where the transform is `random`, it draws from torch's global generator. That is seeded for each image by (seed,
    epoch, index) and restored afterwards, and one thread makes all images, as there is one generator.
    """

    images: Images
    transform: Transform
    preprocessing: Preprocessing  # `input_size` of an image, and `mean` and `std` of its normalisation
    seed: int
    random: bool

    def __getitem__(self, request: Request) -> Batch:
        channels, height, width = self.preprocessing["input_size"]
        pixels = np.empty((len(request.indices), height, width, channels), np.uint8)
        threads = 1 if self.random else torch.get_num_threads()
        self.images.ahead(request.indices)

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


@dataclass(eq=False)
class FeatureBatches(Dataset[Batch]):
    """Answers requests with features, at memory speed; epoch e reads view e modulo their number."""

    views: Sequence[Rows]  # one matrix of features per view of the images
    labels: Tensor

    def __getitem__(self, request: Request) -> Batch:
        indices = torch.tensor(request.indices, dtype=torch.int64)
        inputs = self.views[request.epoch % len(self.views)][indices]
        return Batch(inputs, self.labels[indices], indices, request.total)


def affordable(workers: int, batches: ImageBatches, images: int) -> int:
    """Return for how many of the workers shared memory has room for such batches, of at most so many images.

    It is said where that is not for all. A worker keeps two batches there ahead, and those of validation do beside
    those of training. Where it is full, a worker is killed, and the run waits for it.
    """
    if not workers or not SHARED.is_dir():
        return workers
    needed = 4 * images * 4 * math.prod(batches.preprocessing["input_size"])  # four batches of float32, in bytes
    free = shutil.disk_usage(SHARED).free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = free // max(needed, 1)
    if room < workers:
        rank_zero_info(
            f"{SHARED} has {free / 1e6:,.0f} MB free, room for {room} of {workers} workers with {needed / 1e6:,.0f} MB "
            f"each; docker run takes --shm-size for more."
        )
    return min(workers, room)
