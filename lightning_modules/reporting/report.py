"""The end of a fit: the run's tables, summary.json, pictures, report.html, and the same answer in words."""

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_modules.files import atomic
from lightning_modules.reporting.page import page
from lightning_modules.results.answer import ANSWERED
from lightning_modules.results.results import Results

PACKAGES = ("torch", "lightning", "timm", "torchmetrics", "torchvision", "numpy")


def report(folder: Path, results: Results, remarks: Sequence[str], seconds: dict[str, float]) -> str:
    """Write a run's files into `folder` and return what to print.

    Args:
        folder: The run's folder; its `config.yaml`, where it is there, is shown in `report.html`.
        results: Of both `val` and `test`; each table is written as `<name>.csv`.
        remarks: What to distrust, one line each.
        seconds: Wall time of each part of the run.
    """
    from lightning_modules.reporting import figures  # matplotlib takes a second to import

    tables = {name: folder / f"{name}.csv" for name in results.tables}
    for name, table_file in tables.items():
        if name != "results":
            _write_table(results.tables[name], table_file)
    pictures = figures.pictures(results, "test", ANSWERED)
    drawn = {name: [folder / f"{name}{ending}" for ending in (".png", ".svg")] for name in pictures}
    summary, page_file = folder / "summary.json", folder / "report.html"
    files = [*tables.values(), summary, *(file for both in drawn.values() for file in both), page_file]
    content = results.summary() | {
        "remarks": list(remarks),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": [file.name for file in files],
    }
    _remove_stale(folder, keep=content["files"])
    with atomic(summary) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")
    for name, picture in pictures.items():
        figures.save(picture.figure, folder / name)
    config = folder / "config.yaml"
    with atomic(page_file) as file:
        captions = {both[1]: pictures[name].caption for name, both in drawn.items()}
        file.write_text(page(results, content, captions, config.read_text() if config.exists() else ""))
    _write_table(results.tables["results"], tables["results"])  # last, as it stands for a finished run
    lines = [*_text(results, content["test_images"]), *(f"Note: {remark}" for remark in remarks)]
    return "\n".join([*lines, "", *(f"  {file}" for file in files)])


def _write_table(rows: pd.DataFrame, path: Path) -> None:
    """Write a table; its name never stands for half of it."""
    with atomic(path) as file:
        rows.to_csv(file, index=False)


def _remove_stale(folder: Path, keep: Sequence[str]) -> None:
    """Remove what the run that is replaced has written, as its summary.json says, and this one does not write."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        for name in json.loads((folder / "summary.json").read_text()).get("files", []):
            if name not in keep:
                (folder / Path(name).name).unlink(missing_ok=True)


def _text(results: Results, images: int) -> list[str]:
    """Return the curve and the plain answers, layer by layer."""
    test, headline = results.curve("test"), results.headline
    several = len(results.layers) > 1
    lines = ["", f"{results.title}: test {headline.label} on {images:,} images, mean ± std over subset seeds", ""]
    for layer in results.layers:
        rows = test[test["layer"] == layer]
        lines += [f"Layer {layer}, {rows['neurons'].max():,} neurons", ""] if several else []
        lines += [_table(results, rows), ""]
        lines += [*(answer["text"] for answer in results.answers(layer).values()), *([""] if several else [])]
    return lines


def _table(results: Results, curve: pd.DataFrame) -> str:
    """Return a layer's curve as text: a line per selection and fraction, with a bar for the share of the full layer."""
    headline, wide = results.headline, max(12, *(len(name) for name in curve["selection"]))
    digits, unit = headline.digits, f" {headline.unit}".rstrip()
    lines = [f"{'selection':<{wide}} {'fraction':>8} {'neurons':>8}  {headline.label:>14}  {'of full':>8}"]
    for row in curve.itertuples():
        spread = "" if math.isnan(row.std) else f" ± {headline.scale * row.std:4.{digits}f}"
        bar = "█" * round(30 * row.ratio) if math.isfinite(row.ratio) else ""  # a full layer may be never right
        lines.append(
            f"{row.selection:<{wide}} {row.fraction:>8g} {row.neurons:>8}  "
            f"{headline.scale * row.mean:6.{digits}f}{unit}{spread:<7}  {100 * row.ratio:6.1f} %  {bar}"
        )
    return "\n".join(lines)
