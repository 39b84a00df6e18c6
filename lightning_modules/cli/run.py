"""One run: a task, a model and a Trainer, in a folder of its own that ends up with a report."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules import Pretraining, RedundancyProbe
from lightning_modules.checkpoints import AtomicCheckpointIO, Checkpoints
from lightning_modules.cli.errors import Classes, arguments
from lightning_modules.cli.extraction import ExtractingTrainer
from lightning_modules.cli.folder import ADVICE, RunFolder
from lightning_modules.cli.parser import run_parser
from lightning_modules.files import atomic, one_line, writing
from lightning_modules.progress import FitProgress
from lightning_modules.reporting import dashboard, figures
from lightning_modules.reporting.report import report

VERBS = {
    "extract": "Extract the features that fit trains on, beside other processes that do the same, and end.",
    "fit": "Train a model on a task, evaluate it on validation and test, and report.",
    "validate": "Evaluate a finished run on validation again, into validate.csv.",
    "test": "Evaluate a finished run on test again, into test.csv.",
    "predict": "Write what every probe of a finished run says of every test image, into predictions.csv.",
}
"""Methods of the Trainer that a run can be of."""
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
"""Processes that run the whole command line, each on one device."""

NAME_MAX = 255  # Bytes in the name of a folder, on all usual file systems


class Refusal(BaseException):
    """Carries the error of a constructor past jsonargparse, which would bury it under all that it tried instead."""


class CLI(LightningCLI):
    """LightningCLI with named runs, each in a folder of its own, that end in a report.

    The command line begins with one of `VERBS`. What cannot be as it asks is told by a MisconfigurationException.
    """

    suffix = ""  # Ends the name of a run that is not given one

    def __init__(self, args: Sequence[str], tasks: Classes) -> None:
        self.tasks = tasks
        self.verb = args[0]
        super().__init__(
            LightningModule,
            tasks.base,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=ExtractingTrainer,
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
            args=list(args),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one verb that is asked for, so that no parser is built for others."""
        known = super().subcommands()
        return {self.verb: known.get(self.verb, known["fit"])}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose `--config` also finds the shipped configurations."""
        parser = run_parser(self.tasks)(**kwargs, allow_abbrev=False)
        parser.add_config_option()
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run and not to one of its parts."""
        parser.set_defaults({"model": "RedundancyProbe"})
        parser.add_argument(
            "--name", type=str | None, default=None, help="The run's name; null is <task>_<backbone>_<selections>."
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Whether fit may replace a finished run.")
        formats = figures.Format | list[figures.Format]
        parser.add_argument("--pictures", type=formats, default=figures.FORMATS, help="Their formats; [] for none.")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise MisconfigurationException(f"seed_everything cannot be had: {error}.") from error

    def _parse_ckpt_path(self) -> None:
        """Take no hyper-parameter from a checkpoint: they stand in config.yaml and on the command line."""

    @property
    def settings(self) -> Any:
        """What was parsed for the verb."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Let constructors' complaints through as they are, and load no checkpoint that holds more than data."""
        self.parser.add_instantiator(self.construct, object, subclasses=True)
        if self.verb != "extract":
            self.settings["weights_only"] = True

    def instantiate_classes(self) -> None:
        """Make task, model and Trainer."""
        try:
            super().instantiate_classes()
        except Refusal as refusal:
            raise refusal.args[0] from None

    def construct(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        """Make an object of a class that the configuration names.

        Raises:
            Refusal: If the constructor raises, or an argument is null that must not be.
        """
        for name, parameter in arguments(kind).items():  # jsonargparse lets null pass for any type
            typed = parameter.annotation not in (parameter.empty, Any) and "None" not in str(parameter.annotation)
            if typed and kwargs.get(name, parameter) is None and parameter.default is not None:
                key = run_parser(self.tasks).options.prefix(kind) + name
                raise Refusal(MisconfigurationException(f"{key} is null; leave it out, or give it a value."))
        try:
            return kind(*args, **kwargs)
        except (ValueError, ImportError) as error:  # a library of its own may not be installed
            raise Refusal(MisconfigurationException(f"{kind.__name__}: {one_line(error)}.")) from error
        except Exception as error:
            raise Refusal(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the run its name and folder, and the Trainer the checkpoints that go there."""
        self.datamodule.preprocessing = self.model.preprocessing
        labels = (self.datamodule.label, self.model.label, self.suffix)
        self.name = run_name(self.settings["name"], "_".join(filter(None, labels)))
        config = dict(self.config_init[self.subcommand]["trainer"])
        self.folder = RunFolder(Path(config["default_root_dir"] or ".").expanduser() / self.name)
        config |= launched(config["strategy"], config["devices"], config["num_nodes"])
        config["callbacks"] = [
            *(callbacks := as_list(config["callbacks"])),
            Checkpoints(self.folder.last),
            LambdaCallback(setup=self._describe, on_train_start=self._begin, on_fit_end=self._begin),
        ]
        if config["enable_progress_bar"] is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            config["callbacks"].append(FitProgress())
        config["plugins"] = [*as_list(config["plugins"]), AtomicCheckpointIO()]
        if config["logger"] in (None, True):  # `_log_configuration` adds W&B's, once the folder is held
            config["logger"] = False
        try:
            trainer = super().instantiate_trainer(**config | kwargs)
            check_processes(trainer)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            asked = ", ".join(f"{key} {config[key]}" for key in ("accelerator", "devices", "num_nodes", "strategy"))
            raise MisconfigurationException(f"There is no Trainer with {asked} here: {error}") from error
        return trainer

    def after_instantiate_classes(self) -> None:
        """Let Lightning load the checkpoint that is meant; that of a fit is known once its folder is held."""
        self.dumped = self.parser.dump(self.config, skip_none=False, skip_validation=True)  # parsed, so valid
        if self.verb not in ("extract", "fit"):
            checkpoint = self.folder.checkpoint(self.settings["ckpt_path"], self.verb)
            self.config_init[self.subcommand]["ckpt_path"] = checkpoint

    def fit(self, **arguments: Any) -> None:
        """Fit, evaluate on validation and test, and report; LightningCLI calls this in place of Trainer.fit."""
        connect(self.trainer)
        with self.folder.occupied(self.trainer, self.settings["overwrite"]):
            self.run(**arguments)

    def run(self, **arguments: Any) -> None:
        """Do what `fit` does, in a folder that is held."""
        arguments["ckpt_path"] = self.folder.checkpoint(self.settings["ckpt_path"], self.verb)
        self.started = time.perf_counter()
        self._log_configuration()
        self.trainer.fit(**arguments)
        trained = time.perf_counter()
        probes = isinstance(self.model, RedundancyProbe)
        evaluated: dict[str, float] = {}
        for evaluate in (self.trainer.validate, self.trainer.test):
            for found in evaluate(self.model, datamodule=self.datamodule, verbose=not probes, weights_only=True):
                evaluated |= found
        if isinstance(self.model, Pretraining) and self.trainer.is_global_zero:
            with writing(self.folder.path, ADVICE), atomic(self.folder.results) as file:
                self.model.results(evaluated).to_csv(file, index=False)
        if probes and self.trainer.is_global_zero:
            seconds = {"extraction": self.model.stream.extractor.seconds, "fit": trained - self.started}
            seconds |= {"evaluation": time.perf_counter() - trained}
            results = self.model.results()
            with writing(self.folder.path, ADVICE):
                remarks, formats = self.model.solver.remarks(self.model), self.settings["pictures"]
                print(report(self.folder.path, results, remarks, seconds, formats), flush=True)
            dashboard.log_report(self.trainer.loggers, self.folder.path, results)

    def _log_configuration(self) -> None:
        """Let the loggers know the configuration before long work starts."""
        groups = {"task": self.datamodule.label}
        if getattr(self.model, "backbone", None):
            groups["backbone"] = self.model.backbone.label
        if self.settings["trainer"]["logger"] in (None, True):
            resumed = bool(self.settings["ckpt_path"])
            self.trainer.logger = dashboard.wandb_logger(self.name, self.folder.path, resumed, groups)
        dumped = yaml.safe_load(self.dumped)[self.subcommand] | {"name": self.name}
        # Any verb takes it, so what only one of them knows is left out.
        self.unwritten = {key: dumped[key] for key in ("name", "seed_everything", "trainer", "model", "data")}
        if self.trainer.is_global_zero:
            dashboard.log_configuration(self.trainer.loggers, groups | self.unwritten)

    def _describe(self, *_: Any, stage: str) -> None:
        """Log a line for each part of the run, once the data are there and before any image is extracted."""
        if stage != ("fit" if self.verb == "extract" else self.verb):  # a fit evaluates too
            return
        lines = {"task": self.datamodule.describe(), **self.model.describe(self.datamodule)}
        packages = {kind.__module__.partition(".")[0] for kind in (self.tasks.base, CLI, Trainer)}
        named = re.findall(r"class_path: ([\w.]+)", self.dumped)
        own_code = [path for path in named if path.partition(".")[0] not in packages]
        lines |= {"own code": ", ".join(own_code)} if own_code else {}
        lines["folder"] = str(self.folder.path)
        for name, value in lines.items():
            rank_zero_info(f"{name:<{max(map(len, lines))}}  {value}")

    def _begin(self, *_: Any) -> None:
        """Write the configuration, and remove what an earlier run left, once nothing stands in the way of this one."""
        if not self.unwritten or not self.trainer.is_global_zero:
            return
        with writing(self.folder.path, ADVICE):
            self.folder.results.unlink(missing_ok=True)
            if not self.trainer.ckpt_path:
                self.folder.last.unlink(missing_ok=True)
            with atomic(self.folder.path / "config.yaml") as file:
                file.write_text(yaml.safe_dump(self.unwritten, sort_keys=False), encoding="utf-8")
        self.unwritten = {}

    def after_test(self) -> None:
        """Write what a verb other than fit found."""
        if isinstance(self.model, RedundancyProbe) and self.trainer.is_global_zero:
            predicts = self.verb == "predict"
            table = self.model.predictions.table() if predicts else self.model.results().tables["results"]
            path = self.folder.path / ("predictions.csv" if predicts else f"{self.verb}.csv")
            with writing(path, ADVICE), atomic(path) as file:
                table.to_csv(file, index=False)
            print(path)

    after_validate = after_predict = after_test


def run_name(given: str | None, default: str) -> str:
    """Return the name of a run's folder; a default that is longer than file systems take is cut, and stays its own."""
    name = re.sub(r"[^\w.+=-]+", "-", given or default)
    if not name.strip("."):
        raise MisconfigurationException(f"--name is {given!r}; it must name a folder of its own.")
    if len(name.encode()) > NAME_MAX and given:
        raise MisconfigurationException(f"--name has {len(name.encode())} bytes; a folder's has at most {NAME_MAX}.")
    if len(name.encode()) > NAME_MAX:
        kept = name.encode()[: NAME_MAX - 9].decode(errors="ignore")
        return f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def launched(strategy: Any, devices: Any, nodes: int) -> dict[str, Any]:
    """Return the Trainer's devices and nodes, as torchrun says them itself; refuse a name that is no strategy."""
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise MisconfigurationException(f"trainer.strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}.")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        devices, nodes = here if devices == "auto" else devices, everywhere // here
    return {"devices": devices, "num_nodes": nodes}


def check_processes(trainer: Trainer) -> None:
    """Refuse a Trainer that would wait for processes that nobody started, with a ValueError that says what to do."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    knows_its_node = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= set(os.environ)
    if isinstance(environment, LightningEnvironment) and trainer.num_nodes > 1 and not knows_its_node:
        raise ValueError("start torchrun on each node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there.")


def connect(trainer: Trainer) -> None:
    """Start the other processes of a run, where Lightning is to, and connect all, as Trainer.fit would do later."""
    if trainer.world_size > 1:
        launcher: Any = trainer.strategy.launcher  # all of `STRATEGIES` have one
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, null as no value, and anything else as one value."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
