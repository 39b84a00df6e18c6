"""Pictures of a run and of several, and what all pictures share: readable in print and by the colour-blind.

What is told apart differs in colour, marker and line style. Legends lie outside the axes, where they hide nothing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lightning_modules.files import atomic
from lightning_modules.measures.measure import Measure, Picture
from lightning_modules.results.redundancy import MANY_DELTAS
from lightning_modules.results.results import ANSWERED, Results
from lightning_modules.results.tables import Column, by_series
from lightning_modules.subsets.selections import FULL

mpl.rcParams["text.parse_math"] = False  # names of classes, layers and tasks are no formulas
if mpl.rcParams["font.sans-serif"] == mpl.rcParamsDefault["font.sans-serif"]:  # what a user chose stays
    mpl.rcParams["font.sans-serif"] = ["DejaVu Sans"]  # the first of them; each further one is sought for every text
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4A21")
"""Okabe and Ito's colours, told apart with every common form of colour blindness, and a dark brown."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
LINES = ("-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1, 1)))
Format = Literal["png", "svg", "pdf"]
FORMATS: list[Format] = ["png", "svg"]
"""What pictures are written as, unless asked for otherwise."""
Style = dict[str, Any]
FAINT: Style = {"alpha": 0.5, "markerfacecolor": "white", "linewidth": 1}  # a panel's further columns
GREY: Style = {"color": "gray", "marker": "", "linewidth": 1}  # references in a panel
FAINT_SELECTIONS = 3  # up to which they have room


def save(figure: Figure, path: Path, formats: Format | list[Format]) -> list[Path]:
    """Write a figure as a file of each format and return the files; equal figures give equal files."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)  # once for all
    figure.set_layout_engine("none")
    files = [path.with_suffix(f".{each}") for each in ([formats] if isinstance(formats, str) else formats)]
    for target in files:
        figure.set_dpi(150)
        with atomic(target) as file, mpl.rc_context({"svg.hashsalt": path.stem, "pdf.fonttype": 42}):
            # Not `savefig`, which goes through everything once more before it draws.
            if target.suffix == ".png":
                FigureCanvasAgg(figure).print_png(file)
            elif target.suffix == ".svg":
                FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
            else:
                FigureCanvasPdf(figure).print_pdf(file, metadata={"CreationDate": None})
    return files


def curve(results: Results, split: str) -> dict[str, Picture]:
    """Draw the headline metric against fraction, and beside it a panel for each measure with columns to draw.

    A row per layer, a line per selection; the share of the plain answer is marked.
    """
    means, headline = by_series(results.curve(split)), results.headline
    beside = [(measure, [c for c in measure.columns if c.drawn and c.name in means]) for measure in results.measures]
    beside = [(measure, columns) for measure, columns in beside if columns]
    figure, rows = grid(len(results.layers), 1 + len(beside), results.title)
    selections = styles(means.loc[means["selection"] != FULL, "selection"])
    several = len(results.layers) > 1
    for (axes, *panels), layer in zip(rows, results.layers, strict=True):
        of_layer = means[means["layer"] == layer]
        references(axes, of_layer, headline, ANSWERED, with_neurons=not several)
        if results.target.chance is not None:
            chance = headline.scale * results.target.chance
            axes.axhline(chance, color="gray", linewidth=1, linestyle=":", label="chance")
        for selection, style in selections.items():
            points = of_layer[of_layer["selection"] == selection]
            line(axes, points, style, seeds_label(selection, points), "mean", "std", scale=headline.scale)
        fraction_axis(axes, means)
        value_axis(axes, f"{split} {headline.heading}", f"layer {layer}" if several else "")
        for panel, (measure, columns) in zip(panels, beside, strict=True):
            _panel(panel, measure, columns, of_layer, selections)
            fraction_axis(panel, means)
    legend(figure, rows[:, 0])
    also = "".join(f", and {measure.panel or columns[0].label}" for measure, columns in beside)
    caption = f"{headline.label.capitalize()} on the {split} split{also}{also and ','} against the fraction of neurons "
    return {"curve": Picture(figure, f"{caption}kept. Bands are one standard deviation over subsets.")}


def _panel(axes: Axes, measure: Measure, columns: list[Column], rows: pd.DataFrame, drawn: dict[str, Style]) -> None:
    """Draw a measure's columns of a layer's curve: the first with its spread, further ones faint, if there is room.

    References are grey.
    """
    references = [column for column in columns if column.reference]
    first, *others = [column for column in columns if not column.reference]
    greys = {column.name: GREY | {"linestyle": LINES[place]} for place, column in enumerate(references)}
    others = others if len(drawn) <= FAINT_SELECTIONS else []
    for selection, style in drawn.items():
        points = rows[rows["selection"] == selection]
        line(axes, points, style, "", first.name, f"{first.name}_std", scale=first.scale)
        for column in others:
            line(axes, points, style | FAINT, "", column.name, scale=column.scale)
        for column in references:
            line(axes, points, greys[column.name], "", column.name, scale=column.scale)
    axes.set_ylabel(measure.panel or first.heading)
    if measure.panel_limits:
        axes.set_ylim(measure.panel_limits)
    if others or references:
        for column in (first, *others, *references):
            options: Style = {"color": "gray", "marker": "o", "markersize": 4.5, "label": column.label}
            axes.plot([], [], **options | ({} if column is first else greys.get(column.name, FAINT)))
        axes.legend(fontsize=8, loc="best")


def redundancy(results: Results, split: str) -> dict[str, Picture]:
    """Draw diffused redundancy, by the threshold rule, against the share delta that is kept; a panel per layer."""
    found = by_series(results.redundancy(split, MANY_DELTAS).query("rule == 'threshold'"))
    title = "layer {}" if len(results.layers) > 1 else ""
    groups = found.groupby(["layer", "selection"], sort=False)
    figure = redundancies({(title.format(layer), name): rows for (layer, name), rows in groups}, results.title)
    caption = f"Diffused redundancy against the share of the full layer's {results.headline.label} that is kept, with "
    return {"redundancy": Picture(figure, f"{caption}95 % intervals over subsets and {split} {results.target.items}.")}


def redundancies(found: dict[tuple[str, str], pd.DataFrame], title: str = "") -> Figure:
    """Draw redundancies against delta, with 95 % bands: a panel per first name, a line per second.

    Rows are those of a single rule, as `Results.redundancy` returns them.
    """
    names = list(dict.fromkeys(panel for panel, _ in found))
    looks = styles(line for _, line in found)
    figure, flat = panels(len(names), title)
    for axes, panel in zip(flat, names, strict=True):
        for name, style in looks.items():
            if (panel, name) in found:
                rows = found[panel, name]
                axes.plot(rows["delta"], rows["redundancy"], label=name, linewidth=1.3, markersize=3.5, **style)
                band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(rows["delta"], rows["low"], rows["high"], **band)
        axes.set_xlabel("share of the full layer's metric kept, delta")
        axes.set_ylabel("diffused redundancy, DR(delta)")
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(panel, fontsize=9, loc="left")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    legend(figure, flat)
    return figure


def stores(results: Results, split: str) -> dict[str, Picture]:
    """Draw the headline metric against the bytes of a vector, if some have few bits: a line per number of bits.

    A panel per layer and selection, with its Pareto frontier.
    """
    headline, means = results.headline, results.curve(split)
    if not results.several_bits:
        return {}
    means = means.assign(store=[f"{bits} bit{'s' * (bits > 1)} a number" for bits in means["bits"]])
    few = means[means["selection"] != FULL].groupby(["layer", "selection"], sort=False)
    figure, flat = panels(len(few), results.title)
    looks, others = styles(means["store"]), results.table("product_quantisation", split)
    for axes, ((layer, selection), rows) in zip(flat, few, strict=True):
        full = means[(means["layer"] == layer) & (means["selection"] == FULL)]
        rows = pd.concat([rows, full]).sort_values("neurons")
        rows = rows.drop_duplicates(["bits", "bytes"], keep="last")
        references(axes, full, headline, ANSWERED, with_neurons=False)
        best = pareto_frontier(rows.assign(saved=-rows["bytes"]), "saved", "mean")[::-1]
        options: Style = {"color": "gray", "linewidth": 5, "alpha": 0.3, "zorder": 1}
        axes.step(best["bytes"], headline.scale * best["mean"], where="post", label="Pareto frontier", **options)
        for store, style in looks.items():
            line(axes, rows[rows["store"] == store], style, store, "mean", "std", "bytes", headline.scale)
        if len(others):
            grey: Style = {"color": "gray", "linestyle": ":", "marker": "x"}
            of_layer = others[others["layer"] == layer].sort_values("bytes")
            line(axes, of_layer, grey, "product quantisation", headline.name, "", "bytes", headline.scale)
        logarithmic_axis(axes, rows["bytes"], "bytes of a vector")
        which = f"layer {layer}, " if len(results.layers) > 1 else ""
        value_axis(axes, f"{split} {headline.heading}", f"{which}{seeds_label(selection, rows)}")
    legend(figure, flat)
    caption = (
        f"{headline.label.capitalize()} on the {split} split against the bytes that a vector takes, by the bits of "
    )
    return {"bytes": Picture(figure, f"{caption}its numbers. No store off the Pareto frontier is worth its bytes.")}


def layers(results: Results, split: str) -> dict[str, Picture]:
    """Draw the headline metric against fraction for all layers, if there are several, in one panel per selection."""
    if len(results.layers) == 1:
        return {}
    means, headline = by_series(results.curve(split)), results.headline
    selections = list(dict.fromkeys(means.loc[means["selection"] != FULL, "selection"]))
    figure, flat = panels(len(selections), results.title)
    for axes, selection in zip(flat, selections, strict=True):
        for layer, style in styles(results.layers).items():
            rows = means[(means["layer"] == layer) & means["selection"].isin([selection, FULL])]
            label = f"{layer}, {rows['neurons'].max():,} neurons"
            line(axes, rows.sort_values("fraction"), style, label, "mean", "std", scale=headline.scale)
        fraction_axis(axes, means)
        value_axis(axes, f"{split} {headline.heading}", selection)
    legend(figure, flat)
    return {"layers": Picture(figure, f"{headline.label.capitalize()} of all layers in one picture.")}


def grid(rows: int, columns: int, title: str = "") -> tuple[Figure, np.ndarray]:
    """Return a figure with a grid of axes, shape (rows, columns)."""
    figure = Figure(figsize=(6.4 if columns == 1 else 4.8 * columns, 3.9 * rows + 0.5), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(count: int, title: str = "") -> tuple[Figure, list[Axes]]:
    """Return a figure with so many axes, at most two in a row."""
    figure, axes = grid(-(-count // 2), min(2, count), title)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return how each name is drawn."""
    cycles = {"color": COLOURS, "marker": MARKERS, "linestyle": LINES}
    return {
        name: {key: cycle[index % len(cycle)] for key, cycle in cycles.items()}
        for index, name in enumerate(dict.fromkeys(names))
    }


def line(
    axes: Axes, rows: pd.DataFrame, style: Style, label: str, y: str, std: str = "", x: str = "fraction", scale: int = 1
) -> None:
    """Draw a column of rows against another, with a band of one standard deviation to either side, if it is named."""
    rows = rows[rows[y].notna()]  # of some fractions alone, as where others were not attacked
    values = scale * rows[y]
    options: Style = {"linewidth": 1.3, "markersize": 4.5, "label": label}
    axes.plot(rows[x], values, **options | style)
    if std:
        spread = scale * rows[std].fillna(0)
        band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(rows[x], values - spread, values + spread, **band)


def references(axes: Axes, rows: pd.DataFrame, headline: Column, delta: float, with_neurons: bool) -> None:
    """Mark the full layer's metric and the share `delta` of it; rows are those of a layer's curve."""
    full = rows[rows["selection"] == FULL].iloc[0]
    label = f"full layer, {full['neurons']:,} neurons" if with_neurons else "full layer"
    value = headline.scale * full["mean"]
    axes.axhline(value, color="black", linewidth=1, label=label)
    axes.axhline(delta * value, color="black", linewidth=1, linestyle="--", label=f"{100 * delta:g} % of it")


def seeds_label(name: str, rows: pd.DataFrame) -> str:
    """Return a name with the number of subsets behind its means, where they are several."""
    seeds = int(rows["seeds"].max())
    return f"{name}, mean ± std of {seeds} subsets" if seeds > 1 else str(name)


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Name what axes show, each name once, below all of them."""
    named: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    columns = 2 if figure.get_figwidth() < 8 else 3
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=columns)


def value_axis(axes: Axes, label: str, title: str = "") -> None:
    """Let the y axis begin at zero, or where values are below it as far down as up, and name it and the panel."""
    axes.set_ylabel(label)
    axes.set_ylim(bottom=min(0.0, max(axes.dataLim.y0, -axes.dataLim.y1)))
    axes.set_title(title, fontsize=9, loc="left")


def fraction_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Scale fractions by logarithm, as what happens, happens below a tenth."""
    logarithmic_axis(axes, [1.0, *rows["fraction"]], "fraction of neurons")


def logarithmic_axis(axes: Axes, values: Iterable[float], label: str) -> None:
    """Scale the x axis by logarithm, and name it and as many of its values as have room."""
    found = sorted(set(values), reverse=True)
    ticks: list[float] = []
    for value in found:
        if not ticks or ticks[-1] / value > 1.7:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.set_xlim(found[-1] / 1.2, 1.1 * found[0])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    axes.set_xlabel(label)


def short(value: float) -> str:
    """Return a fraction, or a number of neurons, as short as it is told apart."""
    return f"{value:.2g}" if value < 1 else f"{value:,.0f}"


def tasks(
    curves: dict[tuple[str, str], pd.DataFrame],
    headline: Column,
    reference: pd.DataFrame | None,
    delta: float,
    whole: pd.DataFrame,
) -> Figure:
    """Draw tasks side by side: a panel for each, a line for each representation, reference curves behind them.

    Curves are rows as `Results.curve` returns them, by task and representation; of a reference, rows of `task`,
    `pretraining`, `fraction`, `accuracy_mean`, `accuracy_std`. Delta is marked where there is a single representation.
    Networks that were trained as a whole, rows of `task`, `backbone` and the metric as shown, are horizontal lines.
    """
    names = list(dict.fromkeys(task for task, _ in curves))
    looks = styles(name for _, name in curves)
    figure, grid = panels(len(names))
    for axes, task in zip(grid, names, strict=True):
        extent = [curve for (of, _), curve in curves.items() if of == task]
        if reference is not None:
            theirs = reference[reference["task"] == task]
            for index, (name, rows) in enumerate(theirs.groupby("pretraining", sort=False)):
                style = {"color": "gray", "marker": "+x1234"[index % 6], "linestyle": LINES[index % 4]}
                label = f"reference: {name}"
                line(axes, rows, style, label, "accuracy_mean", "accuracy_std", scale=100)
                extent.append(rows)
        for name, style in looks.items():
            if (task, name) in curves:
                rows = curves[task, name].sort_values("fraction")
                if len(looks) == 1:
                    references(axes, rows, headline, delta, with_neurons=False)
                rows = rows.drop_duplicates("fraction")
                line(axes, rows, style, name, "mean", "std", scale=headline.scale)
        for index, (_, name, value, *_) in enumerate(whole[whole["task"] == task].itertuples(index=False)):
            axes.axhline(value, color="gray", linewidth=1, linestyle=LINES[index % len(LINES)], label=f"whole: {name}")
        fraction_axis(axes, pd.concat(extent))
        value_axis(axes, f"test {headline.heading}", task)
    legend(figure, grid)
    return figure


def frontier(table: pd.DataFrame, headline: Column, delta: float) -> Figure:
    """Draw the full layer's metric against DR(delta), with the Pareto frontier of each task.

    The table has a row per task and representation (`series`): `redundancy`, its limits `low` and `high`, and `full`.
    """
    table = table.assign(full=headline.scale * table["full"])
    by_task = table["series"].nunique() > 1
    groups = list(table.groupby("task", sort=False)) if by_task else [("", table)]
    figure, grid = panels(len(groups))
    key = "series" if by_task else "task"
    looks = styles(table[key])
    for axes, (task, rows) in zip(grid, groups, strict=True):
        best = pareto_frontier(rows, "redundancy", "full")
        if len(best) > 1:
            options: Style = {"color": "gray", "linestyle": "--", "linewidth": 1, "zorder": 1}
            axes.step(best["redundancy"], best["full"], where="pre", label="Pareto frontier", **options)
        for row in rows.to_dict("records"):
            style = looks[row[key]] | {"linestyle": "", "markersize": 7, "elinewidth": 1, "capsize": 3}
            known = np.isfinite([row["low"], row["high"]]).all()
            reach = [[max(0, row["redundancy"] - row["low"])], [max(0, row["high"] - row["redundancy"])]]
            axes.errorbar(row["redundancy"], row["full"], xerr=reach if known else None, label=row[key], **style)
        axes.set_xlabel(f"diffused redundancy, DR({delta:g})")
        axes.set_ylabel(f"full layer's test {headline.heading}")
        axes.set_xlim(-0.03, 1.03)
        axes.set_title(task, fontsize=9, loc="left")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    legend(figure, grid)
    return figure


def pareto_frontier(rows: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """Return the rows that no other beats in both of two columns of which more is better, by the first, ascending.

    Of redundancy and performance it is that of Nanda et al. (2023).
    """
    rows = rows.sort_values([one, other], ascending=False)
    before = rows[other].cummax().shift(fill_value=-np.inf)
    return rows[rows[other] > before][::-1]
