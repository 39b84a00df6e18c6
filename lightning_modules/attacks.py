"""Projected gradient descent: images moved against whoever classifies them, within a ball around their pixels."""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

Norm = Literal["L2", "Linf"]


class PGD:
    """Projected gradient descent against the cross-entropy of each image (Madry et al., 2018).

    A moved image stays in a ball around its pixels, before normalisation, and in [0, 1]. Gradients are taken with
    respect to images only, so that no parameter gets one and no process waits for another.

    Args:
        eps: Radius of the ball, of pixels in [0, 1].
        norm: `L2`, the length over all pixels and channels, or `Linf`, the largest change of any.
        steps: Gradient steps.
        step_size: Length of a step, in the same norm.
        option: What names of these arguments begin with in an error, as `model.objective`.

    Raises:
        MisconfigurationException: If the ball is empty or, in Linf, wider than all pixels, or no step is made.
    """

    def __init__(self, eps: float, norm: Norm, steps: int, step_size: float, option: str) -> None:
        most = 1 if norm == "Linf" else inf
        if not 0 < eps <= most or eps == inf:
            right = "above 0, at most 1, as pixels lie in [0, 1] (4/255 is 0.0157)" if norm == "Linf" else "above 0"
            raise MisconfigurationException(f"{option}.eps is {eps:g}; in {norm} it must be {right}.")
        if steps < 1:
            raise MisconfigurationException(f"{option}.steps is {steps}; it must be at least 1.")
        if not 0 < step_size < inf:
            raise MisconfigurationException(f"{option}.step_size is {step_size:g}; it must be above 0.")
        self.eps = eps
        self.norm = norm
        self.steps = steps
        self.step_size = step_size

    def __call__(
        self,
        classify: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        normalisation: Mapping[str, Any],
        start: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return images, shape (B, C, H, W) as given and normalised as given, moved against `classify`.

        Args:
            classify: Returns logits, one row per image, from normalised images.
            images: Normalised images.
            labels: Their classes, shape (B,).
            normalisation: `mean` and `std` of each channel.
            start: From pixels to where to start, as `random`; None starts at the images themselves.
        """
        with torch.inference_mode(False), torch.enable_grad():  # also in validation
            mean, std = (images.new_tensor(normalisation[key]).view(-1, 1, 1) for key in ("mean", "std"))
            pixels = (images * std + mean).clamp(0, 1)
            moved = start(pixels) if start else pixels
            for _ in range(self.steps):
                moved = moved.detach().requires_grad_()
                logits = classify((moved - mean) / std)
                # The loss' gradient of the logits. Only its direction matters here, and its length may be so small that
                # half precision would make it 0 on the way back.
                error = logits.detach().to(moved.dtype).softmax(1) - F.one_hot(labels, logits.shape[1])
                (gradient,) = torch.autograd.grad(logits, moved, F.normalize(error, dim=1).to(logits.dtype))
                moved = self._project(pixels, moved.detach() + self.step_size * self._unit(gradient))
            return (moved - mean) / std

    def random(self, pixels: Tensor) -> Tensor:
        """Return a random place in the ball around each image, uniform in it, by torch's global generator."""
        if self.norm == "Linf":
            return self._project(pixels, pixels + torch.empty_like(pixels).uniform_(-self.eps, self.eps))
        radii = torch.rand_like(pixels[:, :1, :1, :1]) ** (1 / pixels[0].numel())
        return self._project(pixels, pixels + self.eps * radii * self._unit(torch.randn_like(pixels)))

    def _unit(self, gradient: Tensor) -> Tensor:
        """Return the direction of length 1 in which the loss rises fastest; 0 where it does not rise."""
        return gradient.sign() if self.norm == "Linf" else gradient / lengths(gradient)

    def _project(self, pixels: Tensor, moved: Tensor) -> Tensor:
        """Return the nearest point of the ball, and then of [0, 1], which lies nearer to the pixels yet."""
        change = moved - pixels
        if self.norm == "Linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            change = change * (self.eps / lengths(change)).clamp(max=1)
        return (pixels + change).clamp(0, 1)


def lengths(vectors: Tensor) -> Tensor:
    """Return the Euclidean length of each image, shape (B, 1, 1, 1), at least 1e-12, as it is divided by."""
    return vectors.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
