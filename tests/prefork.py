"""Forks of pytest's process, made before any test, that fork one program after another, each a process of its own.

Imports take ten seconds and are the same every time; what a killed or distributed run does after them is not. Requests
and answers are JSON lines through two pipes.
"""

import contextlib
import json
import logging
import os
import runpy
import sys
import tempfile
import traceback
from abc import ABCMeta
from pathlib import Path
from types import UnionType

QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")


def servers():
    """Fork a process that has torch, one that has all other libraries, and one that has this project, too.

    Return the functions that ask them by these names.
    """
    import torch

    torch.set_num_threads(1)
    asks = {"torch": server()}
    import lightning.pytorch.cli  # noqa: F401
    import timm  # noqa: F401

    with contextlib.suppress(ImportError):  # not every version has it
        from jsonargparse._util import get_import_path, resolved_import_paths

        for kind in (type, ABCMeta, UnionType):  # whose paths each command line looks for thousands of times
            resolved_import_paths.add(kind, get_import_path(kind))
    asks["libraries"] = server()
    import train  # noqa: F401

    return asks | {"project": server()}


def server():
    """Fork a process that serves until this one ends; return the function that asks it."""
    asked, answered = os.pipe(), os.pipe()
    if not os.fork():
        os.close(asked[1])
        os.close(answered[0])
        os.environ.pop("WANDB_API_KEY", None)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            speak()
            serve(os.fdopen(asked[0]), os.fdopen(answered[1], "w"))
        finally:
            os._exit(0)
    os.close(asked[0])
    os.close(answered[1])
    requests, answers = os.fdopen(asked[1], "w"), os.fdopen(answered[0])

    def ask(command):
        print(json.dumps(command), file=requests, flush=True)
        return json.loads(answers.readline())

    return ask


def serve(requests, answers):
    warm = False
    for line in requests:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            if not warm and asked["program"] is None:
                warm = not warm_up()
            answer = os.fork() or run(asked)
        print(json.dumps(answer), file=answers, flush=True)


def warm_up():
    """Find out what each would anew, as the options of all classes and fonts, and Lightning of its own classes."""
    import train

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.suppress(SystemExit):
        train.main(["fit", "--config", "quickstart.yaml", "--config", "debug.yaml", "--pictures=png", *QUIET])


def run(command):
    """Become train.py, or a program that does not find it, as the command says; never return."""
    status = 1
    try:
        os.setsid()  # a kill of the group takes the loaders' workers along
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        speak()
        os.chdir(command["cwd"])
        os.environ.update(command["environment"])
        sys.path[1:1] = [path for path in command["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.modules["__main__"].__spec__ = None  # Lightning starts other processes with sys.argv, as those of a script
        if command["program"]:
            here = Path(__file__).parent
            sys.path[:] = [path for path in sys.path if path not in ("", str(here), str(here.parent))]
            sys.argv = [command["program"], *command["args"]]
            runpy.run_path(command["program"], run_name="__main__")
        elif command["torchrun"]:
            torchrun(command["torchrun"], command["args"])
        else:
            main(command["args"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def speak():
    """Write to this process's own standard output and error, where pytest has put others in their place."""
    before = sys.stdout, sys.stderr
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                handler.setStream(sys.stderr)
    for name in ("lightning.pytorch", "lightning.fabric"):  # as they are where pytest did not listen first
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logging.StreamHandler()], False


def main(args):
    """Run train.py in this process."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    import train

    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # which Lightning looks up when it is imported
    sys.argv = [train.__file__, *args]
    train.main()


def torchrun(processes, args):
    """Run train.py as torchrun does, but in forks of this process."""
    import torch.distributed.run as program

    settings = program.config_from_args

    def forked(asked):
        config, *_ = settings(asked)
        config.start_method = "fork"
        return config, main, [args]

    program.config_from_args = forked
    program.main(["--standalone", f"--nproc_per_node={processes}", "train.py", *args])
