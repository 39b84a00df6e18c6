"""A process that has imported everything and forks one train.py after another, each a process of its own.

Imports take ten seconds and are the same every time; what a killed or distributed run does after them is not. Commands
are JSON lines on standard input, answers JSON lines on standard output.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(command):
    """Become train.py with the arguments, folder, environment and output files of the command; never return."""
    status = 1
    try:
        os.setsid()  # a kill of the group takes the loaders' workers along
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(command["cwd"])
        os.environ.update(command["environment"])
        sys.path[1:1] = [path for path in command["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
        rank_zero_only.rank = int(os.environ.get("RANK", 0))  # which Lightning looks up when it is imported
        sys.argv = [train.__file__, *command["args"]]
        train.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    import train

    # What each of them would find out anew, as the options of all classes and fonts, and Lightning of its own classes.
    quiet = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        train.main(["fit", "--config", "quickstart.yaml", "--config", "debug.yaml", "--pictures=png", *quiet])

    for line in requests:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork() or run(asked)
        print(json.dumps(answer), file=answers, flush=True)
