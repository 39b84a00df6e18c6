"""One run: a task, a model and a Trainer, in a folder of its own that ends up with a report."""

import inspect
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules import RedundancyProbe
from lightning_modules.checkpoints import AtomicCheckpointIO, Checkpoints
from lightning_modules.cli.errors import nearest_keys
from lightning_modules.cli.folder import ADVICE, RunFolder
from lightning_modules.cli.launch import check_processes, check_strategy, connect, launched
from lightning_modules.cli.parser import Tasks, options_of_a_run, run_parser
from lightning_modules.cli.summary import Summary, imported
from lightning_modules.files import atomic, writing
from lightning_modules.reporting import dashboard, report

VERBS = {
    "fit": "Train a model on a task, evaluate it on validation and test, and report.",
    "validate": "Evaluate a finished run on validation again, into validate.csv.",
    "test": "Evaluate a finished run on test again, into test.csv.",
    "predict": "Write what every probe of a finished run says of every test image, into predictions.csv.",
}
"""Methods of the Trainer that a run can be of."""
PARSERS: dict[tuple[str, Tasks], tuple[Any, ...]] = {}
"""Parsers that were built in this process, by their verb: building one takes as long as parsing with it."""


class Refusal(BaseException):
    """Carries what a constructor complains of past jsonargparse, which would bury it under all that it tried instead.

    Args:
        error: The complaint.
    """

    def __init__(self, error: MisconfigurationException) -> None:
        super().__init__(str(error))
        self.error = error


class CLI(LightningCLI):
    """LightningCLI with named runs, each in a folder of its own, that end in a report.

    Args:
        args: The command line; its first word is one of `VERBS`.
        tasks: What can be probed.

    Raises:
        MisconfigurationException: If something cannot be as asked for; the message is one line.
    """

    def __init__(self, args: Sequence[str], tasks: Tasks) -> None:
        self.tasks = tasks
        self.verb = args[0]
        super().__init__(
            LightningModule,
            tasks.base,
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
            args=list(args),
        )

    # --------------------------------------------------------------------------------------------------- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one verb that is asked for, so that no parser is built for others."""
        return {self.verb: super().subcommands()[self.verb]}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parser, or take the one of an earlier run in this process."""
        built = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
        if (self.verb, self.tasks) not in PARSERS:
            super().setup_parser(*args, **kwargs)
            PARSERS[self.verb, self.tasks] = tuple(getattr(self, name) for name in built)
        for name, value in zip(built, PARSERS[self.verb, self.tasks], strict=True):
            setattr(self, name, value)

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

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise MisconfigurationException(f"seed_everything cannot be had: {error}.") from error

    def _parse_ckpt_path(self) -> None:
        """Take no hyper-parameter from a checkpoint: they stand in config.yaml and on the command line."""

    # ------------------------------------------------------------------------------------------------- instances

    def before_instantiate_classes(self) -> None:
        """Let constructors' complaints through as they are, and load no checkpoint that holds more than data."""
        self.parser.add_instantiator(self.construct, object, subclasses=True)
        self.settings["weights_only"] = True

    @property
    def settings(self) -> Any:
        """What was parsed for the verb."""
        return self.config[self.subcommand]

    def instantiate_classes(self) -> None:
        """Make task, model and Trainer."""
        try:
            super().instantiate_classes()
        except Refusal as refusal:
            raise refusal.error from None

    def construct(self, kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the constructor of anything that the configuration names.

        Raises:
            Refusal: If the constructor raises a MisconfigurationException, or an argument is null that must not be.
        """
        for name, parameter in inspect.signature(kind).parameters.items():  # jsonargparse lets null pass for any type
            typed = parameter.annotation not in (parameter.empty, Any) and "None" not in str(parameter.annotation)
            if typed and kwargs.get(name, parameter) is None and parameter.default is not None:
                key = next(iter(nearest_keys(name, options_of_a_run(self.tasks), 1)), name)
                raise Refusal(MisconfigurationException(f"{key} is null; leave it out, or give it a value."))
        try:
            return kind(*args, **kwargs)
        except MisconfigurationException as error:
            raise Refusal(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the run its name and folder, and the Trainer the checkpoints that go there.

        Raises:
            MisconfigurationException: If the name is none, or the Trainer cannot be had as asked for.
        """
        self.datamodule.preprocessing = self.model.preprocessing
        name = self.settings["name"] or self.default_name
        self.name = re.sub(r"[^\w.+=-]+", "-", name)
        if not self.name.strip("."):
            raise MisconfigurationException(f"--name is {name!r}; it must name a folder of its own.")
        config = dict(self.config_init[self.subcommand]["trainer"])
        self.folder = RunFolder(Path(config["default_root_dir"] or ".").expanduser() / self.name)
        check_strategy(config["strategy"])
        config |= launched(config["devices"], config["num_nodes"])
        packages = {kind.__module__.partition(".")[0] for kind in (self.tasks.base, CLI, Trainer)}
        config["callbacks"] = [
            *_list(config["callbacks"]),
            Checkpoints(self.folder.last),
            Summary(self.folder.path, list(imported(self.settings, packages))),
            LambdaCallback(on_train_start=self._begin, on_fit_end=self._begin),  # whichever comes first,
        ]
        config["plugins"] = [*_list(config["plugins"]), AtomicCheckpointIO()]
        self.wants_wandb = self.subcommand == "fit" and config["logger"] in (None, True)
        config["logger"] = False if config["logger"] is True else config["logger"] or False
        try:
            trainer = super().instantiate_trainer(**config | kwargs)
            check_processes(trainer)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            asked = ", ".join(f"{key} {config[key]}" for key in ("accelerator", "devices", "num_nodes", "strategy"))
            raise MisconfigurationException(f"There is no Trainer with {asked} here: {error}") from error
        return trainer

    @property
    def default_name(self) -> str:
        """What the run is called where it is not given a name."""
        return f"{self.datamodule.label}_{self.model.label}"

    # ----------------------------------------------------------------------------------------------------- verbs

    def after_instantiate_classes(self) -> None:
        """Let Lightning load the checkpoint that is meant; the last of a fit is known once its folder is held."""
        if self.subcommand != "fit" or self.settings["ckpt_path"] != "last":
            checkpoint = self.folder.checkpoint(self.settings["ckpt_path"], self.verb)
            self.config_init[self.subcommand]["ckpt_path"] = checkpoint

    def fit(self, **arguments: Any) -> None:
        """Fit, evaluate on validation and test, and report; LightningCLI calls this in place of Trainer.fit.

        Args:
            arguments: Those of Trainer.fit.
        """
        connect(self.trainer)
        with self.folder.occupied(self.trainer, self.settings["overwrite"]):
            self.run(**arguments)

    def run(self, **arguments: Any) -> None:
        """Do what `fit` does, in a folder that is held."""
        if self.settings["ckpt_path"] == "last":
            arguments["ckpt_path"] = self.folder.checkpoint("last", self.verb)
        self.begun = False
        started = time.perf_counter()
        self._log_configuration()
        self.trainer.fit(**arguments)
        trained = time.perf_counter()
        probes = isinstance(self.model, RedundancyProbe)
        for evaluate in (self.trainer.validate, self.trainer.test):
            evaluate(self.model, datamodule=self.datamodule, verbose=not probes, weights_only=True)
        if probes and self.trainer.is_global_zero:
            seconds = {"extraction": self.model.stream.extractor.seconds, "fit": trained - started}
            seconds |= {"evaluation": time.perf_counter() - trained}
            results = self.model.results()
            with writing(self.folder.path, ADVICE):
                print(report(self.folder.path, results, self.model.solver.remarks(self.model), seconds), flush=True)
            dashboard.log_report(self.trainer.loggers, self.folder.path, results)

    def _log_configuration(self) -> None:
        """Let the loggers know the configuration before long work starts."""
        groups = {"task": self.datamodule.label}
        if isinstance(self.model, RedundancyProbe):
            groups["backbone"] = self.model.backbone.label
        if self.wants_wandb:
            resumed = bool(self.settings["ckpt_path"])
            self.trainer.logger = dashboard.wandb_logger(self.name, self.folder.path, resumed, groups)
        # Any verb takes it, so what only one of them knows is left out.
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        dumped = {key: dumped[key] for key in ("seed_everything", "trainer", "model", "data")}
        self.saved = {"name": self.name, **dumped}
        if self.trainer.is_global_zero:
            dashboard.log_configuration(self.trainer.loggers, groups | self.saved)

    def _begin(self, *_: Any) -> None:
        """Write the configuration, and remove what an earlier run left, once nothing stands in the way of this one."""
        if self.begun or not self.trainer.is_global_zero:
            return
        self.begun = True
        with writing(self.folder.path, ADVICE):
            self.folder.results.unlink(missing_ok=True)
            if not self.trainer.ckpt_path:
                self.folder.last.unlink(missing_ok=True)
            with atomic(self.folder.path / "config.yaml") as file:
                file.write_text(yaml.safe_dump(self.saved, sort_keys=False))

    def after_validate(self) -> None:
        """Write what was measured on validation."""
        self._write("validate.csv", lambda: self.model.results().tables["results"])

    def after_test(self) -> None:
        """Write what was measured on test."""
        self._write("test.csv", lambda: self.model.results().tables["results"])

    def after_predict(self) -> None:
        """Write what every probe says of every test image."""
        self._write("predictions.csv", lambda: self.model.predictions.table())

    def _write(self, name: str, table: Callable[[], pd.DataFrame]) -> None:
        if isinstance(self.model, RedundancyProbe) and self.trainer.is_global_zero:
            with writing(self.folder.path, ADVICE):
                self.folder.path.mkdir(parents=True, exist_ok=True)
                with atomic(self.folder.path / name) as file:
                    table().to_csv(file, index=False)
            print(self.folder.path / name)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value is not None else []
