"""Multinomial logistic regression to its optimum: L-BFGS on whitened coordinates, for all probes of a bank at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.checks import free_memory
from lightning_modules.features.moments import Moments, rounding
from lightning_modules.measures.measure import Column
from lightning_modules.probes import lbfgs
from lightning_modules.probes.bank import ProbeBank
from lightning_modules.probes.lbfgs import Algebra
from lightning_modules.probes.solver import Solver
from lightning_modules.subsets.coordinates import Space
from lightning_modules.subsets.plan import describe

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)
ROWS = 512  # in a batch from memory, at least, so that small batches cost no more than large ones
KEPT = 0.25  # share of the free memory that features may fill; more are read again in every pass

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Logistic(Solver):
    """Softmax cross-entropy with a penalty on the squared weights, to its optimum: no epochs, no learning rate.

    A probe minimises the sum of its losses over train + penalty / 2 * |W|^2; the bias is not penalised.

    Args:
        penalty: 1 / C of scikit-learn's LogisticRegression. Of a list every probe goes from the largest to the smaller
            ones as long as its loss on validation falls, and takes the one with the smallest.
        tolerance: A probe has converged when its objective is estimated to exceed the optimum by this share or less.
        max_iterations: Passes over the training features for each penalty, at most.

    Raises:
        MisconfigurationException: If a value is not above 0, or there is no penalty.
    """

    name = "logistic"
    trains = False
    second_moments = True
    copies = 2 * lbfgs.HISTORY + 8
    columns = (Column("penalty", "penalty"), Column("excess"))

    def __init__(
        self,
        penalty: float | list[float] = list(PENALTIES),  # noqa: B006 (never changed)
        tolerance: float = 1e-6,
        max_iterations: int = 500,
    ) -> None:
        self.penalty = penalty if isinstance(penalty, list) else [penalty]
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        if not self.penalty:
            raise MisconfigurationException("model.solver.penalty needs at least one value.")
        penalties = (("penalty", value) for value in self.penalty)
        for name, value in (*penalties, ("tolerance", tolerance), ("max_iterations", max_iterations)):
            if not (value > 0 and math.isfinite(value)):
                raise MisconfigurationException(f"model.solver.{name} is {value:g}; it must be above 0.")

    def candidates(self) -> list[tuple[float, ...]]:
        """Return one candidate: each probe's penalty is chosen as it is solved."""
        return [(math.nan, math.nan)]

    def loss(self, target: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the target's loss, for several classes the cross-entropy."""
        return target.loss(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits.softmax(-2)

    def prepare(self, model: RedundancyProbe) -> None:
        """Solve every probe on train for one penalty after the other, and keep the one that validation chooses."""
        moments = model.stream.moments("train", model.coordinates.sources)
        objective = _Objective(model, moments, lambda: model.stream.all_views("train"))
        val = _in_memory(model, lambda: model.stream.batches("val"), len(model.task.images["val"]))
        grid, bank = model.grid, model.grid.banks[0]
        best = torch.full_like(grid.kept_score[0], math.inf)
        active = best > 0
        for parameter in bank.parameters():
            parameter.data.zero_()
        for penalty in sorted(self.penalty, reverse=True):
            excess = objective.minimise(bank, penalty, active, self.tolerance, self.max_iterations)
            loss = torch.zeros_like(best)
            with torch.no_grad():
                for inputs, labels in val():
                    loss += self.loss(model.target, bank(model.coordinates(inputs)), labels)
            loss = model.stream.reduce(loss)
            active = active & (loss < best)
            best = torch.where(active, loss, best)
            grid.keep(active.unsqueeze(0), 0)
            grid.hyperparameters[0, active, 0] = penalty
            grid.hyperparameters[0, active, 1] = excess[active]
            if not active.any():
                break

    def refit(self, model: RedundancyProbe) -> None:
        """Solve every probe on train and validation together, with the penalty that was chosen."""
        train, val = (model.stream.moments(split, model.coordinates.sources) for split in ("train", "val"))
        both = {source: train[source] + val[source] for source in train}
        objective = _Objective(model, both, lambda: itertools.chain(*map(model.stream.batches, ("train", "val"))))
        bank, found = model.grid.banks[0], model.grid.hyperparameters[0]
        bank.copy_probes(model.grid.kept[0], found[:, 0] > 0)  # to start from
        for penalty in found[:, 0].unique().tolist():
            chosen = found[:, 0] == penalty
            excess = objective.minimise(bank, penalty, chosen, self.tolerance, self.max_iterations)
            found[:, 1] = torch.where(chosen, torch.maximum(found[:, 1], excess), found[:, 1])
        model.grid.refitted.copy_probes(bank, found[:, 0] > 0)
        model.grid.is_refitted.fill_(True)

    def remarks(self, model: RedundancyProbe) -> list[str]:
        """Name the probes that have not converged."""
        excess = model.grid.hyperparameters[0, :, 1]
        if not (excess > self.tolerance).any():
            return []
        which = describe(model.probes, (excess > self.tolerance).tolist())
        return [
            f"The optimum was not reached for {which}: the objective may exceed it by {excess.max():.2g} of its value; "
            f"raise model.solver.max_iterations or model.solver.penalty."
        ]

    def provenance(self) -> dict[str, Any]:
        """Return the solver: its penalties are chosen anew only by a fit."""
        return {"solver": self.name}


class _Objective:
    """The objective of every probe, over the images of all processes, on centred coordinates."""

    def __init__(self, model: RedundancyProbe, moments: Mapping[Space, Moments], read: Batches) -> None:
        self.model = model
        self.images = float(next(iter(moments.values())).count)
        self.batches = _in_memory(model, read, self.images)
        self.scatters = {source: each.scatter for source, each in moments.items()}
        coordinates, sources = model.coordinates, map(model.coordinates.source, model.coordinates.groups)
        centres = [
            coordinates.ordering(group).coordinates(moments[source].mean.unsqueeze(0)).squeeze(0)
            - coordinates.centre(group)
            for group, source in zip(coordinates.groups, sources, strict=True)
        ]
        self.centre = torch.cat(centres).float().unsqueeze(1)  # (R, 1)

    def minimise(self, bank: ProbeBank, penalty: float, active: Tensor, tolerance: float, limit: int) -> Tensor:
        """Move the active probes of a bank, boolean of shape (P,), to their optima from where they are.

        Returns:
            By what share of its value each objective is estimated to exceed its optimum, shape (P,).
        """
        algebra = Algebra(bank)
        whitening = _Whitening(self, bank, penalty)
        with torch.no_grad():
            bank.bias.copy_(bank(self.centre).squeeze(-1))  # of centred coordinates
            start = algebra.get()
            moved, excess = lbfgs.minimise(
                lambda step: self._evaluate(algebra, start + whitening.weights(step), penalty, whitening.gradient),
                algebra,
                active,
                tolerance,
                limit,
            )
            algebra.set(start + whitening.weights(moved))
            bank.bias.copy_(2 * bank.bias - bank(self.centre).squeeze(-1))
        return excess

    def _evaluate(
        self, algebra: Algebra, vector: Tensor, penalty: float, transform: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the objective of every probe, shape (P,), float64, and its gradient, transformed, shape (N,)."""
        model, bank = self.model, algebra.set(vector)
        gradient = torch.zeros_like(vector)
        total = torch.zeros(len(bank.probes), dtype=torch.float64, device=vector.device)
        for inputs, labels in self.batches():
            with torch.enable_grad():
                losses = model.solver.loss(model.target, bank(model.coordinates(inputs) - self.centre), labels)
                parts = torch.autograd.grad(losses.sum(), [bank.weight, bank.bias])
            gradient += torch.cat([part.flatten() for part in parts])
            total += losses.detach()
        weights = vector.clone()
        weights[-bank.bias.numel() :] = 0
        total = model.stream.reduce(total) + penalty / 2 * algebra.inner(weights[None], weights[None])[:, 0, 0]
        return total, transform(model.stream.reduce(gradient) + penalty * weights)


class _Whitening:
    """Coordinates in which objectives curve about alike in all directions, for every subset of a bank.

    The curvature of a class's loss is near half of X'X / C. With L L' = X'X / 2 C + penalty I over a probe group's
    coordinates, and T the inverse of L, a step u stands for the weights u T. T is lower triangular, so its leading
    blocks serve the smaller subsets.
    """

    def __init__(self, objective: _Objective, bank: ProbeBank, penalty: float) -> None:
        self.bank = bank
        share = 0.5 / bank.classes
        self.bias = (share * objective.images) ** -0.5
        inverses = []
        coordinates = objective.model.coordinates
        for group in coordinates.groups:
            system = share * coordinates.ordering(group).square(objective.scatters[coordinates.source(group)])
            system.diagonal().add_(penalty + rounding(len(system)) * system.diagonal().max())
            factor = torch.linalg.cholesky(system).float()
            identity = torch.eye(len(factor), device=factor.device)
            inverses.append(torch.linalg.solve_triangular(factor, identity, upper=False))
        counts = [len(stack.probes) for stack in bank.stacks]
        ends = list(itertools.accumulate(counts))
        self.inverses = [torch.stack(inverses[end - count : end]) for end, count in zip(ends, counts, strict=True)]

    def weights(self, vector: Tensor) -> Tensor:
        """Return the weights and biases that a step stands for."""
        return self._apply(vector, transpose=False)

    def gradient(self, vector: Tensor) -> Tensor:
        """Return the gradient by the step, from that by weights and biases."""
        return self._apply(vector, transpose=True)

    def _apply(self, vector: Tensor, transpose: bool) -> Tensor:
        result = torch.zeros_like(vector)
        biases = self.bank.bias.numel()
        result[-biases:] = self.bias * vector[-biases:]
        for stack, inverse in zip(self.bank.stacks, self.inverses, strict=True):
            for place, first in enumerate(stack.blocks):
                for last in stack.blocks[place:]:
                    factor = inverse[:, last.start : last.stop, first.start : first.stop]
                    source, to = (first, last) if transpose else (last, first)
                    seen, made = (  # the probes that see both blocks
                        stack.view(whole, block)[:, last.probe - block.probe :].flatten(1, 2)
                        for whole, block in ((vector, source), (result, to))
                    )
                    made += torch.bmm(seen, factor.transpose(1, 2) if transpose else factor)
        return result


def _in_memory(model: RedundancyProbe, read: Batches, images: float) -> Batches:
    """Return what reads the batches of so many images in every pass: from memory where it holds them."""
    size = 4 * images * sum(model.widths.values()) / model.trainer.world_size
    if size > KEPT * free_memory():
        return read
    inputs, labels = (torch.cat(parts) for parts in zip(*read(), strict=True))
    rows = max(ROWS, model.task.batch_size)
    return lambda: zip(inputs.split(rows), labels.split(rows), strict=True)
