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
