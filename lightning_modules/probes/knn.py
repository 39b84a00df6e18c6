"""k nearest neighbours on every subset: no training, the other standard evaluation of frozen features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.checks import free_memory
from lightning_modules.measures.measure import Column
from lightning_modules.measures.neighbours import DECIMALS
from lightning_modules.measures.similarities import similarities
from lightning_modules.probes.solver import Solver

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

BLOCK = 4096  # training vectors that are compared at once
KEPT = 0.25  # share of the free memory that coordinates of train may fill; more are computed for every batch
LEAST = 1e-6  # share of the votes that a class is given at least, so that no loss is infinite
_kept: WeakKeyDictionary[RedundancyProbe, list[Sequence[Tensor]]] = WeakKeyDictionary()  # what `_stored` yields


class KNN(Solver):
    """The vote of the k nearest training vectors by cosine, each with weight exp(cosine / temperature), as in DINO.

    Cosines are of a probe's own coordinates alone; of equal ones, rounded to 10 decimals, the vector that comes first
    in train is nearer. Logits are the logarithms of each class's share of the votes.

    Args:
        neighbours: k; of a list each probe takes the one that is right most often on validation, the first of equals.
        temperature: Of the weights.

    Raises:
        MisconfigurationException: If a value is out of range, or there is none.
    """

    name = "knn"
    trains = False
    linear = False
    columns = (Column("voters", "neighbours that vote"),)

    def __init__(self, neighbours: int | list[int] = 20, temperature: float = 0.07) -> None:
        self.neighbours = neighbours if isinstance(neighbours, list) else [neighbours]
        self.temperature = temperature
        wrong = next((each for each in self.neighbours if each < 1), None)
        if wrong is not None or not self.neighbours:
            said = "is empty; give at least one value" if wrong is None else f"is {wrong}; it must be 1 or more"
            raise MisconfigurationException(f"model.solver.neighbours {said}.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise MisconfigurationException(f"model.solver.temperature is {temperature:g}; it must be above 0.")

    def candidates(self) -> list[tuple[float, ...]]:
        """Return one candidate: each probe's k is chosen in `prepare`."""
        return [(math.nan,)]

    def prepare(self, model: RedundancyProbe) -> None:
        """Choose how many neighbours vote for each probe, on validation."""
        images = len(model.task.images["train"])
        _kept.pop(model, None)
        if max(self.neighbours) > images:
            raise MisconfigurationException(
                f"model.solver.neighbours is {max(self.neighbours)}, but train has {images:,} images; give at most as "
                f"many."
            )
        right = torch.zeros(len(self.neighbours), len(model.probes), dtype=torch.int64, device=model.device)
        for inputs, labels in model.stream.batches("val") if len(self.neighbours) > 1 else ():
            nearest = self._nearest(model, inputs)
            for place, count in enumerate(self.neighbours):
                right[place] += (self._votes(model, nearest, count).argmax(1) == labels).sum(1)
        chosen = model.stream.reduce(right).argmax(0)
        model.grid.hyperparameters[0, :, 0] = torch.tensor(self.neighbours).to(chosen)[chosen].double()
        model.grid.kept_epoch.zero_()
        model.trainer.num_sanity_val_steps = 0  # there is no training that they could try

    def logits(self, model: RedundancyProbe, inputs: Tensor, split: str) -> Tensor:
        """Return the logarithm of each class's share of the votes, shape (P, C, B)."""
        nearest, counts = self._nearest(model, inputs), model.grid.hyperparameters[0, :, 0].long()
        votes = inputs.new_empty(len(counts), model.target.outputs, len(inputs), dtype=torch.float64)
        for count in counts.unique().tolist():
            votes[counts == count] = self._votes(model, nearest[counts == count], count)
        return (votes / votes.sum(1, keepdim=True)).clamp(min=LEAST).log()

    def loss(self, target: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the target's loss, for several classes the cross-entropy."""
        return target.loss(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the shares of the votes."""
        return logits.softmax(-2)

    def provenance(self) -> dict[str, Any]:
        """Return the solver and its temperature; the numbers of neighbours are chosen anew only by a fit."""
        return {"solver": self.name, "temperature": self.temperature}

    def _nearest(self, model: RedundancyProbe, inputs: Tensor) -> Tensor:
        """Return keys of the nearest training vectors of inputs, (B, sum of widths), nearest first, (P, B, k), int64.

        A key is the cosine, rounded, times the number of vectors n, plus n - 1 less the place in train. No two are
        equal, so that blocks of train may come in any size.
        """
        groups, images = model.coordinates.groups, len(model.task.images["train"])
        sizes = [group.sizes[-1] for group in groups]
        queries = model.coordinates(inputs.double()).split(sizes)
        best: list[Tensor] = [torch.empty(len(inputs), 0, dtype=torch.int64, device=inputs.device)] * len(model.probes)
        last = images - 1
        for stored in self._stored(model, sizes):
            count = stored[0].shape[1]
            ties = torch.arange(last, last - count, -1, device=inputs.device)
            last -= count
            for group, ours, theirs in zip(groups, queries, stored, strict=True):
                cosines = similarities(ours.t(), theirs.t(), group.sizes, "cosine")
                for index, values in zip(group.probes, cosines, strict=True):
                    keys = torch.cat([best[index], (values * 10**DECIMALS).round().long() * images + ties], 1)
                    best[index] = keys.topk(min(max(self.neighbours), keys.shape[1]), dim=1).values
        return torch.stack(best)

    def _stored(self, model: RedundancyProbe, sizes: list[int]) -> Iterator[Sequence[Tensor]]:
        """Yield blocks of train as the largest probe of each group sees it, each (k, block), float64.

        They are kept for the batches to come where memory holds them all.
        """
        if model in _kept:
            yield from _kept[model]
            return
        images, blocks = len(model.task.images["train"]), []
        keep = 8 * images * sum(sizes) * model.trainer.world_size <= KEPT * free_memory()
        for start in range(0, images, BLOCK):
            features = model.stream.everything("train", start, start + BLOCK)
            assert features is not None  # as features are clean
            stored = model.coordinates(features.double()).split(sizes)
            if keep:
                blocks.append(stored)
            yield stored
        if keep:
            _kept[model] = blocks

    def _votes(self, model: RedundancyProbe, nearest: Tensor, count: int) -> Tensor:
        """Return the votes of so many of the nearest, by keys of shape (P, B, k), for every class, shape (P, C, B)."""
        images = len(model.task.images["train"])
        nearest = nearest[..., :count]
        cosines = nearest.div(images, rounding_mode="floor").double() / 10**DECIMALS
        weights = ((cosines - cosines[..., :1]) / self.temperature).exp()
        classes = model.task.images["train"].labels.to(nearest.device)[images - 1 - nearest.remainder(images)]
        votes = weights.new_zeros(*nearest.shape[:2], model.target.outputs)
        return votes.scatter_add_(2, classes.long(), weights).transpose(1, 2)
