"""What every measure is made of: columns of results.csv, a table and pictures of its own, and exact sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    label: str
    """For tables and pictures."""
    unit: str = ""
    """`%` for shares, which are shown times 100."""
    digits: int = 3
    """Decimals shown."""
    logged: bool = False
    """Whether its mean over seeds is logged as `<split>/<name>/<selection>/<fraction>`."""
    drawn: bool = False
    """Whether it is a line in the measure's panel beside the curve."""


class Batch(NamedTuple):
    """What a measure sees of one batch, on this process."""

    inputs: Tensor
    """Features as the probes see them, shape (B, sum of the layers' widths)."""
    logits: Tensor
    """Of every probe, shape (P, C, B)."""
    labels: Tensor
    """Shape (B,)."""
    indices: Tensor
    """Places in the split, shape (B,)."""


@dataclass(frozen=True)
class Context:
    """What a measure may know of the run that it belongs to."""

    probes: Sequence[Probe]
    """The P probes."""
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
    table: ClassVar[str] = ""
    """The name of its own table, written to `<table>.csv`; none where empty."""
    context: Context
    split: str
    """The split that is measured, `val` or `test`."""

    def setup(self, context: Context) -> None:
        """Take what a measure may know of its run, and add states; called once, before the first batch."""
        self.context = context

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        raise NotImplementedError

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return each column by its name, shape (P,), and the rows of the table under the table's name."""
        raise NotImplementedError

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Return pictures of a finished run by their file names, beside the curve; none by default."""
        return {}
