"""Exact search, where documents are to be found and nothing is predicted: a probe is a ranking on its subset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules import probes
from lightning_modules.measures.similarities import SIMILARITIES
from lightning_modules.probes.sgd import SGD
from lightning_modules.probes.solver import Solver

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

SIDES = ("both", "stored")  # of a search, that few bits are for


class Search(Solver):
    """Exact search through the documents of train: there is nothing to find, and probes have no weights.

    Args:
        similarity: `cosine`, of what is left after dropping, `dot`, the inner product, or `l2`, the distance.
        quantised: What `model.bits` takes to few bits: `both` documents and queries, or what is `stored`, the documents
            alone.

    Raises:
        MisconfigurationException: If there is no such similarity, or another word for what is quantised.
    """

    name = "search"
    trains = False
    columns = ()

    def __init__(
        self,
        similarity: Literal["cosine", "dot", "l2"] = "cosine",
        quantised: Literal["both", "stored"] = "both",
    ) -> None:
        for name, value, known in (("similarity", similarity, SIMILARITIES), ("quantised", quantised, SIDES)):
            if value not in known:
                raise MisconfigurationException(
                    f"model.solver.{name} is {value!r}; it must be one of {', '.join(known)}."
                )
        self.similarity, self.quantised = similarity, quantised

    def candidates(self) -> list[tuple[float, ...]]:
        """Return one candidate: there is nothing to choose."""
        return [()]

    def prepare(self, model: RedundancyProbe) -> None:
        """Keep every probe as it is."""
        model.trainer.num_sanity_val_steps = 0  # of training steps, and there are none
        model.grid.kept_epoch.zero_()

    def loss(self, target: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Raise an error, as a ranking has no loss."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Raise an error, as a ranking has no probabilities."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Return the solver, the similarity and what is in few bits."""
        return {"solver": self.name, "similarity": self.similarity, "quantised": self.quantised}


def suited(solver: Solver, target: Any) -> Solver:
    """Return the solver for a target, which is `Search` where nothing is predicted; refuse one that is not for it."""
    name, searches = type(solver).__name__, not target.outputs
    if name in target.solvers or not (searches or hasattr(probes, name)):  # or one of the user's own
        return solver
    if searches and type(solver) is SGD and vars(solver) == vars(SGD()):  # what is taken where none is named
        return Search()
    *others, last = target.solvers
    right = "no solver; leave model.solver out, or name Search" if searches else f"{', '.join(others)} or {last}"
    raise MisconfigurationException(
        f"model.solver is {name}, but the task has {target.describe()}, which takes {right}."
    )
