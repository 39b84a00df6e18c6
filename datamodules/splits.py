"""Which images of a labelled set go into which split: pure functions of labels and a seed."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def stratified_split(labels: Tensor, parts: Sequence[float | Mapping[int, int]], seed: int) -> list[Tensor]:
    """Cut a labelled set into a rest and seeded, disjoint parts that hold the same share of every class.

    Args:
        labels: Class index of each image, shape (n,).
        parts: Share of each class that goes into each part, for example `[0.2, 0.2]`; or, as a whole number, how many
            images a part has, shared out in proportion, and by largest remainder what is left over; or how many of
            each class.
        seed: The split depends on the labels and this number alone.

    Returns:
        Sorted indices into `labels`: first the rest, then one tensor per part. Shares are rounded to whole images
        per class; a class gives every part at least one image as long as one remains in the rest.
    """
    counts = dict(zip(*(found.tolist() for found in labels.unique(return_counts=True)), strict=True))
    left = dict(counts)
    sizes: list[float | Mapping[int, int]] = []
    for part in parts:
        size = _in_proportion(left, part, seed) if isinstance(part, int) else part
        if isinstance(size, Mapping):
            left = {label: count - size[label] for label, count in left.items()}
        sizes.append(size)
    chosen: list[list[Tensor]] = [[] for _ in range(len(parts) + 1)]
    for label, count in counts.items():
        members = (labels == label).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{label}".encode()))
        members = members[torch.randperm(len(members), generator=generator)]
        for place, part in enumerate(sizes, start=1):
            take = part[label] if isinstance(part, Mapping) else min(max(1, round(part * count)), len(members) - 1)
            chosen[place].append(members[:take])
            members = members[take:]
        chosen[0].append(members)
    return [torch.cat(pieces).sort().values for pieces in chosen]


def _in_proportion(counts: Mapping[int, int], size: int, seed: int) -> dict[int, int]:
    """Return how many of each class make up `size` images: exact shares rounded down, or up where most is lost.

    Among classes that lose the same, the seed decides.
    """
    total = sum(counts.values())
    exact = {label: divmod(count * size, total) for label, count in counts.items()}
    taken = {label: whole for label, (whole, _) in exact.items()}
    labels = list(counts)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda place: -exact[labels[place]][1])
    for place in order[: size - sum(taken.values())]:
        taken[labels[place]] += 1
    return taken
