"""Which coordinates a probe sees: pure functions of the selection, the layer, the fraction and the subset seed.

Every selection orders all coordinates of a basis, and a subset is the first k of them: subsets therefore nest as the
fraction grows. The basis is the layer's own neurons or, by name, another. A new selection is one function here and one
line in `SELECTIONS`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules import bases
from lightning_modules.bases import PrincipalComponents, principal_components
from lightning_modules.statistics import Moments

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


class Probe(NamedTuple):
    """What makes one probe of a run."""

    selection: str
    fraction: float
    neurons: int
    seed: int
    layer: str = "penultimate"


def neurons(fraction: float, width: int) -> int:
    """Return k, the neurons that `fraction` of a layer of `width` is; rounded down as in the paper, at least one."""
    return max(1, int(fraction * width + 1e-9))


def order(selection: str, layer: Layer, seed: int) -> Tensor:
    """Return the ordering of a selection, a permutation of shape (D,)."""
    return SELECTIONS[selection].order(layer, seed)


def plan(
    selections: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
    full_seeds: Sequence[int],
    widths: dict[str, int],
    ensembles: bool = False,
) -> list[Probe]:
    """Return every probe of a run.

    Args:
        selections: Names of `OFFERED`.
        fractions: Fractions of the neurons.
        seeds: Subset seeds of selections by chance.
        full_seeds: Initialisation seeds of the full layer.
        widths: D of each layer.
        ensembles: Whether a selection by chance also gets, for each fraction, a probe with as many neurons as its
            seeds' subsets hold together.

    Returns:
        By layer: the full layer first, then selections by seed and ascending fraction.
    """
    probes = []
    for layer, width in widths.items():
        probes += [Probe(FULL, 1.0, width, seed, layer) for seed in full_seeds]
        for selection in selections:
            by_chance = SELECTIONS[selection].by_chance
            asked = set(fractions)
            if ensembles and by_chance:
                together = (held_together(selection, neurons(fraction, width), seeds, width) for fraction in fractions)
                asked |= {size / width for size in together if size < width}
            for seed in seeds if by_chance else [0]:
                probes += [
                    Probe(selection, fraction, neurons(fraction, width), seed, layer) for fraction in sorted(asked)
                ]
    return probes


def references(probes: Sequence[Probe]) -> Tensor:
    """Return for each probe the place of its layer's first full probe, shape (P,)."""
    full: dict[str, int] = {}
    for index, probe in enumerate(probes):
        if probe.selection == FULL:
            full.setdefault(probe.layer, index)
    return torch.tensor([full[probe.layer] for probe in probes])


def ensembles(probes: Sequence[Probe], fractions: Sequence[float]) -> list[list[int]]:
    """Return the places of the probes of these fractions that differ by nothing but the subset seed, if any do."""
    members: dict[tuple[str, str, float], list[int]] = {}
    for index, probe in enumerate(probes):
        if SELECTIONS[probe.selection].by_chance and probe.fraction in fractions:
            members.setdefault((probe.layer, probe.selection, probe.fraction), []).append(index)
    return [places for places in members.values() if len(places) > 1]


def held_together(selection: str, size: int, seeds: Sequence[int], width: int) -> int:
    """Return how many different coordinates the subsets of `size` of these seeds hold, at most the width."""
    if SELECTIONS[selection].basis is not None:  # every seed has coordinates of its own
        return min(width, size * len(seeds))
    subsets = [order(selection, Layer(width), seed)[:size] for seed in seeds]
    return len(torch.cat(subsets).unique())


def check(
    selections: Sequence[str], fractions: Sequence[float], seeds: Sequence[int], full_seeds: Sequence[int] = (0,)
) -> None:
    """Refuse what cannot be a run.

    Raises:
        MisconfigurationException: If a list is empty or repeats itself, a selection is unknown, a fraction is not in
            (0, 1], or a seed is negative.
    """
    lists = {"selection": selections, "fractions": fractions, "seeds": seeds, "full_seeds": full_seeds}
    for name, values in lists.items():
        if not values:
            raise MisconfigurationException(f"model.{name} is empty; give at least one.")
        if len(set(values)) < len(values):
            twice = next(value for value in values if list(values).count(value) > 1)
            raise MisconfigurationException(f"model.{name} lists {twice} twice; give each once.")
    for selection in selections:
        if selection not in OFFERED:
            raise MisconfigurationException(
                f"model.selection is {selection!r}; it must be one of {', '.join(sorted(OFFERED))}."
            )
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise MisconfigurationException(f"model.fractions has {fraction:g}; a fraction must be in (0, 1].")
    for name, given in (("seeds", seeds), ("full_seeds", full_seeds)):
        for seed in given:
            if seed < 0:
                raise MisconfigurationException(f"model.{name} has {seed}; a seed must be 0 or more.")
