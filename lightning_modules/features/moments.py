"""First and second moments of features, summed over a split in one pass and over processes."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

CONSTANT = 1e-12  # share of its squared mean up to which a variance is none: float32 cannot tell
ROWS = 512  # collected before they are multiplied, so that small batches cost no more than large ones
COLUMNS = 256  # of X'X that are computed at once; what lies above their diagonal follows by symmetry


class Moments:
    """Sums over images that give means, variances, principal components, CKA and ridge probes.

    Everything is summed in float64, so in any order of images, batches and processes it is the same to rounding: of D
    neurons (`width`) over the images and over each of C classes, and with `outer` the D x D products of neurons, too,
    which `scatter` needs.
    """

    def __init__(self, width: int, classes: int, *, outer: bool = True, device: torch.device | str = "cpu") -> None:
        self.width = width
        classes = max(1, classes)  # where there are none, all images are of one
        zeros = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = {
            "counts": zeros.new_zeros(classes),
            "totals": zeros.new_zeros(classes, width),
            "products": zeros.new_zeros((width, width) if outer else (width,)),
        }
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images: features of shape (b, D), labels of shape (b,)."""
        device = self.sums["counts"].device
        self._waiting.append((features.to(device), labels.to(device)))
        if sum(len(labels) for _, labels in self._waiting) >= ROWS:
            self._flush()

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes, each of which has added its own images; `reduce` sums a tensor."""
        self._flush()
        self.sums = {name: reduce(values) for name, values in self.sums.items()}

    def __add__(self, other: "Moments") -> "Moments":
        """Return the sums over the images of both."""
        both = copy.copy(self)
        both.sums = {name: self._sum(name) + other._sum(name) for name in self.sums}
        both._waiting = []
        return both

    def _flush(self) -> None:
        if self._waiting:
            features, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            for rows, of_rows in zip(features.split(ROWS), labels.split(ROWS), strict=True):
                self._add(rows.double(), of_rows)

    def _add(self, rows: Tensor, labels: Tensor) -> None:
        """Add float64 rows, shape (b, D)."""
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
        return self._sum("totals").sum(0) / self.count

    @property
    def class_means(self) -> Tensor:
        """Mean of every neuron over each class, shape (C, D); not a number for a class without images."""
        return self._sum("totals") / self.counts.unsqueeze(1)

    @property
    def squares(self) -> Tensor:
        """Sum of every neuron's squares, not centred, shape (D,): what rounding is relative to."""
        products = self._sum("products")
        return products if products.ndim == 1 else products.diagonal()

    @property
    def variance(self) -> Tensor:
        """Population variance of every neuron, shape (D,); exactly zero for one that never changes."""
        variance = self.squares / self.count - self.mean.square()
        return variance.masked_fill(variance <= CONSTANT * self.mean.square(), 0)

    @property
    def scatter(self) -> Tensor:
        """Centred X'X, shape (D, D): symmetric, with zeros for neurons that never change."""
        lower = self._sum("products").tril()
        scatter = lower + lower.tril(-1).t() - self.count * self.mean.outer(self.mean)
        changes = (self.variance > 0).double()
        return scatter * changes * changes.unsqueeze(1)

    @property
    def cross(self) -> Tensor:
        """Centred X'Y with one-hot labels Y, shape (D, C), with zeros for neurons that never change."""
        return ((self._sum("totals") - self.counts.unsqueeze(1) * self.mean) * (self.variance > 0)).t()


def by_layer(features: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Split features, shape (B, sum of widths), into those of each layer, shape (B, D)."""
    return dict(zip(widths, features.split(list(widths.values()), dim=1), strict=True))


def rounding(terms: int) -> float:
    """Return the relative error that sums of so many float64 products may have."""
    return terms * torch.finfo(torch.float64).eps
