"""Read NumPy arrays from Python pickles without running any code in them."""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy._core.multiarray import _reconstruct

from datamodules.images import one_line

ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
"""The only functions and classes that a pickle may name: those that make arrays, in old and new versions of NumPy."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and Python's own containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it holds code, {f'{module}.{name}'!r}, which is never run")
        return ALLOWED[module, name]


def unpickle_arrays(path: Path) -> Any:
    """Return the content of a pickle of arrays; strings of Python 2 are decoded as Latin-1, as NumPy's bytes need.

    Raises:
        MisconfigurationException: If the file is damaged, or holds code, which is never run.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise MisconfigurationException(f"{path} cannot be read ({one_line(error)}).") from error
