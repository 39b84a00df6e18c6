"""The parser of the command line: configurations by name, and mistakes in one line."""

import difflib
import functools
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules import Pretraining, RedundancyProbe
from lightning_modules.cli.errors import Classes, Options, explain, fail, program
from lightning_modules.files import CONFIGS

MODELS: dict[type, dict[str, Any]] = {
    RedundancyProbe: {"solver": {"class_path": "SGD"}},
    Pretraining: {"objective": {"class_path": "CrossEntropy"}},
}
"""What `--model` takes by name, with the class of an argument where only settings of it are given."""


def find_config(name: str) -> str:
    """Return the path of a configuration, in the current folder or else among the shipped ones; refuse other names."""
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return str(path)
    shipped = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    tasks = [each for each in shipped if not each.startswith(("paper_", "pretrain_", "sweep_"))]
    near = difflib.get_close_matches(name, shipped, n=1) or [f"one of {', '.join(tasks)}"]
    raise MisconfigurationException(f"There is no configuration {name!r} here or in {CONFIGS}; try {near[0]}.")


class ConfigFile(ActionConfigFile):
    """`--config`, looked up by `find_config` and named where it cannot be read."""

    def __call__(self, parser: Any, config: Any, value: Any, option_string: str | None = None) -> None:
        """Apply the file to what is parsed so far."""
        if isinstance(value, str):
            value = find_config(value)
            try:
                settings = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                mark = getattr(error, "problem_mark", None)
                where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
                problem = getattr(error, "problem", None) or error
                raise MisconfigurationException(f"{value} is not valid YAML{where} ({problem}).") from error
            if not isinstance(settings, dict):
                raise MisconfigurationException(
                    f"{value} holds {settings!r:.60}; it must hold settings, as `data: CIFAR10`."
                )
        super().__call__(parser, config, value, option_string)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without a hundred lines of usage."""

    prefix = ""  # What its options begin with on the command line; a configuration's parts have parsers of their own

    options = Options({})
    """Those of which the nearest is named to one who mistypes one, where the parser has not all of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.found_defaults: dict[tuple[int, bool], Namespace] = {}
        super().__init__(*args, **kwargs)

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """Return the defaults of all options.

        They are found once for as many options as there are: jsonargparse asks several times in every parse, which
        takes a quarter of it, as the options of each class that a default names are looked for.
        """
        key = len(self._actions), skip_validation
        if key not in self.found_defaults:
            self.found_defaults[key] = super().get_defaults(skip_validation, **kwargs)
        return self.found_defaults[key].clone()

    def set_defaults(self, *args: dict[str, Any], **kwargs: Any) -> None:
        """Set the defaults of options."""
        self.found_defaults.clear()
        super().set_defaults(*args, **kwargs)

    def add_config_option(self) -> None:
        """Add `--config`, which also finds the shipped configurations."""
        text = "A YAML file, here or in configs/; later ones go over earlier ones."
        self.add_argument("-c", "--config", action=ConfigFile, help=text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line and exit status 2."""
        options = self.options or Options({}, [action.dest for action in self._actions])
        fail(explain(message, options, self.prefix))


def parse_apart(kind: type, verb: str, args: Sequence[str], configured: bool = False) -> tuple[Any, list[str]]:
    """Return what a verb's words ask of it, as an object of a class, and the words that are options of fit.

    Where it is `configured`, `--config` is its own, too.
    """
    own = {"help", "h", *inspect.signature(kind).parameters, *(["config", "c"] if configured else [])}
    mine: list[str] = []
    further: list[str] = []
    words = mine
    for word in args:
        if word.startswith("--") or word in ("-c", "-h"):
            words = mine if re.split(r"[.=]", word.lstrip("-"))[0] in own else further
        words.append(word)
    description = inspect.cleandoc(kind.__doc__ or "").partition("\n\nArgs")[0]
    parser = Parser(prog=f"{program()} {verb}", description=description)
    if configured:
        parser.add_config_option()
    parser.add_class_arguments(kind)
    settings = parser.parse_args(mine).as_dict()
    return kind(**{key: value for key, value in settings.items() if key != "config"}), further


@functools.cache
def run_parser(tasks: Classes) -> type[Parser]:
    """Return the class of a run's parsers; jsonargparse makes further ones of it, for the classes that are named."""
    parts = {"trainer": Classes(Trainer, [Trainer]), "data": tasks, "model": Classes(LightningModule, list(MODELS))}
    parts |= {"trainer.callbacks": Classes(Callback, [Callback]), "trainer.logger": Classes(Logger, [Logger])}

    class RunParser(Parser):
        """Knows all options of a run, also while it parses those of one class."""

        options = Options(parts, ("name", "overwrite", "config", "seed_everything", "ckpt_path"))

        def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
            """Add the arguments of a class, of which some have a class of their own where none is named."""
            added = super().add_class_arguments(theclass, *args, **kwargs)
            if not args and not kwargs.get("nested_key"):
                self.prefix = self.options.prefix(theclass)
                self.set_defaults(MODELS.get(theclass, {}))
            return added

    return RunParser
