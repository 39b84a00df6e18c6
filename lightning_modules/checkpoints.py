"""Checkpoints: when and how they are written, what probes depend on, and that only their own run goes on from them."""

from __future__ import annotations

import io
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.backbones import weights
from lightning_modules.files import atomic, remove_unfinished, writing
from lightning_modules.subsets.selections import FULL

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

FORMAT = 3  # Number of the layout of checkpoints; to be raised where an older one can no longer be read
PAUSE = 5.0  # Seconds between two writes, at least
SHARE = 0.05  # Share of the time that may go into writing


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint, and run no code in it; refuse a file that is none, is cut short or has another `FORMAT`."""
    checkpoint = weights.read_torch(path, "checkpoint")
    number = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if number != FORMAT:
        found = "no checkpoint of this project" if number is None else f"a checkpoint of format {number}"
        raise MisconfigurationException(
            f"{path} holds {found}, where format {FORMAT} is read; name a checkpoint that a fit of this version left."
        )
    return checkpoint


class Checkpoints(Checkpoint):
    """Writes the state of a fit at the end of the first epoch, of later ones as `PAUSE` and `SHARE` allow, and last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._due = 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state if that is due; the first process decides, as all of them take part."""
        started = time.monotonic()
        if trainer.strategy.broadcast(started >= self._due):
            trainer.save_checkpoint(self.path, weights_only=False)
            ended = time.monotonic()
            self._due = ended + max(PAUSE, (ended - started) / SHARE)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state."""
        trainer.save_checkpoint(self.path, weights_only=False)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoints of this `FORMAT`; Lightning's own way of writing may leave half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; where the disk does not take it, the one before it stays, and the user is told."""
        content = io.BytesIO()
        torch.save(checkpoint | {"format": FORMAT}, content)
        path = Path(path)
        remove_unfinished(path.parent)
        with writing(path, "make room, and go on with --ckpt_path last"), atomic(path) as file:
            file.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Return a checkpoint, as `read` does."""
        return read(Path(path))


def save_probes(model: RedundancyProbe, checkpoint: dict[str, Any]) -> None:
    """Leave the backbone out of a checkpoint, and add the probes, their coordinates and what they depend on."""
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    checkpoint["probes"] = {
        "provenance": provenance_of_probes(model),
        "training": provenance_of_training(model),
        "probes": [list(probe) for probe in model.probes],
        "indices": [model.coordinates.subset(index) for index in range(len(model.probes))],
        "train_losses": model.train_losses,
    }


def load_probes(model: RedundancyProbe, checkpoint: dict[str, Any]) -> list[Tensor]:
    """Return the training losses of a checkpoint's epochs, shape (K, P) each.

    Raises:
        MisconfigurationException: If it is of another run, its training went further than the one that resumes it, or
            it is to be tested before its probes were refitted.
    """
    saved = checkpoint.get("probes")
    if saved is None:
        raise MisconfigurationException("The checkpoint holds no probes; name one that a fit of RedundancyProbe left.")
    check_provenance(saved["provenance"], provenance_of_probes(model))
    refitted = checkpoint["state_dict"]["grid.is_refitted"] or not model.refit
    if model.trainer.state.fn in ("test", "predict") and not refitted:
        raise MisconfigurationException(
            "The checkpoint is of a fit that did not come to its refit; go on with fit and --ckpt_path last first."
        )
    losses = list(saved["train_losses"])
    if model.trainer.state.fn == "fit":
        check_provenance(saved["training"], provenance_of_training(model))
        wanted, done = model.trainer.max_epochs or 0, len(losses)
        if 0 < wanted < done:
            raise MisconfigurationException(
                f"trainer.max_epochs is {wanted}, but the checkpoint has gone through {done}; give {done} or more."
            )
    return losses


def provenance_of_probes(model: RedundancyProbe) -> dict[str, Any]:
    """Return what the probes of a model depend on, in plain types."""
    asked = [probe for probe in model.probes if probe.selection != FULL]
    backbone = model.stream.extractor.provenance()
    return {
        "task": model.task.label,
        **model.target.provenance(),
        "backbone": model.backbone.label,
        "layer": ", ".join(model.widths),
        "weights": backbone["weights"],
        "preprocessing": str(backbone["preprocessing"]),
        "data.view": model.task.view,
        "selection": model.plan.selections,
        "bits": model.plan.bits,
        "fractions": sorted({probe.fraction for probe in asked}),
        "seeds": sorted({probe.seed for probe in asked}),
        "probes": [list(probe) for probe in model.probes],
        **model.solver.provenance(),
        "standardise": model.stream.standardise,
        "refit": model.refit,
    }


def provenance_of_training(model: RedundancyProbe) -> dict[str, Any]:
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


def check_provenance(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a checkpoint that depends on something else than the run at hand; name the first difference."""
    for what, value in ours.items():
        if saved.get(what) != value:
            there, here = (textwrap.shorten(str(each), 80, placeholder="...") for each in (saved.get(what), value))
            raise MisconfigurationException(
                f"The checkpoint does not belong here: its {what} is {there}, not {here}; take the configuration of "
                f"its own run."
            )
