"""The LightningModule that makes backbones: trains a timm model on a task and writes its weights."""

from pathlib import Path
from typing import Any

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
from lightning_modules.backbones import build, weights
from lightning_modules.checkpoints import check_provenance
from lightning_modules.files import atomic, writing
from lightning_modules.objectives import CrossEntropy, Objective


class Pretraining(LightningModule):
    """Trains a timm model from scratch on a task and writes its weights, without the classifier, as safetensors.

    Args:
        name: A timm architecture.
        output: The file to write.
        kwargs: Passed on to the model's constructor.
        pretrained_cfg_overlay: Preprocessing, where it differs from the architecture's default.
        objective: The loss: `CrossEntropy` (or null), or the import path of a subclass of `Objective` of your own.
        learning_rate: Largest learning rate of AdamW; warm-up over the first tenth of the steps, then cosine to zero.
        weight_decay: Of AdamW.

    Raises:
        MisconfigurationException: If timm has no such model, or the overlay is out of range.
    """

    def __init__(
        self,
        name: str,
        output: str,
        kwargs: dict[str, Any] | None = None,
        pretrained_cfg_overlay: build.PretrainedCfgOverlay = build.PretrainedCfgOverlay(),  # noqa: B008 (frozen)
        objective: Objective | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        if not timm.is_model(name.partition(".")[0]):
            raise MisconfigurationException(f"model.name is {name!r}; timm has no such architecture.")
        self.name = name
        self.output = Path(output)
        self.kwargs = kwargs or {}
        self.overlay = pretrained_cfg_overlay
        self.preprocessing = build.timm_preprocessing(name, pretrained_cfg_overlay, self.kwargs)
        self.objective: Objective = CrossEntropy() if objective is None else objective
        self.objective_settings = repr(self.objective)  # taken before `setup`, which may add modules
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.network: Any = None

    @property
    def label(self) -> str:
        """What a run of this model is called by default, after its task."""
        return f"{self.name}_pretraining"

    def describe(self, task: Any) -> dict[str, str]:
        """Return what a run with this task will do, part by part."""
        return {
            "network": f"{build.as_call(self.name, self.kwargs)}, {build.describe_preprocessing(self.preprocessing)}",
            "objective": self.objective_settings,
            "optimiser": f"AdamW, learning rate up to {self.learning_rate:g} (warm-up, then cosine), weight decay "
            f"{self.weight_decay:g}, batches of {task.batch_size:,}",
            "output": str(self.output),
        }

    def setup(self, stage: str) -> None:
        """Build the network for the task's target, the first time."""
        if stage == "fit":
            checks.monitors(self.trainer, ["val/accuracy"])
        if self.network is None:
            target = self.trainer.datamodule.target  # type: ignore[attr-defined]
            self.network, _, self.classifier = build.build(self.name, False, self.kwargs, self.overlay, target.outputs)
            self.objective.setup(self.network, target)
            self.accuracy = MulticlassAccuracy(target.outputs, average="micro")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a linear warm-up and a cosine decay over the whole fit."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return this process' share of the objective's mean over the batch of all processes."""
        summed = self.objective(self.network, batch.inputs, batch.labels)
        return summed * (self.trainer.world_size / batch.total)  # DDP averages gradients over processes

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the images that are classified correctly, of the validation or the test split."""
        self.accuracy.update(self.network(batch.inputs), batch.labels)
        split = "test" if self.trainer.testing else "val"
        self.log(f"{split}/accuracy", self.accuracy, on_epoch=True, prog_bar=True, batch_size=batch.total)

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
            "preprocessing": build.describe_preprocessing(self.preprocessing),
            "classes": list(task.target.classes),
            "objective": self.objective_settings,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "data.batch_size": task.batch_size,
            "data.seed": task.seed,
            "data.view": task.view,
            "trainer.max_epochs": self.trainer.max_epochs,  # the schedule spans them
        }

    def on_fit_end(self) -> None:
        """Write the weights, without the classifier, for `model.backbone.weights` to name."""
        if not self.trainer.is_global_zero:
            return
        state = weights.without(self.network.state_dict(), self.classifier or [])
        state = {name: value.cpu().contiguous() for name, value in state.items()}
        with writing(self.output, "set --model.output"):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.output) as file:
                file.write_bytes(save(state, {"architecture": self.name}))
        rank_zero_info(f"Weights of {self.name} ({self.output.stat().st_size:,} bytes) written to {self.output}.")
