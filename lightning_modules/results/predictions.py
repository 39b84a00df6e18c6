"""What every probe decides for every image of a split: predictions.csv."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lightning_modules.subsets.plan import Probe


class Predictions:
    """Collects decisions of several processes.

    Args:
        probes: The P probes.
        images: The n images, with names and labels.
        target: What is predicted, see `datamodules.targets.Target`.
        device: Where decisions are computed.
    """

    def __init__(self, probes: Sequence[Probe], images: Any, target: Any, device: torch.device) -> None:
        self.probes = probes
        self.images = images
        self.target = target
        self.decisions = torch.zeros((len(probes), len(images)), dtype=torch.int64, device=device)

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Note what the probes decide, from logits of shape (P, C, B), for the images at `indices`, shape (B,)."""
        self.decisions[:, indices] = self.target.decide(logits)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the shares of all processes: each has zeros where the others have decisions."""
        self.decisions = total(self.decisions)

    def table(self) -> pd.DataFrame:
        """Return one row per image: its name, its label, and what each probe decides.

        A probe's column is `<selection>/<fraction>/<seed>`, after its layer where there are several.
        """
        several = len({probe.layer for probe in self.probes}) > 1
        columns = {"image": [self.images.name(index) for index in range(len(self.images))]}
        columns["label"] = self.target.name(self.images.labels)
        for probe, decisions in zip(self.probes, self.decisions, strict=True):
            layer = f"{probe.layer}/" if several else ""
            columns[f"{layer}{probe.selection}/{probe.fraction:g}/{probe.seed}"] = self.target.name(decisions)
        return pd.DataFrame(columns)
