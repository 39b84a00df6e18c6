"""L-BFGS for all probes of a bank at once, each with its own history and steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.probes.bank import ProbeBank

HISTORY = 8  # steps that are remembered
DESCENT = 1e-4  # share of the decrease that a step's slope promises with which it is taken


class Algebra:
    """Vectors that hold a number for every weight and bias of a bank, shape (N,), seen probe by probe."""

    def __init__(self, bank: ProbeBank) -> None:
        self.bank = bank
        count, device = bank.weight.numel(), bank.weight.device
        # Slices of a vector that fall into equal runs, and whose each run is.
        self.runs = [(block.weights, stack.probes[:, block.probe :]) for stack in bank.stacks for block in stack.blocks]
        self.runs.append((slice(count, count + bank.bias.numel()), torch.arange(len(bank.probes))))
        self.runs = [(part, owners.flatten().to(device)) for part, owners in self.runs]
        self._owner = torch.empty(count + bank.bias.numel(), dtype=torch.int64, device=device)
        for part, owners in self.runs:
            self._owner[part].view(len(owners), -1).copy_(owners.unsqueeze(1))

    def get(self) -> Tensor:
        """Return the bank's weights and biases."""
        return torch.cat([self.bank.weight, self.bank.bias.flatten()])

    def set(self, vector: Tensor) -> ProbeBank:
        """Give the bank these weights and biases, and return it."""
        self.bank.weight.copy_(vector[: self.bank.weight.numel()])
        self.bank.bias.copy_(vector[self.bank.weight.numel() :].view_as(self.bank.bias))
        return self.bank

    def spread(self, values: Tensor) -> Tensor:
        """Return one value per probe, shape (P,), at every place that is the probe's."""
        return values[self._owner]

    def inner(self, ones: Tensor, others: Tensor) -> Tensor:
        """Return each probe's inner products, shape (P, a, b), float64, of a and b vectors."""
        total = torch.zeros(len(self.bank.probes), len(ones), len(others), dtype=torch.float64, device=ones.device)
        for part, owners in self.runs:
            left, right = (each[:, part].view(len(each), len(owners), -1).transpose(0, 1) for each in (ones, others))
            total[owners] += torch.bmm(left, right.transpose(1, 2)).double()
        return total

    def combine(self, coefficients: Tensor, vectors: Tensor) -> Tensor:
        """Return for each probe its own combination, by coefficients of shape (P, a), of a vectors."""
        result = torch.empty_like(vectors[0])
        for part, owners in self.runs:
            rows = vectors[:, part].view(len(vectors), len(owners), -1).transpose(0, 1)
            result[part] = torch.bmm(coefficients[owners].to(rows.dtype).unsqueeze(1), rows).flatten()
        return result


def minimise(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], algebra: Algebra, active: Tensor, tolerance: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Minimise convex functions of the active probes from zero, each with its own history and steps.

    Every evaluation serves all probes: one takes its step and finds the next direction, another tries a shorter step.
    Directions are combinations of what is remembered, found from its inner products alone (Chen et al., 2014).

    Args:
        evaluate: Returns values, shape (P,), and gradients, shape (N,), at a vector of shape (N,).
        algebra: Of such vectors.
        active: Probes that move, boolean, shape (P,).
        tolerance: A probe stops where half its slope along the next direction, by which a quadratic function exceeds
            its minimum, is at most this share of the value.
        limit: Evaluations.

    Returns:
        Where probes ended, shape (N,), and that share, shape (P,).
    """
    m = HISTORY
    values, gradients = evaluate(torch.zeros_like(algebra.get()))
    here = torch.zeros_like(gradients)
    memory = gradients.new_zeros(2 * m + 1, len(here))  # m steps, m changes of the gradient, the gradient
    memory[-1] = gradients
    products = algebra.inner(memory, memory)  # (P, 2 m + 1, 2 m + 1)
    direction, slopes = -gradients, -products[:, -1, -1]
    lengths, scales = torch.ones_like(values), torch.ones_like(values)
    for count in range(limit):
        moving = active & (-slopes / 2 > tolerance * values)
        if not moving.any():
            break
        step = algebra.spread((lengths * moving).to(here.dtype)) * direction
        new_values, new_gradients = evaluate(here + step)
        ends = algebra.inner(direction[None], new_gradients[None])[:, 0, 0]
        # By convexity, a step that goes down even at its end has gone down all the way, whatever rounding says.
        taken = ~moving | (ends <= 0) | (new_values <= values + DESCENT * lengths * slopes)
        everywhere = algebra.spread(taken)
        slot = count % m
        memory[slot] = torch.where(everywhere, step, 0)
        memory[m + slot] = torch.where(everywhere, new_gradients - memory[-1], 0)
        memory[-1] = torch.where(everywhere, new_gradients, memory[-1])
        here = torch.where(everywhere, here + step, here)
        values = torch.where(taken, new_values, values)
        lowest = (slopes / (slopes - ends)).clamp(0.1, 0.5)  # where the slope would vanish, as a share of the length
        lengths = torch.where(taken, 1.0, lengths * lowest)
        changed = [slot, m + slot, 2 * m]
        products[:, :, changed] = fresh = algebra.inner(memory, memory[changed])
        products[:, changed] = fresh.transpose(1, 2)
        coefficients, scales = _direction(products, slot, scales)
        direction = torch.where(everywhere, algebra.combine(coefficients, memory), direction)
        slopes = torch.where(taken, (coefficients * products[:, -1]).sum(1), slopes)
    return here, -slopes / 2 / values


def _direction(products: Tensor, latest: int, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return L-BFGS's direction as coefficients of the remembered vectors, shape (P, 2 m + 1), and the new scales."""
    m = products.shape[1] // 2
    along, squares = products[:, :m, m : 2 * m].diagonal(0, 1, 2), products.diagonal(0, 1, 2)[:, m : 2 * m]
    inverse = torch.where(along > 1e-10 * squares, 1 / along, 0)  # none of what is empty
    known = inverse[:, latest] > 0
    scales = torch.where(known, along[:, latest] / squares[:, latest], scales)
    coefficients = torch.zeros_like(products[:, 0])
    coefficients[:, -1] = -1
    shares = torch.zeros_like(inverse)
    newest_first = [(latest - age) % m for age in range(m)]
    for pair in newest_first:
        shares[:, pair] = inverse[:, pair] * (coefficients * products[:, pair]).sum(1)
        coefficients[:, m + pair] -= shares[:, pair]
    coefficients *= scales.unsqueeze(1)
    for pair in reversed(newest_first):
        coefficients[:, pair] += shares[:, pair] - inverse[:, pair] * (coefficients * products[:, m + pair]).sum(1)
    return coefficients, scales
