"""Partial inversion: pictures that match an image on some neurons, and how much of the other neurons they match."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.attacks import lengths
from lightning_modules.subsets.selections import Layer, random

Choice = Literal["random", "least_active", "most_active"]
Regulariser = Literal["none", "others_apart", "total_variation"]
NOTHING = 1e-12  # what distances are divided by at least


def choose(choice: Choice, features: Tensor, neurons: int, seed: int) -> Tensor:
    """Return which neurons are to be matched, shape (D,), boolean.

    Args:
        choice: `random`, those of the selection of that name; or those with the smallest or largest magnitude.
        features: The image's representation, shape (D,).
        neurons: How many.
        seed: Subset seed of random ones.
    """
    if choice == "random":
        order = random(Layer(len(features)), seed).to(features.device)
    else:
        order = features.abs().argsort(stable=True, descending=choice == "most_active")
    return torch.zeros_like(features, dtype=torch.bool).index_fill(0, order[:neurons], True)


def distances(found: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """Return the distances of rows over chosen neurons, relative to the length of what is wanted; (B, D) to (B,)."""
    return ((found - wanted) * chosen).norm(dim=1) / (wanted * chosen).norm(dim=1).clamp_min(NOTHING)


def agreement(found: Tensor, wanted: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return distances and cosines on chosen neurons (`matched`) and all others (`unmatched`); (B, D) to (B,) each.

    Distances are relative to the length of what is wanted; where that is zero, both are not a number.
    """
    measured = {}
    for name, seen in (("matched", chosen), ("unmatched", ~chosen)):
        parts = found.double() * seen, wanted.double() * seen
        nothing = parts[1].norm(dim=1) == 0
        measured[f"{name}_distance"] = distances(*parts, seen).masked_fill(nothing, torch.nan)
        cosines = torch.nn.functional.cosine_similarity(*parts, eps=NOTHING)
        measured[f"{name}_cosine"] = cosines.masked_fill(nothing, torch.nan)
    return measured


def total_variation(pixels: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, (B, C, H, W) to (B,)."""
    return pixels.diff(dim=2).abs().mean((1, 2, 3)) + pixels.diff(dim=3).abs().mean((1, 2, 3))


def invert(
    represent: Callable[[Tensor], Tensor],
    wanted: Tensor,
    chosen: Tensor,
    start: Tensor,
    steps: int,
    step_size: float,
    regulariser: Regulariser = "none",
    weight: float = 1.0,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return pixels, as `start`, whose representations are near to those wanted on the chosen neurons.

    Gradient descent on the relative distance, in steps of the same length in pixels, within [0, 1]; of all that it
    passes, the pixels with the smallest loss are kept.

    Args:
        represent: From pixels in [0, 1], shape (B, C, H, W), to representations, (B, D), each row of its image alone.
        wanted: Representations, shape (B, D).
        chosen: Which neurons are to be matched, shape (B, D), boolean.
        start: Pixels to start from.
        steps: How many steps.
        step_size: The length of each, over all pixels and channels.
        regulariser: What is added to the distance: nothing; the `total_variation` of the pixels, `weight` times; or,
            to keep the `others_apart`, minus the distance on all other neurons, `weight` times as large at the start.
        weight: Of the regulariser.
        after_step: Called after each step.
    """
    best, least, pull = start, start.new_full((len(start),), torch.inf), None
    pixels = start
    with torch.enable_grad():
        for step in range(steps + 1):
            pixels = pixels.detach().requires_grad_()
            found = represent(pixels)
            loss = distances(found, wanted, chosen)
            if regulariser == "total_variation":
                loss = loss + weight * total_variation(pixels)
            elif regulariser == "others_apart":
                others = distances(found, wanted, ~chosen)
                pull = weight * (loss / others.clamp_min(NOTHING)).detach() if pull is None else pull
                loss = loss - pull * others
            better = loss.detach() < least
            best = torch.where(better.view(-1, 1, 1, 1), pixels.detach(), best)
            least = torch.where(better, loss.detach(), least)
            if step < steps:
                (gradient,) = torch.autograd.grad(loss.sum(), pixels)
                pixels = (pixels.detach() - step_size * gradient / lengths(gradient)).clamp(0, 1)
                after_step()
    return best
