"""What every measure is made of: columns of results.csv, a table and pictures of its own, and exact sums."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.features.moments import Moments
from lightning_modules.results.results import Results
from lightning_modules.results.tables import Column
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Probe


@dataclass(frozen=True)
class Batch:
    """What a measure sees of one batch, on this process."""

    inputs: Tensor  # features as the probes see them, shape (B, sum of the layers' widths)
    logits: Tensor  # of every probe, shape (P, C, B)
    labels: Tensor  # shape (B,)
    indices: Tensor  # positions in the split, shape (B,)

    @cached_property
    def predicted(self) -> Tensor:
        """The class with the largest logit, by every probe, shape (P, B); found once for all measures."""
        return self.logits.max(1).indices  # as argmax, and six times as fast over classes that lie apart


@dataclass(frozen=True)
class Context:
    """What a measure may know of its run."""

    probes: Sequence[Probe]  # the P probes
    fractions: Sequence[float]  # as asked for; `probes` may have more, see `Measure.needs_comparison_probes`
    coordinates: Coordinates  # the neurons or other coordinates that the probes see
    target: Any  # what is predicted, see `datamodules.targets.Target`
    solver: Any  # what found the probes, see `lightning_modules.probes.solver.Solver`
    device: torch.device  # where this process computes
    reduce: Callable[[Tensor], Tensor]  # sums a tensor over processes, where it is no state of torchmetrics
    features: Callable[..., Tensor | None]
    """All of a split, or its rows from a start to a stop, shape (n, sum of widths); None where they are not kept."""
    moments: Callable[[str], Mapping[str, Moments]]  # sums over a split and all processes, by layer
    stream: Any = None  # from images to what the probes see, see `lightning_modules.features.extractor.FeatureStream`
    logits: Callable[[Tensor], Tensor] | None = None  # from `coordinates` to those of the probes that a run ends with


class Picture(NamedTuple):
    """A figure and what stands below it."""

    figure: Figure
    caption: str


class Measure(Metric):
    """Counts or sums over a split what becomes columns of results.csv, or a table of its own.

    A subclass declares `columns` (and `table`), adds its states in `setup`, updates them with every `Batch` and turns
    them into values in `compute`. As a torchmetrics Metric it is summed over processes before `compute` sees it. What
    it declares is what tables, pictures, the report and W&B show; nothing else has to know of it.

    `compute` returns each column by its name, shape (P,), and the rows of the table, a DataFrame with a column `split`,
    under the table's name. What was not measured on this split may be absent.
    """

    full_state_update = False
    columns: Sequence[Column] = ()  # its columns of results.csv
    panel = ""  # the name of the axis of its drawn columns, beside the curve; empty is the heading of the first
    panel_limits: tuple[float, float] | None = None  # where that axis begins and ends; None where the values say it
    table = ""  # the name of its own table, written to <table>.csv; none where empty
    needs_comparison_probes = False  # each fraction also gets a probe on as many neurons as its seeds hold together
    second_moments = False  # it sums X'X of every layer, D^2 numbers each
    needs_clean_features = False  # it works with model.features: clean only
    needs_images = False  # it asks for images beside the pass of the backbone over them
    needs_labels = False  # it works only where something is predicted
    needs_classes = False  # it works only where classes are predicted
    context: Context
    split: str  # the split that is measured, `val` or `test`

    def __init__(self) -> None:
        super().__init__()  # without torchmetrics' own arguments, which would be settings of every measure

    def setup(self, context: Context) -> None:
        """Take what a measure may know of its run, and add states; called once, before the first batch."""
        self.context = context

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Return pictures of a finished run by their file names, beside the curve; none by default."""
        return {}

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return what report.html shows of its table, by heading: the rows of the split, as they are."""
        rows = results.table(self.table, split)
        return {self.table.replace("_", " ").capitalize(): rows.drop(columns="split")} if len(rows) else {}

    def lines(self, rows: pd.DataFrame) -> dict[str, pd.Series]:
        """Return lines over the fraction on W&B, by name: values by `layer`, `selection`, `fraction` and `split`."""
        return {}
