"""What `invert` leaves beside its pictures: `inversion.csv`, a grid of pictures for each fraction, and a page."""

from collections.abc import Callable
from html import escape
from pathlib import Path

import matplotlib.image
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.files import atomic
from lightning_modules.reporting import figures, page
from lightning_modules.reporting.report import write_table

MEASURED = ["matched_distance", "matched_cosine", "unmatched_distance", "unmatched_cosine"]


def report(folder: Path, rows: pd.DataFrame, backbone: str) -> str:
    """Write table, pictures and page of the pictures in a folder, and return what to print.

    `rows` are those of inversion.csv, `backbone` is what was inverted, in a line.
    """
    write_table(rows, folder / "inversion.csv")
    drawn = {folder / "inversion.png": (curve(rows), "Cosine between the neurons of pictures and those of the images.")}
    for fraction, group in rows.groupby("fraction"):
        caption = (
            f"Pictures that match each image on {group['neurons'].iloc[0]:,} of {group['width'].iloc[0]:,} neurons; "
            f"below each the cosine on these, and on all others."
        )
        drawn[folder / f"inversion_{fraction:g}.png"] = grid(group, folder), caption
    for file, (figure, _) in drawn.items():
        with atomic(file) as unfinished:
            figure.savefig(unfinished, dpi=150)
    means = rows.groupby(["choice", "fraction", "neurons"], sort=False)
    shown = means[[*MEASURED, *(f"start_{name}" for name in MEASURED)]].mean()
    content = [f"<p>{escape(backbone)}</p>", *(page.figure(file, caption) for file, (_, caption) in drawn.items())]
    content += ["<h2>Means over images and seeds</h2>", page.table(shown.reset_index())]
    html = folder / "inversion.html"
    with atomic(html) as unfinished:
        unfinished.write_text(page.shell("Partial inversion", "\n".join(content)), encoding="utf-8")
    table = shown[MEASURED].map("{:.3f}".format).reset_index().to_string(index=False)
    return "\n".join([table, "", *(f"  {file}" for file in (folder / "inversion.csv", *drawn, html))])


def grid(rows: pd.DataFrame, folder: Path) -> Figure:
    """Draw the pictures of one fraction: a row for each image, which comes first, a column for each choice and seed."""
    images = list(dict.fromkeys(rows["image"]))
    columns = list(dict.fromkeys(zip(rows["choice"], rows["seed"], strict=True)))
    figure = Figure(figsize=(1.7 * (1 + len(columns)), 1.95 * len(images) + 0.3), layout="constrained")
    panels = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for image, line in zip(images, panels, strict=True):
        _show(line[0], folder / "pictures" / f"{image}.png", "image", image)
        for axes, (choice, seed) in zip(line[1:], columns, strict=True):
            found = rows[(rows["image"] == image) & (rows["choice"] == choice) & (rows["seed"] == seed)]
            if found.empty:
                axes.set_visible(False)
                continue
            words = found[["matched_cosine", "unmatched_cosine"]].iloc[0].map("{:.2f}".format)
            title = f"{choice.replace('_', ' ')}, seed {seed}"
            _show(axes, folder / found["picture"].iloc[0], title, ", others ".join(words).replace(", others nan", ""))
    return figure


def _show(axes: Axes, file: Path, title: str, below: str) -> None:
    axes.imshow(matplotlib.image.imread(file), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(below, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def curve(rows: pd.DataFrame) -> Figure:
    """Draw cosines against the fraction of matched neurons, a panel for each choice, mean and spread."""
    choices = list(dict.fromkeys(rows["choice"]))
    figure, panels = figures.panels(len(choices), "")
    lines = {"matched_cosine": "neurons that were to be matched", "unmatched_cosine": "all other neurons"}
    lines |= {"start_unmatched_cosine": "all other neurons, before the first step"}
    looks = figures.styles(lines)
    spread: Callable[[pd.Series], float] = lambda values: values.std(ddof=0)  # noqa: E731
    for axes, choice in zip(panels, choices, strict=True):
        groups = rows[rows["choice"] == choice].groupby("fraction")
        for name, label in lines.items():
            points = groups[name].agg(mean="mean", spread=spread).reset_index()
            figures.line(axes, points, looks[name], label, "mean", "spread")
        figures.fraction_axis(axes, rows)
        axes.set_ylabel("cosine with the image's neurons, mean ± std")
        axes.set_title(choice.replace("_", " "), fontsize=9, loc="left")
    figures.legend(figure, panels)
    return figure
