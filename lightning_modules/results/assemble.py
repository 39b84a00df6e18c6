"""From what measures computed and probes predicted to tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lightning_modules.subsets.plan import Probe


def assemble(
    probes: Sequence[Probe],
    widths: Mapping[str, int],
    measured: Mapping[str, Sequence[Mapping[str, Tensor | pd.DataFrame]]],
    metric: str,
    facts: Mapping[str, Any],
) -> dict[str, pd.DataFrame]:
    """Return the tables of a run by the names of their files.

    Args:
        probes: The P probes.
        widths: D of each layer.
        measured: By split, what each measure computed.
        metric: The column of the headline metric.
        facts: Further columns of results.csv, with one value for all probes or P; with `task` and `backbone`.

    Returns:
        `results`, with one row per probe and split, and each table that a measure computed.
    """
    tables: dict[str, list[pd.DataFrame]] = {"results": []}
    for split, computed in measured.items():
        columns: dict[str, Any] = {
            "task": facts["task"],
            "backbone": facts["backbone"],
            **{key: [getattr(probe, key) for probe in probes] for key in ("layer", "selection", "fraction", "neurons")},
            "width": [widths[probe.layer] for probe in probes],
            "seed": [probe.seed for probe in probes],
            "split": split,
        }
        values = {}
        for name, value in (item for each in computed for item in each.items()):
            if isinstance(value, Tensor):
                values[name] = value.cpu().numpy()
            else:
                tables.setdefault(name, []).append(value)
        columns |= {name: values.pop(name) for name in ("images", metric, "loss") if name in values}
        tables["results"].append(pd.DataFrame({**columns, **facts, **values}))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def predictions(probes: Sequence[Probe], images: Any, target: Any, predicted: Tensor) -> pd.DataFrame:
    """Return one row per test image: its name, its label, and what each probe says of it.

    A probe's column is named `<selection>/<fraction>/<seed>`, after its layer where there are several.

    Args:
        probes: The P probes.
        images: The n test images, with their names and labels.
        target: What is predicted; it names decisions.
        predicted: Decisions, shape (P, n).
    """
    names = [images.name(index) for index in range(len(images))]
    columns = {"image": names, "label": target.name(images.labels)}
    several = len({probe.layer for probe in probes}) > 1
    for probe, row in zip(probes, predicted.cpu(), strict=True):
        layer = f"{probe.layer}/" if several else ""
        columns[f"{layer}{probe.selection}/{probe.fraction:g}/{probe.seed}"] = target.name(row)
    return pd.DataFrame(columns)
