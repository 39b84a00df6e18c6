"""Bases whose coordinates are selected: principal components, discriminants, projections; and orders to select in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_modules.features.moments import Moments, rounding

STEPS = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.03076}
"""By bits, the step between levels over the standard deviation: uniform levels with the least squared error on a normal
distribution (Max, 1960)."""
SMALLEST = 1e-30  # step, of a coordinate that never changes
PENALTY = 0.3  # where labels rank neurons, over the mean diagonal of the layer's centred X'X


class Ordering(NamedTuple):
    """Nested subsets: the first k coordinates of an ordering, for several k."""

    order: Tensor  # Distinct coordinates, the most wanted first, at least as many as the largest size
    sizes: Sequence[int]  # The m subset sizes k, ascending; equal ones are allowed
    basis: Tensor | None = None
    """Coordinates as columns, shape (D, M), features x having the coordinates basis' x; None for the layer's
    own neurons."""

    @property
    def chosen(self) -> Tensor:
        """The coordinates of the largest subset, in order."""
        return self.order[: self.sizes[-1]]

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return the coordinates of the largest subset in order, shape (b, k), of rows of shape (b, D)."""
        if self.basis is None:
            return rows.index_select(1, self.chosen.to(rows.device))  # in half the time of brackets
        return rows @ self.basis[:, self.chosen.to(self.basis.device)].to(rows)

    def half(self, matrix: Tensor) -> Tensor:
        """Return a symmetric matrix over neurons, shape (D, D), from the coordinates to neurons, shape (k, D)."""
        return matrix[self.chosen.to(matrix.device)] if self.basis is None else self.coordinates(matrix).t()

    def square(self, matrix: Tensor) -> Tensor:
        """Return a quadratic form over neurons, shape (D, D) and symmetric, over the coordinates, shape (k, k)."""
        return self.coordinates(self.half(matrix))

    def masks(self) -> Tensor:
        """Return which of the ordered coordinates each size sees, shape (k, m), as float64 zeros and ones."""
        places = torch.arange(self.sizes[-1]).unsqueeze(1)
        return (places < torch.tensor(self.sizes)).double()


class PrincipalComponents(NamedTuple):
    """The directions of a representation by descending variance."""

    variances: Tensor  # Population variance along each, descending, shape (D,)
    components: Tensor  # One per column, orthonormal, shape (D, D); the entry of the largest magnitude is positive
    rank: int  # How many have a variance that is not zero: fewer than the images


def principal_components(moments: Moments) -> PrincipalComponents:
    """Return the principal components of centred features."""
    count = moments.count
    variances, components = torch.linalg.eigh(moments.scatter / count)
    variances, components = variances.flip(0).clamp(min=0), components.flip(1)
    # Rounding is relative to what was summed, which includes the means.
    tolerance = rounding(moments.width) * (moments.squares.sum() / count)
    rank = min(int((variances > tolerance).sum()), int(count) - 1)
    return PrincipalComponents(variances, _signed(components), rank)


def penalised(system: Tensor, moments: Moments) -> Tensor:
    """Return a matrix like the centred X'X with `PENALTY` on its diagonal, shape (D, D)."""
    penalty = PENALTY * moments.scatter.diagonal().mean()
    return system + torch.eye(moments.width).to(system) * (penalty if penalty > 0 else 1)


def discriminants(moments: Moments) -> Tensor:
    """Return linear discriminants and what they leave as an orthonormal basis, one direction per column, shape (D, D).

    The first k columns, for k up to C - 1, span the k directions along which the classes differ most for their variance
    within, the latter with `PENALTY` (regularised linear discriminant analysis). The others are the principal
    components of what is orthogonal to all of these, by descending variance. The entry of the largest magnitude is
    positive.
    """
    seen = moments.counts > 0
    means = moments.cross[:, seen] / moments.counts[seen].sqrt()  # times its transpose: the scatter between classes
    factor = torch.linalg.cholesky(penalised(moments.scatter - means @ means.t(), moments))
    whitened = torch.linalg.solve_triangular(factor, means, upper=False)
    directions, ratios, _ = torch.linalg.svd(whitened, full_matrices=False)
    rank = int((ratios[: means.shape[1] - 1] > rounding(moments.width) * ratios[:1]).sum())
    directions = torch.linalg.solve_triangular(factor.t(), directions[:, :rank], upper=True)
    spanning, rest = torch.linalg.qr(directions, mode="complete").Q.tensor_split([rank], dim=1)
    components = torch.linalg.eigh(rest.t() @ moments.scatter @ rest).eigenvectors.flip(1)
    return _signed(torch.cat([spanning, rest @ components], 1))


def _signed(columns: Tensor) -> Tensor:
    """Return columns of which each has a positive entry of the largest magnitude."""
    return columns * columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()


class Quantiser(NamedTuple):
    """Uniform levels of each coordinate, `low + step * code` with codes from 0 to 2^bits - 1; the mean is their middle.

    With one bit that is the sign of the difference to the mean, seen as the mean less or plus half a step.
    """

    low: Tensor  # The lowest level of each, shape (D,)
    step: Tensor  # Between two levels, shape (D,), above 0
    bits: int

    def __call__(self, values: Tensor) -> Tensor:
        """Return the nearest levels to coordinates, shape (..., D)."""
        codes = ((values - self.low) / self.step).round_().clamp_(0, 2**self.bits - 1)
        return codes.mul_(self.step).add_(self.low)


def levels(mean: Tensor, variance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the lowest level and the step, shape (D,) each, for coordinates of that mean and variance over train.

    One that never changes has a step so small that its only level is its mean.
    """
    step = (STEPS[bits] * variance.clamp(min=0).sqrt()).clamp(min=SMALLEST)
    return mean - step * (2**bits - 1) / 2, step


def gaussian_projection(width: int, seed: int) -> Tensor:
    """Draw a random projection with independent normal entries of variance 1 / D, shape (D, D), float64.

    Its first k columns project on k coordinates, each with the scale of a neuron. The generator is its own, on the CPU.
    """
    entries = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return entries / width**0.5


def orthogonal_projection(width: int, seed: int) -> Tensor:
    """Draw a rotation or reflection, every one as likely as any other (Haar), shape (D, D), float64.

    The orthogonal factor of a Gaussian matrix, with the signs that make the triangular factor's diagonal positive
    (Mezzadri, 2007).
    """
    q, r = torch.linalg.qr(gaussian_projection(width, seed))
    return q * r.diagonal().sign()


def positive_projection(width: int, seed: int) -> Tensor:
    """Draw the projection of the paper's code: float32 entries uniform in [0, 1), columns of length 1, shape (D, D).

    For reproduction: as no entry is negative, all columns are nearly parallel (their expected cosine is 3/4).
    """
    entries = torch.rand(width, width, generator=torch.Generator().manual_seed(seed))
    return normalize(entries, dim=0).double()
