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
    neurons (`width`), of the C numbers that least squares regresses on (`outputs`, of classes their one-hot labels) and
    of their products, and with `outer` the D x D products of neurons, too, which `scatter` needs.
    """

    def __init__(self, width: int, outputs: int, *, outer: bool = True, device: torch.device | str = "cpu") -> None:
        self.width = width
        zeros = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = {
            "count": zeros.clone(),
            "total": zeros.new_zeros(width),
            "counts": zeros.new_zeros(outputs),
            "squares": zeros.clone(),
            "totals": zeros.new_zeros(outputs, width),
            "products": zeros.new_zeros((width, width) if outer else (width,)),
        }
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add images: features of shape (b, D); targets of shape (b, C), or of classes their indices, shape (b,)."""
        device = self.sums["counts"].device
        self._waiting.append((features.to(device), targets.to(device)))
        if sum(len(targets) for _, targets in self._waiting) >= ROWS:
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
            features, targets = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            if targets.ndim == 1:
                targets = one_hot(targets.long(), len(self.sums["counts"]))
            for rows, of_rows in zip(features.split(ROWS), targets.split(ROWS), strict=True):
                self._add(rows.double(), of_rows.double())

    def _add(self, rows: Tensor, targets: Tensor) -> None:
        """Add float64 rows, shape (b, D), and targets, shape (b, C)."""
        self.sums["count"] += len(rows)
        self.sums["total"] += rows.sum(0)
        self.sums["counts"] += targets.sum(0)
        self.sums["squares"] += targets.square().sum()
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
        """Sum of the targets, of classes the images of each, shape (C,), float64."""
        return self._sum("counts")

    @property
    def target_mean(self) -> Tensor:
        """Mean of the targets, of classes the share of each, shape (C,)."""
        return self.counts / self.count

    @property
    def target_squares(self) -> Tensor:
        """Squares of the centred targets, summed over images and outputs, a float64 scalar."""
        return self._sum("squares") - self.counts.square().sum() / self.count

    @property
    def count(self) -> Tensor:
        """Images, a float64 scalar."""
        return self._sum("count")

    @property
    def mean(self) -> Tensor:
        """Mean of every neuron, shape (D,)."""
        return self._sum("total") / self.count

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
    def products(self) -> Tensor:
        """X'X, not centred, shape (D, D) and symmetric."""
        lower = self._sum("products").tril()
        return lower + lower.tril(-1).t().contiguous()  # a copy first, in a third of the time

    @property
    def scatter(self) -> Tensor:
        """Centred X'X, shape (D, D): symmetric, with zeros for neurons that never change."""
        scatter = self.products - self.count * self.mean.outer(self.mean)
        changes = (self.variance > 0).double()
        return scatter * changes * changes.unsqueeze(1)

    @property
    def cross(self) -> Tensor:
        """Centred X'Y with the targets Y, shape (D, C), with zeros for neurons that never change."""
        return ((self._sum("totals") - self.counts.unsqueeze(1) * self.mean) * (self.variance > 0)).t()


def by_layer(features: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Split features, shape (B, sum of widths), into those of each layer, shape (B, D)."""
    return dict(zip(widths, features.split(list(widths.values()), dim=1), strict=True))


def rounding(terms: int) -> float:
    """Return the relative error that sums of so many float64 products may have."""
    return terms * torch.finfo(torch.float64).eps
