"""Which images of a labelled set go into which split: pure functions of labels and a seed."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_split(labels: Tensor, parts: Sequence[float], seed: int) -> list[Tensor]:
    """Cut a labelled set into a rest and seeded, disjoint parts that hold the same share of every class.

    Args:
        labels: Class index of each image, shape (n,).
        parts: Share of each class that goes into each part, for example `[0.2, 0.2]`.
        seed: The split depends on the labels and this number alone.

    Returns:
        Sorted indices into `labels`: first the rest, then one tensor per part. Shares are rounded to whole images
        per class; a class gives every part at least one image as long as one remains in the rest.
    """
    chosen: list[list[Tensor]] = [[] for _ in range(len(parts) + 1)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{label}".encode()))
        members = members[torch.randperm(len(members), generator=generator)]
        size = len(members)
        for place, share in enumerate(parts, start=1):
            take = min(max(1, round(share * size)), len(members) - 1)
            chosen[place].append(members[:take])
            members = members[take:]
        chosen[0].append(members)
    return [torch.cat(pieces).sort().values for pieces in chosen]
