"""The probes of a run: every selection, fraction and subset seed of every layer, beside the full layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.subsets.selections import FULL, OFFERED, SELECTIONS, Layer, order


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
