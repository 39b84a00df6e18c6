"""Which neurons a probe sees: pure functions of the selection, the width, the fraction and the subset seed.

Every selection is an ordering of all neurons, and a subset is its first k: subsets therefore nest as the fraction
grows. A new selection is one function here and one line in `SELECTIONS`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

FULL = "full"
"""The selection of the full layer, the reference of every ratio."""


class Selection(NamedTuple):
    """A rule that orders the neurons of a layer."""

    order: Callable[[int, int], Tensor]
    """From the width D and the subset seed to a permutation of 0 to D - 1, shape (D,)."""
    by_chance: bool
    """Whether the subset seed matters; without chance there is one probe per fraction."""


def random(width: int, seed: int) -> Tensor:
    """Order neurons at random, as the paper's code does for that seed."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def first(width: int, seed: int) -> Tensor:
    """Keep the layer's own order, so that subsets are prefixes (Matryoshka-style)."""
    return torch.arange(width)


SELECTIONS = {"random": Selection(random, by_chance=True), "first": Selection(first, by_chance=False)}
"""Selections by name, beside the full layer."""


class Probe(NamedTuple):
    """What makes one probe of a run."""

    selection: str
    fraction: float
    neurons: int
    seed: int


def neurons(fraction: float, width: int) -> int:
    """Return k, the neurons that `fraction` of a layer of `width` is; rounded down as in the paper, at least one."""
    return max(1, int(fraction * width + 1e-9))


def order(selection: str, width: int, seed: int) -> Tensor:
    """Return the ordering of a selection, shape (width,); the full layer keeps the layer's own."""
    return first(width, seed) if selection == FULL else SELECTIONS[selection].order(width, seed)


def subset(probe: Probe, width: int) -> Tensor:
    """Return the neurons a probe sees, shape (k,), in the order of its weights."""
    return order(probe.selection, width, probe.seed)[: probe.neurons]


def plan(
    selections: Sequence[str], fractions: Sequence[float], seeds: Sequence[int], full_seeds: Sequence[int], width: int
) -> list[Probe]:
    """Return every probe of a run: the full layer first, then selections by seed and ascending fraction."""
    probes = [Probe(FULL, 1.0, width, seed) for seed in full_seeds]
    for selection in selections:
        for seed in seeds if SELECTIONS[selection].by_chance else [0]:
            probes += [Probe(selection, fraction, neurons(fraction, width), seed) for fraction in sorted(fractions)]
    return probes


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
        if selection not in SELECTIONS:
            raise MisconfigurationException(
                f"model.selection is {selection!r}; it must be one of {', '.join(sorted(SELECTIONS))}."
            )
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise MisconfigurationException(f"model.fractions has {fraction:g}; a fraction must be in (0, 1].")
    for name, given in (("seeds", seeds), ("full_seeds", full_seeds)):
        for seed in given:
            if seed < 0:
                raise MisconfigurationException(f"model.{name} has {seed}; a seed must be 0 or more.")
