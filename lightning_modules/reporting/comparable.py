"""Which runs may stand in one table: the largest group whose numbers mean the same."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.results.results import Results
from lightning_modules.results.tables import by_series
from lightning_modules.subsets.selections import FULL

MUST_AGREE = {
    "solver": "solver",
    "features": "features",
    "images": "number of test images of {task}",
    "augmentation": "augmentation of {task}",  # colour or orientation is what some tasks ask for
    "view": "view of {task}",
    "width": "width of {backbone}, layer {layer}",
}
"""Columns of results.csv that must be the same in all runs, and of what they are."""
SETTINGS = (
    "standardise",
    "refit",
    "solver.init_args.keep",
    "solver.init_args.similarity",
    "solver.init_args.quantised",
)
"""Keys of config.yaml, below model.init_args, that must be, too."""
Facts = dict[str, tuple[str | None, Path]]
"""What runs state: values by what they are of, each with the run; None is of subsets that only one may measure."""


def comparable(folders: Iterable[Path], strict: bool, solvers: bool = False) -> dict[Path, Results]:
    """Read runs, and return as many as are comparable with each other; a line says why each other is left out.

    Runs are comparable whose numbers mean the same, and that do not measure the same; what is not stated is no reason.
    With `solvers` they may differ in their solver, and two that do, do not measure the same. Of groups of one size,
    that of the earliest run is taken.

    Raises:
        MisconfigurationException: If no run is left, or any would be left out with `strict`.
    """
    read: dict[Path, Results] = {}
    facts: dict[Path, Facts] = {}
    reasons: dict[Path, str] = {}
    for folder in folders:
        try:
            read[folder] = Results.read(folder)
            facts[folder] = _facts(folder, read[folder], solvers)
        except MisconfigurationException as error:
            reasons[folder] = str(error)
    groups = [_group(first, facts) for first in facts]
    taken, stated = max(groups, key=lambda group: len(group[0]), default=([], {}))
    reasons |= {folder: _conflict(stated, facts[folder]) or "" for folder in facts if folder not in taken}
    if reasons and (strict or not taken):
        raise MisconfigurationException(next(iter(reasons.values())))
    for folder, reason in reasons.items():
        print(f"Left out: {folder}. {reason}")
    return {folder: read[folder] for folder in taken}


def _group(first: Path, facts: Mapping[Path, Facts]) -> tuple[list[Path], Facts]:
    """Return runs that are comparable with the first and with each other, in the order given, and what they state."""
    taken, stated = {first}, facts[first]
    for folder, its in facts.items():
        if folder != first and not _conflict(stated, its):
            taken.add(folder)
            stated = its | stated
    return [folder for folder in facts if folder in taken], stated


def _conflict(stated: Facts, facts: Facts) -> str | None:
    """Say why a run with these facts cannot stand beside others, if it cannot."""
    for what, (value, folder) in facts.items():
        before, where = stated.get(what, (value, folder))
        if before != value:
            return f"Not comparable: the {what} is {before} in {where}, but {value} in {folder}."
        if value is None and where != folder:
            return f"{where} and {folder} both measure {what}; leave one of them out."
    return None


def _facts(folder: Path, run: Results, solvers: bool) -> Facts:
    """Return what a run states that others must share, and the subsets that it measures."""
    test = run.rows[run.rows["split"] == "test"]
    if test.empty:
        raise MisconfigurationException(f"{folder / 'results.csv'} has no rows of the test split; finish the run.")
    free = {"solver", "keep", "similarity"} if solvers else set()
    stated = {name: value for name, value in _settings(folder).items() if name not in free}
    stated["metric"] = run.headline.name
    for column in test.columns.intersection(list(MUST_AGREE.keys() - free)):
        for row in test[["task", "backbone", "layer", column]].dropna().drop_duplicates().to_dict("records"):
            stated[MUST_AGREE[column].format_map(row)] = row[column]
    subsets = by_series(test[test["selection"] != FULL])[["selection", "backbone", "layer", "task"]].drop_duplicates()
    said = "{selection} subsets of {backbone}, layer {layer}, on {task}"
    said += f", by {test['solver'].iloc[0]}" if solvers and "solver" in test else ""
    measured = map(said.format_map, subsets.to_dict("records"))
    return {what: (str(value), folder) for what, value in stated.items()} | dict.fromkeys(measured, (None, folder))


def _settings(folder: Path) -> dict[str, Any]:
    """Return those of `SETTINGS` that a run's config.yaml has, by their last key."""
    try:
        config = pd.json_normalize(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, NotImplementedError, TypeError):  # older runs, and files of others, have none
        return {}
    keys = [key for key in SETTINGS if f"model.init_args.{key}" in config]
    return {key.rpartition(".")[2]: config[f"model.init_args.{key}"].iloc[0] for key in keys}
