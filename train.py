"""The command line: joins a task, a model and a Trainer, and leaves a run's files."""

import argparse
import contextlib
import difflib
import importlib
import inspect
import logging
import os
import re
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch.distributed import DistError, TCPStore

import datamodules
import lightning_modules
from datamodules import Task
from datamodules.images import one_line
from lightning_modules import FrozenBackbone, RedundancyProbe
from lightning_modules.backbones.frozen import PretrainedCfgOverlay, keep_freed_memory
from lightning_modules.checkpoints import Checkpoints, WholeCheckpointIO
from lightning_modules.files import whole
from lightning_modules.reporting import dashboard, report
from lightning_modules.results import curves as measures

CONFIGS = Path(__file__).resolve().parent / "configs"
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
"""Processes that run the whole command line, each on one device."""
PARENT = os.getppid()
"""The process that started this one."""
VERBS = {
    "compare": "lightning_modules.reporting.compare.compare",
    "export": "lightning_modules.export.export",
}
"""Verbs that are no methods of the Trainer, and the functions that they run; imported when they are called."""
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "a word"}
TYPES |= {"list[int]": "a list of whole numbers", "list[float]": "a list of numbers", "list[str]": "a list of words"}
"""What types are called to a user."""


def find_config(name: str) -> str:
    """Return the path of a configuration, looked up in the current folder and then among the shipped ones."""
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return str(path)
    shipped = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=1) or [f"one of {', '.join(shipped)}"]
    raise MisconfigurationException(f"There is no configuration {name!r} here or in {CONFIGS}; try {near[0]}.")


class ConfigFile(ActionConfigFile):
    """`--config`, looked up by `find_config` and named where it cannot be read."""

    def __call__(self, parser: Any, config: Any, value: Any, option_string: str | None = None) -> None:
        """Apply the file to what is parsed so far."""
        if parser._subparsers is not None:
            raise MisconfigurationException(
                "--config comes after the verb, as `train.py fit --config quickstart.yaml`."
            )
        if isinstance(value, str):
            value = find_config(value)
            read_config(value)
        super().__call__(parser, config, value, option_string)


def read_config(path: str) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        MisconfigurationException: If it is no YAML, or holds no settings.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise MisconfigurationException(f"{path} is not valid YAML{where} ({problem}).") from error
    if not isinstance(settings, dict):
        raise MisconfigurationException(f"{path} holds {settings!r:.60}; it must hold settings, as `data: CIFAR10`.")
    return settings


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without a hundred lines of usage."""

    known: Sequence[str] | None = None
    """The options, where they are not the keys of a configuration."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line and exit status 2."""
        fail(explain(message, self.known))


def explain(message: str, known: Sequence[str] | None = None) -> str:
    """Return what jsonargparse says of a mistake as one line that names the wrong value and what would be right.

    Args:
        message: What jsonargparse says.
        known: The options that there are, where they are not the keys of a configuration.
    """
    name = re.search(r'Parser key "(data|model)".*Expected a dot import path string: (\S+)', message, re.DOTALL)
    name = name or re.search(r'Parser key "(data|model)":.*Given value: (\w+)$', message, re.DOTALL)
    if name:
        return f"--{name[1]} is {nearest_class(name[2], name[1])}, or a class's import path."
    unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", message)
    if unknown:
        near = nearest_keys(unknown[1], known=known)
        everything = "--help lists all." if known else "`train.py fit --help` lists all."
        hint = f"did you mean {' or '.join(near)}?" if near else everything
        return f"There is no option {unknown[1]!r}; {hint}"
    part = re.search(r'Parser key "([\w.]+)":\s+Unable to load config \'(.*?)\'', message)
    part = part or re.search(r'Parser key "(backbone)":.*Given value: (\w+)$', message, re.DOTALL)
    if part:
        key = next(iter(nearest_keys(part[1], 1, known)), part[1])
        return f"--{key} is {part[2]!r}; it must be settings, as `--{key} '{{name: value}}'` or `--{key}.name value`."
    required = re.search(r"the following arguments are required: (.*)", message)
    if required:
        keys = [next(iter(nearest_keys(key, 1, known)), key) for key in required[1].split(", ")]
        if known:
            named = ["RUN" if key == "runs" else f"--{key}" for key in keys]  # these come without a flag
            return f"Give {' and '.join(named)} too; --help tells what they are."
        return f"Nothing sets {' and '.join(keys)}; give a --config, as quickstart.yaml, or --{keys[0]}."
    wrong = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if wrong:
        key = next(iter(nearest_keys(wrong[1], 1, known)), wrong[1])
        value = re.search(r"Given value: (.*)|Got value: (.*)", wrong[2])
        types = re.search(r"Subtypes: \[(.*)\]\n|Expected an? (.*?)(?:\. Got value|$)", wrong[2])
        if value and types:
            said = re.sub(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]", r"\1\2", types[1] or types[2])
            said = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", said).replace("dict[str, Any]", "dict")
            right = " or ".join(TYPES.get(each, each) for each in said.split(", "))
            return f"{key} is {value[1] or value[2]}; it must be {right}."
    return message.partition("Given value type")[0]


def offered(kind: str) -> list[str]:
    """Return the classes that `--data` or `--model` takes by name."""
    names = datamodules.__all__ if kind == "data" else lightning_modules.__all__
    return [name for name in names if name not in ("Task", "FrozenBackbone")]


def nearest_class(name: str, kind: str) -> str:
    """Return what is to be said of a name that `--data` or `--model` does not take, with the nearest that it does."""
    known = offered(kind)
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1)
    hint = next((f"; did you mean {each}? I" for each in known if each.lower() in near), "; i")
    return f"{name!r}{hint}t must be one of {', '.join(known)}"


def nearest_keys(key: str, cutoff: float = 0.6, known: Sequence[str] | None = None) -> list[str]:
    """Return the keys of a configuration (or of `known`) whose last part is nearest to that of `key`, at most two."""
    owners: dict[str, list[Callable[..., Any]]] = {
        "trainer": [Trainer],
        "data": [getattr(datamodules, name) for name in offered("data")],
        "model": [getattr(lightning_modules, name) for name in offered("model")],
        "model.backbone": [FrozenBackbone],
        "model.backbone.pretrained_cfg_overlay": [PretrainedCfgOverlay],
    }
    keys = ["name", "overwrite", "config", "seed_everything", "ckpt_path", *owners]
    for part, kinds in owners.items():
        keys += [f"{part}.{name}" for kind in kinds for name in inspect.signature(kind).parameters]
    last = {each: each.rpartition(".")[2] for each in known or keys}
    near = difflib.get_close_matches(key.rpartition(".")[2], set(last.values()), n=1, cutoff=cutoff)
    found = [each for each in last if last[each] in near]
    given = {argument.lstrip("-").partition("=")[0] for argument in sys.argv}  # settles what several parts know
    return sorted(found, key=lambda each: (each not in given, -difflib.SequenceMatcher(None, each, key).ratio()))[:2]


class FinishedRun(MisconfigurationException):
    """Raised where a run would go into the folder of a finished one.

    Args:
        folder: That folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} holds a finished run; choose another --name, or say --overwrite true.")
        self.folder = folder


class UnavailableTask(MisconfigurationException):
    """Raised where the data of one task of several cannot be had."""


class CLI(LightningCLI):
    """LightningCLI with named runs, each in a folder of its own, that end in a report."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            Task,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # `_begin` writes it where the run's other files are
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_epochs": 100,
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # the loaders share images out themselves, and exactly
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
            parser_kwargs={"description": f"{__doc__} Further verbs: {', '.join([*VERBS, 'vtab'])}."},
            args=None if args is None else list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose `--config` also finds the shipped configurations."""
        parser = Parser(**kwargs, allow_abbrev=False)
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="A YAML file, here or in configs/; later ones go over earlier ones.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run and not to one of its parts."""
        parser.set_defaults({"model": "RedundancyProbe"})
        parser.link_arguments("data", "model.init_args.num_classes", _num_classes, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.width", _width, apply_on="instantiate")
        parser.add_argument(
            "--name", type=str | None, default=None, help="The run's name; null is <task>_<backbone>_<selections>."
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Whether fit may replace a finished run.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say what overlays inherit and drop."""
        super().parse_arguments(parser, args)
        for line in overlaid(sys.argv[1:] if args is None else args):
            rank_zero_info(line)

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise MisconfigurationException(f"seed_everything cannot be had: {error}.") from error

    def _parse_ckpt_path(self) -> None:
        """Take no hyper-parameter from a checkpoint: they stand in config.yaml and on the command line."""

    def before_instantiate_classes(self) -> None:
        """Let a constructor's complaint through as it is, and load no checkpoint that holds more than data."""
        for kind in (Task, LightningModule, FrozenBackbone):
            self.parser.add_instantiator(build, kind, subclasses=True)
        self.config[self.subcommand]["weights_only"] = True
        if self.config[self.subcommand]["model"].get("init_args", {}).get("num_classes") is not None:
            raise MisconfigurationException("model.num_classes is that of the task; leave it out.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the run its name and folder, and the Trainer the checkpoints and the logger that go there.

        Raises:
            MisconfigurationException: If the folder holds a finished run or cannot be written, a checkpoint that is
                wanted is not there, or the Trainer cannot be had as asked for.
        """
        self.datamodule.preprocessing = self.model.preprocessing
        name = self._get(self.config, "name") or f"{self.datamodule.label}_{self.model.label}"
        self.name = re.sub(r"[^\w.+=-]+", "-", name)
        if not self.name.strip("."):
            raise MisconfigurationException(f"--name is {name!r}; it must name a folder of its own.")
        trainer = self.config[self.subcommand]["trainer"]
        self.folder = Path(trainer["default_root_dir"] or ".").expanduser() / self.name
        checkpoint = self._checkpoint()
        if self.subcommand == "fit":
            self._claim_folder()
        built = super().instantiate_trainer(**kwargs)
        built.ckpt_path = checkpoint  # where the model sees it before Lightning loads it
        self.config_init[self.subcommand]["ckpt_path"] = None
        return built

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        if isinstance(config["strategy"], str) and config["strategy"] not in STRATEGIES:
            raise MisconfigurationException(
                f"trainer.strategy is {config['strategy']!r}; it must be one of {', '.join(STRATEGIES)}."
            )
        if config["logger"] is None or config["logger"] is True:
            resumed = bool(self.config[self.subcommand]["ckpt_path"])
            fit = self.subcommand == "fit"
            config["logger"] = dashboard.wandb_logger(self.name, self.folder, resumed, self._groups()) if fit else False
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun says how many processes there are
            here, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
            config["devices"] = here if config["devices"] == "auto" else config["devices"]
            config["num_nodes"] = all_of_them // here
        callbacks += [Checkpoints(self._last), LambdaCallback(on_fit_start=self._begin)]
        plugins = config["plugins"] or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpointIO()]
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
            environment = getattr(trainer.strategy, "cluster_environment", None)
            if environment is not None:
                environment.validate_settings(trainer.num_devices, trainer.num_nodes)
            if isinstance(environment, LightningEnvironment) and trainer.num_nodes > 1 and not _knows_its_node():
                raise ValueError("start torchrun on each node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there.")
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            asked = ", ".join(f"{key} {config[key]}" for key in ("accelerator", "devices", "num_nodes", "strategy"))
            raise MisconfigurationException(f"There is no Trainer with {asked} here: {error}") from error
        return trainer

    def _checkpoint(self) -> str | None:
        """Return the file that `--ckpt_path` means; `last` is the run's own, the default of all verbs but fit."""
        wanted = self.config[self.subcommand]["ckpt_path"] or (None if self.subcommand == "fit" else "last")
        if wanted == "last" and not self._last.is_file():
            if self.subcommand != "fit":
                raise MisconfigurationException(
                    f"There is no {self._last}; name the --config of a run, or its checkpoint with --ckpt_path."
                )
            rank_zero_info(f"There is no {self._last} yet; the run starts from the beginning.")
            return None
        if wanted and wanted != "last" and not Path(wanted).is_file():
            raise MisconfigurationException(f"There is no checkpoint {str(wanted)!r}; give a file, or say last.")
        return str(self._last) if wanted == "last" else wanted

    @property
    def _last(self) -> Path:
        """The run's checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    def _claim_folder(self) -> None:
        """Refuse to write over a finished run, or into a folder that cannot be written."""
        if self._is_finished():
            raise FinishedRun(self.folder)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass

    def _is_finished(self) -> bool:
        """Return whether the folder holds a finished run that must stay."""
        return (self.folder / "results.csv").exists() and not self.config[self.subcommand]["overwrite"]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say where the run's files cannot be written."""
        try:
            yield
        except OSError as error:
            raise MisconfigurationException(
                f"The run cannot be written to {self.folder} ({error.strerror or error}); make room there, or name "
                f"another folder with --trainer.default_root_dir."
            ) from error

    def before_fit(self) -> None:
        """Start the clock, and let the loggers know the configuration before long work starts."""
        self.started = time.perf_counter()
        # Any verb takes it, so what only one of them knows is left out.
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        settings = {key: settings[key] for key in ("seed_everything", "trainer", "model", "data")}
        self.settings = {"name": self.name, **settings}
        if self.trainer.is_global_zero:
            dashboard.log_configuration(self.trainer.loggers, self._groups() | self.settings)

    def _groups(self) -> dict[str, str]:
        """Return what runs can be grouped by."""
        groups = {"task": self.datamodule.label}
        if isinstance(self.model, RedundancyProbe):
            groups["backbone"] = self.model.backbone.label
        return groups

    def _begin(self, *_: Any) -> None:
        """Write the configuration, and remove what an earlier run left, once nothing stands in the way of this one."""
        if not self.trainer.is_global_zero:
            return
        with self._writing():
            (self.folder / "results.csv").unlink(missing_ok=True)
            if not self.trainer.ckpt_path:
                self._last.unlink(missing_ok=True)
            with whole(self.folder / "config.yaml") as file:
                file.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def after_fit(self) -> None:
        """Measure every probe on validation and test, and report."""
        self.trainer.ckpt_path = None  # from here on the model is the one at hand
        if not isinstance(self.model, RedundancyProbe):
            self.trainer.test(self.model, datamodule=self.datamodule, weights_only=True)
            return
        trained = time.perf_counter()
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False, weights_only=True)
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False, weights_only=True)
        if self.trainer.is_global_zero:
            seconds = {"look": self.model.look_seconds, "fit": trained - self.started}
            seconds |= {"evaluation": time.perf_counter() - trained}
            tables = self.model.tables()
            with self._writing():
                print(report(self.folder, tables, self.model.remarks(), seconds), flush=True)
            dashboard.log_report(self.trainer.loggers, self.folder, tables)

    def after_validate(self) -> None:
        """Write what was measured on validation."""
        self._write("validate.csv", "results")

    def after_test(self) -> None:
        """Write what was measured on test."""
        self._write("test.csv", "results")

    def after_predict(self) -> None:
        """Write what every probe says of every test image."""
        self._write("predictions.csv", "prediction_table")

    def _write(self, name: str, table: str) -> None:
        if isinstance(self.model, RedundancyProbe) and self.trainer.is_global_zero:
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                with whole(self.folder / name) as file:
                    getattr(self.model, table)().to_csv(file, index=False)
            print(self.folder / name)


class TaskRun(CLI):
    """A run of one task of several, which share a backbone.

    Args:
        args: The command line.
        backbones: Those of earlier runs, by what they were made from; a new one is added.

    Raises:
        FinishedRun: If the run is finished already.
        UnavailableTask: If the task's data cannot be had.
    """

    def __init__(self, args: Sequence[str], backbones: dict[str, FrozenBackbone]) -> None:
        self.backbones = backbones
        super().__init__(args)

    def before_instantiate_classes(self) -> None:
        """Go on where the run was interrupted, and let a backbone be shared: it is frozen, so no run can tell."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        if not config["overwrite"]:
            config["ckpt_path"] = config["ckpt_path"] or "last"
        self.parser.add_instantiator(self._share, FrozenBackbone, subclasses=True, prepend=True)

    def _share(self, *args: Any, **kwargs: Any) -> FrozenBackbone:
        made_from = repr((args, sorted(kwargs.items())))
        if made_from not in self.backbones:
            self.backbones[made_from] = build(*args, **kwargs)
        return self.backbones[made_from]

    def _claim_folder(self) -> None:
        """Have the data before there is a folder; every process tries, as none can ask another yet."""
        if not self._is_finished():
            try:
                self.datamodule.prepare_data()
                self.datamodule.setup("fit")
            except MisconfigurationException as error:
                raise UnavailableTask(one_line(error)) from error
        super()._claim_folder()


def build(kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a constructor; jsonargparse would bury what it raises under everything it tried instead."""
    for name, parameter in inspect.signature(kind).parameters.items():  # jsonargparse lets null pass for any type
        if kwargs.get(name, parameter) is None and "None" not in str(parameter.annotation):
            fail(f"{next(iter(nearest_keys(name, cutoff=1)), name)} is null; leave it out, or give it a value.")
    try:
        return kind(*args, **kwargs)
    except MisconfigurationException as error:
        fail(str(error))


def overlaid(args: Sequence[str]) -> Iterator[str]:
    """Say what a later part of the command line leaves of an earlier one where that is easily missed.

    Another `model.backbone.name` inherits the `kwargs`, `weights`, overlay and layer of the one before; another class
    of task or model inherits the arguments it knows and drops the others.

    Args:
        args: The command line.

    Yields:
        A line for each such change.
    """
    backbone: dict[str, Any] = {}
    given_for: dict[str, str] = {}
    classes: dict[str, str] = {}
    arguments: dict[str, dict[str, Any]] = {"data": {}, "model": {}}
    for step in _settings(args):
        for part, before in arguments.items():
            new = step.get(part) or {}
            new = {"class_path": new} if isinstance(new, str) else new
            name = new.get("class_path", classes.get(part))
            known = getattr(datamodules if part == "data" else lightning_modules, str(name).rpartition(".")[2], None)
            if known and part in classes and name != classes[part]:
                dropped = {key: before.pop(key) for key in set(before) - set(inspect.signature(known).parameters)}
                if dropped:
                    said = ", ".join(f"{key} {value}" for key, value in sorted(dropped.items()))
                    yield f"--{part} is now {name}; dropped from {classes[part]}: {said}."
            if name:
                classes[part] = name
            before |= new.get("init_args") or {key: new[key] for key in new if key != "class_path"}
        new = arguments["model"].pop("backbone", None)
        new = new if isinstance(new, dict) else {}
        backbone |= new
        given_for |= dict.fromkeys(new, backbone.get("name", ""))
    kept = {key: value for key, value in backbone.items() if given_for[key] not in ("", backbone.get("name"))}
    kept = {key: value for key, value in kept.items() if value and value not in ("pretrained", "penultimate")}
    if kept:
        said = ", ".join(f"{key} {value}" for key, value in kept.items())
        yield f"model.backbone.name is now {backbone['name']}; inherited from {given_for[next(iter(kept))]}: {said}."


def _settings(args: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what each configuration on the command line sets, in order, and then what the flags set together."""
    arguments = iter(args)
    flags: dict[str, Any] = {}
    for argument in arguments:
        if not argument.startswith("-"):
            continue
        option, given, value = argument.partition("=")
        value = value if given else next(arguments, "")
        if option in ("-c", "--config"):
            yield read_config(find_config(value))
            continue
        *parents, last = option.lstrip("-").split(".")
        place = flags
        for key in parents:
            if not isinstance(place.get(key), dict):  # `--data ImageFolder` before `--data.root DIR`
                place[key] = {"class_path": place[key]} if key in place else {}
            place = place[key]
        place[last] = yaml.safe_load(value) if value.startswith("{") else value
    yield flags


def _knows_its_node() -> bool:
    return {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= set(os.environ)


def _num_classes(task: Task) -> int:
    return task.num_classes


def _width(task: Task) -> int | None:
    return task.width


def fail(message: str) -> NoReturn:
    """End with one line and exit status 2; of several processes that meet the same mistake, one says so."""
    said = said_by_processes(1)
    if said == 1 or (said is None and not is_left_behind()):
        lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
        print(f"error: {' '.join(lines)}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_left_behind() -> bool:
    """Return whether this is one of several that Lightning started, and the first, which started it, is ending."""
    patience = 5.0 if int(os.environ.get("LOCAL_RANK", 0)) else 0.0
    while patience > 0 and os.getppid() == PARENT:
        time.sleep(0.1)
        patience -= 0.1
    return patience > 0


def said_by_processes(more: int) -> int | None:
    """Add to the number of processes of this launch that met a mistake, and return it.

    None where nobody counts: a single process, processes that do not know of each other yet, or whose first is gone.
    """
    if not {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"} <= set(os.environ):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
        return store.add(f"mistakes/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", more)
    except DistError:
        return None


def run_verb(verb: str, args: Sequence[str]) -> None:
    """Run a verb that is no method of the Trainer, with a parser made from its function's arguments."""
    module, _, function = VERBS[verb].rpartition(".")
    run = getattr(importlib.import_module(module), function)
    parser = Parser(
        prog=f"train.py {verb}", description=(inspect.getdoc(run) or verb).partition("\n")[0], allow_abbrev=False
    )
    several: set[str | int] = {
        name for name, kind in typing.get_type_hints(run).items() if name == "runs" and kind == list[str]
    }
    for name in several:
        parser.add_argument(str(name), nargs="+", help="Folders of runs, or patterns.")
    parser.add_function_arguments(run, skip=several)
    parser.known = list(inspect.signature(run).parameters)
    run(**vars(parser.parse_args(args)))


def vtab(args: Sequence[str]) -> None:
    """Run a backbone over VTAB, a run for each task, and compare them. All other options are those of fit.

    A finished run is kept, an interrupted one goes on, and a task whose data cannot be had is left out.

    Args:
        args: The command line after the verb.

    Raises:
        MisconfigurationException: If a name is no task, runs would share a folder, or no task can be had.
    """
    from lightning_modules.reporting.compare import compare, compare_groups  # these draw, which takes long to import

    parser = argparse.ArgumentParser(
        "train.py vtab",
        description=(inspect.getdoc(vtab) or "").partition("\n\nArgs:")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    defaults = inspect.signature(compare).parameters
    parser.add_argument("-c", "--config", action="append", help="As fit takes it, also several; none is vtab1k.yaml.")
    parser.add_argument("--tasks", nargs="+", default=list(datamodules.VTAB), help="Names, also as [DTD,SVHN].")
    parser.add_argument("--data.protocol", dest="protocol", default="vtab1k", help="vtab1k, or full.")
    parser.add_argument("--output", type=Path, default=Path("vtab"), help="Folder of the comparison.")
    parser.add_argument("--delta", type=float, default=defaults["delta"].default, help="As compare takes it.")
    parser.add_argument("--rule", choices=measures.RULES, default=defaults["rule"].default, help="As compare takes it.")
    try:
        given, options = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise MisconfigurationException(f"{error.argument_name}: {error.message}.") from error
    tasks = list(dict.fromkeys(re.findall(r"[\w.]+", " ".join(given.tasks))))
    unknown = next((task for task in tasks if task not in offered("data")), None)
    if unknown or not tasks:
        raise MisconfigurationException(f"--tasks holds {nearest_class(unknown, 'data') if unknown else 'no task'}.")
    if not 0 < given.delta <= 1:
        raise MisconfigurationException(f"--delta is {given.delta:g}; it must be above 0, at most 1.")
    configs = [f"--config={name}" for name in given.config or ["vtab1k.yaml"]]
    backbones: dict[str, FrozenBackbone] = {}
    groups: dict[Path, str] = {}
    for place, task in enumerate(tasks):
        of_task = ["--name=null", "--overwrite=false", f"--data={task}", f"--data.protocol={given.protocol}"]
        said = f"{task}, {place + 1} of {len(tasks)}"
        rank_zero_info(f"{said}.")
        try:
            folder = TaskRun(["fit", *configs, *of_task, *options], backbones).folder
        except UnavailableTask as error:
            rank_zero_info(f"{said}, is skipped: {error}")
            continue
        except FinishedRun as error:
            folder = error.folder
            rank_zero_info(f"{said}, is kept: {folder} holds a finished run; --overwrite true does all anew.")
        finally:
            dashboard.finish()
        if folder in groups:
            raise MisconfigurationException(f"All tasks would go to {folder}; leave --name and --data out.")
        groups[folder] = getattr(datamodules, task).group or "other"
    if not groups:
        raise MisconfigurationException("None of the tasks can be had; the lines above say why.")
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        compare([str(folder) for folder in groups], given.output, given.delta, given.rule)
        compare_groups(groups, given.output, given.delta, given.rule)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line."""
    keep_freed_memory()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for what Lightning's own command line calls
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    # Left out: advertisements, and advice that a frozen backbone or a small data set has no use for.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    for advice in (
        "does not have many workers",
        "in eval mode at the start of training",
        "is deprecated",
        "sync_dist=True",
        "args parameter is intended to run from within Python",  # `vtab` does that
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")
    try:
        verb, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
        if verb in VERBS:
            run_verb(verb, rest)
        elif verb == "vtab":
            vtab(rest)
        else:
            CLI(args)
    except MisconfigurationException as error:
        # A loader's worker wraps its traceback around the message; the message is the last line.
        fail(str(error).strip().splitlines()[-1].partition("MisconfigurationException: ")[2] or str(error))
    except RuntimeError:
        said = said_by_processes(0)
        if said or (said is None and is_left_behind()):  # a collective broke off where another met a mistake
            sys.exit(2)
        raise
    finally:
        dashboard.finish()


if __name__ == "__main__":
    main()
