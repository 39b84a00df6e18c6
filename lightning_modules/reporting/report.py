"""The end of a fit: the run's tables, summary.json, pictures, report.html, and the same answer in words."""

import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules.files import whole
from lightning_modules.reporting import figures, page
from lightning_modules.results import curves as measures
from lightning_modules.subsets.selections import FULL

DELTAS = (0.8, 0.9, 0.95, 0.99)
"""Shares of the full layer's accuracy for which redundancy is given."""
ANSWERED = 0.9
"""The share the plain answer is about; the paper's."""
OPTIONAL = ("layers", "ensembles", "neighbours")
"""Tables that not every run has."""
PACKAGES = ("torch", "lightning", "timm", "torchmetrics", "torchvision", "numpy")


def report(folder: Path, tables: dict[str, pd.DataFrame], remarks: Sequence[str], seconds: dict[str, float]) -> str:
    """Write a run's files into `folder` and return what to print.

    Args:
        folder: The run's folder; its `config.yaml`, where it is there, is shown in `report.html`.
        tables: By the names of their files: `results`, of both `val` and `test`, and `classes`; where they were asked
            for `layers`, `ensembles` and `neighbours`. Each is written as `<name>.csv`.
        remarks: What to distrust, one line each.
        seconds: Wall time of each part of the run.
    """
    results = tables["results"]
    test = measures.curve(results, "test")
    redundancy = measures.redundancy(results, "test", DELTAS)
    first, *others = (
        _of_layer(results[results["layer"] == layer], test, redundancy) for layer in results["layer"].unique()
    )
    summary = {
        "task": results["task"].iloc[0],
        "backbone": results["backbone"].iloc[0],
        "test_images": int(results.loc[results["split"] == "test", "images"].iloc[0]),
        **first,
        **({"further_layers": others} if others else {}),
        "remarks": list(remarks),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    for name in (*OPTIONAL, *page.CAPTIONS):  # what a run that is replaced had and this one has not
        for ending in ("csv", "png", "svg"):
            if name not in tables:
                (folder / f"{name}.{ending}").unlink(missing_ok=True)
    title = f"{summary['task']}, {summary['backbone']}"
    files = [folder / f"{name}.csv" for name in tables]
    for name, rows in tables.items():
        if name != "results":
            with whole(folder / f"{name}.csv") as file:
                rows.to_csv(file, index=False)
    with whole(folder / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")
    pictures = {}
    for name, figure in figures.run_figures(tables, "test", title, ANSWERED).items():
        pictures[name] = figures.save(figure, folder / name)
    config = folder / "config.yaml"
    with whole(folder / "report.html") as file:
        shown = {name: files[1] for name, files in pictures.items()}
        settings = config.read_text() if config.exists() else ""
        file.write_text(page.page(summary, tables, redundancy, shown, settings))
    with whole(folder / "results.csv") as file:  # last, as it stands for a finished run
        results.to_csv(file, index=False)
    files += [folder / "summary.json", *(file for both in pictures.values() for file in both), folder / "report.html"]
    lines = ["", f"{title}: test accuracy on {summary['test_images']:,} images, mean ± std over subset seeds", ""]
    for layer in (first, *others):
        lines += [f"Layer {layer['layer']}, {layer['width']:,} neurons", ""] if others else []
        lines += [table(test[test["layer"] == layer["layer"]]), ""]
        lines += [*(answer["text"] for answer in layer["answers"].values()), *([""] if others else [])]
    return "\n".join([*lines, *(f"Note: {remark}" for remark in remarks), "", *(f"  {file}" for file in files)])


def _of_layer(results: pd.DataFrame, test: pd.DataFrame, redundancy: pd.DataFrame) -> dict[str, Any]:
    """Return what `summary.json` says of one layer.

    Args:
        results: Rows of the layer as in `results.csv`.
        test: The run's curve on test.
        redundancy: The run's redundancies on test.
    """
    layer, width = results["layer"].iloc[0], int(results["width"].iloc[0])
    test, redundancy = test[test["layer"] == layer], redundancy[redundancy["layer"] == layer]
    val = measures.curve(results, "val")
    answers = {f"{delta:g}": _answer(val, results, delta) for delta in DELTAS}
    by_selection: dict[str, dict[str, Any]] = {"redundancy": {}, "interval": {}, "neurons": {}}
    for row in redundancy.to_dict("records"):
        interval = None if math.isnan(row["low"]) else [round(row["low"], 9), round(row["high"], 9)]
        values = {"redundancy": round(row["redundancy"], 9), "interval": interval, "neurons": int(row["neurons"])}
        for name, value in values.items():
            rules = by_selection[name].setdefault(str(row["selection"]), {})
            rules.setdefault(row["rule"], {})[f"{row['delta']:g}"] = value
    return {
        "layer": layer,
        "width": width,
        "full_accuracy": test.loc[test["selection"] == FULL, "mean"].item(),
        "answer": answers[f"{ANSWERED:g}"]["text"],
        "answers": answers,
        "curve": _records(test.loc[test["selection"] != FULL]),
        "diffused_redundancy": by_selection["redundancy"],
        "diffused_redundancy_interval": by_selection["interval"],
        "critical_mass": by_selection["neurons"],
    }


def table(curve: pd.DataFrame) -> str:
    """Return a curve as text: one line per selection and fraction, with a bar for the share of the full accuracy."""
    wide = max(12, *(len(name) for name in curve["selection"]))
    lines = [f"{'selection':<{wide}} {'fraction':>8} {'neurons':>8}  {'accuracy':>14}  {'of full':>8}"]
    for row in curve.itertuples():
        spread = "" if math.isnan(row.std) else f" ± {100 * row.std:4.1f}"
        bar = "█" * round(30 * row.ratio) if math.isfinite(row.ratio) else ""  # a full layer may be never right
        lines.append(
            f"{row.selection:<{wide}} {row.fraction:>8g} {row.neurons:>8}  {100 * row.mean:6.1f} %{spread:<7} "
            f" {100 * row.ratio:6.1f} %  {bar}"
        )
    return "\n".join(lines)


def _answer(val: pd.DataFrame, results: pd.DataFrame, delta: float) -> dict[str, Any]:
    """Say how many neurons to keep for a share `delta` of the full accuracy, and what that costs.

    The fraction is chosen on validation, by the threshold rule over all selections; the loss is told on test.
    """
    width = int(results["width"].iloc[0])
    enough = val.loc[(val["selection"] != FULL) & (val["ratio"] >= delta)].sort_values("neurons", kind="stable")
    wish = f"To keep {100 * delta:g} % of the accuracy"
    if enough.empty or enough["neurons"].iloc[0] == width:
        return {"text": f"{wish}: keep all {width:,} neurons; no smaller measured subset is enough.", "neurons": width}
    best = enough.iloc[0]
    test = results[results["split"] == "test"]
    full = test.loc[test["selection"] == FULL, "accuracy"].mean()
    kept = test.loc[(test["selection"] == best["selection"]) & (test["fraction"] == best["fraction"]), "accuracy"]
    lost = 100 * (full - kept)
    spread = f" ± {lost.std(ddof=0):.1f}" if len(lost) > 1 else ""
    bytes_kept = 100 * best["neurons"] / width
    text = (
        f"{wish}: keep {best['neurons']:,} of {width:,} neurons ({best['selection']}), lose {lost.mean():.1f}{spread} "
        f"points ({100 * kept.mean():.1f} instead of {100 * full:.1f} %), store {bytes_kept:.3g} % of the bytes."
    )
    return {
        "text": text,
        "selection": best["selection"],
        "fraction": float(best["fraction"]),
        "neurons": int(best["neurons"]),
        "points_lost_mean": float(lost.mean()),
        "points_lost_std": float(lost.std(ddof=0)) if len(lost) > 1 else None,
        "bytes_kept_percent": float(bytes_kept),
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as JSON types, with missing numbers as null."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
