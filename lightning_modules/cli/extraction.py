"""The verb `extract`: the features that a fit would train on, made by as many processes as there are."""

import contextlib
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules import RedundancyProbe


class Extracted(BaseException):
    """Ends a fit where its first step would follow."""


class ExtractingTrainer(Trainer):
    """A Trainer with one verb more."""

    def extract(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Extract the features that a fit trains on, along with other processes that do the same, and end.

        Raises:
            MisconfigurationException: If the fit would extract none.
        """

        def extract(trainer: Trainer, _: LightningModule) -> None:
            task: Any = datamodule
            if not isinstance(model, RedundancyProbe) or model.features == "off" or task.vectors:
                why = "data hold vectors" if getattr(task, "vectors", False) else "model.features is off"
                why = why if isinstance(model, RedundancyProbe) else f"model is {type(model).__name__}"
                raise MisconfigurationException(f"There is nothing to extract: {why}.")
            for split in ("train", "val", "test"):
                task.features(split)
            raise Extracted

        self.callbacks.insert(0, LambdaCallback(on_fit_start=extract))  # type: ignore[attr-defined]
        with contextlib.suppress(Extracted):
            self.fit(model, datamodule=datamodule)
