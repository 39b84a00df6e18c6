"""The command line: joins the tasks of `datamodules` and the models of `lightning_modules`."""

from collections.abc import Sequence

import datamodules
from lightning_modules import cli

OFFERED = tuple(getattr(datamodules, name) for name in datamodules.__all__ if name != "Task")
TASKS = cli.Classes(datamodules.Task, OFFERED)  # what `--data` takes: these by name, all others by an import path


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, null that of this process; a user's mistake ends in one line."""
    cli.main(args, TASKS)


if __name__ == "__main__":
    main()
