"""How much of the whole layer's geometry subsets keep: linear CKA, plain and debiased, and nearest neighbours."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_modules.features.moments import Moments
from lightning_modules.subsets.bases import Ordering

QUERIES = 512
"""Vectors whose neighbours are searched at once."""

COSINES = 10
"""Decimals of a cosine that count; what differs less is a tie."""

NOTHING = 1e-24
"""A subset with less than this share of the whole layer's HSIC with itself holds nothing but rounding."""


def linear_cka(moments: Moments, orderings: Sequence[Ordering]) -> list[Tensor]:
    """Return the linear CKA of subsets with the whole layer (Kornblith et al., 2019).

    |Z'X|_F^2 / (|Z'Z|_F |X'X|_F) of the centred coordinates Z of the subset and the centred representations X.

    Returns:
        One float64 tensor per ordering, shape (m,); not a number for a subset that never changes.
    """
    scatter = moments.scatter
    results = []
    for ordering in orderings:
        masks = ordering.masks().to(scatter)
        with_whole, within = _traces(ordering, scatter, masks)
        results.append(with_whole / (within * scatter.square().sum()).sqrt())
    return results


def _traces(ordering: Ordering, products: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return |Z'X|_F^2 and |Z'Z|_F^2 for each size, shape (m,), from X'X."""
    halfway = ordering.coordinates(products)
    return halfway.square().sum(0) @ masks, _leading(ordering.coordinates(halfway.t()).square(), masks)


def _leading(matrix: Tensor, masks: Tensor) -> Tensor:
    """Return the sum of the leading k x k block for each size, shape (m,)."""
    return torch.einsum("km,km->m", masks, matrix @ masks)


class DebiasedCKA(Moments):
    """Moments with the sums that the debiased CKA of subsets with the whole layer needs beside them.

    CKA whose every HSIC is the unbiased estimator (Song et al., 2012, equation 5; Nguyen et al., 2021): the plain one
    grows as images become few for the neurons. With q_i = |x_i|^2 over the whole layer and q_iS over a subset, the
    n x n kernels K = ZZ' and L = XX' without their diagonals enter only as

        tr KL = |Z'X|_F^2 - sum_i q_iS q_i,
        1'K1 = |sum_i z_i|^2 - sum_i q_iS,
        1'KL1 = sum_i (z_i's_Z - q_iS) (x_i's_X - q_i), with s the sums over images,

    which expand into second moments and sums of q_iS, q_iS^2, q_iS q_i and q_iS x_i. It is the same for any shift.

    Args:
        width: D.
        classes: C.
        orderings: The subsets.
        shift: As for `Moments`; the mean over another split is a good one.
        device: Where the sums lie.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        orderings: Sequence[Ordering],
        *,
        shift: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(width, classes, shift=shift, device=device)
        # The whole layer is one more subset, the last.
        self.orderings = [*orderings, Ordering(torch.arange(width), [width])]
        self._masks = [ordering.masks().to(self.shift) for ordering in self.orderings]
        subsets = sum(len(ordering.sizes) for ordering in self.orderings)
        self.sums["norms"] = self.shift.new_zeros(subsets)
        self.sums["norms_squared"] = self.shift.new_zeros(subsets)
        self.sums["norms_with_whole"] = self.shift.new_zeros(subsets)
        self.sums["weighted"] = self.shift.new_zeros(width, subsets)

    def _add(self, rows: Tensor, labels: Tensor) -> None:
        super()._add(rows, labels)
        norms = torch.cat(
            [
                ordering.coordinates(rows).square() @ masks
                for ordering, masks in zip(self.orderings, self._masks, strict=True)
            ],
            1,
        )
        self.sums["norms"] += norms.sum(0)
        self.sums["norms_squared"] += norms.square().sum(0)
        self.sums["norms_with_whole"] += norms.t() @ norms[:, -1]
        self.sums["weighted"] += rows.t() @ norms

    def compute(self) -> list[Tensor]:
        """Return the debiased CKA, one float64 tensor per ordering, shape (m,).

        It may be negative. Not a number for a subset that never changes, and for fewer than four images.
        """
        lower = self._sum("products").tril()
        products = lower + lower.tril(-1).t()
        total = self.sums["totals"].sum(0)
        from_whole = products @ total  # X'X s_X
        norms_of_whole, weighted_by_whole = self.sums["norms"][-1], self.sums["weighted"][:, -1]
        of_whole = total @ total - norms_of_whole
        results, start = [], 0
        for ordering, masks in zip(self.orderings, self._masks, strict=True):
            part = slice(start, start := start + len(ordering.sizes))
            norms, squared, with_whole = (
                self.sums[name][part] for name in ("norms", "norms_squared", "norms_with_whole")
            )
            weighted = self.sums["weighted"][:, part]
            z = ordering.coordinates(total.unsqueeze(0)).squeeze(0)  # s_Z of the largest subset; masks give the rest
            own = ordering.square(products)
            of_subset = z.square() @ masks - norms
            whole_traces = ordering.coordinates(products).square().sum(0) @ masks - with_whole
            whole_sums = (
                (z * ordering.coordinates(from_whole.unsqueeze(0)).squeeze(0)) @ masks
                - total @ weighted
                - (z * ordering.coordinates(weighted_by_whole.unsqueeze(0)).squeeze(0)) @ masks
                + with_whole
            )
            own_traces = _leading(own.square(), masks) - squared
            own_sums = (
                _leading(z.unsqueeze(1) * own * z, masks)
                - 2 * torch.einsum("k,mk,km->m", z, ordering.coordinates(weighted.t()), masks)
                + squared
            )
            cross = self._hsic(whole_traces, of_subset * of_whole, whole_sums)
            results.append((cross, self._hsic(own_traces, of_subset.square(), own_sums)))
        whole = results.pop()[1]
        return [cross / (own.masked_fill(own <= NOTHING * whole, torch.nan) * whole).sqrt() for cross, own in results]

    def _hsic(self, traces: Tensor, sums: Tensor, joint_sums: Tensor) -> Tensor:
        """Return the unbiased HSIC from tr KL, 1'K1 1'L1 and 1'KL1, up to a factor of the number of images."""
        count = self.count
        if count < 4:
            return torch.full_like(traces, torch.nan)
        return traces + sums / ((count - 1) * (count - 2)) - 2 / (count - 2) * joint_sums


def neighbours_kept(
    queries: Tensor,
    gallery: Tensor,
    orderings: Sequence[Ordering],
    *,
    neighbours: int = 10,
    own: Tensor | None = None,
) -> list[Tensor]:
    """Count how many of the queries' nearest gallery vectors, by cosine on the whole layer, subsets find too.

    The inner products of nested subsets add up, so that an ordering costs one product of the n queries with the m
    gallery vectors, 2 n m D operations in float64, and a search through n m cosines for each size. Ties go to the
    smaller index; a vector of zeros has cosine 0 with all.

    Args:
        queries: Shape (n, D).
        gallery: Shape (m, D), more than `neighbours`.
        orderings: The subsets.
        neighbours: How many are looked for.
        own: The place of each query in the gallery, which does not count as its neighbour, shape (n,).

    Returns:
        One int64 tensor per ordering, shape (sizes,): neighbours kept over all queries, of `neighbours` * n.
    """
    chunks = range(0, len(queries), QUERIES)

    def nearest(seen: Tensor, stored: Tensor, sizes: Sequence[int], chunk: int) -> Iterator[Tensor]:
        part = slice(chunk, chunk + QUERIES)
        return _nearest(seen[part], stored, sizes, neighbours, None if own is None else own[part])

    wanted = [next(nearest(queries, gallery, [queries.shape[1]], chunk)).unsqueeze(2) for chunk in chunks]
    results = []
    for ordering in orderings:
        seen, stored = ordering.coordinates(queries), ordering.coordinates(gallery)
        kept = torch.zeros(len(ordering.sizes), dtype=torch.int64, device=queries.device)
        for chunk, of_whole in zip(chunks, wanted, strict=True):
            for place, found in enumerate(nearest(seen, stored, ordering.sizes, chunk)):
                kept[place] += (of_whole == found.unsqueeze(1)).sum()
        results.append(kept)
    return results


def _nearest(
    queries: Tensor, gallery: Tensor, sizes: Sequence[int], neighbours: int, own: Tensor | None
) -> Iterator[Tensor]:
    """Yield the places of the nearest gallery vectors on the first k coordinates, for each k, shape (n, neighbours)."""
    shape = (len(queries), len(gallery))
    products = torch.zeros(shape, dtype=torch.float64, device=queries.device)
    query_norms, gallery_norms = products.new_zeros(len(queries), 1), products.new_zeros(len(gallery))
    # Keys are whole numbers of which no two are equal, so that the choice among ties is the same everywhere.
    ties = torch.arange(len(gallery) - 1, -1, -1, device=queries.device)
    start = 0
    for size in sizes:
        rows, columns = queries[:, start:size].double(), gallery[:, start:size].double()
        products.addmm_(rows, columns.t())
        query_norms += rows.square().sum(1, keepdim=True)
        gallery_norms += columns.square().sum(1)
        start = size
        cosines = products / (query_norms * gallery_norms).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        keys = (cosines * 10**COSINES).round().long() * len(gallery) + ties
        if own is not None:
            keys.scatter_(1, own.to(keys.device).unsqueeze(1), torch.iinfo(torch.int64).min)
        yield keys.topk(neighbours, dim=1).indices
