"""A run's results: its tables, and what follows from them, computed when first asked."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.files import one_line
from lightning_modules.results import curves
from lightning_modules.results.answer import answer
from lightning_modules.results.redundancy import DELTAS, redundancy
from lightning_modules.results.resampling import resample, with_limits
from lightning_modules.results.tables import PER_IMAGE_FILE, Column, by_series, read_per_image
from lightning_modules.subsets.selections import FULL

if TYPE_CHECKING:
    from lightning_modules.measures.measure import Measure

ANSWERED = 0.9  # the share of the full layer's metric that the plain answer is about; the paper's
NEEDED = ("task", "backbone", "selection", "fraction", "split")  # columns, beside that of the metric
UNSTATED = {"metric": "accuracy", "label": "accuracy", "unit": "%", "chance": None, "items": "images"}
"""What is predicted where no summary.json says it, as beside results of older versions and of others."""


class Results:
    """A run's tables, and the curve, redundancies and answers that follow from them, each computed once.

    Args:
        tables: By the names of their files: `results`, with one row per probe and split, and those of the measures.
        measures: What was measured; of their columns it takes labels.
        target: What is predicted, see `datamodules.targets.Target`; of it the names of `UNSTATED` count.
        per_image: By split, which images each probe has right: boolean, shape (P, n), in the order of the rows of
            `results`; or the metric of each image, or what each adds to it. There are no intervals without.

    Raises:
        MisconfigurationException: If a layer has no full row.
    """

    def __init__(
        self,
        tables: Mapping[str, pd.DataFrame],
        measures: Sequence["Measure"],
        target: Any,
        per_image: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.tables, self.measures, self.target, self.per_image = tables, measures, target, per_image or {}
        self.headline = Column(target.metric, target.label, target.unit, digits=1 if target.unit == "%" else 3)
        self.rows = curves.complete(tables["results"])  # of results.csv; each layer has a full one
        self._computed: dict[Any, Any] = {}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what a run left in its folder; without measures, as nothing tells their labels.

        A MisconfigurationException is raised if its results.csv is none, or lacks what is needed.
        """
        file, summary = folder / "results.csv", folder / "summary.json"
        try:
            rows = pd.read_csv(file, keep_default_na=False, na_values=[""])  # a class or task may be called null
            stated = json.loads(summary.read_text(encoding="utf-8")).get("target", {}) if summary.is_file() else {}
            per_image = read_per_image(folder / PER_IMAGE_FILE)
        except (ValueError, OSError) as error:
            raise MisconfigurationException(f"Results in {folder} cannot be read ({one_line(error)}).") from error
        target = SimpleNamespace(**UNSTATED | stated)
        missing = [column for column in (*NEEDED, target.metric) if column not in rows]
        if missing or rows.empty:
            raise MisconfigurationException(f"{file} has no {', '.join(missing) or 'rows'}; a fit writes such a file.")
        try:
            return cls({"results": rows}, [], target, per_image)
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
    def several_bits(self) -> bool:
        """Whether numbers are stored in fewer than 32 bits, too."""
        return bool((self.rows["bits"] < 32).any())

    @property
    def columns(self) -> list[Column]:
        """The measures' columns that have a label, without the headline metric's."""
        columns = [column for measure in self.measures for column in measure.columns]
        return [column for column in columns if column.label and column.name != self.headline.name]

    def table(self, name: str, split: str) -> pd.DataFrame:
        """Return a table's rows of a split; none where there is no such table."""
        rows = self.tables.get(name, pd.DataFrame({"split": []}))
        return rows[rows["split"] == split]

    def draws(self, split: str) -> pd.DataFrame | None:
        """Return draws of the means, see `resampling.resample`; None where images were not noted for each row."""
        rows = self.rows[self.rows["split"] == split]
        if len(rows) != len(self.per_image.get(split, ())):
            return None
        return self._once(("draws", split), lambda: resample(self.per_image[split], rows))

    def curve(self, split: str) -> pd.DataFrame:
        """Return what was measured against fraction, see `curves.curve`, with limits where there are draws."""

        def compute() -> pd.DataFrame:
            curve, draws = curves.curve(self.rows, split, self.headline.name, self.columns), self.draws(split)
            return curve if draws is None else with_limits(curve, draws)

        return self._once(("curve", split), compute)

    def redundancy(self, split: str, deltas: Sequence[float] = DELTAS) -> pd.DataFrame:
        """Return DR(delta) by every rule, see `redundancy.redundancy`."""
        return self._once(
            ("redundancy", split, tuple(deltas)),
            lambda: redundancy(self.rows, split, deltas, self.headline.name, self.draws(split)),
        )

    def class_losses(self, split: str) -> pd.DataFrame:
        """Return what each class loses, see `curves.class_losses`; no rows where there are no classes."""
        if "classes" not in self.tables:
            return pd.DataFrame()
        return self._once(
            ("class losses", split), lambda: curves.class_losses(self.tables["classes"], split, self.headline.name)
        )

    def answers(self, layer: str) -> dict[float, dict[str, Any]]:
        """Return the plain answers of a layer by the share that is kept."""
        return self._once(("answers", layer), lambda: {delta: answer(self, layer, delta) for delta in DELTAS})

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what was computed under that key; whoever gets it changes nothing."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def summary(self) -> dict[str, Any]:
        """Return what there is to say of the run, as JSON has it."""
        return {
            "task": self.rows["task"].iloc[0],
            "backbone": self.rows["backbone"].iloc[0],
            "target": {name: getattr(self.target, name) for name in UNSTATED},
            "test_images": int(self.rows.loc[self.rows["split"] == "test", "images"].iloc[0]),
            "layers": [self._summary_of(layer) for layer in self.layers],
        }

    def _summary_of(self, layer: str) -> dict[str, Any]:
        """Return what there is to say of a layer."""
        test, found = self.curve("test"), self.redundancy("test")
        test, found = test[test["layer"] == layer], found[found["layer"] == layer]
        names = ("diffused_redundancy", "diffused_redundancy_interval", "critical_mass")
        redundancies: dict[str, Any] = {name: {} for name in names}
        for row in by_series(found.round(9)).to_dict("records"):
            interval = None if math.isnan(row["low"]) else [row["low"], row["high"]]
            never = math.isnan(row["redundancy"])
            values = (None, None, None) if never else (row["redundancy"], interval, int(row["neurons"]))
            for name, value in zip(names, values, strict=True):
                rules = redundancies[name].setdefault(str(row["selection"]), {})
                rules.setdefault(row["rule"], {})[f"{row['delta']:g}"] = value
        points = test[test["selection"] != FULL].astype(object)
        return {
            "layer": layer,
            "width": int(self.rows.loc[self.rows["layer"] == layer, "width"].iloc[0]),
            f"full_{self.headline.name}": test.loc[test["selection"] == FULL, "mean"].item(),
            "answer": self.answers(layer)[ANSWERED]["text"],
            "answers": {f"{delta:g}": each for delta, each in self.answers(layer).items()},
            "curve": points.where(points.notna(), None).to_dict("records"),
            **redundancies,
        }
