"""The LightningModule that makes backbones: an ordinary supervised classifier, saved for others to freeze."""

from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.backbones import weights
from lightning_modules.backbones.frozen import PretrainedCfgOverlay, is_timm_model
from lightning_modules.checkpoints import check_belonging
from lightning_modules.files import whole


class Pretraining(LightningModule):
    """Trains a timm model from scratch on a task and writes its weights as safetensors.

    Args:
        name: A timm architecture.
        output: The file to write.
        num_classes: Number of classes; taken from the task.
        kwargs: Passed on to the model's constructor.
        pretrained_cfg_overlay: Preprocessing, where it differs from the architecture's default.
        learning_rate: Largest rate of AdamW; warmed up over the first tenth of the steps, then a cosine to zero.
        weight_decay: Of AdamW.
        label_smoothing: Of the cross-entropy.

    Raises:
        MisconfigurationException: If timm has no such model.
    """

    def __init__(
        self,
        name: str,
        output: str,
        num_classes: int,
        kwargs: dict[str, Any] | None = None,
        pretrained_cfg_overlay: PretrainedCfgOverlay = PretrainedCfgOverlay(),  # noqa: B008 (frozen)
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not is_timm_model(name):
            raise MisconfigurationException(f"model.name is {name!r}; timm has no such architecture.")
        self.name = name
        self.output = Path(output)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.network: Any = timm.create_model(
            name, num_classes=num_classes, pretrained_cfg_overlay=pretrained_cfg_overlay.given() or None, **kwargs or {}
        )
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the network wants of an image (timm's data configuration)."""
        return resolve_model_data_config(self.network)

    @property
    def label(self) -> str:
        """What a run of this model is called by default, after its task."""
        return f"{self.name}_pretraining"

    def setup(self, stage: str) -> None:
        """Refuse a checkpoint that cannot be read before Lightning does, in one line."""
        if self.trainer.ckpt_path:
            weights.read_torch(Path(self.trainer.ckpt_path), "checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the training rests on."""
        checkpoint["pretraining"] = self._training()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a training as it was not begun.

        Raises:
            MisconfigurationException: If the checkpoint is of another; the message says where.
        """
        check_belonging(checkpoint.get("pretraining", {}), self._training())

    def _training(self) -> dict[str, Any]:
        task = self.trainer.datamodule  # type: ignore[attr-defined]
        return {
            "architecture": self.name,
            "classes": list(task.classes),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "label_smoothing": self.label_smoothing,
            "data.batch_size": task.batch_size,
            "data.seed": task.seed,
            "trainer.max_epochs": self.trainer.max_epochs,  # the schedule spans them
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a linear warm-up and a cosine decay over the whole fit."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return this process' share of the batch's mean cross-entropy."""
        logits = self.network(batch.inputs)
        summed = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing, reduction="sum")
        return summed * (self.trainer.world_size / batch.total)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the validation images."""
        self._score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the test images."""
        self._score(batch, "test")

    def _score(self, batch: Any, split: str) -> None:
        self.accuracy.update(self.network(batch.inputs), batch.labels)
        self.log(f"{split}/accuracy", self.accuracy, on_epoch=True, prog_bar=True, batch_size=batch.total)

    def on_fit_end(self) -> None:
        """Write the weights, without the classifier, for `model.backbone.weights` to name."""
        if not self.trainer.is_global_zero:
            return
        classifier = self.network.pretrained_cfg["classifier"]
        state = {
            key: value.detach().cpu().contiguous()
            for key, value in self.network.state_dict().items()
            if not key.startswith(classifier)
        }
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with whole(self.output) as file:
                save_file(state, file, {"architecture": self.name})
        except (OSError, SafetensorError) as error:
            raise MisconfigurationException(
                f"The weights cannot be written to {self.output} ({error}); set --model.output."
            ) from error
        rank_zero_info(f"Weights of {self.name} ({self.output.stat().st_size:,} bytes) written to {self.output}.")
