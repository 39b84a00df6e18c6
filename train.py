"""The command line: joins a task, a model and a Trainer, and leaves a run's files."""

import difflib
import inspect
import logging
import netrc
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

import datamodules
import lightning_modules
from datamodules import Task
from lightning_modules import FrozenBackbone, RedundancyProbe
from lightning_modules.reporting import report

CONFIGS = Path(__file__).resolve().parent / "configs"


def find_config(name: str) -> str:
    """Return the path of a configuration, looked up in the current folder and then among the shipped ones."""
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return str(path)
    shipped = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=1) or [f"one of {', '.join(shipped)}"]
    raise MisconfigurationException(f"There is no configuration {name!r} here or in {CONFIGS}; try {near[0]}.")


class ConfigFile(ActionConfigFile):
    """`--config`, looked up by `find_config`."""

    def __call__(self, parser: Any, config: Any, value: Any, option_string: str | None = None) -> None:
        """Apply the file to what is parsed so far."""
        super().__call__(parser, config, find_config(value) if isinstance(value, str) else value, option_string)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without a hundred lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line and exit status 2."""
        unknown = re.search(r'Parser key "(data|model)".*Expected a dot import path string: (\S+)', message, re.DOTALL)
        if unknown:
            kind, name = unknown.groups()
            known = datamodules.__all__ if kind == "data" else lightning_modules.__all__
            known = [each for each in known if each not in ("Task", "FrozenBackbone")]
            fail(f"--{kind} is {name!r}; it must be one of {', '.join(known)}, or the import path of a class.")
        fail(message.partition("Given value type")[0])


class CLI(LightningCLI):
    """LightningCLI with named runs, each in a folder of its own, that end in a report."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            Task,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # `before_fit` writes it where the run's other files are
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyper-parameters stand in config.yaml, and nowhere else
            trainer_defaults={
                "max_epochs": 100,
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # the loaders share images out themselves, and exactly
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
            parser_kwargs={"description": __doc__},
            args=None if args is None else list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose `--config` also finds the shipped configurations."""
        parser = Parser(**kwargs)
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
        parser.add_argument(
            "--name", type=str | None, default=None, help="The run's name; null is <task>_<backbone>_<selections>."
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Whether fit may replace a finished run.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say what overlays inherit and drop."""
        super().parse_arguments(parser, args)
        for line in overlaid(sys.argv[1:] if args is None else args):
            rank_zero_info(line)

    def before_instantiate_classes(self) -> None:
        """Let a constructor's complaint through as it is, and load no checkpoint that holds more than data."""
        for kind in (Task, LightningModule, FrozenBackbone):
            self.parser.add_instantiator(build, kind, subclasses=True)
        self.config[self.subcommand]["weights_only"] = True

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the run its name and folder, and the Trainer the checkpoints and the logger that go there."""
        self.datamodule.preprocessing = self.model.preprocessing
        name = self._get(self.config, "name") or f"{self.datamodule.name}_{self.model.label}"
        self.name = re.sub(r"[^\w.+=-]+", "-", name)
        trainer = self.config[self.subcommand]["trainer"]
        self.folder = Path(trainer["default_root_dir"] or ".").expanduser() / self.name
        if self.subcommand == "fit":
            self._claim_folder()
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        if config["logger"] is None or config["logger"] is True:
            config["logger"] = wandb_logger(self.name, self.folder) if self.subcommand == "fit" else False
        checkpoints = ModelCheckpoint(
            self.folder / "checkpoints",
            save_last=True,
            save_top_k=0,
            every_n_epochs=max(1, (config["max_epochs"] or 0) // 20),
            save_on_train_epoch_end=True,
        )
        return super()._instantiate_trainer(config, [*callbacks, checkpoints])

    def _claim_folder(self) -> None:
        """Refuse to write over a finished run, or into a folder that cannot be written."""
        settings = self.config[self.subcommand]
        if (self.folder / "results.csv").exists() and not settings["overwrite"]:
            raise MisconfigurationException(
                f"{self.folder} holds a finished run; choose another --name, or say --overwrite true."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                self._write_config()
                (self.folder / "results.csv").unlink(missing_ok=True)
                if not settings["ckpt_path"]:
                    shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        except OSError as error:
            raise MisconfigurationException(
                f"The run cannot be written to {self.folder} ({error.strerror}); set --trainer.default_root_dir."
            ) from error

    def _write_config(self) -> None:
        """Write all that runs this again; any verb takes it, so what only one of them knows is left out."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        settings = {key: settings[key] for key in ("seed_everything", "trainer", "model", "data")}
        (self.folder / "config.yaml").write_text(yaml.safe_dump({"name": self.name, **settings}, sort_keys=False))

    def before_fit(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def after_fit(self) -> None:
        """Measure every probe on validation and test, and report."""
        if not isinstance(self.model, RedundancyProbe):
            self.trainer.test(self.model, datamodule=self.datamodule, weights_only=True)
            return
        trained = time.perf_counter()
        self.trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt", weights_only=False)
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False, weights_only=True)
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False, weights_only=True)
        if self.trainer.is_global_zero:
            seconds = {"look": self.model.look_seconds, "fit": trained - self.started}
            seconds |= {"evaluation": time.perf_counter() - trained}
            results, classes = self.model.results(), self.model.class_results()
            print(report(self.folder, results, classes, self.model.remarks(), seconds), flush=True)

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
            self.folder.mkdir(parents=True, exist_ok=True)
            getattr(self.model, table)().to_csv(self.folder / name, index=False)
            print(self.folder / name)


def build(kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a constructor; jsonargparse would bury what it raises under everything it tried instead."""
    try:
        return kind(*args, **kwargs)
    except MisconfigurationException as error:
        fail(str(error))


def wandb_logger(name: str, folder: Path) -> WandbLogger:
    """Return the W&B logger of a run; without credentials it works offline, and says how to sync."""
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = False
    if "WANDB_MODE" not in os.environ and not has_wandb_credentials():
        offline = True
        rank_zero_info(f"No W&B credentials: logging offline; `wandb sync {folder}/wandb/offline-run-*` uploads it.")
    return WandbLogger(project="diffused-redundancy", name=name, save_dir=folder, offline=offline)


def has_wandb_credentials() -> bool:
    """Return whether W&B would log in without asking: from its variable, or from the file `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
            yield yaml.safe_load(Path(find_config(value)).read_text()) or {}
            continue
        *parents, last = option.lstrip("-").split(".")
        place = flags
        for key in parents:
            if not isinstance(place.get(key), dict):  # `--data ImageFolder` before `--data.root DIR`
                place[key] = {"class_path": place[key]} if key in place else {}
            place = place[key]
        place[last] = yaml.safe_load(value) if value.startswith("{") else value
    yield flags


def _num_classes(task: Task) -> int:
    return task.num_classes


def fail(message: str) -> NoReturn:
    """End with one line and exit status 2."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    print(f"error: {' '.join(lines)}", file=sys.stderr, flush=True)
    sys.exit(2)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for what Lightning's own command line calls
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    # Left out: advertisements, and advice that a frozen backbone or a small data set has no use for.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    for advice in (
        "does not have many workers",
        "in eval mode at the start of training",
        "is deprecated",
        "sync_dist=True",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")
    try:
        CLI(args)
    except MisconfigurationException as error:
        # A loader's worker wraps its traceback around the message; the message is the last line.
        fail(str(error).strip().splitlines()[-1].partition("MisconfigurationException: ")[2] or str(error))


if __name__ == "__main__":
    main()
