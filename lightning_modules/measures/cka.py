"""How much of a layer's geometry subsets keep: linear CKA with the full layer, plain and debiased, and by chance."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from lightning_modules.features.moments import Moments
from lightning_modules.measures.layer_ranks import LayerRanks
from lightning_modules.results.tables import Column
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.coordinates import Space

NOTHING = 1e-24  # a subset with less than this share of the full layer's HSIC with itself holds rounding alone


class CKA(LayerRanks):
    """Linear CKA of every subset with its full layer, plain and debiased, and the table of `LayerRanks`.

    Beside the plain one stands what independent representations of as many images reach, where the debiased one expects
    0, and for random neurons what X'X of the full layer alone makes one expect.
    Missing for subsets in fewer than 32 bits, of which X'X says nothing.
    The ranks follow from the sums that CKA needs: X'X, and a few of every subset. Costs 2 n D^2 operations for n
    images of D neurons in float64, and D^2 numbers of memory.
    """

    columns = (
        Column("cka", "CKA", logged=True, drawn=True),
        Column("cka_debiased", "CKA, debiased", drawn=True),
        Column("cka_chance", "CKA by chance", drawn=True, reference=True),
        Column("cka_foretold", "CKA foretold from X'X", drawn=True, reference=True),
    )
    panel = "CKA with the full layer"
    panel_limits = (0, 1.03)

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Sum over processes and return the columns, and the table of layers."""
        table, coordinates = super().compute(), self.context.coordinates
        columns = torch.full((len(self.columns), len(self.context.probes)), torch.nan, dtype=torch.float64)
        for layer, sums in self.sums.items():
            found = coordinates.of_source(Space(layer)), linear_cka(sums, sums.orderings[:-1]), sums.compute()
            scatter = sums.scatter
            for group, (plain, chance), debiased in zip(*found, strict=True):
                columns[:3, list(group.probes)] = torch.stack([plain, debiased, chance]).cpu()
                if group.selection == "random":
                    columns[3, list(group.probes)] = foretold_cka(scatter, group.sizes).cpu()
        return {**table, **{column.name: values for column, values in zip(self.columns, columns, strict=True)}}

    def begin(self, layer: str, width: int) -> Moments:
        """Return empty sums of a layer."""
        coordinates = self.context.coordinates
        orderings = [coordinates.ordering(group) for group in coordinates.of_source(Space(layer))]
        return DebiasedCKA(width, self.context.target.outputs, orderings, device=self.context.device)


def linear_cka(moments: Moments, orderings: Sequence[Ordering]) -> list[tuple[Tensor, Tensor]]:
    """Return the linear CKA of subsets with the full layer (Kornblith et al., 2019), and that by chance, float64.

    |Z'X|_F^2 / (|Z'Z|_F |X'X|_F) of the centred coordinates Z of the subset and the centred representations X. By
    chance is its mean over all permutations of the n images of Z, so what is left where Z and X have nothing to do with
    each other: tr Z'Z tr X'X / (n - 1) in place of |Z'X|_F^2, or the geometric mean of both participation ratios over
    n - 1. Two tensors of shape (m,) per ordering; not a number for a subset that never changes.
    """
    scatter = moments.scatter
    size, total = scatter.square().sum(), scatter.trace() / (moments.count - 1)
    results = []
    for ordering in orderings:
        masks = ordering.masks().to(scatter)
        halfway = ordering.half(scatter)  # Z'X, and so all of Z'Z
        with_full = halfway.square().sum(1) @ masks
        own = ordering.coordinates(halfway)
        norms = (_leading(own.square(), masks) * size).sqrt()
        results.append((with_full / norms, (own.diagonal() @ masks) * total / norms))
    return results


def foretold_cka(scatter: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the linear CKA with the full layer to expect of k random neurons, for each size k, shape (m,), float64.

    From the centred X'X alone: |Z'X|_F^2 and |Z'Z|_F^2 in the formula of `linear_cka` are replaced by their means over
    all subsets of k of the D neurons.
    """
    k, width = torch.tensor(sizes).to(scatter), len(scatter)
    squares, whole = scatter.diagonal().square().sum(), scatter.square().sum()
    pairs = k * (k - 1) / max(1, width * (width - 1))
    return k / width * whole / ((k / width * squares + pairs * (whole - squares)) * whole).sqrt()


def _leading(matrix: Tensor, masks: Tensor) -> Tensor:
    """Return the sum of the leading k x k block for each size, shape (m,)."""
    return torch.einsum("mk,km->m", masks.t() @ matrix, masks)


class DebiasedCKA(Moments):
    """Moments with the sums that the debiased CKA of subsets with the full layer needs beside them.

    CKA whose every HSIC is the unbiased estimator (Song et al., 2012, equation 5; Nguyen et al., 2021): the plain one
    grows as images become few for the neurons. With q_i = |x_i|^2 over the full layer and q_iS over a subset, the
    n x n kernels K = ZZ' and L = XX' without their diagonals enter only as

        tr KL = |Z'X|_F^2 - sum_i q_iS q_i,
        1'K1 = |sum_i z_i|^2 - sum_i q_iS,
        1'KL1 = sum_i (z_i's_Z - q_iS) (x_i's_X - q_i), with s the sums over images,

    which expand into second moments and sums of q_iS, q_iS^2, q_iS q_i and q_iS x_i.
    """

    def __init__(
        self, width: int, outputs: int, orderings: Sequence[Ordering], *, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(width, outputs, device=device)
        # The full layer is one more subset, the last.
        self.orderings = [*orderings, Ordering(torch.arange(width), [width])]
        zeros = self.sums["counts"].new_zeros(sum(len(ordering.sizes) for ordering in self.orderings))
        self._masks = [ordering.masks().to(zeros) for ordering in self.orderings]
        self.sums |= {name: zeros.clone() for name in ("norms", "norms_squared", "norms_with_full")}
        self.sums["weighted"] = zeros.new_zeros(width, len(zeros))

    def _add(self, rows: Tensor, targets: Tensor) -> None:
        super()._add(rows, targets)
        subsets = zip(self.orderings, self._masks, strict=True)
        norms = torch.cat([ordering.coordinates(rows).square() @ masks for ordering, masks in subsets], 1)
        self.sums["norms"] += norms.sum(0)
        self.sums["norms_squared"] += norms.square().sum(0)
        self.sums["norms_with_full"] += norms.t() @ norms[:, -1]
        self.sums["weighted"] += rows.t() @ norms

    def compute(self) -> list[Tensor]:
        """Return the debiased CKA, shape (m,) per ordering, float64; it may be negative.

        Not a number for a subset that never changes, and for fewer than four images.
        """
        products, total = self.products, self.sums["total"]
        from_full = products @ total  # X'X s_X
        norms_of_full, weighted_by_full = self.sums["norms"][-1], self.sums["weighted"][:, -1]
        of_full = total @ total - norms_of_full
        results, start = [], 0
        for ordering, masks in zip(self.orderings, self._masks, strict=True):
            part = slice(start, start := start + len(ordering.sizes))
            names = ("norms", "norms_squared", "norms_with_full", "weighted")
            norms, squared, with_full, weighted = (self.sums[name][..., part] for name in names)
            z = ordering.coordinates(total.unsqueeze(0)).squeeze(0)  # s_Z of the largest subset; masks give the rest
            halfway = ordering.half(products)
            own = ordering.coordinates(halfway)
            of_subset = z.square() @ masks - norms
            full_traces = halfway.square().sum(1) @ masks - with_full
            full_sums = (
                (z * ordering.coordinates(from_full.unsqueeze(0)).squeeze(0)) @ masks
                - total @ weighted
                - (z * ordering.coordinates(weighted_by_full.unsqueeze(0)).squeeze(0)) @ masks
                + with_full
            )
            own_traces = _leading(own.square(), masks) - squared
            own_sums = (
                _leading(z.unsqueeze(1) * own * z, masks)
                - 2 * torch.einsum("k,mk,km->m", z, ordering.coordinates(weighted.t()), masks)
                + squared
            )
            cross = self._hsic(full_traces, of_subset * of_full, full_sums)
            results.append((cross, self._hsic(own_traces, of_subset.square(), own_sums)))
        full = results.pop()[1]
        return [cross / (own.masked_fill(own <= NOTHING * full, torch.nan) * full).sqrt() for cross, own in results]

    def _hsic(self, traces: Tensor, sums: Tensor, joint_sums: Tensor) -> Tensor:
        """Return the unbiased HSIC from tr KL, 1'K1 1'L1 and 1'KL1, up to a factor of the number of images."""
        count = self.count
        if count < 4:
            return torch.full_like(traces, torch.nan)
        return traces + sums / ((count - 1) * (count - 2)) - 2 / (count - 2) * joint_sums
