"""The measures of a run, driven together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

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
            measure.reset()  # states that were added from one tensor are tensors of their own from here on

    def update(self, split: str, batch: Batch) -> None:
        """Add a batch of a split to all measures."""
        for measure in self:
            measure.split = split
            measure.update(batch)

    def compute(self, split: str) -> list[Mapping[str, Any]]:
        """Return what each measure computes of a split over all processes, and start anew."""
        computed = []
        for measure in self:
            measure.split = split
            computed.append(measure.compute())
            measure.reset()
        return computed

    def logged(self, computed: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and values, shape (P,), of the computed columns that are logged."""
        for measure, values in zip(self, computed, strict=True):
            yield from ((each.name, values[each.name]) for each in measure.columns if each.logged)
