"""From a PIL image to the backbone's input: the evaluation view, training augmentations by name, normalisation."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

Transform = Callable[[Image.Image], Tensor]
"""From an RGB image to pixels of the backbone's input size, shape (C, H, W), uint8."""
Preprocessing = dict[str, Any]
"""The keys of timm's data configuration: input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode."""


def evaluation(preprocessing: Preprocessing) -> Transform:
    """Return the backbone's own evaluation view: resize and centre crop; nothing random."""
    return create_transform(**preprocessing, is_training=False, normalize=False)


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
            transforms.PILToTensor(),
        ]
    )


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return pixels as the backbone wants them: over 255, less the mean, over the standard deviation of each channel.

    Each pass goes along whole rows of pixels, several times faster than along the three channels of one.

    Args:
        pixels: Images with their channels last, shape (B, H, W, C), uint8.
        preprocessing: With `mean` and `std` of each channel.

    Returns:
        float32 of shape (B, C, H, W), channels last in memory, equal to torchvision's ToTensor and Normalize.
    """
    images, height, width, channels = pixels.shape
    mean, std = (torch.tensor(preprocessing[key]).repeat(width) for key in ("mean", "std"))
    rows = pixels.reshape(images, height, width * channels).float()
    return rows.div_(255).sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Callable[[Preprocessing], Transform]] = {"none": evaluation, "paper": paper}
"""Training views by name; a new one is a function above and a line here."""
