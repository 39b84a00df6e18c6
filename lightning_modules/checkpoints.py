"""When and how the state of a run is written: often enough to lose little, seldom enough to cost little, atomically."""

import io
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.backbones import weights
from lightning_modules.files import atomic, remove_unfinished, writing

FORMAT = 1
"""Number of the layout of checkpoints; to be raised where an older one can no longer be read."""
PAUSE = 5.0
"""Seconds between two writes, at least."""
SHARE = 0.05
"""Share of the time that may go into writing."""


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
