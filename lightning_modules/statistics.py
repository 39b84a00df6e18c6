"""Statistics of representations that cost no look at an image: mean, spread, and the curvature a probe will meet."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def mean_and_std(batches: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation of every neuron, summed in float64.

    Args:
        batches: This process' share of the representations, each of shape (b, D).
        reduce: Sums a tensor over processes.

    Returns:
        Two float64 tensors of shape (D,). A neuron that never changes has standard deviation 1, so that dividing by
        it leaves it at zero.
    """
    total: Tensor | None = None
    for batch in batches:
        values = batch.double()
        sums = torch.stack([torch.full_like(values[:1].sum(0), len(values)), values.sum(0), values.square().sum(0)])
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("No batch to take statistics of.")
    count, first, second = reduce(total)
    mean = first / count
    variance = (second / count - mean.square()).clamp(min=0)
    constant = variance <= 1e-12 * mean.square().clamp(min=1e-30)
    return mean, variance.sqrt().masked_fill(constant, 1.0)


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
