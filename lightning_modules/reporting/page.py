"""`report.html`: all that a run found in one file that a person can mail; nothing outside it is needed to read it."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules.measures.measure import Column
from lightning_modules.results.redundancy import RULES
from lightning_modules.results.results import Results
from lightning_modules.subsets.selections import FULL

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.answer {{ font-size: 1.15rem; border-left: 4px solid #0072b2; padding-left: 1rem; }}
.note {{ border-left: 4px solid #d55e00; padding-left: 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ font-size: .85rem; color: #444; }}
pre {{ font-size: .8rem; background: #f5f5f5; padding: .7rem; overflow-x: auto; }}
@media print {{ pre {{ white-space: pre-wrap; }} figure, tr {{ break-inside: avoid; }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(results: Results, summary: Mapping[str, Any], pictures: Mapping[Path, str], settings: str) -> str:
    """Return `report.html`.

    Args:
        results: The run's.
        summary: What `summary.json` holds.
        pictures: Captions by SVG file.
        settings: What `config.yaml` holds.
    """
    layers, label = summary["layers"], results.headline.label
    body = [f"<h1>{html.escape(results.title)}</h1>"]
    for layer in layers:
        place = f"Layer {layer['layer']}: " if len(layers) > 1 else ""
        body.append(f'<p class="answer">{html.escape(place + layer["answer"])}</p>')
    body += [f'<p class="note">{html.escape(remark)}</p>' for remark in summary["remarks"]]
    names = ", ".join(f"{layer['layer']} ({layer['width']:,} neurons)" for layer in layers)
    body.append(
        f"<p>Linear probes on subsets of the neurons of {html.escape(summary['backbone'])}, layer "
        f"{html.escape(names)}, tested on {summary['test_images']:,} images. The fraction of the answer was chosen on "
        f"the validation split.</p>"
    )
    body += [_figure(file, caption) for file, caption in pictures.items()]
    body += [f"<h2>{html.escape(label.capitalize())} by fraction</h2>", _table(_curve(results))]
    body.append("<h2>Diffused redundancy</h2>")
    body.append(
        f"<p>One minus the fraction that is enough to keep a share of the full layer's {html.escape(label)}, with its "
        f"95 % interval over subsets, and as many neurons. By <em>threshold</em> the smallest measured fraction that "
        f"reaches the share is enough; by <em>nearest</em> the one whose ratio lies nearest to it; by "
        f"<em>interpolated</em> the point where the line between measured fractions reaches it.</p>"
    )
    body.append(_table(_redundancy(results.redundancy("test"))))
    for measure in results.measures:
        for heading, rows in measure.shown(results, "test").items():
            body += [f"<h2>{html.escape(heading)}</h2>", _table(rows)]
    if settings:
        body += ["<h2>Configuration</h2>", f"<pre>{html.escape(settings)}</pre>"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    seconds = ", ".join(f"{part} {value:.1f} s" for part, value in summary["seconds"].items())
    body.append(f"<p>{html.escape(f'{versions}; {seconds}.')}</p>")
    return TEMPLATE.format(title=html.escape(results.title), body="\n".join(body))


def _figure(file: Path, caption: str) -> str:
    """Return a picture inside the page; as an image, so that two pictures' identifiers do not collide."""
    content = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{content}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(rows: pd.DataFrame) -> str:
    """Return a table that scrolls where it is wider than the page."""
    words = rows.rename(columns=lambda name: str(name).replace("_", " "))
    return f'<div class="wide">{words.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)}</div>'


def _curve(results: Results) -> pd.DataFrame:
    """Return the curve on test with its numbers in words."""
    curve, headline = results.curve("test"), results.headline
    rows = pd.DataFrame({"selection": curve["selection"]})
    if len(results.layers) > 1:
        rows.insert(0, "layer", curve["layer"])
    rows["fraction"] = curve["fraction"].map("{:.3g}".format)
    rows["neurons"] = curve["neurons"].map("{:,}".format)
    rows[headline.heading] = list(map(headline.words, curve["mean"], curve["std"]))
    rows["of full (%)"] = (100 * curve["ratio"]).map("{:.1f}".format)
    for column in results.columns:
        if column.name in curve and column.limits:
            rows[f"{column.heading}, 95 %"] = _with_limits(curve, column)
        elif column.name in curve:
            rows[column.heading] = list(map(column.words, curve[column.name], curve[f"{column.name}_std"]))
    return rows


def _with_limits(curve: pd.DataFrame, column: Column) -> list[str]:
    """Return a column's values with their limits; the full layer, which is not compared with itself, has none."""
    values = (curve[name].map(column.words) for name in (column.name, *column.limits))
    rows = zip(curve["selection"], *values, strict=True)
    return ["" if selection == FULL else f"{value} [{', '.join(limits)}]" for selection, value, *limits in rows]


def _redundancy(redundancy: pd.DataFrame) -> pd.DataFrame:
    """Return redundancies with a row per selection and share, and a column per rule."""
    rows = redundancy.copy()
    rows["value"] = [
        f"{row.redundancy:.3g}"
        + ("" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]")
        + ("" if pd.isna(row.neurons) else f", {row.neurons:,.0f} neurons")
        for row in rows.itertuples()
    ]
    keys = ["layer"] if rows["layer"].nunique() > 1 else []
    rows["share"] = (100 * rows["delta"]).map("{:g} %".format)
    keys += ["selection", "share"]
    wide = rows.pivot_table(index=keys, columns="rule", values="value", aggfunc="first", sort=False)
    return wide[list(RULES)].reset_index().rename_axis(columns=None)
