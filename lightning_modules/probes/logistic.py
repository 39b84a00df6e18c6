"""Logistic regression to its optimum: L-BFGS on whitened coordinates, for all probes of a bank at once."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.measures.measure import Column
from lightning_modules.probes import lbfgs
from lightning_modules.probes.penalised import Objective, in_memory
from lightning_modules.probes.solver import Solver
from lightning_modules.subsets.plan import describe

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)


class Logistic(Solver):
    """Cross-entropy with a penalty on the squared weights, to its optimum: no epochs, no learning rate.

    Softmax cross-entropy of classes, binary cross-entropy of several labels, each by itself. A probe minimises the sum
    of its losses over train + penalty / 2 * |W|^2; the bias is not penalised.

    Args:
        penalty: 1 / C of scikit-learn's LogisticRegression. Of a list every probe goes from the largest to the smaller
            ones as long as its loss on validation falls, and takes the one with the smallest.
        tolerance: A probe has converged when its objective exceeds the optimum by at most this share of its value, as
            its duality gap shows.
        max_iterations: Steps for each penalty, at most; each is a pass over the training features.

    Raises:
        MisconfigurationException: If a value is not above 0, or there is no penalty.
    """

    name = "logistic"
    trains = False
    second_moments = True
    copies = 2 * lbfgs.HISTORY + 10
    factors = 1
    columns = (Column("penalty", "penalty"), Column("excess"))

    def __init__(
        self,
        penalty: float | list[float] = list(PENALTIES),  # noqa: B006 (never changed)
        tolerance: float = 1e-4,
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
        """Return the target's loss, a cross-entropy."""
        return target.loss(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits.softmax(-2)

    def prepare(self, model: RedundancyProbe) -> None:
        """Solve every probe on train for one penalty after the other, and keep the one that validation chooses."""
        moments = model.stream.moments("train", model.coordinates.sources)
        objective = Objective(model, moments, lambda: model.stream.all_views("train"))
        val = in_memory(model, lambda: model.stream.batches("val"), len(model.task.images["val"]))
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
        objective = Objective(model, both, lambda: itertools.chain(*map(model.stream.batches, ("train", "val"))))
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
