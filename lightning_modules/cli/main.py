"""From the words of the command line to what they ask for; a user's mistake ends in one line."""

import importlib
import inspect
import logging
import os
import sys
import typing
import warnings
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.backbones.memory import keep_freed_memory
from lightning_modules.cli import run
from lightning_modules.cli.errors import fail, is_left_alone, nearest_class
from lightning_modules.cli.parser import Parser, Tasks
from lightning_modules.cli.sweep import sweep
from lightning_modules.reporting import dashboard

FUNCTIONS = {
    "compare": "lightning_modules.reporting.compare.compare",
    "export": "lightning_modules.export.export",
}
"""Functions that are verbs; imported when they are called, as what they need takes long to import."""
VERBS = run.VERBS | {
    "sweep": "Run fit for every combination of tasks, backbones or other settings, and compare the runs.",
    "compare": "Compare finished runs: the table of redundancies, joined results and pictures.",
    "export": "Write one subset of a finished run, with its probe, as files that need nothing of this project.",
}
"""Everything that train.py does, and what that is."""


def main(args: Sequence[str] | None, tasks: Tasks) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2.

    Args:
        args: The command line; null is that of the process.
        tasks: What can be probed.
    """
    keep_freed_memory()
    _quieten()
    verb, *rest = (sys.argv[1:] if args is None else list(args)) or [""]
    try:
        if verb in ("-h", "--help"):
            print(_help())
        elif verb in run.VERBS:
            run.CLI([verb, *rest], tasks)
        elif verb == "sweep":
            sweep(rest, tasks)
        elif verb in FUNCTIONS:
            _call(verb, rest)
        elif not verb:
            fail(f"Give a verb, one of {', '.join(VERBS)}; --help tells what they do.")
        elif verb.partition("=")[0] in ("-c", "--config"):
            fail("--config comes after the verb, as `train.py fit --config quickstart.yaml`.")
        else:
            fail(f"The verb is {nearest_class(verb, list(VERBS))}; --help tells what they do.")
    except MisconfigurationException as error:
        # A loader's worker wraps its traceback around the message; the message is the last line.
        fail(str(error).strip().splitlines()[-1].partition("MisconfigurationException: ")[2] or str(error))
    except RuntimeError as error:
        if not is_left_alone(error):
            raise
        fail("Another process of this run is gone, which says itself why; this one ends with it.")
    finally:
        dashboard.finish()


def _help() -> str:
    """Return what --help prints."""
    wide = max(map(len, VERBS))
    lines = [f"  {verb:<{wide}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        ["usage: train.py VERB ...", "", *lines, "", "train.py VERB --help lists the options of a verb."],
    )


def _call(verb: str, args: Sequence[str]) -> None:
    """Call the function of a verb, with a parser made from its arguments."""
    module, _, name = FUNCTIONS[verb].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    parser = Parser(prog=f"train.py {verb}", description=VERBS[verb], allow_abbrev=False)
    several: set[str | int] = {
        name for name, kind in typing.get_type_hints(function).items() if name == "runs" and kind == list[str]
    }
    for each in several:
        parser.add_argument(str(each), nargs="+", help="Folders of runs, or patterns.")
    parser.add_function_arguments(function, skip=several)
    given = vars(parser.parse_args(args))
    function(**{key: given[key] for key in inspect.signature(function).parameters})


def _quieten() -> None:
    """Leave out advertisements, and advice that a frozen backbone or a small data set has no use for."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for what LightningCLI calls
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    for advice in (
        "does not have many workers",
        "in eval mode at the start of training",
        "is deprecated",
        "sync_dist=True",
        "args parameter is intended to run from within Python",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in str(record.msg)
