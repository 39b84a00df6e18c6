"""The command line: joins the tasks of `datamodules` and the models of `lightning_modules`."""

from collections.abc import Sequence

import datamodules
from lightning_modules import cli

CONFIGS = cli.CONFIGS
"""Folder of the shipped configurations."""
TASKS = cli.Tasks(
    base=datamodules.Task,
    offered=tuple(getattr(datamodules, name) for name in datamodules.__all__ if name != "Task"),
)
"""What `--data` takes by name, and the class of whatever it takes by an import path."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line.

    Args:
        args: The words after `train.py`; null takes those of this process.
    """
    cli.main(args, TASKS)


if __name__ == "__main__":
    main()
