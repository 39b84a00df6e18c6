"""When and how the state of a run is written: often enough to lose little, seldom enough to cost little, and whole."""

import io
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.files import sweep, whole

PAUSE = 5.0
"""Seconds between two writes, at least."""
SHARE = 0.05
"""Share of the time that may go into writing."""


def check_belonging(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint that rests on something else than the run at hand.

    Args:
        theirs: What the checkpoint says of itself.
        mine: What it would have to say.

    Raises:
        MisconfigurationException: If they differ; the message names the first difference.
    """
    for what, value in mine.items():
        if theirs.get(what) != value:
            raise MisconfigurationException(
                f"The checkpoint does not belong here: its {what} is {_short(theirs.get(what))}, not {_short(value)}; "
                f"take the configuration of its own run."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Checkpoints(Checkpoint):
    """Writes the state of a fit at the end of the first epoch, of later ones as `PAUSE` and `SHARE` allow, and last.

    Args:
        path: The one file that is written.
    """

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


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and renames: Lightning's own way goes through another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            MisconfigurationException: If the disk does not take it; the checkpoint before it stays.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            with whole(path) as file:
                file.write_bytes(content.getbuffer())
        except OSError as error:
            raise MisconfigurationException(
                f"The checkpoint {path} cannot be written ({error.strerror or error}); make room, and go on with "
                f"--ckpt_path last."
            ) from error
