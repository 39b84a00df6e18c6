"""The LightningModule that trains a timm model on a task as a whole, also further, and writes its weights."""

import json
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules import checks
from lightning_modules.backbones import build
from lightning_modules.backbones import weights as weight_files
from lightning_modules.checkpoints import check_provenance
from lightning_modules.files import atomic, writing
from lightning_modules.objectives import CrossEntropy, Objective
from lightning_modules.subsets.selections import FULL


class Pretraining(LightningModule):
    """Trains a timm model on a task and writes its weights, without the classifier, as safetensors.

    Args:
        name: A timm architecture; null where a file of `weights` that was made here says it.
        output: The file to write.
        kwargs: Passed on to the model's constructor.
        pretrained_cfg_overlay: Preprocessing, where it differs from the architecture's default.
        objective: The loss: a class of `objectives.py`, `CrossEntropy` where null, or the import path of a subclass of
            `Objective` of your own.
        learning_rate: Largest learning rate, after the warm-up; from there it falls as a cosine to zero.
        weight_decay: Of the optimiser.
        optimizer: `AdamW` or `SGD`.
        momentum: Of SGD.
        warmup_steps: Steps of the warm-up; null is a tenth of all.
        weights: What the training starts from: `random`, or for full fine-tuning `pretrained`, those of timm, or a
            file, as `model.backbone.weights` takes it. The classifier is always new.

    Raises:
        MisconfigurationException: If timm has no such model, weights are absent or do not fit, or a value is out of
            range.
    """

    def __init__(
        self,
        name: str | None = None,
        output: str = "pretrained.safetensors",
        kwargs: dict[str, Any] | None = None,
        pretrained_cfg_overlay: build.PretrainedCfgOverlay = build.PretrainedCfgOverlay(),  # noqa: B008 (frozen)
        objective: Objective | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        optimizer: Literal["AdamW", "SGD"] = "AdamW",
        momentum: float = 0.9,
        warmup_steps: int | None = None,
        weights: str = "random",
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise MisconfigurationException(f"model.momentum is {momentum:g}; it must be from 0 to below 1.")
        if warmup_steps is not None and warmup_steps < 0:
            raise MisconfigurationException(f"model.warmup_steps is {warmup_steps}; it must be 0 or more.")
        self.weights = weights
        self.file = None if weights in ("pretrained", "random") else weight_files.find(weights)
        made = weight_files.made(self.file) if self.file else {}
        self.name, self.kwargs, self.overlay = build.completed(
            name, kwargs, pretrained_cfg_overlay, weights, made, "model"
        )
        if not timm.is_model(self.name.partition(".")[0]):
            raise MisconfigurationException(f"model.name is {self.name!r}; timm has no such architecture.")
        self.output = Path(output)
        self.preprocessing = build.timm_preprocessing(self.name, self.overlay, self.kwargs)
        self.objective: Objective = CrossEntropy() if objective is None else objective
        self.objective_settings = repr(self.objective)  # taken before `setup`, which may add modules
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.network: Any = None

    @property
    def label(self) -> str:
        """What results call the network, and a run of it by default after its task: the file that it writes."""
        return self.output.stem

    def describe(self, task: Any) -> dict[str, str]:
        """Return what a run with this task will do, part by part."""
        named = "AdamW" if self.optimizer == "AdamW" else f"SGD, momentum {self.momentum:g}"
        warmup = "warm-up" if self.warmup_steps is None else f"warm-up of {self.warmup_steps:,} steps"
        return {
            "network": f"{build.as_call(self.name, self.kwargs)}, {self.weights} weights, "
            f"{build.describe_preprocessing(self.preprocessing)}",
            "objective": self.objective_settings,
            "optimiser": f"{named}, learning rate up to {self.learning_rate:g} ({warmup}, then cosine), weight decay "
            f"{self.weight_decay:g}, batches of {task.batch_size:,}",
            "output": str(self.output),
        }

    def setup(self, stage: str) -> None:
        """Build the network for the task's target, the first time."""
        if stage == "fit":
            checks.monitors(
                self.trainer, ["val/accuracy", *["val/robust_accuracy"] * hasattr(self.objective, "attack")]
            )
        if self.network is None:
            task = self.trainer.datamodule  # type: ignore[attr-defined]
            target = task.target
            if task.streaming:
                raise MisconfigurationException(
                    "data.streaming is true, but pre-training visits images in every epoch; set it false."
                )
            if task.vectors or target.metric != "accuracy":
                raise MisconfigurationException(
                    f"Pre-training needs images of one class each, which {task.label} has not."
                )
            self.network, _, self.classifier = build.build(
                self.name, self.weights == "pretrained", self.kwargs, self.overlay, target.outputs
            )
            if self.file:
                weight_files.load(self.network, self.file, self.classifier or [])
            normalisation = {key: self.preprocessing[key] for key in ("mean", "std")}  # of grey images, too
            self.network.pretrained_cfg = self.network.pretrained_cfg | normalisation
            self.objective.setup(self.network, target)
            self.accuracy = MulticlassAccuracy(target.outputs, average="micro")
            self.robust_accuracy = MulticlassAccuracy(target.outputs, average="micro")
            self.seed = torch.initial_seed()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser, with a warm-up and a cosine decay over the whole fit."""
        rate, decay, steps = self.learning_rate, self.weight_decay, int(self.trainer.estimated_stepping_batches)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), rate, weight_decay=decay)
        if self.optimizer == "SGD":
            optimizer = torch.optim.SGD(self.parameters(), rate, self.momentum, weight_decay=decay)
        share = 0.1 if self.warmup_steps is None else self.warmup_steps / steps
        if share >= 1:
            raise MisconfigurationException(
                f"model.warmup_steps is {self.warmup_steps}; it must be below {steps}, the steps of the whole fit."
            )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps, pct_start=share, cycle_momentum=self.optimizer == "AdamW"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return this process' share of the objective's mean over the batch of all processes."""
        # Dropout and random starts draw what they would have drawn, also where a training goes on after it was killed.
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx, self.global_rank)))
        summed = self.objective(self.network, batch.inputs, batch.labels)
        return summed * (self.trainer.world_size / batch.total)  # DDP averages gradients over processes

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the images of the validation or the test split that are classified correctly, attacked ones too."""
        split = "test" if self.trainer.testing else "val"
        measured = {"accuracy": (self.accuracy, batch.inputs)}
        attack: Any = getattr(self.objective, "attack", None)
        if attack:
            measured["robust_accuracy"] = (self.robust_accuracy, attack(self.network, batch.inputs, batch.labels))
        for name, (accuracy, images) in measured.items():
            accuracy.update(self.network(images), batch.labels)
            self.log(f"{split}/{name}", accuracy, on_epoch=True, prog_bar=True, batch_size=batch.total)

    test_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the training depends on."""
        checkpoint["pretraining"] = self._provenance()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a training that depends on something else; the message names it."""
        if "pretraining" not in checkpoint:
            raise MisconfigurationException("The checkpoint is not one of Pretraining; name one that its fit left.")
        check_provenance(checkpoint["pretraining"], self._provenance())

    def _provenance(self) -> dict[str, Any]:
        task = self.trainer.datamodule  # type: ignore[attr-defined]
        return {
            "architecture": build.as_call(self.name, self.kwargs),
            "weights": self.weights,
            "preprocessing": build.describe_preprocessing(self.preprocessing),
            "classes": list(task.target.classes),
            "objective": self.objective_settings,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "optimizer": self.optimizer,
            "momentum": self.momentum,
            "warmup_steps": self.warmup_steps,
            "data.batch_size": task.batch_size,
            "data.seed": task.seed,
            "data.view": task.view,
            "trainer.max_epochs": self.trainer.max_epochs,  # the schedule spans them
        }

    def on_fit_end(self) -> None:
        """Write the weights, without the classifier, and what made them, for `model.backbone.weights` to name."""
        if not self.trainer.is_global_zero:
            return
        state = weight_files.without(self.network.state_dict(), self.classifier or [])
        state = {name: value.cpu().contiguous() for name, value in state.items()}
        with writing(self.output, "set --model.output"):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.output) as file:
                file.write_bytes(save(state, {weight_files.MADE: json.dumps(self._made(), default=str)}))
        rank_zero_info(f"Weights of {self.name} ({self.output.stat().st_size:,} bytes) written to {self.output}.")

    def _made(self) -> dict[str, Any]:
        """Return what the weights are of and what made them; accuracies are those of the last validation."""
        task = self.trainer.datamodule  # type: ignore[attr-defined]
        described = self.describe(task)
        found = {name: float(value) for name, value in self.trainer.callback_metrics.items() if "accuracy" in name}
        return {
            "architecture": self.name,
            "kwargs": self.kwargs,
            "weights": self.weights,
            "preprocessing": {key: self.preprocessing[key] for key in vars(self.overlay)},
            "objective": described["objective"],
            "optimiser": described["optimiser"],
            "data": task.describe(),
            "classes": list(task.target.classes),
            "epochs": self.trainer.current_epoch,
            **found,
        }

    def results(self, evaluated: dict[str, float]) -> pd.DataFrame:
        """Return a row for validation and for test as in results.csv, from what both logged; subsets it has none."""
        task = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = []
        for split in ("val", "test"):
            images = len(task.images[split])
            found = {key.partition("/")[2]: value for key, value in evaluated.items() if key.startswith(f"{split}/")}
            row = {"task": task.label, "backbone": self.label, "selection": FULL, "fraction": 1.0, "seed": self.seed}
            row |= {"split": split, "images": images, "view": task.view, "epoch": self.trainer.current_epoch}
            rows.append(row | {key: round(value * images) / images for key, value in found.items()})
        return pd.DataFrame(rows)
