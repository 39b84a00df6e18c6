"""Pictures of several runs together: tasks side by side, and the redundancy-performance frontier."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_modules.reporting import figures
from lightning_modules.results import Column


def tasks(
    curves: dict[tuple[str, str], pd.DataFrame], headline: Column, reference: pd.DataFrame | None, delta: float
) -> Figure:
    """Draw tasks side by side: a panel for each, a line for each representation, reference curves behind them.

    Curves are rows as `Results.curve` returns them, by task and representation; of a reference, rows of `task`,
    `pretraining`, `fraction`, `accuracy_mean`, `accuracy_std`. Delta is marked where there is a single representation.
    """
    names = list(dict.fromkeys(task for task, _ in curves))
    styles = figures.styles(name for _, name in curves)
    figure, panels = figures.panels(len(names))
    for axes, task in zip(panels, names, strict=True):
        extent = [curve for (of, _), curve in curves.items() if of == task]
        if reference is not None:
            theirs = reference[reference["task"] == task]
            for index, (name, rows) in enumerate(theirs.groupby("pretraining", sort=False)):
                style = {"color": "gray", "marker": "+x1234"[index % 6], "linestyle": figures.LINES[index % 4]}
                label = f"reference: {name}"
                figures.line(axes, rows, style, label, "accuracy_mean", "accuracy_std", scale=100)
                extent.append(rows)
        for name, style in styles.items():
            if (task, name) in curves:
                rows = curves[task, name].sort_values("fraction")
                if len(styles) == 1:
                    figures.references(axes, rows, headline, delta, with_neurons=False)
                rows = rows.drop_duplicates("fraction")
                figures.line(axes, rows, style, name, "mean", "std", scale=headline.scale)
        figures.fraction_axis(axes, pd.concat(extent))
        figures.value_axis(axes, f"test {headline.heading}", task)
    figures.legend(figure, panels)
    return figure


def frontier(table: pd.DataFrame, headline: Column, delta: float) -> Figure:
    """Draw the full layer's metric against DR(delta), with the Pareto frontier of each task.

    The table has a row per task and representation (`series`): `redundancy`, its limits `low` and `high`, and `full`.
    """
    table = table.assign(full=headline.scale * table["full"])
    by_task = table["series"].nunique() > 1
    groups = list(table.groupby("task", sort=False)) if by_task else [("", table)]
    figure, panels = figures.panels(len(groups))
    key = "series" if by_task else "task"
    styles = figures.styles(table[key])
    for axes, (task, rows) in zip(panels, groups, strict=True):
        best = pareto_frontier(rows)
        if len(best) > 1:
            options: figures.Style = {"color": "gray", "linestyle": "--", "linewidth": 1, "zorder": 1}
            axes.step(best["redundancy"], best["full"], where="pre", label="Pareto frontier", **options)
        for row in rows.to_dict("records"):
            style = styles[row[key]] | {"linestyle": "", "markersize": 7, "elinewidth": 1, "capsize": 3}
            known = np.isfinite([row["low"], row["high"]]).all()
            reach = [[max(0, row["redundancy"] - row["low"])], [max(0, row["high"] - row["redundancy"])]]
            axes.errorbar(row["redundancy"], row["full"], xerr=reach if known else None, label=row[key], **style)
        axes.set_xlabel(f"diffused redundancy, DR({delta:g})")
        axes.set_ylabel(f"full layer's test {headline.heading}")
        axes.set_xlim(-0.03, 1.03)
        axes.set_title(task, fontsize=9, loc="left")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    figures.legend(figure, panels)
    return figure


def pareto_frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other beats in both `redundancy` and `full`, redundancy ascending.

    The redundancy-performance Pareto frontier (Nanda et al., 2023).
    """
    rows = rows.sort_values(["redundancy", "full"], ascending=False)
    before = rows["full"].cummax().shift(fill_value=-np.inf)
    return rows[rows["full"] > before][::-1]
