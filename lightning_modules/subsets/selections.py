"""Selections: rules that order the coordinates of a basis, so that a subset is the first k of them.

Subsets therefore nest as the fraction grows. The basis is the layer's own neurons or, by name, another. A new selection
is one function here, or in `searches` where it is more than a ranking, and one line in `SELECTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.features.moments import CONSTANT
from lightning_modules.subsets import bases, searches
from lightning_modules.subsets.bases import PrincipalComponents, principal_components

FULL = "full"  # The selection of the full layer, the reference of every ratio


@dataclass
class Layer:
    """What selections may know of a layer."""

    width: int  # D, its number of neurons
    moments: Any = None  # `Moments` of the clean view of train, for fitted selections

    @cached_property
    def components(self) -> PrincipalComponents:
        """The principal components, computed once for all selections."""
        return principal_components(self.moments)


class Basis(NamedTuple):
    """Coordinates of a layer beside its own neurons: `(representation - centre) @ matrix`."""

    matrix: Tensor  # A coordinate in each column, shape (D, D), float64
    centre: Tensor  # Shape (D,), float64


class Selection(NamedTuple):
    """A rule that orders the coordinates of a layer."""

    order: Callable[[Layer, int], Tensor]
    """From the layer and the subset seed to a permutation of 0 to D - 1, shape (D,)."""
    seeded: bool = False
    """Whether order or basis are drawn from the subset seed; otherwise there is one probe per fraction."""
    basis: str | None = None  # The basis whose coordinates are ordered, of `BASES`; None for the layer's own neurons
    fitted: bool = False  # Whether order or basis are computed from the training split
    labels: bool = False  # Whether they are computed from what is to be predicted, too
    classes: bool = False  # Whether that must be classes


def random(layer: Layer, seed: int) -> Tensor:
    """Order neurons at random; for a given seed the order is that of the paper's code."""
    return torch.randperm(layer.width, generator=torch.Generator().manual_seed(seed))


def first(layer: Layer, seed: int) -> Tensor:
    """Keep the basis' own order, so that subsets are prefixes (Matryoshka-style)."""
    return torch.arange(layer.width)


def least(layer: Layer, seed: int) -> Tensor:
    """Order principal components by ascending variance, with those that have none last."""
    rank = layer.components.rank
    return torch.cat([torch.arange(rank).flip(0), torch.arange(rank, layer.width)])


def variance(layer: Layer, seed: int) -> Tensor:
    """Order neurons by descending variance over train; ties go to the smaller index."""
    return _descending(layer.moments.variance)


def fisher(layer: Layer, seed: int) -> Tensor:
    """Order neurons by Fisher's ratio over train, descending; those that never change are among the last."""
    return _descending(fisher_ratio(layer.moments).nan_to_num(nan=-1.0, posinf=torch.inf))


def fisher_ratio(moments: Any) -> Tensor:
    """Return the variance of each neuron between classes over that within, shape (D,), from `Moments`.

    Infinite for one that varies between classes only, not a number for one that never changes.
    """
    seen = moments.counts > 0
    counts, means = moments.counts[seen].unsqueeze(1), moments.class_means[seen]
    between = (counts * (means - moments.mean).square()).sum(0) / moments.count
    within = moments.variance - between
    unseen = CONSTANT * (moments.variance + moments.mean.square())
    between, within = (part.masked_fill(part <= unseen, 0) for part in (between, within))
    return between / within


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True).cpu()


def pca_basis(layer: Layer, seed: int) -> Basis:
    """Return the principal components of the clean view of train by descending variance."""
    return Basis(layer.components.components, layer.moments.mean)


def uncentred_basis(layer: Layer, seed: int) -> Basis:
    """Return the directions of `pca_basis`, applied to vectors that are not centred."""
    return Basis(layer.components.components, torch.zeros(layer.width, dtype=torch.float64))


def whitened_basis(layer: Layer, seed: int) -> Basis:
    """Return the principal components scaled to variance 1; those that have none are zero."""
    variances, components, rank = layer.components
    scale = variances[:rank].rsqrt()
    return Basis(components * torch.cat([scale, variances.new_zeros(layer.width - rank)]), layer.moments.mean)


def discriminant_basis(layer: Layer, seed: int) -> Basis:
    """Return the linear discriminants of the classes over train, and then the principal components of what is left."""
    return Basis(bases.discriminants(layer.moments), layer.moments.mean)


def _projection(matrix: Callable[[int, int], Tensor]) -> Callable[[Layer, int], Basis]:
    return lambda layer, seed: Basis(matrix(layer.width, seed), torch.zeros(layer.width, dtype=torch.float64))


BASES: dict[str, Callable[[Layer, int], Basis]] = {
    "pca": pca_basis,
    "pca_uncentred": uncentred_basis,
    "pca_whitened": whitened_basis,
    "discriminant": discriminant_basis,
    "gaussian": _projection(bases.gaussian_projection),
    "orthogonal": _projection(bases.orthogonal_projection),
    "positive": _projection(bases.positive_projection),
}
"""From the layer and the subset seed to coordinates beside the neurons themselves."""

SELECTIONS = {
    "random": Selection(random, seeded=True),
    "first": Selection(first),
    "pca": Selection(first, basis="pca", fitted=True),
    "pca_uncentred": Selection(first, basis="pca_uncentred", fitted=True),
    "pca_whitened": Selection(first, basis="pca_whitened", fitted=True),
    "pca_least": Selection(least, basis="pca", fitted=True),
    "discriminant": Selection(first, basis="discriminant", fitted=True, labels=True, classes=True),
    "random_projection": Selection(first, seeded=True, basis="gaussian"),
    "orthogonal_projection": Selection(first, seeded=True, basis="orthogonal"),
    "positive_projection": Selection(first, seeded=True, basis="positive"),
    "variance": Selection(variance, fitted=True),
    "fisher": Selection(fisher, fitted=True, labels=True, classes=True),
    "greedy": Selection(searches.greedy, fitted=True, labels=True),
    "backward": Selection(searches.backward, fitted=True, labels=True),
    "column_subset": Selection(searches.column_subset, fitted=True),
    "harmless": Selection(searches.harmless, fitted=True, labels=True),
    FULL: Selection(first),
}
"""Selections by name; the full layer comes by itself."""
OFFERED = [name for name in SELECTIONS if name != FULL]  # Selections that a run can ask for


def order(selection: str, layer: Layer, seed: int) -> Tensor:
    """Return the ordering of a selection, a permutation of shape (D,)."""
    return SELECTIONS[selection].order(layer, seed)
