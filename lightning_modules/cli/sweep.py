"""Many runs by one command: every combination of what is varied, shared out over machines, and the comparison."""

import glob
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_modules import FrozenBackbone, Pretraining
from lightning_modules.cli.errors import Classes, nearest_class
from lightning_modules.cli.folder import OccupiedFolder, RunFolder
from lightning_modules.cli.parser import find_config, parse_apart
from lightning_modules.cli.run import CLI, Refusal, as_list
from lightning_modules.files import atomic, one_line, writing
from lightning_modules.reporting import dashboard, figures

LABELLED = {"config", "data", "data.protocol", "model.backbone", "model.backbone.name", "model.backbone.weights"}
LABELLED |= {"model.selection", "data.root", "data.name", "data.features"}
"""What a run's default name, and so a comparison, tells apart by itself."""
RUNS = "runs.csv"
COLUMNS = ["command", "run", "group"]
"""Of `runs.csv`: the command line of each run, its folder, and the group of its task."""


class UnavailableData(MisconfigurationException):
    """Raised where a run cannot have the data of its task or the weights of its backbone."""


class Planned(NamedTuple):
    """One run of a sweep."""

    name: str  # what messages call it
    apart: str  # what is varied beside `LABELLED`: ends the run's name, tells apart what cannot stand in one table
    varied: str  # what is varied beside configurations, which name their files: ends the name of a pre-training's
    arguments: list[str]
    command: str  # the same in one


class Sweep:
    """Run fit for every combination of what is varied, and compare the runs; all other options are those of fit.

    A finished run is kept, an interrupted one goes on, one that another process is at is left to it, and one whose data
    or weights cannot be had is skipped, each with a line. A backbone is loaded once.

    Args:
        vary: What to run: options of fit, each with the list of its values, as `data: [DTD, SVHN]`; a value may be
            settings, as `{name: resnet18, weights: random}` of model.backbone, of config a list of files, of which
            later ones go over earlier ones, and of weights a pattern of files, as `made/*.safetensors`. Also as
            `--vary.data '[DTD, SVHN]'`.
        configs: Configurations of every run, as fit takes them with --config; after a varied one.
        output: Folder of the comparison, and of runs.csv, which says where each run lies.
        delta: As compare takes it.
        rule: As compare takes it.
        reference: As compare takes it.
        pictures: Formats of the pictures of runs and comparison; [] for none.
        shard: The part of the work for this machine, i/n is the i-th of n; null is all, or the part of this task of a
            SLURM array. The last one to end compares all.
    """

    def __init__(
        self,
        vary: dict[str, Any] = {},  # noqa: B006 (never changed)
        configs: str | list[str] = [],  # noqa: B006 (never changed)
        output: Path = Path("sweep"),
        delta: float = 0.9,
        rule: Literal["threshold", "nearest", "interpolated"] = "nearest",
        reference: str | None = None,
        pictures: figures.Format | list[figures.Format] = figures.FORMATS,
        shard: str | None = None,
    ) -> None:
        if not 0 < delta <= 1:
            raise MisconfigurationException(f"--delta is {delta:g}; it must be above 0, at most 1.")
        self.vary = {
            key: list({repr(each): each for value in values for each in _matches(key, value)}.values())
            for key, values in _flat(vary).items()
        }
        empty = next((key for key, values in self.vary.items() if not values), None)
        if empty or not vary:
            raise MisconfigurationException(f"vary{f'.{empty}' if empty else ''} is empty; there is nothing to run.")
        self.configs = as_list(configs)
        self.output = output
        self.options, self.pictures = (delta, rule, reference), as_list(pictures)
        self.part, self.parts = shard_of(shard)
        self.backbones: dict[str, FrozenBackbone | Refusal] = {}
        self.folders: dict[Path, str] = {}

    def planned(self, further: Sequence[str]) -> list[Planned]:
        """Return all runs of the sweep, each with these further options of fit."""
        runs, combinations = [], list(itertools.product(*self.vary.values()))
        for number, values in enumerate(combinations, 1):
            words = [value if isinstance(value, str) else json.dumps(value) for value in values]
            varied, given = (dict(zip(self.vary, each, strict=True)) for each in (words, values))
            configs = [*as_list(given.get("config")), *self.configs]
            flags = [f"--{key}={value}" for key, value in varied.items() if key != "config"]
            told = {key: f"{key.rpartition('.')[2]}={value}" for key, value in varied.items() if key != "config"}
            apart, all_told = (
                re.sub(r"[^\w.+=-]+", "-", "_".join(each for key, each in told.items() if key not in left_out))
                for left_out in (LABELLED, ())
            )
            arguments = ["fit", *(f"--config={name}" for name in configs), "--name=null", "--overwrite=false", *flags]
            arguments += [f"--pictures={json.dumps(self.pictures)}", *further]
            name = f"{', '.join(words)} ({number} of {len(combinations)})"
            runs.append(Planned(name, apart, all_told, arguments, " ".join(arguments)))
        return runs

    def compare(self, planned: Sequence[Planned]) -> int:
        """Compare the runs that are finished, say which are not, and return how many are."""
        from lightning_modules.reporting.compare import compare, compare_groups  # draws, which takes long to import

        known = {row.command: (Path(row.run), row.group) for row in self._runs().itertuples()}
        together: dict[str, dict[Path, str]] = {}
        missing = []
        for run in planned:
            folder, group = known.get(run.command, (Path(), ""))
            if run.command in known and RunFolder(folder).results.is_file():
                together.setdefault(run.apart, {})[folder] = group
            else:
                missing.append(run.name)
        for apart, groups in together.items():
            runs = [str(folder) for folder in groups]
            compared = compare(runs, self.output / apart, *self.options, pictures=self.pictures)
            if compared and all(groups[folder] for folder in compared):
                compare_groups({each: groups[each] for each in compared}, self.output / apart, *self.options[:2])
        if missing:
            rank_zero_info(f"{len(missing)} of {len(planned)} runs are not finished: {', '.join(missing)}.")
        return len(planned) - len(missing)

    def record(self, command: str, folder: Path, group: str | None) -> None:
        """Note in runs.csv where a run lies and the group of its task, for whoever compares in the end."""
        if self.folders.setdefault(folder, command) != command:
            raise MisconfigurationException(f"Two runs would go to {folder}; make two sweeps of what tells them apart.")
        with writing(self.output, "name another folder with --output"):
            self.output.mkdir(parents=True, exist_ok=True)
            with FileLock(self.output / "runs.lock"), atomic(self.output / RUNS) as file:
                row = pd.DataFrame([[command, str(folder), group or ""]], columns=COLUMNS)
                pd.concat([self._runs(), row]).drop_duplicates("command", keep="last").to_csv(file, index=False)

    def _runs(self) -> pd.DataFrame:
        file = self.output / RUNS
        return pd.read_csv(file, keep_default_na=False) if file.is_file() else pd.DataFrame(columns=COLUMNS)


class SweptRun(CLI):
    """A fit that is one of several in this process."""

    def __init__(self, planned: Planned, tasks: Classes, sweep: Sweep) -> None:
        self.planned = planned
        self.suffix = planned.apart
        self.sweep = sweep
        super().__init__(planned.arguments, tasks)

    def construct(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        """Share a backbone between runs, as it is frozen; without the task or the backbone, others may go on."""
        shared, key = self.sweep.backbones, repr(sorted(kwargs.items()))
        found = shared.get(key) if kind is FrozenBackbone else None
        if found is None:
            try:
                found = super().construct(kind, *args, **kwargs)
            except Refusal as refusal:
                (error,) = refusal.args
                if isinstance(error, MisconfigurationException) and issubclass(kind, (FrozenBackbone, self.tasks.base)):
                    refusal = Refusal(UnavailableData(one_line(error)))
                found = refusal
            if kind is FrozenBackbone:
                shared[key] = found  # also that it cannot be had, which may take minutes to find out
        if isinstance(found, Refusal):
            raise found
        return found

    def before_instantiate_classes(self) -> None:
        """Let each pre-training write a file of its own, which names its run, too."""
        super().before_instantiate_classes()
        model = self.settings["model"]
        if model["class_path"].endswith(f".{Pretraining.__name__}"):
            output, self.suffix = Path(model["init_args"]["output"]), ""
            ending = f"_{self.planned.varied}" * bool(self.planned.varied)
            model["init_args"]["output"] = str(output.with_stem(output.stem + ending))

    def fit(self, **arguments: Any) -> None:
        """Note where the run lies, and do it."""
        if self.trainer.is_global_zero:
            self.sweep.record(self.planned.command, self.folder.path, self.datamodule.group)
        super().fit(**arguments)

    def run(self, **arguments: Any) -> None:
        """Load the data first: where one process cannot have them, all skip the run. Go on after an interruption."""
        self.datamodule.trainer = self.trainer  # which knows how many processes have to get images
        refusal = None
        try:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        except MisconfigurationException as error:
            refusal = error
        if self.trainer.strategy.reduce_boolean_decision(refusal is not None, all=False):
            raise UnavailableData(one_line(refusal) if refusal else "another process cannot have its data") from refusal
        rank_zero_info(f"{self.planned.name}:")
        if not self.settings["overwrite"]:
            self.settings["ckpt_path"] = self.settings["ckpt_path"] or "last"
        super().run(**arguments)


def sweep(args: Sequence[str], tasks: Classes) -> None:
    """Do this process' part of a sweep, given as words after the verb, and compare all runs that are finished."""
    if any(re.match("--name(=|$)", word) for word in args):
        raise MisconfigurationException("All runs would go to one folder; leave --name out.")
    asked, further = parse_apart(Sweep, "sweep", args, configured=True)
    offered = [kind.__name__ for kind in tasks.offered]
    for name in asked.vary.get("data", []):
        if isinstance(name, str) and "." not in name and name not in offered:
            raise MisconfigurationException(f"vary.data holds {nearest_class(name, offered)}.")
    for name in (*asked.configs, *itertools.chain.from_iterable(map(as_list, asked.vary.get("config", [])))):
        find_config(name)
    planned = asked.planned(further)
    mine = planned[asked.part - 1 :: asked.parts]
    skipped: list[str] = []
    for each in mine:
        try:
            SweptRun(each, tasks, asked)
        except UnavailableData as error:
            if str(error) not in skipped:  # a reason is told once; in the end all that are not finished are named
                rank_zero_info(f"{each.name} is skipped: {error}.")
            skipped.append(str(error))
        except OccupiedFolder as error:
            rank_zero_info(f"{each.name} is kept: {error}")
        finally:
            dashboard.finish()
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first and not asked.compare(planned) and len(skipped) == len(mine) > 0:
        raise MisconfigurationException("None of the runs can be had; the lines above say why.")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Return options with the lists of their values, from settings that may be nested, as flags with dots are."""
    flat: dict[str, list[Any]] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: as_list(value)}
    return flat


def _matches(key: str, value: Any) -> list[Any]:
    """Return a value itself, or the files of weights that it is a pattern of, where there are any."""
    is_pattern = key == "model.backbone.weights" and isinstance(value, str) and "*" in value
    return (sorted(glob.glob(value)) if is_pattern else []) or [value]  # noqa: PTH207 (may be absolute)


def shard_of(given: str | None) -> tuple[int, int]:
    """Return the i and n of i/n, or those of this task of a SLURM array; 1 and 1 is all."""
    if given is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        names = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT"))
        task, first, step, count = (int(os.environ.get(name, 1)) for name in names)
        given = f"{(task - first) // step + 1}/{count}"
    part = re.fullmatch(r"(\d+)/(\d+)", given or "1/1")
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        raise MisconfigurationException(f"--shard is {given}; it must be i/n, the i-th of n parts, as 1/4.")
    return int(part[1]), int(part[2])
