"""The measures of a run, driven together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules import measures
from lightning_modules.measures.cka import CKA
from lightning_modules.measures.inequality import Inequality
from lightning_modules.measures.measure import Batch, Context, Measure


class Suite(list[Measure]):
    """Measures that see the same batches: one or a list, None is CKA and, of classes, Inequality; nothing in a search.

    Raises:
        MisconfigurationException: If two would write the same column or table.
    """

    def __init__(self, wanted: Measure | Sequence[Measure] | None, clean: bool) -> None:
        self.is_default, self.clean = wanted is None, clean
        given = [CKA(), Inequality()] if wanted is None else wanted
        super().__init__([given] if isinstance(given, Measure) else given)
        writers: dict[str, str] = {}
        for measure in self:
            kind = type(measure).__name__
            names = [column.name for column in measure.columns]
            names += [f"{measure.table}.csv"] if measure.table else []
            for name in names:
                if name in writers:
                    raise MisconfigurationException(
                        f"model.measures: {writers[name]} and {kind} would both write {name}; leave one out."
                    )
                writers[name] = kind

    def put_first(self, target: Any) -> None:
        """Put the measure of the target's own metric before the others; refuse what the run does not have."""
        named = target.measure  # a class, or the name of one of this project's
        kind = getattr(measures, named) if isinstance(named, str) else named
        others = [each for each in self if type(each) is not kind]
        if self.is_default:
            others = [each for each in others if target.classes or not each.needs_classes] if target.outputs else []
        self[:] = [kind(), *others]
        for measure in self:
            name = type(measure).__name__
            if measure.needs_clean_features and not self.clean:
                raise MisconfigurationException(f"{name} needs model.features clean; set that, or leave {name} out.")
            unmet = [what for what, there in (("classes", target.classes), ("labels", target.outputs)) if not there]
            if needs := next((what for what in unmet if getattr(measure, f"needs_{what}")), None):
                raise MisconfigurationException(
                    f"model.measures lists {name}, which needs {needs}; the task has {target.describe()}, so leave it "
                    f"out."
                )

    def setup(self, context: Context) -> None:
        """Let all measures know their run."""
        for measure in self:
            measure.setup(context)
            measure.to(context.device)  # also states that were made without naming it
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
