"""The parser of the command line: configurations by name, and mistakes in one line."""

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules import Pretraining, RedundancyProbe
from lightning_modules.cli.errors import Options, explain, fail, options_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Folder of the shipped configurations."""
MODELS = (Pretraining, RedundancyProbe)
"""What `--model` takes by name."""


def find_config(name: str) -> str:
    """Return the path of a configuration, looked up in the current folder and then among the shipped ones.

    Raises:
        MisconfigurationException: If it is in neither; the message names the nearest shipped one.
    """
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return str(path)
    shipped = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=1) or [f"one of {', '.join(shipped)}"]
    raise MisconfigurationException(f"There is no configuration {name!r} here or in {CONFIGS}; try {near[0]}.")


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


class ConfigFile(ActionConfigFile):
    """`--config`, looked up by `find_config` and named where it cannot be read."""

    def __call__(self, parser: Any, config: Any, value: Any, option_string: str | None = None) -> None:
        """Apply the file to what is parsed so far."""
        if isinstance(value, str):
            value = find_config(value)
            read_config(value)
        super().__call__(parser, config, value, option_string)


class Tasks(NamedTuple):
    """What can be probed, as `train.py` hands it over."""

    base: type[LightningDataModule]
    """Class of all tasks."""
    offered: tuple[type[LightningDataModule], ...]
    """Those that `--data` takes by name."""


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without a hundred lines of usage."""

    def options(self) -> Options:
        """Return the options, of which the nearest is named to one who mistypes one."""
        return Options({action.dest: [] for action in self._actions}, {})

    def add_config_option(self) -> None:
        """Add `--config`, which also finds the shipped configurations."""
        self.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="A YAML file, here or in configs/; later ones go over earlier ones.",
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line and exit status 2."""
        fail(explain(message, self.options()))


@functools.cache
def options_of_a_run(tasks: Tasks) -> Options:
    """Return the options of fit, validate, test and predict."""
    parts: dict[str, Sequence[type]] = {"trainer": (Trainer,), "data": tasks.offered, "model": MODELS}
    return options_of(parts, ("name", "overwrite", "config", "seed_everything", "ckpt_path"))


@functools.cache
def run_parser(tasks: Tasks) -> type[Parser]:
    """Return the class of a run's parsers; jsonargparse makes further ones of it, for the parts of a configuration."""

    class RunParser(Parser):
        """Knows all options of a run, also while it parses a part."""

        def options(self) -> Options:
            """Return the options of a run."""
            return options_of_a_run(tasks)

    return RunParser
