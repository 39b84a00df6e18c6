"""From a PIL image to the backbone's input: the evaluation view, and training augmentations by name."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

Transform = Callable[[Image.Image], Tensor]
Preprocessing = dict[str, Any]
"""The keys of timm's data configuration: input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode."""


def evaluation(preprocessing: Preprocessing) -> Transform:
    """Return the backbone's own evaluation view: resize, centre crop, normalise; nothing random."""
    return create_transform(**preprocessing, is_training=False)


def squashed(preprocessing: Preprocessing) -> Preprocessing:
    """Return the preprocessing that keeps the whole image: resized to the input size whatever its shape, no crop."""
    return preprocessing | {"crop_pct": 1.0, "crop_mode": "squash"}


def paper(preprocessing: Preprocessing) -> Transform:
    """Return the training augmentation of Nanda et al. (2023): crop, flip, colour, a rotation of up to 2 degrees.

    The crop covers 8 to 100 % of the image and is resized to the backbone's input size.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocessing["input_size"][-2:], interpolation=InterpolationMode(preprocessing["interpolation"])
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
            transforms.RandomRotation(degrees=2),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing["mean"], preprocessing["std"]),
        ]
    )


AUGMENTATIONS: dict[str, Callable[[Preprocessing], Transform]] = {"none": evaluation, "paper": paper}
"""Training views by name; a new one is a function above and a line here."""
