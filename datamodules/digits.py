"""Handwritten digits that ship inside scikit-learn: real images without a download, for the quickstart."""

from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.base import Task
from datamodules.images import ArrayImages, Images, as_labels
from datamodules.targets import Multiclass


class Digits(Task):
    """1,797 grey images of 8 x 8 pixels (UCI Optical Recognition of Handwritten Digits, test part), or some of them.

    Validation and test are a seeded stratified fifth each.

    Args:
        digits: Which digits are the classes, for example `[5, 6, 7, 8, 9]`; null takes all ten.
        augmentation: See `Task`.
        **kwargs: See `Task`.

    Raises:
        MisconfigurationException: If there are fewer than two different digits, or one that is none.
    """

    name = "digits"

    def __init__(self, digits: list[int] | None = None, augmentation: str = "none", **kwargs: Any) -> None:
        super().__init__("", augmentation=augmentation, **kwargs)
        self.digits = list(range(10)) if digits is None else digits
        if len(set(self.digits)) != len(self.digits) or len(self.digits) < 2 or not set(self.digits) <= set(range(10)):
            raise MisconfigurationException(
                f"data.digits is {self.digits}; it must list at least two different digits from 0 to 9."
            )
        self.target = Multiclass([str(digit) for digit in self.digits])

    def load(self) -> dict[str, Images]:
        """Return the chosen digits."""
        from sklearn.datasets import load_digits  # here, as it takes a second to import and no other task needs it

        pixels, values = load_digits(return_X_y=True)
        pixels = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
        kept = np.isin(values, self.digits)
        return {"train": ArrayImages(pixels[kept], as_labels([self.digits.index(value) for value in values[kept]]))}
