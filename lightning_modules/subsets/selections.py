"""Selections: rules that order the coordinates of a basis, so that a subset is the first k of them.

Subsets therefore nest as the fraction grows. The basis is the layer's own neurons or, by name, another. A new selection
is one function here and one line in `SELECTIONS`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.features.moments import Moments
from lightning_modules.subsets import bases
from lightning_modules.subsets.bases import PrincipalComponents, principal_components

FULL = "full"
"""The selection of the full layer, the reference of every ratio."""


class Layer:
    """What selections may know of a layer.

    Args:
        width: D, its number of neurons.
        moments: Of the clean view of train; None for selections that know nothing of the data.
    """

    def __init__(self, width: int, moments: Moments | None = None) -> None:
        self.width = width
        self._moments = moments

    @property
    def moments(self) -> Moments:
        """The moments, where a selection asks for them that says so in `SELECTIONS` or `BASES`."""
        assert self._moments is not None
        return self._moments

    @cached_property
    def components(self) -> PrincipalComponents:
        """The principal components, computed once for all selections."""
        return principal_components(self.moments)


class Basis(NamedTuple):
    """Coordinates of a layer beside its own neurons: `(representation - centre) @ matrix`."""

    matrix: Tensor
    """A coordinate in each column, shape (D, D), float64."""
    centre: Tensor
    """Shape (D,), float64."""


class Selection(NamedTuple):
    """A rule that orders the coordinates of a layer."""

    order: Callable[[Layer, int], Tensor]
    """From the layer and the subset seed to a permutation of 0 to D - 1, shape (D,)."""
    by_chance: bool = False
    """Whether the subset seed matters; without chance there is one probe per fraction."""
    basis: str | None = None
    """The basis whose coordinates are ordered, of `BASES`; None for the layer's own neurons."""
    informed: bool = False
    """Whether the order or the basis depends on the training images."""


def random(layer: Layer, seed: int) -> Tensor:
    """Order neurons at random, as the paper's code does for that seed."""
    return torch.randperm(layer.width, generator=torch.Generator().manual_seed(seed))


def first(layer: Layer, seed: int) -> Tensor:
    """Keep the basis' own order, so that subsets are prefixes (Matryoshka-style)."""
    return torch.arange(layer.width)


def least(layer: Layer, seed: int) -> Tensor:
    """Put the principal component with the least variance first, and those without any last."""
    rank = layer.components.rank
    return torch.cat([torch.arange(rank).flip(0), torch.arange(rank, layer.width)])


def variance(layer: Layer, seed: int) -> Tensor:
    """Put the neuron that varies most first."""
    return bases.variance_order(layer.moments)


def fisher(layer: Layer, seed: int) -> Tensor:
    """Put the neuron first that separates the classes of train best."""
    return bases.fisher_order(layer.moments)


def pca_basis(layer: Layer, seed: int) -> Basis:
    """Return the principal components of the clean view of train, the one with the largest variance first."""
    return Basis(layer.components.components, layer.moments.mean)


def _projection(matrix: Callable[[int, int], Tensor]) -> Callable[[Layer, int], Basis]:
    return lambda layer, seed: Basis(matrix(layer.width, seed), torch.zeros(layer.width, dtype=torch.float64))


BASES: dict[str, Callable[[Layer, int], Basis]] = {
    "pca": pca_basis,
    "gaussian": _projection(bases.gaussian_projection),
    "orthogonal": _projection(bases.orthogonal_projection),
    "positive": _projection(bases.positive_projection),
}
"""From the layer and the subset seed to coordinates beside the neurons themselves."""

SELECTIONS = {
    "random": Selection(random, by_chance=True),
    "first": Selection(first),
    "pca": Selection(first, basis="pca", informed=True),
    "pca_least": Selection(least, basis="pca", informed=True),
    "random_projection": Selection(first, by_chance=True, basis="gaussian"),
    "orthogonal_projection": Selection(first, by_chance=True, basis="orthogonal"),
    "positive_projection": Selection(first, by_chance=True, basis="positive"),
    "variance": Selection(variance, informed=True),
    "fisher": Selection(fisher, informed=True),
    FULL: Selection(first),
}
"""Selections by name; the full layer comes by itself."""
OFFERED = [name for name in SELECTIONS if name != FULL]
"""Selections that a run can ask for."""


def order(selection: str, layer: Layer, seed: int) -> Tensor:
    """Return the ordering of a selection, a permutation of shape (D,)."""
    return SELECTIONS[selection].order(layer, seed)
