"""Losses to pre-train a backbone with: `--model.objective CLASS`, its arguments as `--model.objective.ARGUMENT`."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import inf
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from lightning_modules.attacks import PGD, Norm


class Objective(nn.Module, ABC):
    """A loss on a batch of images; base class, also for those in files of your own (`--model.objective file.MyLoss`).

    It gets the network and not its outputs, so that it can run it several times, on other images, or to a layer:

        features = penultimate(network, images)  # (B, D)
        logits = network.get_classifier()(features)  # (B, C)

    Images are normalised with `network.pretrained_cfg["mean"]` and `["std"]`, of pixels in [0, 1]. Parameters and
    modules assigned in `setup`, such as further heads, are optimised with the network's and not written with it. The
    network's own classifier must be trained too: its accuracy is what is reported. The constructor keeps each argument
    as the attribute of that name: a run shows them, and a checkpoint made with other ones is refused. Where there is a
    method `attack(network, images, labels)` that returns images made against the network, of the same shape, the
    accuracy on those of validation and test is reported too.
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


class Adversarial(Objective):
    """Cross-entropy of images that projected gradient descent moved against the network (Madry et al., 2018).

    During the attack, see `PGD`, the network is in evaluation mode, as in `robustness`, the library of the published
    robust ImageNet weights, and in TRADES: what is attacked is the network as it will be evaluated, each image for
    itself, and batch norm's statistics are those of the step that follows alone. That step, on the moved images, is in
    training mode.

    Args:
        eps: Radius of the ball, of pixels in [0, 1]; published are 3 in L2 at 224 pixels and 0.0157 (4/255) in Linf.
        norm: `L2`, the length over all pixels and channels, or `Linf`, the largest change of any.
        steps: Gradient steps.
        step_size: Length of a step, in the same norm; null is 2 eps / steps, as published.
        random_start: Whether to start at a random place, uniform in the ball, or else at the image itself.

    Raises:
        MisconfigurationException: If the ball is empty or, in Linf, wider than all pixels, or no step is made.
    """

    def __init__(
        self,
        eps: float,
        norm: Norm = "L2",
        steps: int = 3,
        step_size: float | None = None,
        random_start: bool = False,
    ) -> None:
        super().__init__()
        size = 2 * eps / max(1, steps) if step_size is None else step_size
        self.pgd = PGD(eps, norm, steps, size, "model.objective")
        self.eps = eps
        self.norm = norm
        self.steps = steps
        self.step_size = step_size
        self.random_start = random_start

    def forward(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the moved images summed over the batch, shape ()."""
        return F.cross_entropy(network(self.attack(network, images, labels)), labels, reduction="sum")

    def attack(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return images, shape (B, C, H, W) as given and normalised as given, moved against the network."""
        training = network.training
        network.eval()
        start = self.pgd.random if self.random_start else None
        moved = self.pgd(network, images, labels, network.pretrained_cfg, start)
        network.train(training)
        return moved


class DeCov(Objective):
    """Cross-entropy, and a penalty on the covariances of different neurons over the batch (Cogswell et al., 2016).

    The penalty is alpha / 2 (||C||_F^2 - ||diag C||^2), where C are the covariances of the penultimate layer's neurons
    over the batch of all processes.

    Args:
        alpha: Weight of the penalty.

    Raises:
        MisconfigurationException: If it is negative, or the network has no linear classifier.
    """

    def __init__(self, alpha: float = 1e-4) -> None:
        super().__init__()
        if not 0 <= alpha < inf:
            raise MisconfigurationException(f"model.objective.alpha is {alpha:g}; it must be 0 or more.")
        self.alpha = alpha

    def setup(self, network: Any, target: Any) -> None:
        """Refuse a network without a linear classifier."""
        linear_classifier(network, self)

    def forward(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy and penalty summed over the batch, shape ()."""
        features = penultimate(network, images)
        cross_entropy = F.cross_entropy(network.get_classifier()(features), labels, reduction="sum")
        with torch.autocast(features.device.type, enabled=False):  # half precision ends at 65,504
            features = features.to(images.dtype)
            total = _over_processes(features.new_tensor(len(features)))
            # Where the mean is, the covariances do not change with it to first order: it needs no gradient.
            centred = features - _over_processes(features.sum(0)) / total
            here = centred.T @ centred / total
            # All processes have the same value, each with the gradient of its own images, which DDP brings together.
            covariances = here + _over_processes(here) - here.detach()
            penalty = (covariances.square().sum() - covariances.diagonal().square().sum()) / 2
        return cross_entropy + self.alpha * total * penalty


class Matryoshka(Objective):
    """Sum of the cross-entropies of classifiers that see the first 8, 16, 32, ... and all D neurons (Kusupati, 2022).

    All D are seen by the network's own classifier.

    Args:
        widths: Numbers of first neurons; null are 8 and its doubles below D.
        shared: Whether all widths share the network's classifier, sliced (MRL-E), or have a classifier each (MRL).

    Raises:
        MisconfigurationException: If a width is below 1 or beyond D, or the network has no linear classifier.
    """

    def __init__(self, widths: list[int] | None = None, shared: bool = False) -> None:
        super().__init__()
        self.widths = widths
        self.shared = shared

    def setup(self, network: Any, target: Any) -> None:
        """Build a classifier for each width below D, unless they share one."""
        classifier = linear_classifier(network, self, self.widths or ())
        width = classifier.in_features
        doubles = [8 << i for i in range(width.bit_length()) if 8 << i < width]
        self.nested = sorted({*(doubles if self.widths is None else self.widths)} - {width})
        separate = [] if self.shared else self.nested
        self.heads = nn.ModuleList(nn.Linear(each, classifier.out_features) for each in separate)

    def forward(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropies of all widths summed over the batch, shape ()."""
        features, classifier = penultimate(network, images), network.get_classifier()
        if self.shared:
            logits = [sliced(classifier, features, width) for width in self.nested]
        else:
            logits = [head(features[:, : head.in_features]) for head in self.heads]
        losses = [F.cross_entropy(each, labels, reduction="sum") for each in (*logits, classifier(features))]
        return torch.stack(losses).sum()


class FixedWidth(Objective):
    """Cross-entropy of a classifier that sees the first neurons alone, the baseline of `Matryoshka`.

    The classifier's weights on all other neurons are 0 and stay so: they get no gradient, and weight decay keeps them.

    Args:
        width: How many neurons it sees.

    Raises:
        MisconfigurationException: If they are fewer than 1 or more than D, or the network has no linear classifier.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def setup(self, network: Any, target: Any) -> None:
        """Set the weights on all other neurons to 0, so that the network itself says what the first neurons do."""
        with torch.no_grad():
            linear_classifier(network, self, [self.width]).weight[:, self.width :] = 0

    def forward(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy summed over the batch, shape ()."""
        logits = sliced(network.get_classifier(), penultimate(network, images), self.width)
        return F.cross_entropy(logits, labels, reduction="sum")


def penultimate(network: Any, images: Tensor) -> Tensor:
    """Return what enters the classifier of a timm model, after its dropout, shape (B, D)."""
    return network.forward_head(network.forward_features(images), pre_logits=True)


def linear_classifier(network: Any, objective: Objective, widths: Iterable[int] = ()) -> nn.Linear:
    """Return the classifier of a timm model, which must be one linear layer that sees at least `widths` neurons."""
    found = network.get_classifier() if hasattr(network, "get_classifier") else None
    name = type(objective).__name__
    if not isinstance(found, nn.Linear):
        there = "no classifier" if found is None or isinstance(found, nn.Identity) else type(found).__name__
        raise MisconfigurationException(
            f"model.objective is {name}, which needs one linear classifier; {type(network).__name__} has {there}."
        )
    for width in widths:
        if not 1 <= width <= found.in_features:
            raise MisconfigurationException(
                f"model.objective is {name} of width {width}; it must be from 1 to {found.in_features}, the neurons of "
                f"the penultimate layer."
            )
    return found


def sliced(classifier: nn.Linear, features: Tensor, width: int) -> Tensor:
    """Return what a classifier says of the first `width` of features of shape (B, D); shape (B, C)."""
    return F.linear(features[:, :width], classifier.weight[:, :width], classifier.bias)


def _over_processes(summed: Tensor) -> Tensor:
    """Return a sum over this process' images as that over the images of all, without a gradient."""
    summed = summed.detach().clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(summed)
    return summed
