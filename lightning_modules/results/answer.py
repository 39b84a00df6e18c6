"""The plain answer: how much of a layer to keep for a share of its accuracy, and what test images say of that."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_modules.results.curves import CELL, SERIES
from lightning_modules.results.redundancy import certain
from lightning_modules.subsets.selections import FULL, SELECTIONS

if TYPE_CHECKING:
    from lightning_modules.results.results import Results

LEVEL = 0.05  # the chance, at most, that a subset is called certain to keep a share that it does not keep


def answer(results: "Results", layer: str, delta: float) -> dict[str, Any]:
    """Say how much of a layer to keep for a share `delta` of the full layer's metric, and what that costs.

    Validation chooses: the subset of the fewest bytes that is certain to keep the share, over subsets and images, see
    `redundancy.certain`; `LEVEL` is shared out among the curves that were tried. Where none is certain, that of the
    fewest whose mean keeps it. What it keeps is told on test.

    Returns:
        `text`, and as data `neurons` (how many coordinates) and `certain`; unless the layer is to be kept as it is also
        `selection`, `bits`, `fraction`, `ratio` with its 95 % limits, `points_lost_mean`, `points_lost_std` (over
        seeds), `bytes` of a vector, `bytes_kept_percent`, and what must be stored once, in float32: `basis_bytes` of
        the basis, and `levels_bytes` of what few bits stand for, the lowest level and the step of each coordinate.
    """
    headline, (val, test) = results.headline, (results.curve(split) for split in ("val", "test"))
    val, test = val[val["layer"] == layer], test[test["layer"] == layer]
    full, subsets = test[test["selection"] == FULL].iloc[0], val[val["selection"] != FULL]
    width, whole, draws = int(full["neurons"]), int(full["bytes"]), results.draws("val")
    items, (tried, tested) = results.target.items, (f"{_images(results, split):,}" for split in ("val", "test"))
    tried, tested = f"{tried} validation {items}", f"{tested} test {items}"
    wish = f"To keep {100 * delta:g} % of the {headline.label}"
    lowest = min(full["mean"], val.loc[val["selection"] == FULL, "mean"].iloc[0])
    if not lowest > 0:
        text = f"{wish}: there is none to keep, as the full layer's is {headline.words(lowest)} on {tried} or {tested}."
        return {"text": text, "neurons": width, "certain": False}
    sure = pd.Series(False, subsets.index) if draws is None else _certain(subsets, draws, delta)
    smaller = subsets["bytes"] < whole
    promised = bool((sure & smaller).any())
    enough = subsets[(sure if promised else subsets["ratio"] >= delta) & smaller]
    if enough.empty:
        text = f"{wish}: keep all {width:,} neurons; no smaller subset that was measured reaches it on {tried}."
        return {"text": text, "neurons": width, "certain": False}
    chosen = enough.loc[enough["bytes"].idxmin()]  # the first of equals
    told = test[(test[CELL] == chosen[CELL]).all(axis=1)].iloc[0]
    kept, bits, size = (int(chosen[name]) for name in ("neurons", "bits", "bytes"))
    basis, share = SELECTIONS[chosen["selection"]].basis is not None, 100 * size / whole
    basis_bytes, levels_bytes = 4 * width * kept if basis else 0, 8 * kept if bits < 32 else 0
    each = "" if bits == 32 else f" in {bits} bit{'s' * (bits > 1)} each"
    smaller_by = f"{size:,} bytes instead of {whole:,}"
    if basis:
        how = f"store {kept:,} numbers{each} per vector ({chosen['selection']}){f': {smaller_by}' if each else ''}"
        how += f", made from all {width:,} neurons with a {width:,} x {kept:,} basis ({basis_bytes / 1e6:.1g} MB)"
    elif each:
        which = f"all {width:,} neurons" if kept == width else f"{kept:,} of {width:,} neurons ({chosen['selection']})"
        how = f"keep {which}{each}: {smaller_by}, {share:.3g} %"
    else:
        how = f"keep {kept:,} of {width:,} neurons ({chosen['selection']}), {share:.3g} % of the bytes"
    how += f", and their levels once ({levels_bytes / 1e3:.2g} kB)" if each else ""
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
        "bits": bits,
        "fraction": float(chosen["fraction"]),
        "neurons": kept,
        "certain": promised,
        "ratio": float(told["ratio"]),
        "ratio_interval": interval,
        "points_lost_mean": float(-told["difference"] * headline.scale),
        "points_lost_std": None if np.isnan(told["std"]) else float(told["std"] * headline.scale),
        "bytes": size,
        "bytes_kept_percent": share,
        "basis_bytes": basis_bytes,
        "levels_bytes": levels_bytes,
    }


def _images(results: "Results", split: str) -> int:
    """Return how many images a split has."""
    return int(results.rows.loc[results.rows["split"] == split, "images"].iloc[0])


def _certain(subsets: pd.DataFrame, draws: pd.DataFrame, delta: float) -> pd.Series:
    """Return which rows of a layer's curve are certain to keep delta of the full layer's metric."""
    sure = pd.Series(False, subsets.index)
    curves = subsets.groupby(SERIES, sort=False)
    for _, rows in curves:
        rows = rows.sort_values("fraction")
        cells = list(rows[CELL].itertuples(index=False, name=None))
        full = draws[cells[0][0], FULL, 32, 1.0].to_numpy()
        sure[rows.index] = certain(draws[cells].to_numpy() - delta * full[:, None], LEVEL / len(curves))
    return sure
