"""What a run will do, as resolved from configurations, flags and defaults: a short block before long work starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class Summary(Callback):
    """Says once what a run will do; Lightning calls it when the data are there, and no image was extracted yet.

    Args:
        folder: The run's folder.
        imported: Import paths, outside of the project, of what was loaded for this run.
    """

    def __init__(self, folder: Path, imported: list[str]) -> None:
        self.folder = folder
        self.imported = imported
        self._said = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log a line for each part of the run."""
        if self._said:
            return
        self._said = True
        task: Any = trainer.datamodule  # type: ignore[attr-defined]
        lines = {"task": task.describe(), **pl_module.describe(task)}  # type: ignore[operator]
        if self.imported:
            lines["own code"] = ", ".join(self.imported)
        lines["folder"] = str(self.folder)
        wide = max(map(len, lines))
        for name, value in lines.items():
            rank_zero_info(f"{name:<{wide}}  {value}")


def imported(settings: Any, packages: set[str]) -> Iterator[str]:
    """Yield the import paths of classes that settings name, but for those of these packages."""
    if isinstance(settings, Namespace | dict):
        found = settings.get("class_path")
        if isinstance(found, str) and found.partition(".")[0] not in packages:
            yield found
        for value in vars(settings).values() if isinstance(settings, Namespace) else settings.values():
            yield from imported(value, packages)
    elif isinstance(settings, list):
        for value in settings:
            yield from imported(value, packages)
