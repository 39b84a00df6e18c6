"""How far long work is: a bar in a terminal, and a few lines where nobody watches."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

PAUSE = 60.0
"""Seconds between two lines, at least; there are no more than ten of them, where it is known how long the work is."""


class Progress(tqdm):
    """A bar where standard error is a terminal, else a line now and then.

    Args:
        total: How much there is to do; null is not known.
        desc: What is done.
        unit: Of what.
        shown: Whether to show anything: the first of several processes does.
        initial: How much was done before.
        iterable: What there is to do, for use in a loop.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        unit: str,
        shown: bool = True,
        initial: int = 0,
        iterable: Iterable[Any] | None = None,
    ) -> None:
        disable = None if shown else True
        super().__init__(iterable, total=total, desc=desc, unit=unit, initial=initial, disable=disable)
        self.is_told = shown and self.disable
        self.words = desc, unit
        self.done = self.told = initial
        self.began = self.told_at = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        """Yield what there is to do, and go on by one for each."""
        for each in self.iterable:
            yield each
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Go on by `n` units."""
        self.done += int(n or 0)
        now = time.monotonic()
        if self.is_told and now - self.told_at >= PAUSE and 10 * (self.done - self.told) >= (self.total or 0):
            what, unit = self.words
            of = f" of {self.total:,}" if self.total else ""
            rank_zero_info(f"{what}: {self.done:,}{of} {unit}s after {self.format_interval(now - self.began)}.")
            self.told, self.told_at = self.done, now
        return super().update(n)


class FitProgress(ProgressBar):
    """One progress for all epochs of a fit, in place of Lightning's for each epoch and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.enable()
        self.bar = Progress(None, "", "", shown=False)

    def enable(self) -> None:
        """Show it."""
        self.shown = True

    def disable(self) -> None:
        """Hide it."""
        self.shown = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the steps that were done before, where the fit is resumed."""
        steps = trainer.estimated_stepping_batches
        total = int(steps) if steps != float("inf") else None
        self.bar = Progress(total, "Training", "step", self.shown, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Go on by the steps of the optimiser."""
        self.bar.update(trainer.global_step - self.bar.done)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the model logs for it."""
        self.bar.set_postfix({name: float(value) for name, value in trainer.progress_bar_metrics.items()})

    def on_train_end(self, *_: Any) -> None:
        """End the bar's line."""
        self.bar.close()

    def on_exception(self, *_: Any) -> None:
        """End the bar's line, as what went wrong has its own."""
        self.bar.close()
