"""Runs together: the redundancy table like the paper's Table 1, joined results, the frontier and curves by task."""

import glob
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.files import writing
from lightning_modules.reporting import figures
from lightning_modules.reporting.comparable import comparable
from lightning_modules.reporting.report import write_table
from lightning_modules.results.redundancy import MANY_DELTAS
from lightning_modules.results.results import Results
from lightning_modules.results.tables import Column, by_series
from lightning_modules.subsets.selections import FULL

REFERENCES = Path(__file__).with_name("reference")
"""Curves and redundancies that the paper's authors measured, from their notebooks (nvedant07/invariances_in_reps)."""
ADVICE = "name another folder with --output"
TABLE, DIFFERENCES, FORETOLD = "dr_table.csv", "differences.csv", "foretold.csv"
JOINED, GROUPS = "results.csv", "groups.csv"
LINES = 20  # differences that are printed; all are written


def compare(
    runs: list[str],
    output: Path = Path("compare"),
    delta: float = 0.9,
    rule: Literal["threshold", "nearest", "interpolated"] = "nearest",
    reference: str | None = None,
    strict: bool = False,
    solvers: bool = False,
    pictures: figures.Format | list[figures.Format] = figures.FORMATS,
) -> list[Path]:
    """Compare finished runs: print their redundancies and whether these differ, and write tables and pictures.

    Of runs that are not comparable, the largest group that is is taken, and a line says why each other is left out.

    Args:
        runs: Folders of runs, or patterns; each with a results.csv.
        output: Folder to write to: dr_table.csv, differences.csv, foretold.csv, results.csv (all rows), and the
            pictures frontier, curves and redundancy. Networks that were trained as a whole (runs of
            Pretraining) are lines in the curves of their task, and where there are no others results.csv alone.
        delta: Share of the full layer's metric that is to be kept.
        rule: How the fraction that is enough is found; nearest is that of the paper's table.
        reference: What others measured: curves to draw behind (resnet50_imagenet1k, resnet50_harder_tasks,
            resnet50_dropout), redundancies to print beside ours (dr_table, the paper's), or a CSV file of either form.
        strict: Whether to refuse runs that are not comparable, rather than to leave some out.
        solvers: Whether to compare solvers, too, as representations of their own, rather than to ask for the same one.
        pictures: Formats that pictures are written as; [] for none.

    Returns:
        The folders of the runs of probes that were compared.

    Raises:
        MisconfigurationException: If there is nothing to compare, or with `strict` anything that is not comparable.
    """
    if not 0 < delta <= 1:
        raise MisconfigurationException(f"--delta is {delta:g}; it must be above 0, at most 1.")
    read = comparable(_folders(runs), strict, solvers)
    joined = pd.concat({str(folder): run.tables["results"] for folder, run in read.items()}, names=["run", None])
    joined = joined.reset_index("run").reset_index(drop=True)
    headline = next(iter(read.values())).headline
    whole = _whole(joined, headline)
    if len(whole):
        print(f"\nNetworks trained as a whole, on test\n\n{_words(whole)}")
    read = {folder: run for folder, run in read.items() if (run.rows["selection"] != FULL).any()}
    if not read:
        with writing(output, ADVICE):
            output.mkdir(parents=True, exist_ok=True)
            write_table(joined, output / JOINED)
        print(f"\n  {output / JOINED}")
        return []
    cells = _cells(read, delta, rule)
    table, curves_behind = _table(cells), None
    if reference:
        curves_behind = _reference(reference, list(cells["task"].unique()))
        if "fraction" not in curves_behind:
            table, curves_behind = _beside(table, curves_behind), None
    curves, by_delta = {}, {}
    for cell in cells.to_dict("records"):
        means = by_series(read[cell["run"]].curve("test"))
        of_cell = (means["layer"] == cell["layer"]) & means["selection"].isin([cell["selection"], FULL])
        curves[cell["task"], cell["series"]] = means[of_cell]
        rows = by_series(read[cell["run"]].redundancy("test", MANY_DELTAS))
        of_cell = (rows["layer"] == cell["layer"]) & (rows["selection"] == cell["selection"]) & (rows["rule"] == rule)
        by_delta[cell["task"], cell["series"]] = rows[of_cell]
    differences = redundancy_differences(cells)
    print(f"\nDiffused redundancy, DR({delta:g}), by the {rule} rule\n\n{_words(table)}\n")
    if len(differences):
        more = f"... and {len(differences) - LINES} more in {DIFFERENCES}\n" if len(differences) > LINES else ""
        print(f"Their differences, with 95 % intervals\n\n{_words(differences.head(LINES))}\n{more}")
    foretold = cells.dropna(subset="foretold")[["task", "series", "redundancy", "foretold"]]
    foretold = foretold.assign(error=foretold["foretold"] - foretold["redundancy"]).reset_index(drop=True)
    if len(foretold):
        print(f"Foretold from X'X, without labels: off by {foretold['error'].abs().mean():.2f} on average\n")
        print(f"{_words(foretold)}\n")
    with writing(output, ADVICE):
        output.mkdir(parents=True, exist_ok=True)
        write_table(table, output / TABLE)
        write_table(differences, output / DIFFERENCES)
        write_table(foretold, output / FORETOLD)
        write_table(joined, output / JOINED)
        written: list[Path] = []
        if pictures:
            written += figures.save(figures.frontier(cells, headline, delta), output / "frontier", pictures)
            drawn = figures.tasks(curves, headline, curves_behind, delta, whole)
            written += figures.save(drawn, output / "curves", pictures)
            written += figures.save(figures.redundancies(by_delta), output / "redundancy", pictures)
    for file in (output / TABLE, output / DIFFERENCES, output / FORETOLD, output / JOINED, *written):
        print(f"  {file}")
    return list(read)


def compare_groups(groups: Mapping[Path, str], output: Path, delta: float, rule: str) -> None:
    """Add to a comparison the means over groups of tasks, of each backbone: print them, and write groups.csv.

    Arguments as of `compare`, with the group of each run's task by the run's folder.

    A MisconfigurationException is raised if it cannot be written.
    """
    table = group_means([(group, Results.read(folder)) for folder, group in groups.items()], delta, rule)
    same = [name for name in ("backbone", "layer", "selection") if table[name].nunique() == 1]
    print(f"\nMeans over tasks, redundancy is DR({delta:g}) by the {rule} rule\n")
    print(f"{_words(table.drop(columns=same))}\n")
    with writing(output, ADVICE):
        write_table(table, output / GROUPS)
    print(f"  {output / GROUPS}")


def group_means(runs: Iterable[tuple[str, Results]], delta: float, rule: str) -> pd.DataFrame:
    """Return what backbones reach on the average task of each group, from runs with their tasks' groups.

    Returns:
        One row per backbone, group in the order of the runs and `all`, layer and selection: `backbone`, `group`,
        `layer`, `selection`, `tasks`, `redundancy`, `full_<metric>` and, for each fraction, `<metric>_<fraction>`; on
        test, means over tasks of means over seeds. Missing where it was not measured on every one of the tasks.
    """
    keys, tables = ["layer", "selection"], []
    for group, results in runs:
        metric, means = results.headline.name, by_series(results.curve("test"))
        full = means[means["selection"] == FULL].set_index("layer")["mean"].rename(f"full_{metric}")
        by_fraction = means[means["selection"] != FULL].pivot(index=keys, columns="fraction", values="mean")
        by_fraction = by_fraction.rename(columns=f"{metric}_{{:g}}".format)
        found = by_series(results.redundancy("test", (delta,)).query("rule == @rule")).assign(tasks=1)
        found = found[[*keys, "tasks", "redundancy"]].join(full, on="layer").join(by_fraction, on=keys)
        backbone = results.rows["backbone"].iloc[0]
        tables += [found.assign(backbone=backbone, group=name) for name in (group, "all")]
    table = pd.concat(tables).sort_values("group", key=lambda names: names == "all", kind="stable")
    groups = table.groupby(["backbone", "group", *keys], sort=False)
    means = groups.agg(lambda column: column.mean(skipna=False)).assign(tasks=groups["tasks"].sum()).reset_index()
    return means.sort_values("backbone", key=lambda names: pd.factorize(names)[0], kind="stable", ignore_index=True)


def _folders(runs: list[str]) -> list[Path]:
    """Return the folders of finished runs that patterns name, each once and in the order given."""
    found: dict[Path, Path] = {}
    for pattern in runs:
        path = Path(pattern).expanduser()
        matches = [path] if path.is_dir() else sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 (may be absolute)
        matches = [match for match in matches if match.is_dir()]
        if not matches:
            raise MisconfigurationException(
                f"There is no folder {pattern!r}; name folders of runs, as runs/quickstart."
            )
        for folder in matches:
            if not (folder / JOINED).is_file():
                print(f"Left out: {folder} has no {JOINED}.")
            elif (folder / TABLE).exists():
                print(f"Left out: {folder} is a comparison itself.")
            else:
                found.setdefault(folder.resolve(), folder)
    if not found:
        raise MisconfigurationException(f"None of {', '.join(runs)} has a {JOINED}; name folders of finished runs.")
    return list(found.values())


def _whole(joined: pd.DataFrame, headline: Column) -> pd.DataFrame:
    """Return networks that were trained as a whole, from rows of all runs: `task`, `backbone`, and test metrics."""
    alone = joined.groupby("run")["selection"].transform(lambda names: (names == FULL).all())
    rows = joined[alone & (joined["split"] == "test")]
    names = [name for name in (headline.name, "robust_accuracy") if name in rows and rows[name].notna().any()]
    values = (headline.scale * rows[names]).rename(columns={name: f"{name} ({headline.unit})" for name in names})
    return rows[["task", "backbone"]].join(values)


def _cells(read: Mapping[Path, Results], delta: float, rule: str) -> pd.DataFrame:
    """Return redundancies by run, layer and selection; `series` is what these are called, as far as they differ."""
    tables = []
    for folder, run in read.items():
        means = run.curve("test")
        full = means[means["selection"] == FULL].set_index("layer")["mean"]
        width = run.rows.groupby("layer")["width"].first() if "width" in run.rows else pd.Series(dtype=float)
        found = by_series(run.redundancy("test", (delta,)).query("rule == @rule"))
        found = found.assign(run=folder, full=found["layer"].map(full), width=found["layer"].map(width))
        tables.append(found.assign(**run.rows.reindex(columns=["backbone", "task", "solver"]).iloc[0]))
    cells = pd.concat(tables, ignore_index=True)
    several = _differing(cells)
    return cells.assign(series=cells[["backbone", *several]].astype(str).agg(", ".join, axis=1))


def redundancy_differences(cells: pd.DataFrame) -> pd.DataFrame:
    """Return how the redundancies of each two representations differ on a task, and whether surely so.

    The interval comes from those of the two (Zou and Donner, 2008), as if they were independent; the images that they
    share make it too wide rather than too narrow.

    Args:
        cells: A row per task and representation (`series`): `redundancy`, and its limits `low` and `high`.

    Returns:
        A row per task and pair: `task`, `first`, `second`, `difference` (of the first to the second), its limits `low`
        and `high`, and `differ`, `yes` where zero lies outside them; `unknown` without intervals.
    """
    rows = []
    for task, of_task in cells.groupby("task", sort=False):
        for one, other in itertools.combinations(of_task.to_dict("records"), 2):
            difference = one["redundancy"] - other["redundancy"]
            low = difference - math.hypot(one["redundancy"] - one["low"], other["high"] - other["redundancy"])
            high = difference + math.hypot(one["high"] - one["redundancy"], other["redundancy"] - other["low"])
            differ = "unknown" if math.isnan(low) else "yes" if low > 0 or high < 0 else "not sure"
            rows.append([task, one["series"], other["series"], difference, low, high, differ])
    return pd.DataFrame(rows, columns=["task", "first", "second", "difference", "low", "high", "differ"])


def _differing(cells: pd.DataFrame) -> list[str]:
    """Return what else than the backbone tells representations apart."""
    return [name for name in ("layer", "selection", "solver") if cells[name].nunique() > 1]


def _table(cells: pd.DataFrame) -> pd.DataFrame:
    """Return redundancies with a row per backbone (layer, selection, solver, where they differ), a column per task."""
    keys = ["backbone", *_differing(cells)]
    keys += ["width"] if cells["width"].notna().all() else []
    table = cells.round({"redundancy": 9}).pivot_table(index=keys, columns="task", values="redundancy", sort=False)
    return table[list(cells["task"].unique())].reset_index().rename_axis(columns=None)


def _beside(table: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column `<task>_reference` after each task that the reference has."""
    by_name = theirs.set_index("backbone")  # which may leave out the weights: resnet50 is also resnet50.a1_in1k
    rows = [name if name in by_name.index else name.partition(".")[0] for name in table["backbone"].astype(str)]
    for task in [column for column in table if column in by_name and column != "width"]:
        values = by_name[task].reindex(rows).to_numpy()
        table.insert(table.columns.get_loc(task) + 1, f"{task}_reference", values)
    return table


def _words(table: pd.DataFrame) -> str:
    """Return the table as text."""
    columns = []
    for name, values in table.items():
        words = [str(name), *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values)]
        words = ["-" if word == "nan" else word for word in words]
        wide = max(map(len, words))
        left = name in ("group", "backbone", "layer", "selection", "solver", "task", "first", "second", "differ")
        columns.append([word.ljust(wide) if left else word.rjust(wide) for word in words])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def _reference(name: str, tasks: list[str]) -> pd.DataFrame:
    """Return the curves, or the redundancies by `backbone` with a column per task, of a shipped reference or a file."""
    shipped = {file.stem.removesuffix("_accuracy"): file for file in REFERENCES.iterdir()}
    file = Path(name).expanduser()
    if name not in shipped and not file.is_file():
        raise MisconfigurationException(
            f"--reference is {name!r}; it must be a CSV file or one of {', '.join(sorted(shipped))}."
        )
    try:
        found = pd.read_csv(shipped.get(name, file))
    except ValueError as error:
        raise MisconfigurationException(f"--reference {name} is no CSV file ({error}).") from error
    is_table = "backbone" in found and "fraction" not in found
    needed = [] if is_table else ["pretraining", "task", "fraction", "accuracy_mean", "accuracy_std"]
    missing = [column for column in needed if column not in found]
    if missing:
        raise MisconfigurationException(f"--reference {name} has no column {', '.join(missing)}.")
    has = list(found.columns) if is_table else list(found["task"].unique())
    if not set(has) & set(tasks):
        raise MisconfigurationException(f"--reference {name} has {', '.join(has)}, and none of {', '.join(tasks)}.")
    return found
