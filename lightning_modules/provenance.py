"""What probes depend on: noted in a checkpoint, and compared when one is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.subsets.selections import FULL

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe


def save(model: RedundancyProbe, checkpoint: dict[str, Any]) -> None:
    """Leave the backbone out of a checkpoint, and add the probes, their coordinates and what they depend on."""
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    checkpoint["probes"] = {
        "provenance": of_probes(model),
        "training": of_training(model),
        "probes": [list(probe) for probe in model.probes],
        "indices": [model.coordinates.subset(index) for index in range(len(model.probes))],
        "train_losses": model.train_losses,
    }


def load(model: RedundancyProbe, checkpoint: dict[str, Any]) -> list[Tensor]:
    """Check that a checkpoint belongs to a model, and return the training losses of its epochs, shape (K, P) each.

    Raises:
        MisconfigurationException: If it does not, or its training has gone further than the one that resumes it.
    """
    theirs = checkpoint.get("probes")
    if theirs is None:
        raise MisconfigurationException("The checkpoint holds no probes; name one that a fit of RedundancyProbe left.")
    check(theirs["provenance"], of_probes(model))
    losses = list(theirs["train_losses"])
    if model.trainer.state.fn == "fit":
        check(theirs["training"], of_training(model))
        wanted = model.trainer.max_epochs or 0
        if 0 < wanted < len(losses):
            raise MisconfigurationException(
                f"trainer.max_epochs is {wanted}, but the checkpoint has gone through {len(losses)}; give "
                f"{len(losses)} or more."
            )
    return losses


def of_probes(model: RedundancyProbe) -> dict[str, Any]:
    """Return what the probes of a model depend on, in plain types."""
    asked = [probe for probe in model.probes if probe.selection != FULL]
    backbone = model.stream.extractor.provenance()
    return {
        "task": model.task.label,
        "classes": list(model.target.classes),
        "backbone": model.backbone.label,
        "layer": ", ".join(model.widths),
        "weights": backbone["weights"],
        "preprocessing": str(backbone["preprocessing"]),
        "selection": model.plan.selections,
        "fractions": sorted({probe.fraction for probe in asked}),
        "seeds": sorted({probe.seed for probe in asked}),
        "probes": [list(probe) for probe in model.probes],
        **model.solver.provenance(),
        "standardise": model.stream.standardise,
    }


def of_training(model: RedundancyProbe) -> dict[str, Any]:
    """Return what a training must share, beside its probes, with one that it resumes, in plain types."""
    return {
        "features": model.features,
        **model.solver.training_provenance(),
        "trainer.precision": str(model.trainer.precision),
        "data.batch_size": model.task.batch_size,
        "data.seed": model.task.seed,
        "data.augmentation": model.task.augmentation,
        "training images": model.stream.extractor.digest("train"),
    }


def check(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a MisconfigurationException that names the first difference of what checkpoint and run depend on."""
    for what, value in ours.items():
        if theirs.get(what) != value:
            raise MisconfigurationException(
                f"The checkpoint does not belong here: its {what} is {_short(theirs.get(what))}, not {_short(value)}; "
                f"take the configuration of its own run."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
