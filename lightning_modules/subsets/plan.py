"""The probes of a run: every selection, fraction and subset seed of every layer, beside the full layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.subsets.selections import FULL, OFFERED, SELECTIONS, Layer, order

BITS = (32, 8, 4, 2, 1)  # in which numbers can be stored; 32 is float32, as they are
PAPER_FRACTIONS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.9)


class Probe(NamedTuple):
    """One probe of a run: which coordinates of which layer it sees, and the seed they were drawn from."""

    selection: str
    fraction: float
    neurons: int
    seed: int
    layer: str = "penultimate"
    bits: int = 32  # of each number

    @property
    def series(self) -> str:
        """What a curve of this selection and number of bits is called."""
        return series(self.selection, self.bits)


class ProbeGroup(NamedTuple):
    """The probes of one layer, selection, seed and number of bits: prefixes of one order, so their subsets nest."""

    layer: str
    selection: str
    seed: int
    bits: int
    probes: tuple[int, ...]  # Places of the probes in the run, by ascending size
    sizes: tuple[int, ...]  # How many coordinates each of them sees

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells it from other groups, also where some of its probes are left out."""
        return self[:4]


def probe_groups(probes: Sequence[Probe]) -> list[list[ProbeGroup]]:
    """Group the probes of a run by layer, selection, seed and bits; groups with the same sizes come in one list."""
    members: dict[tuple[str, str, int, int], list[int]] = {}
    for index, probe in enumerate(probes):
        members.setdefault((probe.layer, probe.selection, probe.seed, probe.bits), []).append(index)
    by_sizes: dict[tuple[int, ...], list[ProbeGroup]] = {}
    for key, indices in members.items():
        indices.sort(key=lambda index: probes[index].neurons)
        sizes = tuple(probes[index].neurons for index in indices)
        by_sizes.setdefault(sizes, []).append(ProbeGroup(*key, tuple(indices), sizes))
    return list(by_sizes.values())


def neurons(fraction: float, width: int) -> int:
    """Return k, the number of neurons in `fraction` of a layer: rounded down as in the paper, at least one."""
    return max(1, int(fraction * width + 1e-9))


def stored_bytes(numbers: int, bits: int) -> int:
    """Return the bytes of a vector of so many numbers of so many bits each, packed."""
    return -(-numbers * bits // 8)


def series(selection: str, bits: int) -> str:
    """Return what a curve of a selection and a number of bits is called."""
    return selection if bits == 32 else f"{selection}_{bits}bit"


class Plan:
    """What a run asks for: selections (names of `OFFERED`), subset sizes, seeds and bits, as for `RedundancyProbe`.

    Raises:
        MisconfigurationException: If a list is empty or repeats itself, a selection is unknown, a fraction is not in
            (0, 1], a number of neurons is below 1, a seed is negative, or a number of bits is none of `BITS`.
    """

    def __init__(
        self,
        selection: str | Sequence[str],
        fractions: float | Sequence[float],
        seeds: int | Sequence[int],
        full_seeds: int | Sequence[int] = 1,
        neurons: int | Sequence[int] | None = None,
        bits: int | Sequence[int] = 32,
    ) -> None:
        self.selections = [selection] if isinstance(selection, str) else list(selection)
        self.fractions = list(fractions) if isinstance(fractions, Sequence) else [fractions]
        self.neurons = None if neurons is None else [neurons] if isinstance(neurons, int) else list(neurons)
        self.seeds = seed_list(seeds, "model.seeds")
        self.full_seeds = seed_list(full_seeds, "model.full_seeds")
        self.bits = [bits] if isinstance(bits, int) else list(bits)
        self._check()

    def probes(self, widths: dict[str, int], together: bool = False) -> list[Probe]:
        """Return every probe of a run: by layer, the full layer first, then selections by bits, seed and fraction.

        In fewer than 32 bits each selection also has all of its coordinates, as that is a store of its own; of neurons
        for the first seed alone, as they are the same for all.

        Args:
            widths: D of each layer.
            together: Whether a seeded selection also gets, for each fraction, a probe with as many neurons as the
                subsets of all its seeds hold together.

        Raises:
            MisconfigurationException: If more neurons are asked for than a layer has.
        """
        probes = []
        for layer, width in widths.items():
            probes += [Probe(FULL, 1.0, width, seed, layer) for seed in self.full_seeds]
            for selection in self.selections:
                seeded, basis = SELECTIONS[selection].seeded, SELECTIONS[selection].basis
                asked = set(self.asked(layer, width))
                if together and seeded:
                    sizes = [held_together(selection, neurons(each, width), self.seeds, width) for each in asked]
                    asked |= {size / width for size in sizes if size < width}
                for bits in self.bits:
                    for place, seed in enumerate(self.seeds if seeded else [0]):
                        whole = {1.0} if bits < 32 and (place == 0 or basis) else set()
                        fractions = sorted(asked | whole)
                        probes += [
                            Probe(selection, each, neurons(each, width), seed, layer, bits) for each in fractions
                        ]
        return probes

    def asked(self, layer: str, width: int) -> list[float]:
        """Return the fractions that are asked for of a layer with D = `width` neurons; for k neurons that is k / D."""
        if self.neurons is None:
            return self.fractions
        if max(self.neurons) > width:
            raise MisconfigurationException(
                f"model.neurons has {max(self.neurons):,}, but layer {layer} has {width:,} neurons; give at most "
                f"{width:,}."
            )
        return [size / width for size in self.neurons]

    def describe(self) -> str:
        """Return selections, subset sizes and seeds in one line."""
        sizes = ", ".join(f"{size:g}" for size in sorted(self.neurons or self.fractions))
        sizes = f"{sizes} neurons" if self.neurons else f"fractions {sizes}"
        seeds = f" x {len(self.seeds)} seeds" if any(SELECTIONS[name].seeded for name in self.selections) else ""
        bits = "" if self.bits == [32] else f" x {', '.join(map(str, self.bits))} bits"
        return f"{', '.join(self.selections)} x {sizes}{seeds}{bits}, and the full layer"

    def _check(self) -> None:
        lists: dict[str, list[Any]] = {"selection": self.selections, "fractions": self.fractions}
        lists |= {"seeds": self.seeds, "full_seeds": self.full_seeds, "bits": self.bits}
        lists |= {} if self.neurons is None else {"neurons": self.neurons}
        for name, values in lists.items():
            if not values:
                raise MisconfigurationException(f"model.{name} is empty; give at least one.")
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise MisconfigurationException(f"model.{name} lists {twice} twice; give each once.")
        for selection in self.selections:
            if selection not in OFFERED:
                raise MisconfigurationException(
                    f"model.selection is {selection!r}; it must be one of {', '.join(sorted(OFFERED))}."
                )
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise MisconfigurationException(f"model.fractions has {fraction:g}; a fraction must be in (0, 1].")
        for size in self.neurons or []:
            if size < 1:
                raise MisconfigurationException(f"model.neurons has {size}; a subset has at least 1 neuron.")
        for bits in self.bits:
            if bits not in BITS:
                raise MisconfigurationException(
                    f"model.bits has {bits}; it must be one of {', '.join(map(str, BITS))}."
                )
        for name in ("seeds", "full_seeds"):
            negative = [seed for seed in lists[name] if seed < 0]
            if negative:
                raise MisconfigurationException(f"model.{name} has {negative[0]}; a seed must be 0 or more.")


def seed_list(value: int | Sequence[int], name: str) -> list[int]:
    """Return the seeds that a number n (0 to n - 1) or a list stands for."""
    if value == [] or (isinstance(value, int) and not 1 <= value <= 100_000):
        raise MisconfigurationException(
            f"{name} is {value}; give a number of seeds from 1 to 100,000, or a list of seeds."
        )
    return list(range(value)) if isinstance(value, int) else list(value)


def references(probes: Sequence[Probe]) -> Tensor:
    """Return for each probe the place of its layer's first full probe, shape (P,)."""
    full: dict[str, int] = {}
    for index, probe in enumerate(probes):
        if probe.selection == FULL:
            full.setdefault(probe.layer, index)
    return torch.tensor([full[probe.layer] for probe in probes])


def ensembles(probes: Sequence[Probe], fractions: Sequence[float]) -> list[list[int]]:
    """Return the places of the probes of these fractions that differ by nothing but the subset seed, if any do."""
    members: dict[Probe, list[int]] = {}
    for index, probe in enumerate(probes):
        if SELECTIONS[probe.selection].seeded and probe.fraction in fractions:
            members.setdefault(probe._replace(seed=0), []).append(index)
    return [places for places in members.values() if len(places) > 1]


def held_together(selection: str, size: int, seeds: Sequence[int], width: int) -> int:
    """Return how many different coordinates the subsets of `size` of these seeds hold, at most the width."""
    if SELECTIONS[selection].basis is not None:  # every seed has coordinates of its own
        return min(width, size * len(seeds))
    subsets = [order(selection, Layer(width), seed)[:size] for seed in seeds]
    return len(torch.cat(subsets).unique())


def describe(probes: Sequence[Probe], which: Sequence[bool]) -> str:
    """Name the probes where `which`, one value per probe, is true: by selection and fraction, many by their range."""
    counts: dict[str, dict[float, int]] = {}
    several = len({probe.layer for probe in probes}) > 1
    for probe, chosen in zip(probes, which, strict=True):
        if chosen:
            name = f"{probe.layer} {probe.series}" if several else probe.series
            fractions = counts.setdefault(name, {})
            fractions[probe.fraction] = fractions.get(probe.fraction, 0) + 1
    parts = []
    for name, fractions in counts.items():
        groups = {f" {fraction:g}": count for fraction, count in fractions.items()}
        if len(groups) > 3:
            groups = {f" {min(fractions):g} to {max(fractions):g}": sum(fractions.values())}
        elif name.endswith(FULL):
            groups = {"": fractions[1.0]}
        parts += [f"{name}{group}" + (f" (x{count})" if count > 1 else "") for group, count in groups.items()]
    return ", ".join(parts)


def mean_by_fraction(probes: Sequence[Probe], values: Sequence[float], prefix: str) -> dict[str, float]:
    """Return means over seeds of one value per probe, as `<prefix>/<series>/<fraction>`, with layers if several."""
    several = len({probe.layer for probe in probes}) > 1
    grouped: dict[str, list[float]] = {}
    for probe, value in zip(probes, values, strict=True):
        layer = f"{probe.layer}/" if several else ""
        grouped.setdefault(f"{prefix}/{layer}{probe.series}/{probe.fraction:g}", []).append(value)
    return {name: sum(group) / len(group) for name, group in grouped.items()}
