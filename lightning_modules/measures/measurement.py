"""What is measured of a split in one pass: every probe, what probes say together, and the representation itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.features import moments as statistics
from lightning_modules.measures.accuracy import EnsembleScores, ProbeScores
from lightning_modules.measures.cka import DebiasedCKA, linear_cka, neighbours_kept
from lightning_modules.subsets import plan as subsets
from lightning_modules.subsets.coordinates import Coordinates, Nest
from lightning_modules.subsets.plan import Probe


class Measured(NamedTuple):
    """What was measured of a split, over all processes."""

    scores: dict[str, Tensor]
    """As `ProbeScores` computes them, and `cka` and `cka_debiased` where similarity is measured, shape (P,)."""
    ensembles: dict[str, Tensor]
    """As `EnsembleScores` computes them."""
    layers: list[dict[str, Any]]
    """What is measured of each layer as a whole: rows of `layers.csv` without the split."""


class Measurement(nn.Module):
    """Counts and sums over a split, from which all that is measured of it follows without a second look.

    Args:
        probes: The P probes.
        coordinates: What they see.
        classes: C.
        ridge: Whether they are those of least squares.
        similarity: Whether to sum what CKA and the layers' measures need.
        ensembles: Places of the members of each ensemble.
    """

    def __init__(
        self,
        probes: list[Probe],
        coordinates: Coordinates,
        classes: int,
        ridge: bool,
        similarity: bool,
        ensembles: list[list[int]],
    ) -> None:
        super().__init__()
        self.count = len(probes)
        self.classes = classes
        self.similarity = similarity
        self.probe_scores = ProbeScores(len(probes), classes, subsets.references(probes), squared=ridge)
        self.ensemble_scores = EnsembleScores(ensembles, probabilities=not ridge)
        self._coordinates = [coordinates]  # in a list, as it is a part of another module
        self._sums: dict[str, DebiasedCKA] = {}

    def update(self, inputs: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: representations (B, sum of widths), logits (P, C, B), labels (B,)."""
        self.probe_scores.update(logits, labels)
        if self.ensemble_scores.ensembles:
            self.ensemble_scores.update(logits, labels)
        if self.similarity:
            for layer, part in self._coordinates[0].by_layer(inputs).items():
                self._of_layer(layer, inputs.device).update(part, labels)

    def compute(self, device: torch.device, reduce: Callable[[Tensor], Tensor]) -> Measured:
        """Return what was measured, and start anew.

        Args:
            device: Where this process sums.
            reduce: Sums a tensor over processes.
        """
        scores = self.probe_scores.compute()
        layers: list[dict[str, Any]] = []
        if self.similarity:
            similarities, layers = self._similarities(device, reduce)
            scores |= similarities
        ensembles = self.ensemble_scores.compute() if self.ensemble_scores.ensembles else {}
        self.probe_scores.reset()
        self.ensemble_scores.reset()
        self._sums = {}
        return Measured(scores, ensembles, layers)

    def _of_layer(self, layer: str, device: torch.device) -> DebiasedCKA:
        """Return a layer's sums, begun where they are not: orderings may only be known when a split is measured."""
        if layer not in self._sums:
            coordinates = self._coordinates[0]
            orderings = [coordinates.ordering(nest) for nest in coordinates.of(layer)]
            self._sums[layer] = DebiasedCKA(coordinates.widths[layer], self.classes, orderings, device=device)
        return self._sums[layer]

    def _similarities(
        self, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        found = {name: torch.full((self.count,), torch.nan, dtype=torch.float64) for name in ("cka", "cka_debiased")}
        layers = []
        for layer, width in self._coordinates[0].widths.items():
            sums = self._of_layer(layer, device)
            sums.reduce(reduce)
            plain, debiased = linear_cka(sums, sums.orderings[:-1]), sums.compute()
            for nest, *of_nest in zip(self._coordinates[0].of(layer), plain, debiased, strict=True):
                for name, values in zip(found, of_nest, strict=True):
                    found[name][list(nest.probes)] = values.cpu()
            layers.append(
                {
                    "layer": layer,
                    "width": width,
                    "images": int(sums.count),
                    "participation_ratio": statistics.participation_ratio(sums),
                    "effective_rank": statistics.effective_rank(sums),
                }
            )
        return found, layers


def neighbour_rows(
    coordinates: Coordinates,
    probes: list[Probe],
    queries: Tensor,
    gallery: Tensor,
    neighbours: int,
    reduce: Callable[[Tensor], Tensor],
) -> list[dict[str, Any]]:
    """Count how many of the queries' nearest neighbours in the gallery each subset finds: rows of `neighbours.csv`.

    Args:
        coordinates: What the probes see.
        probes: The P probes.
        queries: This process' share of the queries, shape (n, sum of widths).
        gallery: Shape (m, sum of widths).
        neighbours: How many to look for, at most m.
        reduce: Sums a tensor over processes.
    """
    neighbours = min(neighbours, len(gallery))
    total = int(reduce(torch.tensor(len(queries), device=queries.device)))
    rows = []
    for layer, stored in coordinates.by_layer(gallery).items():
        nests: list[Nest] = coordinates.of(layer)
        counts = neighbours_kept(
            coordinates.by_layer(queries)[layer],
            stored,
            [coordinates.ordering(nest) for nest in nests],
            neighbours=neighbours,
        )
        for nest, of_nest in zip(nests, counts, strict=True):
            for index, kept in zip(nest.probes, reduce(of_nest).tolist(), strict=True):
                probe = probes[index]
                rows.append(
                    {
                        **{key: getattr(probe, key) for key in ("layer", "selection", "fraction", "neurons", "seed")},
                        "split": "test",
                        "queries": total,
                        "gallery": len(gallery),
                        "neighbours": neighbours,
                        "kept": kept / (neighbours * total),
                    }
                )
    return rows
