"""Losses to pre-train a backbone with: `--model.objective CLASS`, its arguments as `--model.objective.ARGUMENT`."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F


class Objective(nn.Module, ABC):
    """A loss on a batch of images; base class, also for those in files of your own (`--model.objective file.MyLoss`).

    It gets the network and not its outputs, so that it can run it several times, on other images, or to a layer:

        features = network.forward_head(network.forward_features(images), pre_logits=True)  # (B, D)
        logits = network.get_classifier()(features)  # (B, C)

    Images are normalised with `network.pretrained_cfg["mean"]` and `["std"]`, of pixels in [0, 1]. Parameters and
    modules assigned in `setup`, such as further heads, are optimised with the network's and not written with it. The
    network's own classifier must be trained too: its accuracy is what is reported. The constructor keeps each argument
    as the attribute of that name: a run shows them, and a checkpoint made with other ones is refused.
    """

    def setup(self, network: Any, target: Any) -> None:
        """Build what depends on the network, a timm model, or the target (`target.outputs` is C), before training."""

    @abstractmethod
    def forward(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss summed over the batch, shape (); what is a mean over it is multiplied by B.

        `network` is a timm model, `images` has shape (B, 3, H, W), `labels` are class indices, shape (B,).
        """

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)


class CrossEntropy(Objective):
    """Cross-entropy of the logits.

    Args:
        label_smoothing: Share of the target's probability that is spread evenly over all classes, from 0 to 1.

    Raises:
        MisconfigurationException: If it is not from 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise MisconfigurationException(
                f"model.objective.label_smoothing is {label_smoothing:g}; it must be from 0 to 1."
            )
        self.label_smoothing = label_smoothing

    def forward(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy summed over the batch, shape ()."""
        return F.cross_entropy(network(images), labels, label_smoothing=self.label_smoothing, reduction="sum")
