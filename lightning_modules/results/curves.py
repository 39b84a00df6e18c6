"""Curves: what was measured against the fraction of neurons, and what each class loses."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.results.tables import Column
from lightning_modules.subsets.plan import stored_bytes
from lightning_modules.subsets.selections import FULL

SERIES = ["layer", "selection", "bits"]  # what a curve is of
CELL = [*SERIES, "fraction"]  # a point of it, of as many probes as there are seeds


def complete(results: pd.DataFrame) -> pd.DataFrame:
    """Return rows as in `results.csv` in which every layer has a `full` one and nothing needed later is absent.

    Tables of older runs may lack `layer`, `bits` (then 32) and `seed`; where a layer has no `full` row its fraction 1.0
    counts as it.

    A MisconfigurationException is raised if a layer has neither.
    """
    rows = results if "layer" in results else results.assign(layer="penultimate")
    rows = rows if "bits" in rows else rows.assign(bits=32)
    if "seed" not in rows:
        rows = rows.assign(seed=rows.groupby([*CELL, "split"]).cumcount())
    for layer, of_layer in rows.groupby("layer", sort=False):
        entire = of_layer[(of_layer["fraction"] == 1.0) & (of_layer["bits"] == 32)]
        if (of_layer["selection"] == FULL).any():
            continue
        if entire.empty:
            raise MisconfigurationException(
                f"There is no reference for {layer}: its results have neither a {FULL} row nor fraction 1."
            )
        entire = entire[entire["selection"] == entire["selection"].iloc[0]]
        rows = pd.concat([rows, entire.assign(selection=FULL)], ignore_index=True)
    return rows


def curve(rows: pd.DataFrame, split: str, metric: str, columns: Sequence[Column] = ()) -> pd.DataFrame:
    """Return the headline metric, and those of further columns that were measured, against fraction.

    Rows are as `complete` returns them.

    Returns:
        One row per layer, selection, bits and fraction; layers in their order, in each the full layer first, fractions
        ascending: `layer`, `selection`, `bits`, `fraction`, `neurons`, `bytes`, `mean` and `std` of the metric over
        seeds (population, as in the paper's tables; missing for a single seed), `seeds`, `ratio`, the mean over the
        full layer's mean (missing if that is not above zero), `difference`, the mean less the full layer's, and for
        each column its mean, and its spread as `<name>_std`.
    """
    rows = rows[rows["split"] == split]
    groups = rows.groupby(CELL, sort=False)
    table = groups[metric].agg(mean="mean", std=_spread, seeds="size").reset_index()
    if "neurons" in rows:
        table.insert(len(CELL), "neurons", groups["neurons"].first().to_numpy())
        table.insert(len(CELL) + 1, "bytes", stored_bytes(table["neurons"], table["bits"]))
    full = table[table["selection"] == FULL].set_index("layer")["mean"]
    table["ratio"] = table["mean"] / table["layer"].map(full.where(full > 0))
    table["difference"] = table["mean"] - table["layer"].map(full)
    for name in (column.name for column in columns):
        if name in rows and rows[name].notna().any():
            table[name] = groups[name].mean().to_numpy()
            table[f"{name}_std"] = groups[name].agg(_spread).to_numpy()
    orders = {"layer": list(table["layer"]), "selection": [FULL, *table["selection"]], "bits": list(table["bits"])}
    return table.sort_values(CELL, key=lambda c: c.map(orders[c.name].index) if c.name in orders else c)


def _spread(values: pd.Series) -> float:
    """Return the population's standard deviation; missing for a single value."""
    return values.std(ddof=0) if len(values) > 1 else np.nan


def class_losses(classes: pd.DataFrame, split: str, metric: str = "accuracy") -> pd.DataFrame:
    """Return what each class loses at each fraction of a split, from rows as in `classes.csv`; most lost first.

    Returns:
        One row per layer, selection, bits, fraction and class with images: `layer`, `selection`, `bits`, `fraction`,
        `class`, `images`, the metric (mean over seeds), the full layer's as `full_<metric>`, and `lost`, the
        difference. Within a curve, classes are ordered by `lost` averaged over its fractions, descending, and fractions
        ascend.
    """
    rows = classes[(classes["split"] == split) & (classes["images"] > 0)]
    if "correct" in rows:
        rows = rows.assign(**{metric: rows["correct"] / rows["images"]})
    keys = [*CELL, "class"]
    means = rows.groupby(keys, sort=False)
    table = means.agg(**{"images": ("images", "first"), metric: (metric, "mean")}).reset_index()
    full = table[table["selection"] == FULL].set_index(["layer", "class"])[metric].rename(f"full_{metric}")
    table = table[table["selection"] != FULL].join(full, on=["layer", "class"])
    table["lost"] = table[f"full_{metric}"] - table[metric]
    groups = table.groupby(SERIES, sort=False).ngroup()
    average = table.groupby([*SERIES, "class"], sort=False)["lost"].transform("mean")
    order = {"group": groups, "lost": -average.round(12), "class": table["class"].astype(str)}
    positions = table[["fraction"]].assign(**order).sort_values([*order, "fraction"]).index
    return table.loc[positions].reset_index(drop=True)
