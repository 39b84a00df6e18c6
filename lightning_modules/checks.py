"""What a run of probes can be: checked before long work starts, and answered in one line where it cannot."""

import math
from collections.abc import Sequence

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def trainer(trainer: Trainer) -> None:
    """Refuse a Trainer with which counts would not be exact, or probes would feel each other."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"trainer.strategy is {type(trainer.strategy).__name__}; probes train on a single device or with ddp."
        )
    for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "limit_train_batches"):
        limit = getattr(trainer, name)
        if isinstance(limit, int) or limit != 1:  # Lightning's 1.0 is all batches, its 1 is one
            raise MisconfigurationException(
                f"trainer.{name} is {limit}, but every image is counted; leave it, overfit_batches and "
                f"fast_dev_run out (debug.yaml is a short run)."
            )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        raise MisconfigurationException(
            "trainer.gradient_clip_val clips the norm over all probes together, so that each would feel the "
            "others; leave it null."
        )
    if str(trainer.precision) not in ("32-true", "16-mixed", "bf16-mixed", "64-true"):
        raise MisconfigurationException(
            f"trainer.precision is {trainer.precision}, which would round the probes; use 32-true, 16-mixed "
            f"or bf16-mixed."
        )


def schedule(trainer: Trainer, steps: int) -> None:
    """Refuse a fit that would make no step, or keep no probe, at this many steps an epoch."""
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if trainer.max_epochs == trainer.max_steps == -1 and not any(
        isinstance(callback, Timer | EarlyStopping)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    ):
        raise MisconfigurationException(
            "trainer.max_epochs is -1, and nothing else ends the fit; give a number, max_steps or max_time."
        )
    counts = ("max_epochs", "max_steps", "accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
    for name in counts:
        value = getattr(trainer, name)
        if isinstance(value, int | float) and (value == 0 or (value < 0 and not name.startswith("max_"))):
            raise MisconfigurationException(f"trainer.{name} is {value}; it must be above 0.")
    if 0 < (trainer.max_epochs or 0) < (every or 1):
        raise MisconfigurationException(
            f"trainer.check_val_every_n_epoch is {every}, beyond the {trainer.max_epochs} epochs of "
            f"trainer.max_epochs; a probe is kept when it is validated."
        )
    if every and isinstance(interval, int) and interval > steps:
        raise MisconfigurationException(
            f"trainer.val_check_interval is {interval}, beyond the {steps} steps of an epoch; a probe is kept when "
            f"it is validated."
        )


def optimisation(candidates: Sequence[tuple[float, float]], momentum: float, step_size: int, gamma: float) -> None:
    """Refuse what SGD cannot be."""
    if len(set(candidates)) < len(candidates):
        twice = next(candidate for candidate in candidates if candidates.count(candidate) > 1)
        raise MisconfigurationException(
            f"model.learning_rate {twice[0]:g} with model.weight_decay {twice[1]:g} is listed twice; give each once."
        )
    if not candidates:
        raise MisconfigurationException("model.learning_rate and model.weight_decay need at least one value each.")
    for name, value, holds, right in (
        *(("learning_rate", rate, rate > 0, "above 0") for rate, _ in candidates),
        *(("weight_decay", decay, decay >= 0, "0 or more") for _, decay in candidates),
        ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
        ("step_size", step_size, step_size >= 1, "at least 1"),
        ("gamma", gamma, 0 < gamma <= 1, "above 0, at most 1"),
    ):
        if not (holds and math.isfinite(value)):
            raise MisconfigurationException(f"model.{name} is {value:g}; it must be {right}.")


def penalties(penalties: Sequence[float]) -> None:
    """Refuse penalties that ridge cannot have."""
    if not penalties:
        raise MisconfigurationException("model.penalty needs at least one value.")
    for penalty in penalties:
        if not (penalty >= 0 and math.isfinite(penalty)):
            raise MisconfigurationException(f"model.penalty is {penalty:g}; it must be 0 or more.")


def memory(parameters: int, candidates: int, probes: int, classes: int, widths: dict[str, int]) -> None:
    """Refuse what cannot fit.

    Args:
        parameters: Of a bank: weights, gradients, momentum and kept weights take four bytes each.
        candidates: Number of banks.
        probes: Number of probes.
        classes: Number of classes.
        widths: D of each layer whose second moments are summed, at eight bytes each and as much again to work with.
    """
    needed = 4 * 4 * parameters * candidates
    available = psutil.virtual_memory().available
    if torch.cuda.is_available():
        available = torch.cuda.mem_get_info()[0]
    if needed > available:
        raise MisconfigurationException(
            f"The bank needs {needed / 1e9:,.1f} GB of memory ({probes} probes x {candidates} candidates, {classes} "
            f"classes: {parameters * candidates:,} weights, with gradient, momentum and best), and "
            f"{available / 1e9:,.1f} GB are free; use fewer fractions, seeds or candidates."
        )
    squares = sum(4 * 8 * width**2 for width in widths.values())
    if squares > available:
        raise MisconfigurationException(
            f"The second moments of {sum(widths.values()):,} neurons need {squares / 1e9:,.1f} GB of memory, and "
            f"{available / 1e9:,.1f} GB are free; set model.similarity false and model.solver sgd, or read less."
        )
