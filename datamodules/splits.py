"""Which images of a labelled set go into which split: pure functions of labels and a seed."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Percent(NamedTuple):
    """Size of a part in percent of all images, as VTAB cuts its splits.

    Unlike a `float`, which is rounded for each class by itself, it fixes the number of images of the part.
    """

    percent: int
    up: bool = False  # Whether the number of images is rounded up, and not down

    def of(self, images: int) -> int:
        """Return the number of images."""
        return -(-images * self.percent // 100) if self.up else images * self.percent // 100


Part = float | Percent | Mapping[int, int]
"""Size of a part: a share of each class (0.2), percent of all images, a number of images (200), or such a number for
each class ({0: 30, 1: 30})."""


def stratified_split(labels: Tensor, parts: Sequence[Part], seed: int) -> list[Tensor]:
    """Split a labelled set into a rest and seeded, disjoint, stratified parts: first the rest, then one for each part.

    Each is a tensor of sorted indices into `labels`, class indices of shape (n,); they depend on these and on the seed
    alone. A number of images is shared out in proportion to the classes, by largest remainder. Shares are rounded to
    whole images per class; a class gives every part at least one image as long as one remains in the rest.
    """
    counts = dict(zip(*(found.tolist() for found in labels.unique(return_counts=True)), strict=True))
    left = dict(counts)
    sizes: list[float | Mapping[int, int]] = []
    for part in parts:
        size = part.of(len(labels)) if isinstance(part, Percent) else part
        if isinstance(size, int):
            size = _in_proportion(left, size, seed)
        if isinstance(size, Mapping):
            left = {label: count - size[label] for label, count in left.items()}
        sizes.append(size)
    chosen: list[list[Tensor]] = [[] for _ in range(len(parts) + 1)]
    for label, count in counts.items():
        members = (labels == label).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{label}".encode()))
        members = members[torch.randperm(len(members), generator=generator)]
        for index, size in enumerate(sizes, start=1):
            take = size[label] if isinstance(size, Mapping) else min(max(1, round(size * count)), len(members) - 1)
            chosen[index].append(members[:take])
            members = members[take:]
        chosen[0].append(members)
    return [torch.cat(pieces).sort().values for pieces in chosen]


def _in_proportion(counts: Mapping[int, int], size: int, seed: int) -> dict[int, int]:
    """Return how many of each class make up `size` images: exact shares rounded down, or up where most is lost.

    Among classes that lose the same, the seed decides.
    """
    total = sum(counts.values())
    exact = {label: divmod(count * size, total) for label, count in counts.items()}
    taken = {label: floor for label, (floor, _) in exact.items()}
    labels = list(counts)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: -exact[labels[index]][1])
    for index in order[: size - sum(taken.values())]:
        taken[labels[index]] += 1
    return taken
