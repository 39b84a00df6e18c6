"""What every measure is made of: columns of results.csv, a table and pictures of its own, and exact sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Probe

if TYPE_CHECKING:  # matplotlib takes a second to import, and a fit draws at its end only
    from matplotlib.figure import Figure

    from lightning_modules.results.results import Results


class Column(NamedTuple):
    """A column of results.csv: one value per probe and split."""

    name: str
    label: str = ""
    """For tables and pictures; empty for what stands in results.csv alone."""
    unit: str = ""
    """`%` for shares and `points` for differences of shares; both are shown times 100."""
    digits: int = 3
    """Decimals shown."""
    limits: tuple[str, ...] = ()
    """The columns with the limits of its interval, which is shown in place of its spread over seeds."""
    logged: bool = False
    """Whether its mean over seeds is logged as `<split>/<name>/<selection>/<fraction>`."""
    drawn: bool = False
    """Whether it is a line in the measure's panel beside the curve."""

    @property
    def scale(self) -> int:
        """What values are multiplied by where they are shown."""
        return 100 if self.unit in ("%", "points") else 1

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def words(self, value: float, spread: float = math.nan) -> str:
        """Return a value as it is shown, with its spread where that is known; nothing for a missing value."""
        if math.isnan(value):
            return ""
        shown = f"{self.scale * value:{'+' if self.unit == 'points' else ''}.{self.digits}f}"
        return shown if math.isnan(spread) else f"{shown} ± {self.scale * spread:.{self.digits}f}"


@dataclass(frozen=True)
class Batch:
    """What a measure sees of one batch, on this process."""

    inputs: Tensor
    """Features as the probes see them, shape (B, sum of the layers' widths)."""
    logits: Tensor
    """Of every probe, shape (P, C, B)."""
    labels: Tensor
    """Shape (B,)."""
    indices: Tensor
    """Places in the split, shape (B,)."""

    @cached_property
    def predicted(self) -> Tensor:
        """The class with the largest logit, by every probe, shape (P, B); found once for all measures."""
        return self.logits.max(1).indices  # as argmax, and six times as fast over classes that lie apart


@dataclass(frozen=True)
class Context:
    """What a measure may know of the run that it belongs to."""

    probes: Sequence[Probe]
    """The P probes."""
    fractions: Sequence[float]
    """Those that were asked for; `probes` may have more, see `Measure.needs_comparison_probes`."""
    coordinates: Coordinates
    """The neurons or other coordinates that the probes see."""
    target: Any
    """What is predicted, see `datamodules.targets.Target`."""
    solver: Any
    """What found the probes, see `lightning_modules.probes.solver.Solver`."""
    device: torch.device
    """Where this process computes."""
    reduce: Callable[[Tensor], Tensor]
    """Sums a tensor over processes; torchmetrics does that for states, this is for other sums."""
    features: Callable[[str], Tensor | None]
    """All features of a split as the probes see them, shape (n, sum of widths); None where they are not kept."""


class Picture(NamedTuple):
    """A figure with what is to be said below it."""

    figure: Figure
    caption: str


class Measure(Metric):
    """Counts or sums over a split what becomes columns of results.csv, or a table of its own.

    A subclass declares `columns` (and `table`), adds its states in `setup`, updates them with every batch and turns
    them into values in `compute`. As a torchmetrics Metric it is summed over processes before `compute` sees it. What
    it declares is what tables, pictures, the report and W&B show; nothing else has to know of it.
    """

    full_state_update = False
    columns: ClassVar[Sequence[Column]] = ()
    """Its columns of results.csv."""
    panel: ClassVar[str] = ""
    """What the axis of its drawn columns is called, in a panel beside the curve."""
    panel_limits: ClassVar[tuple[float, float] | None] = None
    """Where that axis begins and ends; None where the values say it."""
    table: ClassVar[str] = ""
    """The name of its own table, written to `<table>.csv`; none where empty."""
    needs_comparison_probes: ClassVar[bool] = False
    """Whether each fraction also gets a probe with as many neurons as its seeds' subsets hold together."""
    second_moments: ClassVar[bool] = False
    """Whether it sums X'X of every layer, D^2 numbers each."""
    needs_clean_features: ClassVar[bool] = False
    """Whether it works with `model.features: clean` only."""
    context: Context
    split: str
    """The split that is measured, `val` or `test`."""

    def __init__(self) -> None:
        super().__init__()  # without torchmetrics' own arguments, which would be settings of every measure

    def setup(self, context: Context) -> None:
        """Take what a measure may know of its run, and add states; called once, before the first batch."""
        self.context = context

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        raise NotImplementedError

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return each column by its name, shape (P,), and the rows of the table under the table's name.

        Rows have a column `split`. What was not measured on this split may be absent.
        """
        raise NotImplementedError

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Return pictures of a finished run by their file names, beside the curve; none by default."""
        return {}

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return what report.html shows of its table, by heading: the rows of the split, as they are."""
        rows = results.table(self.table, split)
        return {self.table.replace("_", " ").capitalize(): rows.drop(columns="split")} if len(rows) else {}

    def lines(self, rows: pd.DataFrame) -> dict[str, pd.Series]:
        """Return what of its table is a line over the fraction on W&B, by name; none by default.

        Args:
            rows: Of the table.

        Returns:
            Values indexed by `layer`, `selection`, `fraction` and `split`.
        """
        return {}
