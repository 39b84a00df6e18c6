"""Pictures of a run: readable in print and by the colour-blind."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lightning_modules.files import whole
from lightning_modules.subsets import FULL

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart with every common form of colour blindness."""
MARKERS = ("o", "s", "^", "D", "v", "P")


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG and return both files."""
    files = [path.with_suffix(ending) for ending in (".png", ".svg")]
    for path in files:
        with whole(path) as file:
            figure.savefig(file, dpi=150, bbox_inches="tight")
    return files


def accuracy_curve(curve: pd.DataFrame, title: str, classes: int, delta: float) -> Figure:
    """Draw accuracy against fraction, with the full layer, the share `delta` of it, and chance as lines.

    Args:
        curve: As `measures.curve` returns it.
        title: What was measured.
        classes: Number of classes; chance is one over it.
        delta: Share of the full layer's accuracy to mark.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    full = curve.loc[curve["selection"] == FULL].iloc[0]
    axes.axhline(100 * full["mean"], color="black", linewidth=1, label=f"full layer, {full['neurons']:,} neurons")
    axes.axhline(
        100 * delta * full["mean"], color="black", linewidth=1, linestyle="--", label=f"{100 * delta:g} % of it"
    )
    axes.axhline(100 / classes, color="gray", linewidth=1, linestyle=":", label="chance")
    selections = curve.loc[curve["selection"] != FULL].groupby("selection", sort=False)
    for (name, rows), colour, marker in zip(selections, COLOURS * 2, MARKERS * 2, strict=False):
        fractions, mean, std = rows["fraction"], 100 * rows["mean"], 100 * rows["std"].fillna(0)
        seeds = int(rows["seeds"].max())
        label = f"{name}, mean ± std of {seeds} subsets" if seeds > 1 else str(name)
        axes.plot(fractions, mean, color=colour, marker=marker, markersize=4.5, label=label)
        axes.fill_between(fractions, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
    _fraction_axis(axes, curve)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    return figure


def _fraction_axis(axes: Axes, curve: pd.DataFrame) -> None:
    """Scale fractions by logarithm, as what happens, happens below a tenth; name as many as have room."""
    axes.set_xscale("log")
    ticks: list[float] = []
    for fraction in sorted({1.0, *curve["fraction"]}, reverse=True):
        if not ticks or ticks[-1] / fraction > 1.7:
            ticks.append(fraction)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.set_xlabel("fraction of neurons")
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
