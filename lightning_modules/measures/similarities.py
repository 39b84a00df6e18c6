"""How alike queries and stored vectors are on every subset of an order, in one pass over the coordinates."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SIMILARITIES = ("cosine", "dot", "l2")


def similarities(queries: Tensor, stored: Tensor, sizes: Sequence[int], kind: str) -> Iterator[Tensor]:
    """Yield the similarities of queries, shape (n, D), and vectors, shape (m, D), on the first k coordinates, (n, m).

    One for each k of `sizes`, ascending: inner products and squared lengths of nested subsets add up, so that all
    together cost one product, 2 n m D operations. By `cosine`, which is 0 for a vector of zeros, `dot`, the inner
    product, or `l2`, minus the squared distance.
    """
    products = queries.new_zeros(len(queries), len(stored))
    lengths, stored_lengths = products.new_zeros(len(queries), 1), products.new_zeros(len(stored))
    start = 0
    for size in sizes:
        rows, columns = queries[:, start:size], stored[:, start:size]
        products.addmm_(rows, columns.t())
        lengths += rows.square().sum(1, keepdim=True)
        stored_lengths += columns.square().sum(1)
        start = size
        if kind == "cosine":
            shortest = torch.finfo(products.dtype).tiny
            scale, stored_scale = (each.clamp(min=shortest).rsqrt() for each in (lengths, stored_lengths))
            yield (products * scale).mul_(stored_scale)
        elif kind == "l2":
            yield products.mul(2).sub_(lengths).sub_(stored_lengths)
        else:
            yield products.clone()
