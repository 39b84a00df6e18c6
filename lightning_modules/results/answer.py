"""The plain answer: how much of a layer to keep for a share of its accuracy, and what test images say of that."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_modules.results.redundancy import certain
from lightning_modules.subsets.selections import FULL, SELECTIONS

if TYPE_CHECKING:
    from lightning_modules.results.results import Results

LEVEL = 0.05  # the chance, at most, that a subset is called certain to keep a share that it does not keep


def answer(results: "Results", layer: str, delta: float) -> dict[str, Any]:
    """Say how many neurons of a layer to keep for a share `delta` of the full layer's metric, and what that costs.

    Validation chooses: the smallest subset that is certain to keep the share, over subsets and images, see
    `redundancy.certain`; `LEVEL` is shared out among the selections that were tried. Where none is certain, the
    smallest whose mean keeps it. What it keeps is told on test.

    Returns:
        `text`, and as data `neurons` (how many coordinates) and `certain`; unless all neurons are to be kept also
        `selection`, `fraction`, `ratio` with its 95 % limits, `points_lost_mean`, `points_lost_std` (over seeds),
        `bytes_kept_percent` and `basis_bytes`, of the basis that must be stored, too, in float32.
    """
    headline, (val, test) = results.headline, (results.curve(split) for split in ("val", "test"))
    val, test = val[val["layer"] == layer], test[test["layer"] == layer]
    full, subsets = test[test["selection"] == FULL].iloc[0], val[val["selection"] != FULL]
    width, draws = int(full["neurons"]), results.draws("val")
    items, (tried, tested) = results.target.items, (f"{_images(results, split):,}" for split in ("val", "test"))
    tried, tested = f"{tried} validation {items}", f"{tested} test {items}"
    wish = f"To keep {100 * delta:g} % of the {headline.label}"
    sure = pd.Series(False, subsets.index) if draws is None else _certain(subsets, draws, delta)
    promised = bool((sure & (subsets["neurons"] < width)).any())
    enough = subsets[(sure if promised else subsets["ratio"] >= delta) & (subsets["neurons"] < width)]
    if enough.empty:
        text = f"{wish}: keep all {width:,} neurons; no smaller subset that was measured reaches it on {tried}."
        return {"text": text, "neurons": width, "certain": False}
    chosen = enough.loc[enough["neurons"].idxmin()]  # the first of equals
    told = test[(test["selection"] == chosen["selection"]) & (test["fraction"] == chosen["fraction"])].iloc[0]
    kept, basis = int(chosen["neurons"]), SELECTIONS[chosen["selection"]].basis is not None
    share, basis_bytes = 100 * kept / width, 4 * width * kept if basis else 0
    if basis:
        how = (
            f"store {kept:,} numbers per vector ({chosen['selection']}), made from all {width:,} neurons with a "
            f"{width:,} x {kept:,} basis ({basis_bytes / 1e6:.1g} MB)"
        )
    else:
        how = f"keep {kept:,} of {width:,} neurons ({chosen['selection']}), {share:.3g} % of the bytes"
    if promised:
        text = f"{wish}, {100 * (1 - LEVEL):g} % certain on {tried}: {how}."
    elif draws is not None:
        text = f"{wish}: on {tried} no subset is {100 * (1 - LEVEL):g} % certain to; by the means alone, {how}."
    else:
        text = f"{wish}, by the means on {tried}: {how}."
    keeps, unit = f"{100 * told['ratio']:.1f}", f" {headline.unit}" if headline.unit else ""
    interval = [max(0.0, float(told["ratio_low"])), float(told["ratio_high"])] if "ratio_low" in told else None
    between = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    short = f", short of {100 * delta:g} %" if float(keeps) < 100 * delta else ""
    text += (
        f" On {tested} that keeps {keeps} %{between}{short}: "
        f"{headline.words(told['mean'])} instead of {headline.words(full['mean'])}{unit}."
    )
    return {
        "text": text,
        "selection": chosen["selection"],
        "fraction": float(chosen["fraction"]),
        "neurons": kept,
        "certain": promised,
        "ratio": float(told["ratio"]),
        "ratio_interval": interval,
        "points_lost_mean": float(-told["difference"] * headline.scale),
        "points_lost_std": None if np.isnan(told["std"]) else float(told["std"] * headline.scale),
        "bytes_kept_percent": share,
        "basis_bytes": basis_bytes,
    }


def _images(results: "Results", split: str) -> int:
    """Return how many images a split has."""
    return int(results.rows.loc[results.rows["split"] == split, "images"].iloc[0])


def _certain(subsets: pd.DataFrame, draws: pd.DataFrame, delta: float) -> pd.Series:
    """Return which rows of a layer's curve are certain to keep delta of the full layer's metric."""
    sure = pd.Series(False, subsets.index)
    selections = subsets.groupby("selection", sort=False)
    for _, rows in selections:
        rows = rows.sort_values("fraction")
        cells = list(rows[["layer", "selection", "fraction"]].itertuples(index=False, name=None))
        full = draws[cells[0][0], FULL, 1.0].to_numpy()
        sure[rows.index] = certain(draws[cells].to_numpy() - delta * full[:, None], LEVEL / len(selections))
    return sure
