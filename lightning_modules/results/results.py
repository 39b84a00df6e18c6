"""A run's results: its tables, and what follows from them, computed when first asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.measures.measure import Column, Measure
from lightning_modules.results import curves
from lightning_modules.results.answer import ANSWERED, answer
from lightning_modules.results.redundancy import DELTAS, redundancy
from lightning_modules.subsets.selections import FULL

NEEDED = ("task", "backbone", "selection", "fraction", "split")
"""Columns of a results.csv, beside that of its metric, without which there are no results."""


class Headline(NamedTuple):
    """What results know of what is predicted: facts of a `datamodules.targets.Target`, by the same names."""

    metric: str = "accuracy"
    """The column of results.csv."""
    label: str = "accuracy"
    """For text and pictures."""
    unit: str = "%"
    """`%` for shares."""
    chance: float | None = None
    """What guessing is expected to reach, where it is known."""


ACCURACY = Headline()


class Results:
    """A run's tables, and the curve, redundancies and answers that follow from them, each computed once.

    Args:
        tables: By the names of their files: `results`, with one row per probe and split, and those of the measures.
        measures: What was measured; of their columns it takes labels.
        target: What is predicted: a `Headline`, or a `datamodules.targets.Target`.

    Raises:
        MisconfigurationException: If a layer has no full row.
    """

    def __init__(
        self, tables: Mapping[str, pd.DataFrame], measures: Sequence[Measure] = (), target: Any = ACCURACY
    ) -> None:
        self.tables = tables
        self.measures = measures
        self.target = Headline(target.metric, target.label, target.unit, target.chance)
        digits = 1 if target.unit == "%" else 3
        self.headline = Column(target.metric, target.label, target.unit, digits)
        self.rows = curves.complete(tables["results"])
        """Rows of results.csv, in which each layer has a full one."""
        self._computed: dict[Any, Any] = {}

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Return what a run left in its folder; without measures, as nothing tells their labels.

        Raises:
            MisconfigurationException: If its results.csv is none, or lacks what is needed.
        """
        file, summary = folder / "results.csv", folder / "summary.json"
        try:
            rows = pd.read_csv(file, keep_default_na=False, na_values=[""])  # a class or task may be called null
            facts = json.loads(summary.read_text()).get("target", {}) if summary.is_file() else {}
        except (ValueError, OSError) as error:
            raise MisconfigurationException(f"{file} cannot be read ({error}).") from error
        target = Headline(**{name: facts[name] for name in Headline._fields if name in facts})
        missing = [column for column in (*NEEDED, target.metric) if column not in rows]
        if missing or rows.empty:
            raise MisconfigurationException(f"{file} has no {', '.join(missing) or 'rows'}; a fit writes such a file.")
        try:
            return cls({"results": rows}, target=target)
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{file}: {error}") from error

    @property
    def title(self) -> str:
        """What was measured: task and backbone."""
        return f"{self.rows['task'].iloc[0]}, {self.rows['backbone'].iloc[0]}"

    @property
    def layers(self) -> list[str]:
        """The layers, in their order."""
        return list(self.rows["layer"].unique())

    @property
    def columns(self) -> list[Column]:
        """The measures' columns that have a label, without the headline metric's."""
        columns = [column for measure in self.measures for column in measure.columns]
        return [column for column in columns if column.label and column.name != self.headline.name]

    def table(self, name: str, split: str) -> pd.DataFrame:
        """Return a table's rows of a split; none where there is no such table."""
        rows = self.tables.get(name, pd.DataFrame({"split": []}))
        return rows[rows["split"] == split]

    def curve(self, split: str) -> pd.DataFrame:
        """Return what was measured against fraction, see `curves.curve`."""
        columns = self.columns
        return self._once(("curve", split), lambda: curves.curve(self.rows, split, self.headline.name, columns))

    def redundancy(self, split: str, deltas: Sequence[float] = DELTAS) -> pd.DataFrame:
        """Return DR(delta) by every rule, see `redundancy.redundancy`."""
        key = ("redundancy", split, tuple(deltas))
        return self._once(key, lambda: redundancy(self.rows, split, deltas, self.headline.name))

    def class_losses(self, split: str) -> pd.DataFrame:
        """Return what each class loses, see `curves.class_losses`; no rows where there are no classes."""
        classes = self.tables.get("classes", pd.DataFrame())
        return self._once(
            ("class losses", split), lambda: classes if classes.empty else curves.class_losses(classes, split)
        )

    def answers(self, layer: str) -> dict[float, dict[str, Any]]:
        """Return the plain answers of a layer by the share that is kept, see `answer.answer`."""
        return self._once(("answers", layer), lambda: {delta: answer(self, layer, delta) for delta in DELTAS})

    def summary(self) -> dict[str, Any]:
        """Return what there is to say of the run, as JSON has it."""
        return {
            "task": self.rows["task"].iloc[0],
            "backbone": self.rows["backbone"].iloc[0],
            "target": self.target._asdict(),
            "test_images": int(self.rows.loc[self.rows["split"] == "test", "images"].iloc[0]),
            "layers": [self._summary_of(layer) for layer in self.layers],
        }

    def _summary_of(self, layer: str) -> dict[str, Any]:
        """Return what there is to say of a layer."""
        test, found = self.curve("test"), self.redundancy("test")
        test, found = test[test["layer"] == layer], found[found["layer"] == layer]
        by_selection: dict[str, dict[str, Any]] = {"redundancy": {}, "interval": {}, "neurons": {}}
        for row in found.to_dict("records"):
            interval = None if math.isnan(row["low"]) else [round(row["low"], 9), round(row["high"], 9)]
            values = {"redundancy": round(row["redundancy"], 9), "interval": interval, "neurons": int(row["neurons"])}
            for name, value in values.items():
                rules = by_selection[name].setdefault(str(row["selection"]), {})
                rules.setdefault(row["rule"], {})[f"{row['delta']:g}"] = value
        return {
            "layer": layer,
            "width": int(self.rows.loc[self.rows["layer"] == layer, "width"].iloc[0]),
            f"full_{self.headline.name}": test.loc[test["selection"] == FULL, "mean"].item(),
            "answer": self.answers(layer)[ANSWERED]["text"],
            "answers": {f"{delta:g}": said for delta, said in self.answers(layer).items()},
            "curve": _records(test.loc[test["selection"] != FULL]),
            "diffused_redundancy": by_selection["redundancy"],
            "diffused_redundancy_interval": by_selection["interval"],
            "critical_mass": by_selection["neurons"],
        }

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what was computed under that key; whoever gets it changes nothing."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as JSON types, with missing numbers as null."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
