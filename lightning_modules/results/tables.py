"""The tables of a run: their columns, and how they come from what measures computed and probes decided."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lightning_modules.subsets.plan import Probe, series, stored_bytes

PER_IMAGE_FILE = "per_image.safetensors"
PER_IMAGE = "per_image"  # the name under which a measure gives the headline metric of every image, shape (P, n)


class Column(NamedTuple):
    """A column of results.csv: one value per probe and split."""

    name: str
    label: str = ""  # for tables and pictures; empty for what stands in results.csv alone
    unit: str = ""  # `%` for shares and `points` for differences of shares; both are shown times 100
    digits: int = 3  # decimals shown
    logged: bool = False  # whether its mean over seeds is logged as <split>/<name>/<selection>/<fraction>
    drawn: bool = False  # whether it is a line in the measure's panel beside the curve
    reference: bool = False  # whether it is what the panel's first column is to be compared with: a grey line

    @property
    def scale(self) -> int:
        """What values are multiplied by where they are shown."""
        return 100 if self.unit in ("%", "points") else 1

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def words(self, value: float, spread: float = math.nan) -> str:
        """Return a value as it is shown, with its spread where that is known; nothing for a missing value."""
        if math.isnan(value):
            return ""
        shown = f"{self.scale * value:{'+' if self.unit == 'points' else ''}.{self.digits}f}"
        return shown if math.isnan(spread) else f"{shown} ± {self.scale * spread:.{self.digits}f}"


def by_series(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows for people to read: `selection` is what its curve is called, with the bits where they are few."""
    return rows.assign(selection=list(map(series, rows["selection"], rows["bits"])))


def assemble(
    probes: Sequence[Probe],
    widths: Mapping[str, int],
    measured: Mapping[str, Sequence[Mapping[str, Tensor | pd.DataFrame]]],
    metric: str,
    facts: Mapping[str, Any],
) -> tuple[dict[str, pd.DataFrame], dict[str, np.ndarray]]:
    """Return the tables of a run by the names of their files, from what each measure computed, by split.

    `facts` are further columns of `results`, one value for all P probes or P; `task` and `backbone` are among them.
    Beside them stands by split what was found of each image, shape (P, n), where a measure gave that.
    """
    known = pd.DataFrame(list(probes)).assign(width=[widths[probe.layer] for probe in probes])
    known["bytes"] = stored_bytes(known["neurons"], known["bits"])
    tables: dict[str, list[pd.DataFrame]] = {"results": []}
    per_image = {}
    for split, computed in measured.items():
        values = {}
        for name, value in (item for each in computed for item in each.items()):
            if name == PER_IMAGE:
                per_image[split] = value.cpu().numpy()
            elif isinstance(value, Tensor):
                values[name] = value.cpu().numpy()
            else:
                tables.setdefault(name, []).append(value)
        rows = known.assign(**{"split": split, **facts, **values})
        first = [
            "task",
            "backbone",
            "layer",
            "selection",
            "fraction",
            "neurons",
            "width",
            "bits",
            "bytes",
            "seed",
            "split",
        ]
        first += [name for name in ("images", metric, "loss") if name in values]
        tables["results"].append(rows[list(dict.fromkeys([*first, *facts, *values]))])
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}, per_image


def write_per_image(per_image: Mapping[str, np.ndarray], path: Path) -> None:
    """Write which images each probe has right, eight in a byte, or the metric of each image; see `Results`."""
    packed = {split: np.packbits(each, axis=1) if each.dtype == bool else each for split, each in per_image.items()}
    images = {split: right.shape[1] for split, right in per_image.items()}
    save_file(packed, path, metadata={"images": json.dumps(images)})  # several keys would come in any order


def read_per_image(path: Path) -> dict[str, np.ndarray]:
    """Return what `write_per_image` wrote; nothing where there is no such file, as in runs of older versions.

    A ValueError is raised if it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "numpy") as file:
            images = json.loads(file.metadata()["images"])
            found = {split: file.get_tensor(split) for split in images}
            return {
                split: np.unpackbits(each, axis=1, count=images[split]) > 0 if each.dtype == np.uint8 else each
                for split, each in found.items()
            }
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


class Predictions:
    """Collects over processes what P probes decide for n images, as a task holds them: predictions.csv."""

    def __init__(self, probes: Sequence[Probe], images: Any, target: Any, device: torch.device) -> None:
        if not target.outputs:
            raise MisconfigurationException(f"Nothing is predicted of {target.describe()}; take fit, validate or test.")
        self.probes, self.images, self.target = probes, images, target
        one = target.decide(torch.zeros(1, target.outputs, 1, device=device))  # of one probe and image
        self.decisions = one.new_zeros(len(probes), len(images), *one.shape[2:])

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Note what the probes decide, from logits of shape (P, C, B), for the images at `indices`, shape (B,)."""
        self.decisions[:, indices] = self.target.decide(logits)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the shares of all processes: each has zeros where the others have decisions."""
        self.decisions = total(self.decisions)

    def table(self) -> pd.DataFrame:
        """Return one row per image: its name, its label, and what each probe decides.

        A probe's column is `<series>/<fraction>/<seed>`, after its layer where there are several.
        """
        several = len({probe.layer for probe in self.probes}) > 1
        columns = {"image": [self.images.name(index) for index in range(len(self.images))]}
        columns["label"] = self.target.name(self.images.labels)
        for probe, decisions in zip(self.probes, self.decisions, strict=True):
            layer = f"{probe.layer}/" if several else ""
            columns[f"{layer}{probe.series}/{probe.fraction:g}/{probe.seed}"] = self.target.name(decisions)
        return pd.DataFrame(columns)
