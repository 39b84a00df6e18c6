"""What every solver is made of: how probes are found, what is said of it, and which of its settings results name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_modules.measures.measure import Column
from lightning_modules.probes.grid import Grid

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe


class Solver(ABC):
    """Finds the probes of a run; holds its hyper-parameters and no state, which lies in the run's `Grid`.

    One that trains gives an optimiser and sees validation scores; one that does not has its probes after `prepare`.
    """

    name: ClassVar[str]  # What the column `solver` of results says
    trains: ClassVar[bool]  # Whether the Trainer's epochs follow `prepare`
    linear: ClassVar[bool] = True  # Whether probes are weights in the bank; otherwise `logits` looks at the clean view
    second_moments: ClassVar[bool] = False  # Whether it sums X'X of every layer, D^2 numbers each
    copies: ClassVar[int] = 0  # Of all weights that it works with, beside gradient, momentum and what is kept
    factors: ClassVar[int] = 0  # Of the largest subset of every selection and seed, k^2 numbers each, that it holds
    columns: ClassVar[Sequence[Column]]
    """The hyper-parameters that are chosen for each probe on validation, as columns of results.csv."""

    @abstractmethod
    def candidates(self) -> list[tuple[float, ...]]:
        """Return the combinations of `columns` that are trained side by side; one of nan where `prepare` chooses."""

    @abstractmethod
    def prepare(self, model: RedundancyProbe) -> None:
        """Do what must precede the first step; called with the features of train and validation at hand."""

    @abstractmethod
    def loss(self, target: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what is minimised for each probe, summed over the batch, shape (P,), from logits (P, C, B)."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Return logits, with classes on the second axis from the end, as probabilities or estimates of them."""

    def logits(self, model: RedundancyProbe, inputs: Tensor, split: str) -> Tensor:
        """Return the logits of every probe, shape (P, C, B), of inputs of shape (B, sum of widths).

        On `val` of the probes that chose hyper-parameters there, on other splits of those that the run ends with.
        """
        grid = model.grid
        return (grid.kept_logits if split == "val" else grid.final_logits)(model.coordinates(inputs))

    def optimizer(self, grid: Grid) -> OptimizerLRScheduler:
        """Return an optimiser over the grid's banks, if this solver trains; with a schedule, as a dict of both.

        The schedule makes a step after every epoch.
        """
        return None

    def after_epoch(self, grid: Grid, epoch: int) -> None:  # noqa: B027 (most solvers need not)
        """Keep weights after a training epoch, where the solver keeps the last."""

    def after_validation(self, grid: Grid, scores: Tensor, epoch: int) -> None:  # noqa: B027 (most need not)
        """Keep weights by validation scores of every candidate and probe, shape (K, P); higher is better."""

    def refit(self, model: RedundancyProbe) -> None:
        """Find every probe again, on train and validation together, with what validation chose.

        They go to `grid.refitted`, and `grid.is_refitted` says so. Training starts from the same initial weights and
        follows the same schedule. A probe ends with its weights at the end of the epoch that was kept before.

        Raises:
            MisconfigurationException: If a solver that does not train has no way of its own.
        """
        if not self.trains:
            raise MisconfigurationException(f"The solver {self.name} cannot refit; leave model.refit false.")
        refitted, chosen = model.grid.refitted, model.grid.kept_score.argmax(0)
        epochs = model.grid.of_chosen(model.grid.kept_epoch)
        grid = Grid(model.probes, model.target.outputs, self.candidates()).to(refitted.weight)
        found: Any = self.optimizer(grid)
        parts = found if isinstance(found, dict) else {"optimizer": found}
        optimizer, schedule = parts["optimizer"], parts.get("lr_scheduler")
        loader, last = model.task.refit_dataloader(), int(epochs.max())
        rank_zero_info(f"Training again on train and validation together, for {last + 1} epochs.")
        for epoch in range(last + 1):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                seen = model.stream(batch, "train")
                optimizer.zero_grad()
                (model.losses(grid, seen).sum() / seen.total).backward()
                for parameter in grid.banks.parameters():
                    parameter.grad = model.stream.reduce(parameter.grad)
                optimizer.step()
            if schedule is not None:
                schedule.step()
            for place, bank in enumerate(grid.banks):
                refitted.copy_probes(bank, (chosen == place) & (epochs == epoch))
        model.grid.is_refitted.fill_(True)

    def remarks(self, model: RedundancyProbe) -> list[str]:
        """Name the probes that should not be trusted as they are, one line per reason."""
        return []

    def describe(self) -> str:
        """Return the solver with its arguments, in one line."""
        one = {name: value[0] for name, value in vars(self).items() if isinstance(value, list) and len(value) == 1}
        settings = ", ".join(f"{name} {value}" for name, value in (vars(self) | one).items())
        return f"{type(self).__name__} ({settings})"

    def provenance(self) -> dict[str, Any]:
        """Return what its probes depend on, in plain types: checked when a checkpoint is loaded."""
        swept = " and ".join(column.name for column in self.columns)
        return {"solver": self.name, swept: [list(candidate) for candidate in self.candidates()]}

    def training_provenance(self) -> dict[str, Any]:
        """Return what else a training must share with the one it resumes, in plain types."""
        return {}
