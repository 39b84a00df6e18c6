"""L-BFGS for all probes of a bank at once, each with its own history and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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

    def part(self, which: Tensor) -> tuple[Algebra, Tensor]:
        """Return the algebra of some probes, which keep their weights, and where their numbers lie in vectors here."""
        bank = ProbeBank([self.bank.probes[index] for index in which], self.bank.classes).to(self.bank.weight)
        here = torch.arange(len(self._owner), device=which.device)
        count = self.bank.weight.numel()
        places = here.new_empty(bank.weight.numel())
        for place, index in enumerate(which.tolist()):
            of_probe = torch.cat([piece for piece, _ in self.bank.pieces(here[:count], index)], 1)
            for piece, columns in bank.pieces(places, place):
                piece.copy_(of_probe[:, columns])
        places = torch.cat([places, here[count:].view(len(self.bank.probes), -1)[which].flatten()])
        part = Algebra(bank)
        part.set(self.get()[places])
        return part, places

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


@dataclass
class State:
    """How far the probes have come: all that the next step needs."""

    here: Tensor  # shape (N,)
    memory: Tensor  # m steps, m changes of the gradient, the gradient, shape (2 m + 1, N)
    direction: Tensor  # of the next step, shape (N,)
    products: Tensor  # inner products of the memory, shape (P, 2 m + 1, 2 m + 1)
    values: Tensor  # of the functions, shape (P,)
    excess: Tensor  # over the minima, at most, as a share of the values, shape (P,)
    slopes: Tensor  # along the directions, shape (P,)
    lengths: Tensor  # of the next step as a share of the direction, shape (P,)
    scales: Tensor  # of the inverse curvature, shape (P,)
    count: int = 0  # steps

    def part(self, which: Tensor, places: Tensor) -> State:
        """Return the state of some probes, whose numbers lie at these places of the vectors."""
        vectors = {name: getattr(self, name)[..., places] for name in ("here", "memory", "direction")}
        mine = ("products", "values", "excess", "slopes", "lengths", "scales")
        return replace(self, **vectors, **{name: getattr(self, name)[which] for name in mine})


Evaluate = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From a vector to values and by what share they exceed the minima at most, shape (P,), and gradients, shape (N,)."""


def begin(evaluate: Evaluate, algebra: Algebra) -> State:
    """Return the state of functions of every probe at zero."""
    here = torch.zeros_like(algebra.get())
    values, excess, gradients = evaluate(here)
    memory = torch.cat([here.new_zeros(2 * HISTORY, len(here)), gradients.unsqueeze(0)])
    products = algebra.inner(memory, memory)
    ones = torch.ones_like(values)
    return State(here, memory, -gradients, products, values, excess, -products[:, -1, -1], ones, ones)


def advance(evaluate: Evaluate, algebra: Algebra, state: State, tolerance: float, limit: int) -> None:
    """Minimise convex functions of the probes by so many evaluations, each with its own history and steps.

    Every evaluation serves all probes: one takes its step and finds the next direction, another tries a shorter step.
    Directions are combinations of what is remembered, found from its inner products alone (Chen et al., 2014). A probe
    stops where its excess is at most the tolerance.
    """
    m = HISTORY
    for _ in range(limit):
        moving = state.excess > tolerance
        if not moving.any():
            break
        step = algebra.spread((state.lengths * moving).to(state.here.dtype)) * state.direction
        values, excess, gradients = evaluate(state.here + step)
        ends = algebra.inner(state.direction[None], gradients[None])[:, 0, 0]
        # By convexity, a step that goes down even at its end has gone down all the way, whatever rounding says.
        enough = values <= state.values + DESCENT * state.lengths * state.slopes
        taken = ~moving | (ends <= 0) | enough
        everywhere, memory, slot = algebra.spread(taken), state.memory, state.count % m
        memory[slot] = torch.where(everywhere, step, 0)
        memory[m + slot] = torch.where(everywhere, gradients - memory[-1], 0)
        memory[-1] = torch.where(everywhere, gradients, memory[-1])
        state.here = torch.where(everywhere, state.here + step, state.here)
        state.values = torch.where(taken, values, state.values)
        state.excess = torch.where(moving & taken, excess, state.excess)
        # Where the slope would vanish, as a share of the length.
        lowest = (state.slopes / (state.slopes - ends)).clamp(0.1, 0.5)
        state.lengths = torch.where(taken, 1.0, state.lengths * lowest)
        changed = [slot, m + slot, 2 * m]
        state.products[:, :, changed] = fresh = algebra.inner(memory, memory[changed])
        state.products[:, changed] = fresh.transpose(1, 2)
        coefficients, state.scales = _direction(state.products, slot, state.scales)
        state.direction = torch.where(everywhere, algebra.combine(coefficients, memory), state.direction)
        state.slopes = torch.where(taken, (coefficients * state.products[:, -1]).sum(1), state.slopes)
        state.count += 1


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
