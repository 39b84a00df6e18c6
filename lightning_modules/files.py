"""Files that are written whole or not at all, so that a name never stands for half of its content."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = "unfinished"
"""How names start that are not written to their end."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it becomes `path` when all went well, and else disappears."""
    unfinished = path.with_name(f"{UNFINISHED}-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder` an hour ago or earlier."""
    for unfinished in folder.glob(f"{UNFINISHED}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - unfinished.stat().st_mtime > 3600:
                unfinished.unlink()
