"""Pages in one file that a person can mail, with nothing outside it: `report.html`, all that a run found."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from lightning_modules.results.redundancy import RULES
from lightning_modules.results.results import Results
from lightning_modules.results.tables import Column, by_series
from lightning_modules.subsets.selections import FULL


def page(results: Results, summary: Mapping[str, Any], pictures: Mapping[Path, str], settings: str) -> str:
    """Return `report.html`, from what `summary.json` and `config.yaml` hold, and captions by picture."""
    layers, label = summary["layers"], results.headline.label
    tables = [table for measure in results.measures for table in measure.shown(results, "test").items()]
    answers = [f"Layer {each['layer']}: {each['answer']}" if len(layers) > 1 else each["answer"] for each in layers]
    layer_names = ", ".join(f"{layer['layer']} ({layer['width']:,} neurons)" for layer in layers)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    content = {
        "answers": "\n".join(f'<p class="answer">{escape(answer)}</p>' for answer in answers),
        "remarks": "\n".join(f'<p class="note">{escape(remark)}</p>' for remark in summary["remarks"]),
        "backbone": escape(summary["backbone"]),
        "layers": escape(layer_names),
        "images": f"{summary['test_images']:,}",
        "items": escape(results.target.items),
        "pictures": "\n".join(figure(file, caption) for file, caption in pictures.items()),
        "heading": escape(label.capitalize()),
        "curve": table(_curve(results)),
        "metric": escape(label),
        "redundancy": table(_redundancy(results.redundancy("test"))),
        "tables": "\n".join(f"<h2>{escape(heading)}</h2>\n{table(rows)}" for heading, rows in tables),
        "configuration": f"<h2>Configuration</h2>\n<pre>{escape(settings)}</pre>" if settings else "",
        "versions": escape(versions),
        "seconds": escape(", ".join(f"{part} {value:.1f} s" for part, value in summary["seconds"].items())),
    }
    return shell(results.title, _fill("run.html", content))


def shell(title: str, content: str) -> str:
    """Return a page with a title and what stands below it, as HTML."""
    return _fill("page.html", {"title": escape(title), "content": content})


def _fill(template: str, content: Mapping[str, str]) -> str:
    return Template(Path(__file__).with_name(template).read_text(encoding="utf-8")).substitute(content)


def figure(file: Path, caption: str) -> str:
    """Return a picture inside the page; as an image, so that two pictures' identifiers do not collide."""
    content = base64.b64encode(file.read_bytes()).decode()
    kind = {".svg": "svg+xml", ".png": "png"}[file.suffix]
    return (
        f'<figure><img src="data:image/{kind};base64,{content}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(rows: pd.DataFrame) -> str:
    """Return a table that scrolls where it is wider than the page."""
    words = rows.rename(columns=lambda name: str(name).replace("_", " "))
    return f'<div class="wide">{words.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)}</div>'


def _curve(results: Results) -> pd.DataFrame:
    """Return the curve on test with its numbers in words."""
    curve, headline = by_series(results.curve("test")), results.headline
    rows = curve[["layer", "selection"] if len(results.layers) > 1 else ["selection"]].copy()
    rows["fraction"] = curve["fraction"].map("{:.3g}".format)
    for name in ("neurons", "bytes") if results.several_bits else ("neurons",):
        rows[name] = curve[name].map("{:,}".format)
    rows[headline.heading] = list(map(headline.words, curve["mean"], curve["std"]))
    for column in (Column("ratio", "of full", "%", 1), headline._replace(name="difference", label="difference")):
        words = curve[column.name].map(column.words)
        if f"{column.name}_low" in curve:
            low, high = (curve[f"{column.name}_{side}"].map(column.words) for side in ("low", "high"))
            words += (" [" + low + ", " + high + "]").mask(curve["selection"] == FULL, "")
        rows[column.heading] = words
    for column in results.columns:
        if column.name in curve:
            rows[column.heading] = list(map(column.words, curve[column.name], curve[f"{column.name}_std"]))
    return rows


def _redundancy(redundancy: pd.DataFrame) -> pd.DataFrame:
    """Return redundancies with a row per selection and share, and a column per rule."""
    values = [
        "never enough"
        if pd.isna(row.redundancy)
        else f"{row.redundancy:.3g}"
        + ("" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]")
        + f", {row.neurons:,.0f} neurons"
        for row in redundancy.itertuples()
    ]
    rows = by_series(redundancy).assign(value=values, share=(100 * redundancy["delta"]).map("{:g} %".format))
    keys = [*(["layer"] if rows["layer"].nunique() > 1 else []), "selection", "share"]
    wide = rows.pivot_table(index=keys, columns="rule", values="value", aggfunc="first", sort=False)
    return wide[list(RULES)].reset_index().rename_axis(columns=None)
