"""Pictures of one run and of several: readable in print and by the colour-blind.

What is told apart differs in colour, marker and line style. Legends lie outside the axes, where they hide nothing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lightning_modules.files import whole
from lightning_modules.results import curves as measures
from lightning_modules.subsets.selections import FULL

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4A21")
"""Okabe and Ito's colours, told apart with every common form of colour blindness, and a dark brown."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
LINES = ("-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1, 1)))
DEBIASED_LINES = 3
"""Selections up to which the debiased CKA has room beside the plain one."""
ROWS_OF_CLASSES = 30
"""Classes that the heat map has room for; those that lose most."""


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG and return both files; equal figures give equal files."""
    files = [path.with_suffix(ending) for ending in (".png", ".svg")]
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)  # once for both
    figure.set_layout_engine("none")
    for path in files:
        with whole(path) as file, mpl.rc_context({"svg.hashsalt": path.stem}):
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(file, dpi=150, metadata=metadata)
    return files


def run_figures(tables: dict[str, pd.DataFrame], split: str, title: str, delta: float) -> dict[str, Figure]:
    """Return what there is to show of a run, by name.

    Args:
        tables: Those of a run by the names of their files, as `report` takes them.
        split: `val` or `test`.
        title: What was measured.
        delta: Share of the full layer's accuracy to mark.
    """
    curve = measures.curve(tables["results"], split)
    losses = measures.class_losses(tables["classes"], split)
    found = {"curve": curves(curve, title, losses["class"].nunique(), delta)}
    if "gini" in curve:
        rows = tables["results"]
        found["inequality"] = inequality(measures.complete(rows[rows["split"] == split]), title)
    if len(losses):
        found["classes"] = class_losses(losses, title)
    if curve["layer"].nunique() > 1:
        found["layers"] = layers(curve, title)
    for name, draw in (("ensembles", ensembles), ("neighbours", neighbours)):
        rows = tables.get(name, pd.DataFrame({"split": []}))
        rows = rows[rows["split"] == split]
        if len(rows):
            found[name] = draw(rows, title)
    return found


def curves(curve: pd.DataFrame, title: str, classes: int, delta: float) -> Figure:
    """Draw accuracy, and CKA where it was measured, against fraction: a row per layer, a line per selection.

    Args:
        curve: As `measures.curve` returns it.
        title: What was measured.
        classes: Number of classes; chance is one over it.
        delta: Share of the full layer's accuracy to mark.
    """
    names = list(dict.fromkeys(curve["layer"]))
    similar = "cka" in curve
    figure, grid = _figure(len(names), 1 + similar, title)
    styles = _styles(curve.loc[curve["selection"] != FULL, "selection"])
    for (accuracy, *similarity), layer in zip(grid, names, strict=True):
        rows = curve[curve["layer"] == layer]
        _references(accuracy, rows, delta, len(names) == 1)
        accuracy.axhline(100 / classes, color="gray", linewidth=1, linestyle=":", label="chance")
        for selection, style in styles.items():
            of_it = rows[rows["selection"] == selection]
            if of_it.empty:
                continue
            _line(accuracy, of_it, "mean", "std", style, _label(selection, of_it), scale=100)
            for axes in similarity:
                _line(axes, of_it, "cka", "cka_std", style)
                if "cka_debiased" in of_it and len(styles) <= DEBIASED_LINES:
                    faint = style | {"alpha": 0.5, "markerfacecolor": "white", "linewidth": 1}
                    _line(axes, of_it, "cka_debiased", None, faint)
        _fraction_axis(accuracy, curve)
        accuracy.set_ylabel("test accuracy (%)")
        accuracy.set_ylim(bottom=0)
        for axes in similarity:
            _fraction_axis(axes, curve)
            axes.set_ylabel("CKA with the full layer")
            axes.set_ylim(0, 1.03)
            if "cka_debiased" in curve and len(styles) <= DEBIASED_LINES:
                axes.plot([], [], color="gray", marker="o", markersize=4.5, label="CKA")
                faint = {"alpha": 0.5, "markerfacecolor": "white", "linewidth": 1}
                axes.plot([], [], color="gray", marker="o", markersize=4.5, label="CKA, debiased", **faint)
                axes.legend(fontsize=8, loc="lower right")
        if len(names) > 1:
            accuracy.set_title(f"layer {layer}", fontsize=9, loc="left")
    _legend(figure, grid[0][0])
    return figure


def layers(curve: pd.DataFrame, title: str) -> Figure:
    """Draw accuracy against fraction for all layers in one panel per selection; `curve` as for `curves`."""
    selections = list(dict.fromkeys(curve.loc[curve["selection"] != FULL, "selection"]))
    figure, grid = _figure(-(-len(selections) // 2), min(2, len(selections)), title)
    styles = _styles(curve["layer"])
    panels = [axes for row in grid for axes in row]
    for axes, selection in zip(panels, selections, strict=False):
        for layer, style in styles.items():
            rows = curve[(curve["layer"] == layer) & curve["selection"].isin([selection, FULL])]
            label = f"{layer}, {rows['neurons'].max():,} neurons" if "neurons" in rows else str(layer)
            _line(axes, rows.sort_values("fraction"), "mean", "std", style, label, scale=100)
        _fraction_axis(axes, curve)
        axes.set_title(selection, fontsize=9, loc="left")
        axes.set_ylabel("test accuracy (%)")
        axes.set_ylim(bottom=0)
    _hide(panels[len(selections) :])
    _legend(figure, panels[0])
    return figure


def inequality(rows: pd.DataFrame, title: str) -> Figure:
    """Draw Gini coefficient and coefficient of variation over classes against accuracy: a point per probe.

    Args:
        rows: Rows of one split as in `results.csv`, with the full layer.
        title: What was measured.
    """
    names = list(dict.fromkeys(rows["layer"]))
    figure, grid = _figure(len(names), 2, title)
    styles = _styles(rows.loc[rows["selection"] != FULL, "selection"])
    styles[FULL] = {"color": "black", "marker": "*", "markersize": 9}
    named = {"gini": "Gini coefficient over classes", "coefficient_of_variation": "coefficient of variation"}
    for panels, layer in zip(grid, names, strict=True):
        for axes, (column, name) in zip(panels, named.items(), strict=True):
            for selection, style in styles.items():
                points = rows[(rows["layer"] == layer) & (rows["selection"] == selection)]
                look = {"markersize": 4, "alpha": 0.7} | style | {"linestyle": ""}
                label = "full layer" if selection == FULL else selection
                axes.plot(100 * points["accuracy"], points[column], label=label, **look)
            axes.set_xlabel("test accuracy (%)")
            axes.set_ylabel(name)
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        if len(names) > 1:
            panels[0].set_title(f"layer {layer}", fontsize=9, loc="left")
    _legend(figure, grid[0][0])
    return figure


def class_losses(losses: pd.DataFrame, title: str) -> Figure:
    """Draw a heat map of the points that each class loses at each fraction, by the first selection of the first layer.

    Args:
        losses: As `measures.class_losses` returns it.
        title: What was measured.
    """
    layer, selection = losses.iloc[0][["layer", "selection"]]
    rows = losses[(losses["layer"] == layer) & (losses["selection"] == selection)]
    names, fractions = list(dict.fromkeys(rows["class"])), sorted(rows["fraction"].unique())
    shown = names[:ROWS_OF_CLASSES]
    values = 100 * rows.pivot_table(index="class", columns="fraction", values="lost").loc[shown, fractions].to_numpy()
    figure = Figure(figsize=(2.6 + 0.55 * len(fractions), 1.6 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bound = max(1.0, float(np.abs(values).max()))
    image = axes.imshow(values, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 * bound else "black"
        axes.text(column, row, f"{value:z.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(fractions)), [_short(fraction) for fraction in fractions], fontsize=8, rotation=45)
    axes.set_yticks(range(len(shown)), [str(name) for name in shown], fontsize=8)
    axes.set_xlabel(f"fraction of neurons ({selection})")
    figure.colorbar(image, label="points lost to the full layer")
    some = f", the {len(shown)} of {len(names)} classes that lose most" if len(shown) < len(names) else ""
    place = f", {layer}" if losses["layer"].nunique() > 1 else ""
    figure.suptitle(f"{title}{place}{some}", fontsize=10)
    return figure


def ensembles(rows: pd.DataFrame, title: str) -> Figure:
    """Draw accuracy against the neurons used: ensembles by rule, beside single probes with as many.

    Args:
        rows: Rows of one split as in `ensembles.csv`.
        title: What was measured.
    """
    panels = list(rows.groupby(["layer", "selection"], sort=False))
    figure, grid = _figure(-(-len(panels) // 2), min(2, len(panels)), title)
    flat = [axes for row in grid for axes in row]
    rows = rows.assign(
        series=[f"{m} probes, {r.replace('_', ' ')}" for m, r in zip(rows["members"], rows["rule"], strict=True)]
    )
    styles = _styles(["single", *rows["series"]])
    for axes, ((layer, selection), _) in zip(flat, panels, strict=False):
        group = rows[(rows["layer"] == layer) & (rows["selection"] == selection)]
        single = group.drop_duplicates("single_neurons").sort_values("single_neurons")
        look = {"linewidth": 1.3, "markersize": 4.5}
        axes.plot(
            single["single_neurons"], 100 * single["single_accuracy"], label="one probe", **look | styles["single"]
        )
        for series, points in group.sort_values("neurons").groupby("series", sort=False):
            axes.plot(points["neurons"], 100 * points["accuracy"], label=series, **look | styles[series])
        _logarithmic(axes, [*group["neurons"], *group["single_neurons"]])
        axes.set_xlabel("neurons together")
        axes.set_ylabel("test accuracy (%)")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{layer}, {selection}", fontsize=9, loc="left")
    _hide(flat[len(panels) :])
    _legend(figure, flat[0])
    return figure


def neighbours(rows: pd.DataFrame, title: str) -> Figure:
    """Draw the share of nearest neighbours that subsets keep against fraction.

    Args:
        rows: Rows of one split as in `neighbours.csv`.
        title: What was measured.
    """
    figure, ((axes,),) = _figure(1, 1, title)
    rows = rows[rows["selection"] != FULL]
    several = rows["layer"].nunique() > 1
    rows = rows.assign(series=rows["layer"] + " " + rows["selection"] if several else rows["selection"])
    groups = rows.groupby(["series", "fraction"], sort=False)["kept"]
    kept = groups.agg(mean="mean", std=lambda values: values.std(ddof=0), seeds="size").reset_index()
    for series, style in _styles(kept["series"]).items():
        points = kept[kept["series"] == series].sort_values("fraction")
        _line(axes, points, "mean", "std", style, _label(series, points), scale=100)
    _fraction_axis(axes, kept)
    axes.set_ylabel(f"of the {rows['neighbours'].iloc[0]} nearest neighbours kept (%)")
    axes.set_ylim(0, 103)
    _legend(figure, axes)
    return figure


def tasks(curves: dict[tuple[str, str], pd.DataFrame], reference: pd.DataFrame | None, delta: float) -> Figure:
    """Draw tasks side by side: a panel for each, a line for each representation, reference curves behind them.

    Args:
        curves: Rows as `measures.curve` returns them with a full one, by task and representation.
        reference: Rows of `task`, `pretraining`, `fraction`, `accuracy_mean`, `accuracy_std`, or none.
        delta: Share of the full layer's accuracy, marked where there is a single representation.
    """
    names = list(dict.fromkeys(task for task, _ in curves))
    series = list(dict.fromkeys(name for _, name in curves))
    figure, grid = _figure(-(-len(names) // 2), min(2, len(names)))
    panels = [axes for row in grid for axes in row]
    styles = _styles(series)
    drawn: dict[str, Any] = {}
    for axes, task in zip(panels, names, strict=False):
        extent = [curve for (of, _), curve in curves.items() if of == task]
        if reference is not None:
            theirs = reference[reference["task"] == task]
            for place, (name, rows) in enumerate(theirs.groupby("pretraining", sort=False)):
                style = {"color": "gray", "marker": "+x1234"[place % 6], "linestyle": LINES[place % 4]}
                _line(axes, rows, "accuracy_mean", "accuracy_std", style, f"reference: {name}", scale=100)
                extent.append(rows)
        for name, style in styles.items():
            if (task, name) in curves:
                rows = curves[task, name].sort_values("fraction")
                if len(series) == 1:
                    _references(axes, rows, delta, with_neurons=False)
                _line(axes, rows.drop_duplicates("fraction"), "mean", "std", style, name, scale=100)
        _fraction_axis(axes, pd.concat(extent))
        axes.set_ylabel("test accuracy (%)")
        axes.set_ylim(bottom=0)
        axes.set_title(task, fontsize=9, loc="left")
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    _hide(panels[len(names) :])
    figure.legend(drawn.values(), drawn.keys(), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def frontier(table: pd.DataFrame, delta: float) -> Figure:
    """Draw the full layer's accuracy against DR(delta), with the Pareto frontier of each task.

    Args:
        table: One row per task and representation: `task`, `series`, `redundancy`, `low` and `high` (its interval),
            and `full_accuracy`.
        delta: Share of the full layer's accuracy that is kept.
    """
    by_task = table["series"].nunique() > 1
    panels = list(table.groupby("task", sort=False)) if by_task else [("", table)]
    figure, grid = _figure(-(-len(panels) // 2), min(2, len(panels)))
    flat = [axes for row in grid for axes in row]
    key = "series" if by_task else "task"
    styles = _styles(table[key])
    drawn: dict[str, Any] = {}
    for axes, (task, rows) in zip(flat, panels, strict=False):
        best = rows.iloc[measures.frontier(rows["redundancy"].tolist(), rows["full_accuracy"].tolist())]
        if len(best) > 1:
            look = {"color": "gray", "linestyle": "--", "linewidth": 1, "zorder": 1}
            axes.step(best["redundancy"], 100 * best["full_accuracy"], where="pre", label="Pareto frontier", **look)
        for row in rows.to_dict("records"):
            style = styles[row[key]] | {"linestyle": "", "markersize": 7, "elinewidth": 1, "capsize": 3}
            known = np.isfinite([row["low"], row["high"]]).all()
            reach = [[max(0, row["redundancy"] - row["low"])], [max(0, row["high"] - row["redundancy"])]]
            axes.errorbar(
                row["redundancy"], 100 * row["full_accuracy"], xerr=reach if known else None, label=row[key], **style
            )
        axes.set_xlabel(f"diffused redundancy, DR({delta:g})")
        axes.set_ylabel("full layer's test accuracy (%)")
        axes.set_xlim(-0.03, 1.03)
        axes.set_title(task, fontsize=9, loc="left")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    _hide(flat[len(panels) :])
    figure.legend(drawn.values(), drawn.keys(), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _figure(rows: int, columns: int, title: str = "") -> tuple[Figure, np.ndarray]:
    """Return a figure with a grid of axes, shape (rows, columns)."""
    figure = Figure(figsize=(6.4 if columns == 1 else 4.8 * columns, 3.9 * rows + 0.5), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return how each name is drawn."""
    return {
        name: {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES[place % len(LINES)],
        }
        for place, name in enumerate(dict.fromkeys(names))
    }


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    mean: str,
    std: str | None,
    style: dict[str, Any],
    label: str | None = None,
    scale: float = 1,
) -> None:
    """Draw a mean against fraction, with a band of one standard deviation to either side."""
    values = scale * rows[mean]
    axes.plot(rows["fraction"], values, label=label, **{"linewidth": 1.3, "markersize": 4.5} | style)
    if std:
        spread = scale * rows[std].fillna(0)
        axes.fill_between(
            rows["fraction"], values - spread, values + spread, color=style["color"], alpha=0.2, linewidth=0
        )


def _references(axes: Axes, rows: pd.DataFrame, delta: float, with_neurons: bool) -> None:
    """Mark the full layer's accuracy and the share `delta` of it."""
    full = rows[rows["selection"] == FULL].iloc[0]
    label = f"full layer, {full['neurons']:,} neurons" if with_neurons and "neurons" in rows else "full layer"
    axes.axhline(100 * full["mean"], color="black", linewidth=1, label=label)
    kept = 100 * delta * full["mean"]
    axes.axhline(kept, color="black", linewidth=1, linestyle="--", label=f"{100 * delta:g} % of it")


def _label(name: str, rows: pd.DataFrame) -> str:
    seeds = int(rows["seeds"].max())
    return f"{name}, mean ± std of {seeds} subsets" if seeds > 1 else str(name)


def _legend(figure: Figure, axes: Axes) -> None:
    """Name what `axes` show, below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if figure.get_figwidth() < 8 else 3
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=columns)


def _hide(unused: Iterable[Axes]) -> None:
    for axes in unused:
        axes.set_visible(False)


def _fraction_axis(axes: Axes, curve: pd.DataFrame) -> None:
    """Scale fractions by logarithm, as what happens, happens below a tenth."""
    _logarithmic(axes, [1.0, *curve["fraction"]])
    axes.set_xlabel("fraction of neurons")


def _logarithmic(axes: Axes, values: Iterable[float]) -> None:
    """Scale the x axis by logarithm, and name as many of its values as have room."""
    axes.set_xscale("log")
    found = sorted(set(values), reverse=True)
    ticks: list[float] = []
    for value in found:
        if not ticks or ticks[-1] / value > 1.7:
            ticks.append(value)
    axes.set_xticks(ticks)
    axes.set_xlim(found[-1] / 1.2, 1.1 * found[0])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)


def _short(value: float) -> str:
    """Return a fraction, or a number of neurons, as short as it is told apart."""
    return f"{value:.2g}" if value < 1 else f"{value:,.0f}"
