"""Statistics of representations, summed in one pass: moments, and curvature."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

CONSTANT = 1e-12
"""A neuron whose variance is at most this share of its squared mean never changes: float32 could not tell."""

ROWS = 512
"""Images that are gathered before they are multiplied, so that small batches cost no more than large ones."""

COLUMNS = 256
"""Columns of a product that are made at once; what lies above their diagonal is known by symmetry and not made."""


class Moments:
    """Sums over images from which means, variances, principal components, plain CKA and ridge probes follow.

    Everything is summed in float64, so in any order of images, batches and processes it is the same to rounding.

    Args:
        width: D.
        classes: C.
        outer: Whether to sum the D x D products of neurons too; without, `scatter` is not to be had.
        shift: Shape (D,), subtracted from every representation before it is multiplied, the same on all processes.
            Nothing depends on it but rounding, which matters where means are many times their spread.
        device: Where the sums lie.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        outer: bool = True,
        shift: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.width = width
        self.shift = (torch.zeros(width) if shift is None else shift).to(device, torch.float64)
        self.sums = {
            "counts": self.shift.new_zeros(classes),
            "totals": self.shift.new_zeros(classes, width),
            "products": self.shift.new_zeros((width, width) if outer else (width,)),
        }
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, representations: Tensor, labels: Tensor) -> None:
        """Add images: representations of shape (b, D), labels of shape (b,)."""
        self._waiting.append((representations.to(self.shift.device), labels.to(self.shift.device)))
        if sum(len(labels) for _, labels in self._waiting) >= ROWS:
            self._flush()

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes, each of which has added its own images; `reduce` sums a tensor."""
        self._flush()
        self.sums = {name: reduce(values) for name, values in self.sums.items()}

    def _flush(self) -> None:
        if self._waiting:
            representations, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            for rows, of_rows in zip(representations.split(ROWS), labels.split(ROWS), strict=True):
                self._add(rows.double() - self.shift, of_rows)

    def _add(self, rows: Tensor, labels: Tensor) -> None:
        """Add shifted float64 rows, shape (b, D)."""
        targets = one_hot(labels.long(), len(self.sums["counts"])).double()
        self.sums["counts"] += targets.sum(0)
        self.sums["totals"] += targets.t() @ rows  # a product, as adding by index is in no fixed order on a GPU
        products = self.sums["products"]
        if products.ndim == 1:
            products += rows.square().sum(0)
        else:
            for start in range(0, self.width, COLUMNS):
                products[start:, start : start + COLUMNS] += rows[:, start:].t() @ rows[:, start : start + COLUMNS]

    def _sum(self, name: str) -> Tensor:
        self._flush()
        return self.sums[name]

    @property
    def counts(self) -> Tensor:
        """Images of each class, shape (C,), float64."""
        return self._sum("counts")

    @property
    def count(self) -> Tensor:
        """Images, a float64 scalar."""
        return self.counts.sum()

    @property
    def mean(self) -> Tensor:
        """Mean of every neuron, shape (D,)."""
        return self.shift + self._offset

    @property
    def class_means(self) -> Tensor:
        """Mean of every neuron over each class, shape (C, D); not a number for a class without images."""
        return self.shift + self._sum("totals") / self.counts.unsqueeze(1)

    @property
    def squares(self) -> Tensor:
        """Sum of every neuron's squared distance from the shift, shape (D,): what rounding is relative to."""
        products = self._sum("products")
        return products if products.ndim == 1 else products.diagonal()

    @property
    def variance(self) -> Tensor:
        """Population variance of every neuron, shape (D,); exactly zero for one that never changes."""
        variance = self.squares / self.count - self._offset.square()
        return variance.masked_fill(variance <= CONSTANT * self.mean.square(), 0)

    @property
    def scatter(self) -> Tensor:
        """Centred X'X, shape (D, D): symmetric, with zeros for neurons that never change."""
        lower = self._sum("products").tril()
        scatter = lower + lower.tril(-1).t() - self.count * self._offset.outer(self._offset)
        changes = (self.variance > 0).double()
        return scatter * changes * changes.unsqueeze(1)

    @property
    def cross(self) -> Tensor:
        """Centred X'Y with one-hot labels Y, shape (D, C)."""
        return (self._sum("totals") - self.counts.unsqueeze(1) * self._offset).t()

    @property
    def _offset(self) -> Tensor:
        """The mean from the shift."""
        return self._sum("totals").sum(0) / self.count


def rounding(terms: int) -> float:
    """Return the relative error that sums of so many float64 products may have."""
    return terms * torch.finfo(torch.float64).eps


def largest_curvature(representations: Tensor, masks: Tensor, iterations: int = 30) -> Tensor:
    """Return a bound on the curvature of each probe's softmax cross-entropy, by power iteration.

    The Hessian of the loss at an input x with probabilities p is (diag(p) - p p') (x) x x'; the largest eigenvalue of
    the first factor never exceeds 1/2 (reached where two classes share the probability; Böhning, 1992), so that of
    the mean over inputs never exceeds half the largest eigenvalue of the second moments. The bias counts as a neuron
    that is always one.

    Args:
        representations: A sample, shape (n, D).
        masks: Which neurons each probe sees, shape (P, D), boolean.
        iterations: Steps of the power iteration.

    Returns:
        Shape (P,), in the representations' precision.
    """
    inputs = torch.cat([representations, torch.ones_like(representations[:, :1])], 1)
    seen = torch.cat([masks, torch.ones_like(masks[:, :1])], 1)
    vectors = inputs.mean(0) * seen
    eigenvalues = vectors.norm(dim=1)
    for _ in range(iterations):
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        vectors = (vectors @ inputs.t() @ inputs) / len(inputs) * seen
        eigenvalues = vectors.norm(dim=1)
    return eigenvalues / 2
