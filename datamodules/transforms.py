"""From a PIL image to the backbone's input: evaluation transform, training augmentations by name, normalisation."""

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
    """Return the backbone's own evaluation transform: resize and centre crop, nothing random."""
    transform = create_transform(**preprocessing, is_training=False, normalize=False)
    return transforms.Compose([*_grey(preprocessing), transform])


def _grey(preprocessing: Preprocessing) -> list[Callable[[Image.Image], Image.Image]]:
    """Return what makes an image grey where the backbone takes one channel; grey images stay as they are stored."""
    return [transforms.Grayscale()] if preprocessing["input_size"][0] == 1 else []


def squash(preprocessing: Preprocessing) -> Transform:
    """Return a resize of the whole image to the input size, whatever its shape, without a crop."""
    return evaluation(preprocessing | {"crop_pct": 1.0, "crop_mode": "squash"})


def paper(preprocessing: Preprocessing) -> Transform:
    """Return the training augmentation of Nanda et al. (2023): crop, flip, colour, a rotation of up to 2 degrees.

    The crop covers 8 to 100 % of the image and is resized to the backbone's input size.
    """
    size, interpolation = preprocessing["input_size"][-2:], InterpolationMode(preprocessing["interpolation"])
    return transforms.Compose(
        [
            *_grey(preprocessing),
            transforms.RandomResizedCrop(size, interpolation=interpolation),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
            transforms.RandomRotation(degrees=2),
            transforms.PILToTensor(),
        ]
    )


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Divide pixels by 255, subtract the mean and divide by the standard deviation of each channel.

    `pixels` have shape (B, H, W, C), uint8; the result is float32 of shape (B, C, H, W), channels last in memory, and
    equals torchvision's ToTensor and Normalize. Mean and deviation are repeated for a row of pixels: several times
    faster than broadcasting over three channels.
    """
    images, height, width, channels = pixels.shape
    mean, std = (torch.tensor(preprocessing[key]).repeat(width) for key in ("mean", "std"))
    rows = pixels.reshape(images, height, width * channels).float()
    return rows.div_(255).sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Callable[[Preprocessing], Transform]] = {"none": evaluation, "paper": paper}
"""Transforms of training images by name; a new one is a function above and a line here."""
VIEWS: dict[str, Callable[[Preprocessing], Transform]] = {"weights": evaluation, "squash": squash}
"""Transforms of images without augmentation by name, as they are evaluated."""
