"""The end of a fit: the run's tables, summary.json, pictures, report.html, and the same answer in words."""

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_modules.files import atomic
from lightning_modules.measures import Picture
from lightning_modules.reporting import figures
from lightning_modules.reporting.page import page
from lightning_modules.results.redundancy import MANY_DELTAS
from lightning_modules.results.results import Results
from lightning_modules.results.tables import PER_IMAGE_FILE, by_series, write_per_image

PACKAGES = ("torch", "lightning", "timm", "torchmetrics", "torchvision", "numpy")


def report(
    folder: Path,
    results: Results,
    remarks: Sequence[str],
    seconds: dict[str, float],
    formats: figures.Format | list[figures.Format] = figures.FORMATS,
) -> str:
    """Write a run's files into its folder and return what to print.

    `remarks` say what to distrust, one line each; `seconds` are wall times of the parts of the run; pictures are drawn
    in `formats`, if there is one. The folder's `config.yaml`, where it is there, is shown in `report.html`.
    """
    found = {"redundancy": results.redundancy("test", MANY_DELTAS), **results.tables}
    tables = {name: folder / f"{name}.csv" for name in found}
    for name in tables.keys() - {"results"}:
        write_table(found[name], tables[name])
    per_image = [folder / PER_IMAGE_FILE] if results.per_image else []
    for path in per_image:
        with atomic(path) as file:
            write_per_image(results.per_image, file)
    pictures: dict[str, Picture] = {}
    own = (measure.pictures for measure in results.measures)
    for draw in (figures.curve, figures.redundancy, figures.layers, figures.stores, *own) if formats else ():
        pictures |= draw(results, "test")
    drawn = {name: figures.save(picture.figure, folder / name, formats) for name, picture in pictures.items()}
    summary, page_file = folder / "summary.json", folder / "report.html"
    files = [*tables.values(), *per_image, summary]
    files += [*(file for of_one in drawn.values() for file in of_one), page_file]
    content = results.summary() | {
        "remarks": list(remarks),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": [file.name for file in files],
    }
    with contextlib.suppress(FileNotFoundError, ValueError):  # files of the run that is replaced go, if not replaced
        for name in set(json.loads(summary.read_text(encoding="utf-8")).get("files", [])) - set(content["files"]):
            (folder / Path(name).name).unlink(missing_ok=True)
    with atomic(summary) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = folder / "config.yaml"
    with atomic(page_file) as file:
        images = {name: [file for file in of_one if file.suffix != ".pdf"] for name, of_one in drawn.items()}
        # Of the two, the greater name is that of the SVG.
        captions = {max(found): pictures[name].caption for name, found in images.items() if found}
        settings = config.read_text(encoding="utf-8") if config.exists() else ""
        file.write_text(page(results, content, captions, settings), encoding="utf-8")
    write_table(results.tables["results"], tables["results"])  # last, as it stands for a finished run
    lines = [*_text(results, content["test_images"]), *(f"Note: {remark}" for remark in remarks)]
    return "\n".join([*lines, "", *(f"  {file}" for file in files)])


def write_table(rows: pd.DataFrame, path: Path) -> None:
    """Write a table; its name never stands for half of it."""
    with atomic(path) as file:
        rows.to_csv(file, index=False)


def _text(results: Results, images: int) -> list[str]:
    """Return the curve and the plain answers, layer by layer."""
    test, headline = by_series(results.curve("test")), results.headline
    several = len(results.layers) > 1
    lines = [
        "",
        f"{results.title}: test {headline.label} on {images:,} {results.target.items}, mean ± std over subset seeds; "
        f"shares of the full layer with 95 % intervals over subsets and {results.target.items}",
        "",
    ]
    for layer in results.layers:
        rows = test[test["layer"] == layer]
        lines += [f"Layer {layer}, {rows['neurons'].max():,} neurons", ""] if several else []
        lines += [*_table(results, rows), ""]
        lines += [*(answer["text"] for answer in results.answers(layer).values()), *([""] if several else [])]
    return lines


def _table(results: Results, curve: pd.DataFrame) -> list[str]:
    """Return a layer's curve as lines, one per selection and fraction, with a bar for the share of the full layer."""
    headline, wide = results.headline, max(12, *(len(name) for name in curve["selection"]))
    digits, unit = headline.digits, f" {headline.unit}".rstrip()
    store = f" {'bytes':>8}" if results.several_bits else ""
    lines = [f"{'selection':<{wide}} {'fraction':>8} {'neurons':>8}{store}  {headline.label:>14}  {'of full':>8}"]
    for row in curve.itertuples():
        spread = "" if math.isnan(row.std) else f" ± {headline.scale * row.std:4.{digits}f}"
        bar = "█" * round(30 * row.ratio) if math.isfinite(row.ratio) else ""  # a full layer may be never right
        low, high = getattr(row, "ratio_low", math.nan), getattr(row, "ratio_high", math.nan)
        between = "" if math.isnan(low) else f"({100 * max(0, low):.1f} to {100 * high:.1f})"
        value = f"{headline.scale * row.mean:6.{digits}f}{unit}{spread:<7}"
        lines.append(
            f"{row.selection:<{wide}} {row.fraction:>8g} {row.neurons:>8}{f' {row.bytes:>8}' if store else ''}  "
            f"{value:<{len(headline.label)}}  {100 * row.ratio:6.1f} % {between:<16} {bar}"
        )
    return lines
