"""A run's folder: which checkpoint it has, whether it is finished, and that one process writes to it at a time."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules.files import writing

ADVICE = "make room there, or name another folder with --trainer.default_root_dir"


class OccupiedFolder(MisconfigurationException):
    """Raised where a fit would go into the folder of a finished run, or of one that another process is at."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.ckpt"
        self.results = path / "results.csv"

    def checkpoint(self, wanted: str | None, verb: str) -> str | None:
        """Return the file that `--ckpt_path` means; `last` is the run's own, the default of all verbs but fit.

        A MisconfigurationException is raised if a checkpoint that is wanted is not there.
        """
        wanted = wanted or (None if verb == "fit" else "last")
        if wanted != "last":
            if wanted and not Path(wanted).is_file():
                raise MisconfigurationException(f"There is no checkpoint {str(wanted)!r}; give a file, or say last.")
            return wanted
        if self.last.is_file():
            return str(self.last)
        if verb != "fit":
            raise MisconfigurationException(
                f"There is no {self.last}; name the --config of a run, or its checkpoint with --ckpt_path."
            )
        rank_zero_info(f"There is no {self.last} yet; the run starts from the beginning.")
        return None

    @contextlib.contextmanager
    def occupied(self, trainer: Trainer, overwrite: bool) -> Iterator[None]:
        """Hold the folder, so that no other process writes to it; a process that is killed lets go of it.

        The first process of a run decides, and all do the same. A finished run may be replaced with `overwrite`.
        """
        lock = FileLock(self.path / "run.lock")
        refusal: MisconfigurationException | None = None
        if trainer.is_global_zero:
            try:
                with writing(self.path, ADVICE):
                    self.path.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=self.path):
                        pass
                lock.acquire(timeout=0)
            except MisconfigurationException as error:
                refusal = error.with_traceback(None)
            except Timeout:
                refusal = OccupiedFolder(f"{self.path} is being written by another process; leave it to that.")
            if refusal is None and self.results.exists() and not overwrite:
                message = f"{self.path} holds a finished run; choose another --name, or say --overwrite true."
                refusal = OccupiedFolder(message)
        path, refusal = trainer.strategy.broadcast((self.path, refusal))
        try:
            if refusal is not None:
                raise refusal
            if path != self.path:
                raise MisconfigurationException(
                    f"The first process goes to {path}, this one to {self.path}; give all the same command line."
                )
            yield
        finally:
            lock.release()
