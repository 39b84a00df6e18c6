"""The measures of a run, driven together."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.measures.cka import CKA
from lightning_modules.measures.inequality import Inequality
from lightning_modules.measures.measure import Batch, Context, Measure


class Suite(list[Measure]):
    """Measures that see the same batches.

    Args:
        measures: One or a list; None is CKA and Inequality.
        clean: Whether the probes train on clean features, which are kept.

    Raises:
        MisconfigurationException: If two would write the same column or table, or one needs clean features.
    """

    def __init__(self, measures: Measure | Sequence[Measure] | None, clean: bool) -> None:
        if measures is None:
            measures = [CKA(), Inequality()]
        super().__init__([measures] if isinstance(measures, Measure) else measures)
        owners: dict[str, Measure] = {}
        for measure in self:
            tables = [f"{measure.table}.csv"] if measure.table else []
            for name in [*(column.name for column in measure.columns), *tables]:
                if owners.setdefault(name, measure) is not measure:
                    both = f"{type(owners[name]).__name__} and {type(measure).__name__}"
                    raise MisconfigurationException(f"model.measures: {both} would both write {name}; leave one out.")
        for measure in self:
            if measure.needs_clean_features and not clean:
                raise MisconfigurationException(
                    f"model.measures lists {type(measure).__name__}, which needs model.features clean; leave one out."
                )

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

    def compute(self) -> list[Mapping[str, Any]]:
        """Return what each measure computes over all processes, and forget what was counted."""
        computed = [measure.compute() for measure in self]
        for measure in self:
            measure.reset()
        return computed
