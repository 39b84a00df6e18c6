"""Runs together: the redundancy table like the paper's Table 1, joined results, the frontier and curves by task."""

import glob
from collections.abc import Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.files import atomic, writing
from lightning_modules.reporting import compare_figures, figures
from lightning_modules.results.redundancy import group_means
from lightning_modules.results.results import Results
from lightning_modules.subsets.selections import FULL

RECIPE = ("solver", "features")
"""Columns that must be the same in all runs."""
SETTINGS = (("standardise",), ("solver", "init_args", "keep"))
"""Settings of the model that must be, by where they stand in its configuration."""
REFERENCES = package_files("lightning_modules.reporting") / "reference"
"""Curves and redundancies that the paper's authors measured, from their notebooks (nvedant07/invariances_in_reps)."""
REFERENCE_COLUMNS = ("pretraining", "task", "fraction", "accuracy_mean", "accuracy_std")
ADVICE = "name another folder with --output"
TABLE, JOINED, GROUPS = "dr_table.csv", "results.csv", "groups.csv"


def compare(
    runs: list[str],
    output: Path = Path("compare"),
    delta: float = 0.9,
    rule: Literal["threshold", "nearest", "interpolated"] = "nearest",
    reference: str | None = None,
) -> None:
    """Compare finished runs: print the table of redundancies and write it, the joined results and pictures.

    Args:
        runs: Folders of runs, or patterns; each with a results.csv.
        output: Folder to write to: dr_table.csv, results.csv, frontier.png and curves.png (and .svg).
        delta: Share of the full layer's accuracy that is to be kept.
        rule: How the fraction that is enough is found; nearest is that of the paper's table.
        reference: What others measured: curves to draw behind (resnet50_imagenet1k, resnet50_harder_tasks,
            resnet50_dropout), redundancies to print beside ours (dr_table, the paper's), or a CSV file of either form.

    Raises:
        MisconfigurationException: If there is nothing to compare, or what is there is not comparable.
    """
    if not 0 < delta <= 1:
        raise MisconfigurationException(f"--delta is {delta:g}; it must be above 0, at most 1.")
    read = {folder: _read(folder) for folder in _folders(runs)}
    _check_comparable(read)
    joined = pd.concat({str(folder): run.tables["results"] for folder, run in read.items()}, names=["run", None])
    cells, curves = _cells(read, delta, rule)
    theirs = _reference(reference, list(cells["task"].unique())) if reference else None
    curves_behind = theirs if theirs is not None and "fraction" in theirs else None
    table = _table(cells)
    if theirs is not None and curves_behind is None:
        table = _beside(table, theirs)
    print(f"\nDiffused redundancy, DR({delta:g}), by the {rule} rule\n\n{_words(table)}\n")
    headline = next(iter(read.values())).headline
    with writing(output, ADVICE):
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in ((TABLE, table), (JOINED, joined.reset_index("run"))):
            with atomic(output / name) as file:
                rows.to_csv(file, index=False)
        written = figures.save(compare_figures.frontier(cells, headline, delta), output / "frontier")
        written += figures.save(compare_figures.tasks(curves, headline, curves_behind, delta), output / "curves")
    for file in (output / TABLE, output / JOINED, *written):
        print(f"  {file}")


def compare_groups(groups: Mapping[Path, str], output: Path, delta: float, rule: str) -> None:
    """Add to a comparison the means over groups of tasks, of each backbone: print them, and write groups.csv.

    Args:
        groups: Group of the task of each run, by the run's folder.
        output: Where `compare` wrote.
        delta: As for `compare`.
        rule: As for `compare`.

    Raises:
        MisconfigurationException: If it cannot be written.
    """
    runs: dict[str, list[tuple[str, Results]]] = {}
    for folder, group in groups.items():
        results = Results.read(folder)
        runs.setdefault(str(results.rows["backbone"].iloc[0]), []).append((group, results))
    means = {backbone: group_means(each, delta, rule) for backbone, each in runs.items()}
    table = pd.concat(means, names=["backbone", None]).reset_index("backbone")
    same = [name for name in ("backbone", "layer", "selection") if table[name].nunique() == 1]
    print(f"\nMeans over tasks, redundancy is DR({delta:g}) by the {rule} rule\n")
    print(f"{_words(table.drop(columns=same))}\n")
    with writing(output, ADVICE), atomic(output / GROUPS) as file:
        table.to_csv(file, index=False)
    print(f"  {output / GROUPS}")


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


def _read(folder: Path) -> Results:
    """Return a finished run.

    Raises:
        MisconfigurationException: If its results are none, lack what is needed, or are not finished.
    """
    results = Results.read(folder)
    if not (results.rows["split"] == "test").any():
        raise MisconfigurationException(f"{folder / JOINED} has no rows of the test split; finish the run.")
    return results


def _settings(folder: Path) -> dict[str, Any]:
    """Return those of `SETTINGS` that a run's config.yaml has, by their last key."""
    found = {}
    for keys in SETTINGS:
        try:
            value = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
            for key in keys:
                value = value[key]
        except (OSError, yaml.YAMLError, KeyError, TypeError):  # older runs, and files of others, have none
            continue
        found[keys[-1]] = value
    return found


def _check_comparable(read: dict[Path, Results]) -> None:
    """Refuse runs whose numbers mean different things; what a run does not say is no reason.

    Raises:
        MisconfigurationException: If metric or recipe differ, a task has other test images, a backbone's layer
            another width, or two runs measured the same.
    """
    said: dict[tuple[str, ...], tuple[str, Path]] = {}
    for folder, run in read.items():
        facts: list[tuple[tuple[str, ...], Any]] = [((name,), value) for name, value in _settings(folder).items()]
        facts.append((("metric",), run.headline.name))
        test = run.rows[run.rows["split"] == "test"]
        for name in RECIPE:
            if name in test:
                facts += [((name,), value) for value in test[name].dropna().unique()]
        # Tasks have augmentations of their own: colour or orientation is what some ask for.
        for keys, column in (
            (("task",), "images"),
            (("task",), "augmentation"),
            (("backbone", "layer"), "width"),
        ):
            if column in test:
                for value in test[[*keys, column]].drop_duplicates().to_dict("records"):
                    facts.append(((column, *(str(value[key]) for key in keys)), value[column]))
        for (layer, selection), _ in test[test["selection"] != FULL].groupby(["layer", "selection"], sort=False):
            cell = (str(test["backbone"].iloc[0]), str(layer), str(selection), str(test["task"].iloc[0]))
            facts.append((("cell", *cell), folder))
        for key, value in facts:
            value = str(value)
            before, where = said.setdefault(key, (value, folder))
            if before != value:
                raise MisconfigurationException(_difference(key, where, before, folder, value))


def _difference(key: tuple[str, ...], one: Path, before: str, other: Path, now: str) -> str:
    """Return in one line why two runs cannot stand in one table."""
    kind, *names = key
    if kind == "cell":
        backbone, layer, selection, task = names
        return (
            f"{one} and {other} both measure {selection} subsets of {backbone}, layer {layer}, on {task}; "
            f"leave one of them out."
        )
    of = (
        {
            "images": f"number of test images of {names[0]}",
            "augmentation": f"augmentation of {names[0]}",
            "width": f"width of {', layer '.join(names)}",
        }
        if names
        else {}
    )
    return (
        f"Not comparable: the {of.get(kind, kind)} is {before} in {one}, but {now} in {other}; "
        f"compare runs that agree in it."
    )


def _cells(
    read: dict[Path, Results], delta: float, rule: str
) -> tuple[pd.DataFrame, dict[tuple[str, str], pd.DataFrame]]:
    """Return what was measured by task and representation: redundancies, and curves with a full row each.

    A representation is called by its backbone, and by layer and selection where there are several in all.
    """
    tables = []
    for folder, run in read.items():
        found, means = run.redundancy("test", (delta,)), run.curve("test")
        found = found[found["rule"] == rule]
        full = means[means["selection"] == FULL].set_index("layer")["mean"]
        width = run.rows.groupby("layer")["width"].first() if "width" in run.rows else pd.Series(dtype=float)
        names = run.rows[["backbone", "task"]].iloc[0].to_dict()
        found = found.assign(run=folder, full=found["layer"].map(full), width=found["layer"].map(width))
        tables.append(found.assign(**names))
    cells = pd.concat(tables, ignore_index=True)
    several = [name for name in ("layer", "selection") if cells[name].nunique() > 1]
    cells["series"] = cells[["backbone", *several]].astype(str).agg(", ".join, axis=1)
    curves = {}
    for cell in cells.to_dict("records"):
        means = read[cell["run"]].curve("test")
        of_cell = (means["layer"] == cell["layer"]) & means["selection"].isin([cell["selection"], FULL])
        curves[cell["task"], cell["series"]] = means[of_cell]
    return cells, curves


def _table(cells: pd.DataFrame) -> pd.DataFrame:
    """Return redundancies with a row per backbone (layer and selection, where they differ), a column per task."""
    keys = ["backbone", *(name for name in ("layer", "selection") if cells[name].nunique() > 1)]
    if cells["width"].notna().all():
        keys.append("width")
    rows = cells.assign(redundancy=cells["redundancy"].round(9))
    if "width" in keys:
        rows["width"] = rows["width"].astype(int)
    table = rows.pivot_table(index=keys, columns="task", values="redundancy", sort=False)
    return table[list(rows["task"].unique())].reset_index().rename_axis(columns=None)


def _beside(table: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column `<task>_reference` after each task that the reference has.

    The reference's backbones may leave out the tag of the weights: `resnet50` is also `resnet50.a1_in1k`.
    """
    by_name = theirs.set_index("backbone")
    rows = [name if name in by_name.index else name.partition(".")[0] for name in table["backbone"].astype(str)]
    table = table.copy()
    for task in [column for column in table if column in by_name and column != "width"]:
        values = by_name[task].reindex(rows).to_numpy()
        table.insert(table.columns.get_loc(task) + 1, f"{task}_reference", values)
    return table


def _words(table: pd.DataFrame) -> str:
    """Return the table as text."""
    words = table.map(lambda value: f"{value:.2f}" if isinstance(value, float) else str(value)).replace("nan", "-")
    left = table.columns.intersection(["group", "backbone", "layer", "selection"])
    wide = {column: max(len(str(column)), *words[column].str.len()) for column in words}
    lines = [dict(zip(words, words, strict=True)), *words.to_dict("records")]
    return "\n".join(
        "  ".join(f"{line[name]:<{wide[name]}}" if name in left else f"{line[name]:>{wide[name]}}" for name in words)
        for line in lines
    )


def _reference(name: str, tasks: list[str]) -> pd.DataFrame:
    """Return the curves or redundancies of a reference, by the name of a shipped one or of a file.

    Args:
        name: A file with the columns `pretraining,task,fraction,accuracy_mean,accuracy_std`, or with `backbone` and one
            of each task; or a shipped one's stem.
        tasks: Of the runs.

    Raises:
        MisconfigurationException: If there is no such reference, or it has none of the tasks.
    """
    shipped = {Path(file.name).stem.removesuffix("_accuracy"): file for file in REFERENCES.iterdir()}
    file = Path(name).expanduser()
    if name not in shipped and not file.is_file():
        raise MisconfigurationException(
            f"--reference is {name!r}; it must be a CSV file or one of {', '.join(sorted(shipped))}."
        )
    with shipped.get(name, file).open() as stream:
        try:
            found = pd.read_csv(stream)
        except ValueError as error:
            raise MisconfigurationException(f"--reference {name} is no CSV file ({error}).") from error
    is_table = "backbone" in found and "fraction" not in found
    missing = [] if is_table else [column for column in REFERENCE_COLUMNS if column not in found]
    if missing:
        raise MisconfigurationException(f"--reference {name} has no column {', '.join(missing)}.")
    has = list(found.columns) if is_table else list(found["task"].unique())
    if not set(has) & set(tasks):
        raise MisconfigurationException(f"--reference {name} has {', '.join(has)}, and none of {', '.join(tasks)}.")
    return found
