"""Arrays out of Python pickles, without running what else may be in them."""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy._core.multiarray import _reconstruct

ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
"""All that a pickle may name: what an array is made with, as old and new versions of NumPy call it."""


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays and Python's own containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it holds code, {f'{module}.{name}'!r}, which is never run")
        return ALLOWED[module, name]


def unpickle_arrays(path: Path) -> Any:
    """Return what a pickle of arrays holds; strings of Python 2 are read as Latin-1, as their arrays need.

    Raises:
        MisconfigurationException: If the file is torn, or holds code, which is never run.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a torn pickle may raise anything
        raise MisconfigurationException(f"{path} cannot be read ({error}).") from error
