"""The command line: `train.py VERB ...`."""

from lightning_modules.cli.errors import Classes
from lightning_modules.cli.main import main

__all__ = ["Classes", "main"]
