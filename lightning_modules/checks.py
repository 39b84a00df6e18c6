"""What a Trainer must be for counts to be exact and probes to be independent, and what must fit into memory."""

import difflib
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.subsets.plan import Probe, mean_by_fraction, probe_groups
from lightning_modules.subsets.selections import OFFERED, SELECTIONS


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


def views(features: str | int, vectors: bool, refit: bool, linear: bool) -> None:
    """Refuse views of the training images that there cannot be, or that a refit or a vote of neighbours cannot use."""
    if isinstance(features, int) and features < 1:
        raise MisconfigurationException(
            f"model.features is {features}; it must be clean, off or a number of augmented views from 1."
        )
    if features != "clean" and (vectors or refit or not linear):
        reason = "vectors have no views" if vectors else "model.refit trains on the clean view"
        reason = reason if linear else "neighbours are looked for in the clean view"
        raise MisconfigurationException(f"model.features is {features}, but {reason}; leave it clean.")


def task(task: Any, backbone: bool, features: str | int, measures: Sequence[Any]) -> None:
    """Refuse images without a backbone, vectors with it, and images that are streamed to what sees them once more."""
    if not (backbone or task.vectors):
        raise MisconfigurationException("model.backbone is null, but the task holds images; name a backbone.")
    if backbone and task.vectors:
        raise MisconfigurationException("The task holds vectors, which no backbone takes; set model.backbone null.")
    again = [f"{type(each).__name__} in model.measures" for each in measures if each.needs_images]
    again = [f"model.features {features}"] * (features != "clean") + again
    if task.streaming and again:
        raise MisconfigurationException(
            f"data.streaming is true, but {again[0]} visits images more than once; set it false, or leave that out."
        )


def selections(names: Sequence[str], target: Any) -> None:
    """Refuse a selection that is fitted to classes, or to any labels, where the task has none."""
    unmet = [what for what, there in (("classes", target.classes), ("labels", target.outputs)) if not there]
    for name in names:
        if needs := next((what for what in unmet if getattr(SELECTIONS[name], what)), None):
            others = [each for each in OFFERED if not any(getattr(SELECTIONS[each], what) for what in unmet)]
            raise MisconfigurationException(
                f"model.selection has {name!r}, which needs {needs}, but the task has {target.describe()}; take of "
                f"{', '.join(others)}."
            )


def schedule(trainer: Trainer, steps: int, refit: bool) -> None:
    """Refuse a fit that would make no step, or keep or refit no probe, at this many steps an epoch."""
    plain = {"max_steps": -1, "accumulate_grad_batches": 1, "gradient_clip_val": None}
    others = [name for name, value in plain.items() if refit and getattr(trainer, name) != value]
    if others:
        raise MisconfigurationException(
            f"trainer.{others[0]} is {getattr(trainer, others[0])}, but model.refit repeats plain steps up to "
            f"trainer.max_epochs; leave it out."
        )
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    ends = any(isinstance(callback, Timer | EarlyStopping) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if refit and (ends or trainer.max_epochs == -1):
        raise MisconfigurationException(
            "model.refit trains again after the last of trainer.max_epochs; give a number of them, and leave max_time "
            "and early stopping out."
        )
    if trainer.max_epochs == trainer.max_steps == -1 and not ends:
        raise MisconfigurationException(
            "trainer.max_epochs is -1, and nothing else ends the fit; give a number, max_steps or max_time."
        )
    for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
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


def monitors(trainer: Trainer, logged: Sequence[str], probes: Sequence[Probe] = ()) -> None:
    """Refuse a callback that waits for a metric that is not logged, unless one's own callbacks may log it.

    What is logged, or, where it is logged of probes, how its name begins.
    """
    names = [key for each in logged for key in mean_by_fraction(probes, [0.0] * len(probes), each)] or list(logged)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks if all(type(each).__module__.startswith("lightning") for each in callbacks) else ():
        monitor = getattr(callback, "monitor", None)
        if monitor not in (None, "epoch", "step", *names) and getattr(callback, "strict", True):
            near = difflib.get_close_matches(str(monitor), names, n=3, cutoff=0)
            raise MisconfigurationException(
                f"{type(callback).__name__}'s monitor is {monitor!r}, which is not logged; near it are "
                f"{', '.join(near)}."
            )


def free_memory() -> int:
    """Return the bytes that are free, on the GPU where there is one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def memory(model: Any, outputs: int, candidates: int) -> None:
    """Refuse a `RedundancyProbe` whose bank, in so many copies, or second moments do not fit into memory."""
    probes, solver = model.probes, model.solver
    parameters = sum((probe.neurons + 1) * outputs for probe in probes) * candidates
    factors = solver.factors * sum(group.sizes[-1] ** 2 for alike in probe_groups(probes) for group in alike)
    # With gradient, momentum and the weights that are kept, of which a refit has its own, and what the solver needs.
    needed = 4 * (parameters * (4 * (1 + model.refit) + solver.copies) + factors)
    available = free_memory()
    if needed > available:
        raise MisconfigurationException(
            f"The bank needs {needed / 1e9:,.1f} GB of memory ({len(probes)} probes x {candidates} candidates, "
            f"{outputs} outputs: {parameters:,} weights, with what {solver.name} works with), and "
            f"{available / 1e9:,.1f} GB are free; use fewer fractions, seeds or candidates."
        )
    squared = model.coordinates.fitted or any(part.second_moments for part in (solver, *model.measures))
    widths = (model.coordinates.source_widths if solver.second_moments else model.widths) if squared else {}
    moments = sum(4 * 8 * width**2 for width in widths.values())  # of train and validation, and as much to work with
    if moments > available:
        raise MisconfigurationException(
            f"The second moments of {sum(widths.values()):,} neurons need {moments / 1e9:,.1f} GB of memory, and "
            f"{available / 1e9:,.1f} GB are free; set model.measures [Inequality] and model.solver SGD, or read fewer "
            f"neurons."
        )
