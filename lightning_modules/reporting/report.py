"""The end of a fit: results.csv, classes.csv, summary.json, the curve, and the same answer in words."""

import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules import measures
from lightning_modules.files import whole
from lightning_modules.reporting import figures
from lightning_modules.subsets import FULL

DELTAS = (0.8, 0.9, 0.95, 0.99)
"""Shares of the full layer's accuracy for which redundancy is given."""
ANSWERED = 0.9
"""The share the plain answer is about; the paper's."""
PACKAGES = ("torch", "lightning", "timm", "torchmetrics", "torchvision", "numpy")


def report(
    folder: Path,
    results: pd.DataFrame,
    classes: pd.DataFrame,
    remarks: Sequence[str],
    seconds: dict[str, float],
) -> str:
    """Write a run's files into `folder` and return what to print.

    Args:
        folder: The run's folder.
        results: Rows as in `results.csv`, of both `val` and `test`.
        classes: Rows as in `classes.csv`.
        remarks: What to distrust, one line each.
        seconds: Wall time of each part of the run.
    """
    test, val = measures.curve(results, "test"), measures.curve(results, "val")
    answers = {f"{delta:g}": _answer(val, results, delta) for delta in DELTAS}
    summary = {
        "task": results["task"].iloc[0],
        "backbone": results["backbone"].iloc[0],
        "layer": results["layer"].iloc[0],
        "width": int(results["width"].iloc[0]),
        "test_images": int(results.loc[results["split"] == "test", "images"].iloc[0]),
        "full_accuracy": test.loc[test["selection"] == FULL, "mean"].item(),
        "answer": answers[f"{ANSWERED:g}"]["text"],
        "answers": answers,
        "curve": _records(test.loc[test["selection"] != FULL]),
        "diffused_redundancy": {
            str(name): {
                rule: {
                    f"{delta:g}": round(measures.diffused_redundancy(rows["fraction"], rows["ratio"], delta, rule), 9)
                    for delta in DELTAS
                }
                for rule in measures.RULES
            }
            for name, rows in test.loc[test["selection"] != FULL].groupby("selection", sort=False)
        },
        "remarks": list(remarks),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    number = classes["class"].nunique()
    title = f"{summary['task']}, {summary['backbone']}"
    picture = figures.accuracy_curve(test, title, number, ANSWERED)
    files = [folder / "results.csv", folder / "classes.csv", folder / "summary.json"]
    with whole(files[1]) as file:
        classes.to_csv(file, index=False)
    with whole(files[2]) as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")
    files += figures.save(picture, folder / "curve")
    with whole(files[0]) as file:  # last, as it stands for a finished run
        results.to_csv(file, index=False)
    return "\n".join(
        [
            "",
            f"{title}: test accuracy on {summary['test_images']:,} images, mean ± std over subset seeds",
            "",
            table(test),
            "",
            *(answer["text"] for answer in answers.values()),
            *(f"Note: {remark}" for remark in remarks),
            "",
            *(f"  {file}" for file in files),
        ]
    )


def table(curve: pd.DataFrame) -> str:
    """Return a curve as text: one line per selection and fraction, with a bar for the share of the full accuracy."""
    lines = [f"{'selection':<12} {'fraction':>8} {'neurons':>8}  {'accuracy':>14}  {'of full':>8}"]
    for row in curve.itertuples():
        spread = "" if math.isnan(row.std) else f" ± {100 * row.std:4.1f}"
        bar = "█" * round(30 * row.ratio) if math.isfinite(row.ratio) else ""  # a full layer may be never right
        lines.append(
            f"{row.selection:<12} {row.fraction:>8g} {row.neurons:>8}  {100 * row.mean:6.1f} %{spread:<7} "
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
