"""Files that are written atomically, so that a name never stands for half of its content; where shipped ones lie."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

INSTALLED = Path(__file__).with_name("configs")
CONFIGS = INSTALLED if INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "configs"
"""Folder of the shipped configurations and weights: inside of this package, or of the checkout."""
UNFINISHED = "unfinished"  # How names start that are not written to their end


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it becomes `path` when all went well, and else disappears."""
    unfinished = path.with_name(f"{UNFINISHED}-{socket.gethostname()}-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder` an hour ago or earlier."""
    for unfinished in folder.glob(f"{UNFINISHED}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            if time.time() - unfinished.stat().st_mtime > 3600:
                unfinished.unlink()


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn an OSError into a MisconfigurationException that names the path and the advice, in one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise MisconfigurationException(f"{path} cannot be written ({reason}); {advice}.") from error


def one_line(error: BaseException) -> str:
    """Return the first line of what an error says, without its full stop, or the error's kind if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
