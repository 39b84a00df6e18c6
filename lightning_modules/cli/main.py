"""From the words of the command line to what they ask for; a user's mistake ends in one line."""

import codecs
import ctypes
import importlib
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from lightning_modules import __version__
from lightning_modules.cli import run
from lightning_modules.cli.errors import Classes, fail, nearest_class, program, told
from lightning_modules.cli.invert import invert
from lightning_modules.cli.parser import Parser
from lightning_modules.cli.sweep import sweep
from lightning_modules.reporting import dashboard

FUNCTIONS = {"compare": "lightning_modules.reporting.compare", "export": "lightning_modules.export"}
"""Modules of verbs that are functions of the same name; imported late, as what they need takes long to import."""
VERBS = run.VERBS | {
    "sweep": "Run fit for every combination of tasks, backbones or other settings, and compare the runs.",
    "compare": "Compare finished runs: the table of redundancies, joined results and pictures.",
    "invert": "Find pictures that match images on some neurons of a backbone, and see what they match of the others.",
    "export": "Write one subset of a finished run, with its probe, as files that need nothing of this project.",
}
"""Everything that train.py does, and what that is."""
PLAIN = {"█": "#", "±": "+-"}  # What is printed where a terminal's encoding lacks the character; others become ?


def main(args: Sequence[str] | None, tasks: Classes) -> None:
    """Run the command line, null that of this process; an error ends in one line and exit status 2.

    `--debug`, anywhere among the words, shows the traceback before that line.
    """
    keep_freed_memory()
    _quieten()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="plain")
    if "" not in sys.path:
        sys.path.append("")  # classes of one's own may lie in the current folder
    words = sys.argv[1:] if args is None else list(args)
    verb, *rest = [word for word in words if word != "--debug"] or [""]
    try:
        if verb in ("-h", "--help"):
            print(f"usage: {program()} VERB ...", "", _verbs(), "", sep="\n")
            print(f"{program()} VERB --help lists its options; --version prints the version, and --debug with a verb")
            print("shows the traceback of an error.")
        elif verb == "--version":
            print(f"diffused-redundancy {__version__}")
        elif verb in run.VERBS:
            run.CLI([verb, *rest], tasks)
        elif verb == "sweep":
            sweep(rest, tasks)
        elif verb == "invert":
            invert(rest, tasks)
        elif verb in FUNCTIONS:
            _call(verb, rest)
        elif verb.partition("=")[0] in ("-c", "--config"):
            fail(f"--config comes after the verb, as `{program()} fit --config quickstart.yaml`.")
        else:
            print(_verbs(), file=sys.stderr)
            fail(f"The verb is {nearest_class(verb, list(VERBS))}." if verb else "Give one of these verbs.")
    except Exception as error:
        if "--debug" in words:
            traceback.print_exception(error)
        fail(told(error))
    finally:
        dashboard.finish()


def _verbs() -> str:
    """Return a line for each verb."""
    return "\n".join(f"  {name:<8}  {what}" for name, what in VERBS.items())


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return what to print in place of characters that cannot be encoded, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end


codecs.register_error("plain", _plain)


def _call(verb: str, args: Sequence[str]) -> None:
    """Call the function of a verb, with a parser made from its arguments."""
    function = getattr(importlib.import_module(FUNCTIONS[verb]), verb)
    parser = Parser(prog=f"{program()} {verb}", description=VERBS[verb], allow_abbrev=False)
    if "runs" in inspect.signature(function).parameters:
        parser.add_argument("runs", nargs="+", help="Folders of runs, or patterns.")
    parser.add_function_arguments(function, skip={"runs"})
    function(**vars(parser.parse_args(args)))


def _quieten() -> None:
    """Leave out advertisements, retries, and advice that a frozen backbone or a small data set has no use for."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for what LightningCLI calls
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)
    for advice in (
        "does not have many workers",
        "in eval mode at the start of training",
        "is deprecated",
        "will run with no optimizer",  # what a solver in closed form has no use for
        "sync_dist=True",
        "args parameter is intended to run from within Python",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("💡 Tip:", "TPU available: False", "GPU available: False"))


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees, where it is glibc (man 3 mallopt) that allocates it.

    A forward pass frees and allocates maps of tens of MB at each layer. glibc returns each to the system, which clears
    it page by page when it is asked for again: half of the time of a MobileNetV2 on a CPU and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is mapped on its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is returned
