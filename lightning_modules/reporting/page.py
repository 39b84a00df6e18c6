"""`report.html`: all that a run found in one file that a person can mail; nothing outside it is needed to read it."""

import base64
import html
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules.results import curves as measures
from lightning_modules.subsets.selections import FULL

CAPTIONS = {
    "curve": "Accuracy on the test split, and similarity with the full layer where it was measured, against the "
    "fraction of neurons kept. Bands are one standard deviation over subsets.",
    "layers": "The same for all layers in one picture.",
    "inequality": "How unequal accuracy is over classes, against accuracy; a point is a probe. 0 is equal.",
    "classes": "Points of test accuracy that each class loses to the full layer, mean over subsets; those that lose "
    "most on top.",
    "ensembles": "Several subsets' probes together, beside one probe that sees as many neurons.",
    "neighbours": "How many of an image's nearest neighbours are still its nearest, by cosine similarity.",
}
LONGEST = 40
"""Classes that the table of classes lists."""
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


def page(
    summary: dict[str, Any],
    tables: dict[str, pd.DataFrame],
    redundancy: pd.DataFrame,
    pictures: dict[str, Path],
    settings: str,
) -> str:
    """Return `report.html`.

    Args:
        summary: What `summary.json` holds.
        tables: The run's, as `report` takes them.
        redundancy: As `measures.redundancy` returns it.
        pictures: SVG files by name.
        settings: What `config.yaml` holds.
    """
    title = f"{summary['task']}, {summary['backbone']}"
    layers = [summary, *summary.get("further_layers", [])]
    body = [f"<h1>{html.escape(title)}</h1>"]
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
    body += [_figure(name, file) for name, file in pictures.items()]
    body.append("<h2>Accuracy by fraction</h2>")
    body.append(_table(_curve(measures.curve(tables["results"], "test"))))
    body.append("<h2>Diffused redundancy</h2>")
    body.append(
        "<p>One minus the fraction that is enough to keep a share of the full layer's accuracy, with its 95 % interval "
        "over subsets, and as many neurons. By <em>threshold</em> the smallest measured fraction that reaches the "
        "share is enough; by <em>nearest</em> the one whose ratio lies nearest to it; by <em>interpolated</em> the "
        "point where the line between measured fractions reaches it.</p>"
    )
    body.append(_table(_redundancy(redundancy)))
    losses = measures.class_losses(tables["classes"], "test")
    if len(losses):
        body.append("<h2>Classes that lose most</h2>")
        body.append(_table(_classes(losses)))
    for name, heading in (("layers", "Layers"), ("ensembles", "Ensembles")):
        rows = tables.get(name, pd.DataFrame())
        if len(rows):
            body += [f"<h2>{heading}</h2>", _table(rows[rows["split"] == "test"].drop(columns="split"))]
    if settings:
        body += ["<h2>Configuration</h2>", f"<pre>{html.escape(settings)}</pre>"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    seconds = ", ".join(f"{part} {value:.1f} s" for part, value in summary["seconds"].items())
    body.append(f"<p>{html.escape(f'{versions}; {seconds}.')}</p>")
    return TEMPLATE.format(title=html.escape(title), body="\n".join(body))


def _figure(name: str, file: Path) -> str:
    """Return a picture inside the page; as an image, so that two pictures' identifiers do not collide."""
    content = base64.b64encode(file.read_bytes()).decode()
    caption = CAPTIONS[name]
    return (
        f'<figure><img src="data:image/svg+xml;base64,{content}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(rows: pd.DataFrame) -> str:
    """Return a table that scrolls where it is wider than the page."""
    words = rows.rename(columns=lambda name: str(name).replace("_", " "))
    return f'<div class="wide">{words.to_html(index=False, border=0, na_rep="", float_format=_short)}</div>'


def _short(value: float) -> str:
    return f"{value:.4g}"


def _curve(curve: pd.DataFrame) -> pd.DataFrame:
    """Return a curve with its numbers in words."""
    rows = pd.DataFrame({"selection": curve["selection"]})
    if curve["layer"].nunique() > 1:
        rows.insert(0, "layer", curve["layer"])
    rows["fraction"] = curve["fraction"].map("{:.3g}".format)
    rows["neurons"] = curve["neurons"].map("{:,}".format)
    rows["accuracy (%)"] = _with_spread(100 * curve["mean"], 100 * curve["std"], 1)
    rows["of full (%)"] = (100 * curve["ratio"]).map("{:.1f}".format)
    if "difference" in curve:
        limits = zip(
            curve["difference"], curve["difference_low"], curve["difference_high"], curve["selection"], strict=True
        )
        rows["difference in points (95 %)"] = [
            "" if name == FULL else f"{100 * middle:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for middle, low, high, name in limits
        ]
    named = {"cka": "CKA", "cka_debiased": "CKA, debiased", "gini": "Gini"}
    named |= {"coefficient_of_variation": "coefficient of variation", "largest_gap": "largest gap"}
    for column, name in named.items():
        if column in curve:
            rows[name] = _with_spread(curve[column], curve[f"{column}_std"], 3)
    return rows


def _with_spread(means: pd.Series, spreads: pd.Series, digits: int) -> list[str]:
    return [
        "" if pd.isna(mean) else f"{mean:.{digits}f}" + ("" if pd.isna(spread) else f" ± {spread:.{digits}f}")
        for mean, spread in zip(means, spreads, strict=True)
    ]


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
    return wide[list(measures.RULES)].reset_index().rename_axis(columns=None)


def _classes(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the points that the classes lose which lose most, a column per fraction, for the first selection."""
    first = losses[(losses[["layer", "selection"]] == losses.iloc[0][["layer", "selection"]]).all(axis=1)]
    first = first[first["class"].isin(first["class"].unique()[:LONGEST])]
    wide = first.pivot_table(index="class", columns="fraction", values="lost", sort=False).sort_index(axis=1)
    words = (100 * wide).map("{:.1f}".format).rename(columns="{:.3g}".format)
    full = first.drop_duplicates("class").set_index("class")
    words.insert(0, "full (%)", (100 * full["full_accuracy"]).map("{:.1f}".format))
    words.insert(0, "test images", full["images"].astype(str))
    return words.reset_index().rename_axis(columns=None)
