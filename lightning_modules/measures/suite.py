"""The measures of a run, driven together."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.measures.cka import CKA
from lightning_modules.measures.inequality import Inequality
from lightning_modules.measures.layer_ranks import LayerRanks
from lightning_modules.measures.measure import Batch, Context, Measure


class Suite(nn.ModuleList):
    """Measures that see the same batches; no two of one class, as their columns would collide.

    Args:
        measures: One or a list; None is CKA, LayerRanks and Inequality.

    Raises:
        MisconfigurationException: If two are of one class.
    """

    def __init__(self, measures: Measure | Sequence[Measure] | None) -> None:
        if measures is None:
            measures = [CKA(), LayerRanks(), Inequality()]
        measures = [measures] if isinstance(measures, Measure) else measures
        super().__init__(measures)
        names = [type(measure).__name__ for measure in measures]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise MisconfigurationException(f"model.measures lists {twice} twice; give each once.")

    def setup(self, context: Context) -> None:
        """Let all measures know the run that they belong to."""
        for measure in self:
            measure.setup(context)

    def start(self, split: str) -> None:
        """Forget what was counted, and begin with a split."""
        for measure in self:
            measure.split = split
            measure.reset()

    def update(self, batch: Batch) -> None:
        """Add a batch to all measures."""
        for measure in self:
            measure.update(batch)

    def compute(self) -> dict[str, Any]:
        """Return columns and tables of all measures by name, over all processes; then forget what was counted."""
        values: dict[str, Any] = {}
        for measure in self:
            values |= measure.compute()
            measure.reset()
        return values

    def logged(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """Return those of the computed columns that are logged, shape (P,)."""
        return {column.name: values[column.name] for each in self for column in each.columns if column.logged}
