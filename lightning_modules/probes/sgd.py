"""Probes trained by stochastic gradient descent with momentum, as the paper trains them."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_modules.measures.measure import Column
from lightning_modules.probes.grid import Grid
from lightning_modules.probes.solver import Solver
from lightning_modules.subsets.plan import describe

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

SAMPLE = 4096  # Training images that the curvature of the loss is bounded on


class SGD(Solver):
    """The target's loss by SGD with momentum; the learning rate drops by a factor every few epochs.

    That is softmax cross-entropy of classes, binary cross-entropy of several labels, and the squared error of numbers.
    Where `learning_rate` or `weight_decay` is a list, every probe is trained with every combination and keeps the one
    with the best accuracy, or other metric of the target, on validation.

    Args:
        learning_rate: Learning rate; a list is swept.
        momentum: Momentum.
        weight_decay: Weight decay, on weights and biases; a list is swept.
        step_size: Epochs between two drops of the learning rate.
        gamma: Factor of a drop.
        keep: The weights each probe keeps: those of its `best` epoch by its own metric on validation (ties go to the
            earlier), or of the `last`.

    Raises:
        MisconfigurationException: If a value is out of range or a combination listed twice.
    """

    name = "sgd"
    trains = True
    columns = (Column("learning_rate", "learning rate"), Column("weight_decay", "weight decay"))

    def __init__(
        self,
        learning_rate: float | list[float] = 0.1,
        momentum: float = 0.9,
        weight_decay: float | list[float] = 1e-4,
        step_size: int = 20,
        gamma: float = 0.1,
        keep: Literal["best", "last"] = "best",
    ) -> None:
        self.learning_rate = learning_rate if isinstance(learning_rate, list) else [learning_rate]
        self.momentum = momentum
        self.weight_decay = weight_decay if isinstance(weight_decay, list) else [weight_decay]
        self.step_size = step_size
        self.gamma = gamma
        self.keep = keep
        for name, values in (("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay)):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None or not values:
                problem = "is empty; give at least one value" if not values else f"lists {twice:g} twice; give it once"
                raise MisconfigurationException(f"model.solver.{name} {problem}.")
        for name, value, holds, right in (
            *(("learning_rate", rate, rate > 0, "above 0") for rate in self.learning_rate),
            *(("weight_decay", decay, decay >= 0, "0 or more") for decay in self.weight_decay),
            ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
            ("step_size", step_size, step_size >= 1, "at least 1"),
            ("gamma", gamma, 0 < gamma <= 1, "above 0, at most 1"),
        ):
            if not (holds and math.isfinite(value)):
                raise MisconfigurationException(f"model.solver.{name} is {value:g}; it must be {right}.")

    def candidates(self) -> list[tuple[float, ...]]:
        """Return every combination of learning rate and weight decay."""
        return list(itertools.product(self.learning_rate, self.weight_decay))

    def loss(self, target: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the target's loss, for several classes the cross-entropy."""
        return target.loss(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits.softmax(-2)

    def optimizer(self, grid: Grid) -> OptimizerLRScheduler:
        """Return SGD over the probes alone, one parameter group per candidate, with the paper's step schedule."""
        optimizer = torch.optim.SGD(
            [
                {"params": list(bank.parameters()), "lr": rate, "weight_decay": decay}
                for bank, (rate, decay) in zip(grid.banks, self.candidates(), strict=True)
            ],
            momentum=self.momentum,
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.step_size, self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def prepare(self, model: RedundancyProbe) -> None:
        """Name the probes whose steps are too long for the loss: past 2 (1 + momentum) / curvature descent can fail.

        Of a squared error it does fail, so that is a MisconfigurationException.
        """
        sample: list[Tensor] = []
        for inputs, _ in model.stream.batches("train"):
            sample.append(model.coordinates.spaces(inputs).t())
            if sum(map(len, sample)) >= SAMPLE:
                break
        curvature = model.target.curvature * largest_curvature(torch.cat(sample), model.coordinates.masks())
        steps, edge = max(self.learning_rate) * curvature, 2 * (1 + self.momentum)
        if model.target.quadratic and model.stream.reduce(steps.max()) > edge * model.trainer.world_size:
            raise MisconfigurationException(
                f"model.solver.learning_rate is {max(self.learning_rate):g}, with which the squared error of these "
                f"features grows without end; take {edge / float(curvature.max()) / 2:.1g} or less, "
                f"set model.standardise, or take model.solver Ridge."
            )
        if (steps > edge).any():
            rank_zero_info(
                f"Learning rate x curvature can reach {steps.max():.3g}, past the edge of stability at {edge:.3g}, for "
                f"{describe(model.probes, (steps > edge).tolist())}; model.standardise or a lower "
                f"model.solver.learning_rate trains them further."
            )

    def after_epoch(self, grid: Grid, epoch: int) -> None:
        """Keep the last weights, where those are wanted."""
        if self.keep == "last":
            grid.keep(torch.ones_like(grid.kept_epoch, dtype=torch.bool), epoch)

    def after_validation(self, grid: Grid, scores: Tensor, epoch: int) -> None:
        """Keep each probe's weights where its score is the best so far; with `last`, the latest score counts."""
        better = scores > grid.kept_score if self.keep == "best" else torch.ones_like(scores, dtype=torch.bool)
        grid.kept_score.copy_(torch.where(better, scores, grid.kept_score))
        if self.keep == "best":
            grid.keep(better, epoch)

    def remarks(self, model: RedundancyProbe) -> list[str]:
        """Name the probes whose training diverged or was not finished."""
        if not model.train_losses:
            return []
        history = model.grid.of_chosen(torch.stack(model.train_losses, -1)).T
        last = history[-1]
        earlier = history[-1 - max(1, len(history) // 10)] if len(history) > 1 else last
        diverged = ~last.isfinite() | (last > 1.05 * model.target.guess)
        falling = ~diverged & (last < 0.99 * earlier)
        remarks = []
        if diverged.any():
            remarks.append(
                f"Training diverged for {describe(model.probes, diverged.tolist())}: the loss ends above that of a "
                f"guess; lower model.solver.learning_rate or set model.standardise."
            )
        if falling.any():
            remarks.append(
                f"Training was not finished for {describe(model.probes, falling.tolist())}: the loss still fell by "
                f"more than 1 % over the last tenth of the epochs; raise trainer.max_epochs or model.solver.step_size."
            )
        return remarks

    def training_provenance(self) -> dict[str, Any]:
        """Return schedule, momentum, and which weights are kept."""
        return {name: getattr(self, name) for name in ("keep", "momentum", "step_size", "gamma")}


def largest_curvature(features: Tensor, masks: Tensor, iterations: int = 30) -> Tensor:
    """Return the largest eigenvalue of each probe's second moments, by power iteration.

    The Hessian of a loss at an input x is H (x) x x' with the second derivatives H by the logits; where the largest
    eigenvalue of H never exceeds c (of softmax cross-entropy 1/2), that of the mean over inputs never exceeds c times
    this. The bias counts as a neuron that is always one. From a sample of features, shape (n, D), and which neurons
    each probe sees, boolean of shape (P, D); returns shape (P,).
    """
    inputs = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    seen = torch.cat([masks, torch.ones_like(masks[:, :1])], 1)
    # Not from the mean: of centred inputs that is the bias alone, an eigenvector with any other eigenvalue.
    vectors = torch.randn(inputs.shape[1], generator=torch.Generator().manual_seed(0)).to(inputs) * seen
    eigenvalues = vectors.norm(dim=1)
    for _ in range(iterations):
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        vectors = (vectors @ inputs.t() @ inputs) / len(inputs) * seen
        before, eigenvalues = eigenvalues, vectors.norm(dim=1)
        if torch.allclose(eigenvalues, before, rtol=1e-5):
            break
    return eigenvalues
