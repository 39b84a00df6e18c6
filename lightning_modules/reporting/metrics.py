"""Metrics in loggers, beside what Lightning does."""

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule


def log(module: LightningModule, values: Mapping[str, float]) -> None:
    """Log single numbers that all processes share, at the end of an epoch, and let callbacks see them."""
    trainer = module.trainer
    if trainer.state.fn != "fit":
        module.log_dict(dict(values), rank_zero_only=True)
        return
    # Twice in every epoch, log_dict would take a tenth of the training's time to handle single numbers.
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": module.current_epoch, **values}, module.global_step)
        logger.save()
