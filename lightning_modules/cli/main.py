"""From the words of the command line to what they ask for; a user's mistake ends in one line."""

import ctypes
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.cli import run
from lightning_modules.cli.errors import Classes, fail, is_left_alone, nearest_class
from lightning_modules.cli.parser import Parser
from lightning_modules.cli.sweep import sweep
from lightning_modules.reporting import dashboard

FUNCTIONS = {"compare": "lightning_modules.reporting.compare", "export": "lightning_modules.export"}
"""Modules of verbs that are functions of the same name; imported late, as what they need takes long to import."""
VERBS = run.VERBS | {
    "sweep": "Run fit for every combination of tasks, backbones or other settings, and compare the runs.",
    "compare": "Compare finished runs: the table of redundancies, joined results and pictures.",
    "export": "Write one subset of a finished run, with its probe, as files that need nothing of this project.",
}
"""Everything that train.py does, and what that is."""


def main(args: Sequence[str] | None, tasks: Classes) -> None:
    """Run the command line, null that of this process; a user's mistake ends in one line and exit status 2."""
    keep_freed_memory()
    _quieten()
    verb, *rest = (sys.argv[1:] if args is None else list(args)) or [""]
    try:
        if verb in ("-h", "--help"):
            lines = [f"  {name:<8}  {what}" for name, what in VERBS.items()]
            print("usage: train.py VERB ...", "", *lines, "", "train.py VERB --help lists its options.", sep="\n")
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


def _call(verb: str, args: Sequence[str]) -> None:
    """Call the function of a verb, with a parser made from its arguments."""
    function = getattr(importlib.import_module(FUNCTIONS[verb]), verb)
    parser = Parser(prog=f"train.py {verb}", description=VERBS[verb], allow_abbrev=False)
    if "runs" in inspect.signature(function).parameters:
        parser.add_argument("runs", nargs="+", help="Folders of runs, or patterns.")
    parser.add_function_arguments(function, skip={"runs"})
    function(**vars(parser.parse_args(args)))


def _quieten() -> None:
    """Leave out advertisements, and advice that a frozen backbone or a small data set has no use for."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for what LightningCLI calls
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    for advice in (
        "does not have many workers",
        "in eval mode at the start of training",
        "is deprecated",
        "will run with no optimizer",  # what a solver in closed form has no use for
        "sync_dist=True",
        "args parameter is intended to run from within Python",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees, where it is glibc (man 3 mallopt) that allocates it.

    A forward pass frees and allocates maps of tens of MB at each layer. glibc returns each to the system, which clears
    it page by page when it is asked for again: half of the time of a MobileNetV2 on a CPU and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is mapped on its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is returned
