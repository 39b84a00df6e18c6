"""The command line: `train.py VERB ...`."""

from lightning_modules.cli.main import main
from lightning_modules.cli.parser import CONFIGS, Tasks

__all__ = ["CONFIGS", "Tasks", "main"]
