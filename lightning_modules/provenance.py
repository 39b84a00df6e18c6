"""What probes depend on: noted in a checkpoint, and compared when one is loaded."""

from __future__ import annotations

import textwrap
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
    """Return the training losses of a checkpoint's epochs, shape (K, P) each.

    Raises:
        MisconfigurationException: If it is of another run, or its training went further than the one that resumes it.
    """
    saved = checkpoint.get("probes")
    if saved is None:
        raise MisconfigurationException("The checkpoint holds no probes; name one that a fit of RedundancyProbe left.")
    check(saved["provenance"], of_probes(model))
    losses = list(saved["train_losses"])
    if model.trainer.state.fn == "fit":
        check(saved["training"], of_training(model))
        wanted, done = model.trainer.max_epochs or 0, len(losses)
        if 0 < wanted < done:
            raise MisconfigurationException(
                f"trainer.max_epochs is {wanted}, but the checkpoint has gone through {done}; give {done} or more."
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


def check(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a checkpoint that depends on something else than the run at hand; name the first difference."""
    for what, value in ours.items():
        if saved.get(what) != value:
            there, here = (textwrap.shorten(str(each), 80, placeholder="...") for each in (saved.get(what), value))
            raise MisconfigurationException(
                f"The checkpoint does not belong here: its {what} is {there}, not {here}; take the configuration of "
                f"its own run."
            )
