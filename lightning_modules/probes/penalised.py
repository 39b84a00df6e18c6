"""The penalised loss of every probe of a bank, and its optimum by L-BFGS on whitened coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.checks import free_memory
from lightning_modules.features.moments import Moments, rounding
from lightning_modules.probes import lbfgs
from lightning_modules.probes.bank import ProbeBank, Stack
from lightning_modules.probes.lbfgs import Algebra
from lightning_modules.subsets.coordinates import Space
from lightning_modules.subsets.plan import probe_groups, references

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

ROWS = 2048  # in a batch from memory, at least, so that small batches cost no more than large ones
KEPT = 0.25  # share of the free memory that features may fill; more are read again in every pass
ROUND = 5  # steps after which probes that have converged are left out
NEARLY_NONE = 1e-6  # curvature of a loss that is at least assumed

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Objective:
    """The objective of every probe of a run, over the images of all processes."""

    def __init__(self, model: RedundancyProbe, moments: Mapping[Space, Moments], read: Batches) -> None:
        self.model = model
        self.images = float(next(iter(moments.values())).count)
        self.batches = in_memory(model, read, self.images)
        self.means = {source: each.mean.unsqueeze(0) for source, each in moments.items()}
        self.scatters = {source: each.scatter for source, each in moments.items()}

    def minimise(self, bank: ProbeBank, penalty: float, active: Tensor, tolerance: float, limit: int) -> Tensor:
        """Move the active probes of a bank, boolean of shape (P,), to their optima from where they are.

        Those of full layers go first, and the others start from as far on as least squares lets them follow.

        Returns:
            By what share of its value each objective exceeds its optimum at most, shape (P,).
        """
        excess = torch.full(active.shape, math.inf, dtype=torch.float64, device=active.device)
        full, before = torch.zeros_like(active), self._full(bank)
        full[references(bank.probes)] = True
        with torch.no_grad():
            for members in ((active & full).nonzero().squeeze(1), (active & ~full).nonzero().squeeze(1)):
                if len(members):
                    part = _Whitened(self, Algebra(bank).part(members)[0], penalty, self._curvatures(bank))
                    if not full[members].any():
                        now = self._full(bank)
                        part.follow({layer: (now[layer][0] - w, now[layer][1] - b) for layer, (w, b) in before.items()})
                    excess[members] = self._solve(part, bank, members, tolerance, limit)
        return excess

    def _solve(self, part: _Whitened, bank: ProbeBank, members: Tensor, tolerance: float, limit: int) -> Tensor:
        """Move the members of a bank, a part of it, to their optima, and return their excess.

        After every so many steps, those that have converged are left out.
        """
        excess = torch.full(members.shape, math.inf, dtype=torch.float64, device=members.device)
        places = torch.arange(len(members), device=members.device)
        state = lbfgs.begin(part.evaluate, part.algebra)
        for done in range(0, limit, ROUND):
            lbfgs.advance(part.evaluate, part.algebra, state, tolerance, min(ROUND, limit - done))
            excess[places] = state.excess
            for index, probe in zip(members[places].tolist(), part.probes(state.here), strict=True):
                bank.set_probe(index, *probe)
            going = (state.excess > tolerance).nonzero().squeeze(1)
            if not len(going):
                break
            if len(going) < len(places):
                places, state = places[going], state.part(going, part.narrow(going))
        return excess

    def centred(self, rows: Tensor, centre: Tensor) -> Batches:
        """Return what reads in every pass what probe groups see less its mean, shape (R, B), and the labels."""

        def read() -> Iterator[tuple[Tensor, Tensor]]:
            for inputs, labels in self.batches():
                yield self.model.coordinates.spaces(inputs).index_select(0, rows) - centre, labels

        if not _fits(self.model, self.images, len(rows)):
            return read
        kept = list(read())
        return lambda: kept

    def _full(self, bank: ProbeBank) -> dict[str, tuple[Tensor, Tensor]]:
        """Return weights and bias of the full probe of each layer, which every bank has.

        What is taken from them does not make the steps of any other probe depend on its company.
        """
        return {bank.probes[place].layer: bank.get_probe(place) for place in references(bank.probes).unique().tolist()}

    def _curvatures(self, bank: ProbeBank) -> dict[str, float]:
        """Return for each layer the mean second derivative of the loss by a logit, of classes that of p (1 - p)."""
        full = self._full(bank)
        totals = torch.zeros(len(full), dtype=torch.float64, device=bank.weight.device)
        for inputs, _ in self.batches():
            for place, logits in enumerate(self.logits(full, inputs).values()):
                totals[place] += self.model.target.bends(logits).sum()
        means = self.model.stream.reduce(totals) / (self.images * bank.classes)
        return dict(zip(full, means.clamp(min=NEARLY_NONE).tolist(), strict=True))

    def logits(self, full: Mapping[str, tuple[Tensor, Tensor]], inputs: Tensor) -> dict[str, Tensor]:
        """Return the logits of probes of full layers, shape (C, B), by layer."""
        layers = self.model.coordinates.by_layer(inputs)
        return {layer: weight @ layers[layer].t() + bias.unsqueeze(1) for layer, (weight, bias) in full.items()}


class _Whitened:
    """The objective on coordinates in which it curves about alike in all directions, for every subset of a bank.

    The curvature of an output's loss is near s X'X, with s the mean of p (1 - p) and X centred. With L L' = s X'X +
    penalty I over a probe group's coordinates, and T the inverse of L, a step u stands for the weights u T. T is lower
    triangular, so its leading blocks serve the smaller subsets.
    """

    def __init__(self, objective: Objective, algebra: Algebra, penalty: float, curvatures: Mapping[str, float]) -> None:
        self.objective, self.penalty, self.curvatures = objective, penalty, curvatures
        self.inverses: dict[tuple[Any, ...], Tensor] = {}
        self.rows = torch.empty(0)
        coordinates = objective.model.coordinates
        for group in itertools.chain(*probe_groups(algebra.bank.probes)):
            scatter = objective.scatters[coordinates.source(group)]
            system = curvatures[group.layer] * coordinates.ordering(group).square(scatter)
            system.diagonal().add_(penalty + rounding(len(system)) * system.diagonal().max())
            factor, identity = torch.linalg.cholesky(system).float(), torch.eye(len(system), device=system.device)
            self.inverses[group.key] = torch.linalg.solve_triangular(factor, identity, upper=False)
        self._take(algebra)
        bank = algebra.bank
        bank.bias.copy_(bank(self.centre).squeeze(-1))  # of centred coordinates
        self.start = algebra.get()

    def _take(self, algebra: Algebra) -> None:
        """Go on with these probes."""
        self.algebra, self.bank = algebra, algebra.bank
        alike = probe_groups(self.bank.probes)
        coordinates, groups = self.objective.model.coordinates, list(itertools.chain(*alike))
        inverses = {group.key: self.inverses[group.key][: group.sizes[-1], : group.sizes[-1]] for group in groups}
        self.factors = [torch.stack([inverses[group.key] for group in each]) for each in alike]  # of each stack
        self.inverses = {
            group.key: factor for group, factor in zip(groups, itertools.chain(*self.factors), strict=True)
        }
        centres = [
            coordinates.ordering(group).coordinates(self.objective.means[coordinates.source(group)])
            - coordinates.centre(group)
            for group in groups
        ]
        self.centre = torch.cat(centres, 1).float().t()  # (R, 1)
        rows = coordinates.rows_of(groups)
        if not torch.equal(rows, self.rows):
            self.rows, self.batches = rows, self.objective.centred(rows, self.centre)
        scales = [(self.curvatures[probe.layer] * self.objective.images) ** -0.5 for probe in self.bank.probes]
        self.scale = torch.tensor(scales).to(self.bank.bias).repeat_interleave(self.bank.classes)  # of biases

    def narrow(self, which: Tensor) -> Tensor:
        """Go on with these probes alone, and return where their numbers lie in vectors of before."""
        part, places = self.algebra.part(which)
        self.start = self.start[places]
        self._take(part)
        return places

    def probes(self, step: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return weights and bias of every probe after a step."""
        bank = self.algebra.set(self.start + self._weights(step))
        bank.bias.copy_(2 * bank.bias - bank(self.centre).squeeze(-1))
        return [bank.get_probe(index) for index in range(len(bank.probes))]

    def follow(self, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Move the start of every probe so that its logits change as least squares makes of those of its full layer."""
        gradient = torch.zeros_like(self.start)
        for (inputs, _), (seen, _) in zip(self.objective.batches(), self.batches(), strict=True):
            changed = self.objective.logits(changes, inputs)
            wanted = torch.stack([changed[probe.layer] * self.curvatures[probe.layer] for probe in self.bank.probes])
            gradient += self._slopes(partial(torch.mul, wanted), seen)[1]
        self.start += self._weights(self._gradient(self.objective.model.stream.reduce(gradient)))

    def evaluate(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective of every probe, its excess, both of shape (P,), float64, and its gradient, shape (N,).

        The penalty alone curves the objective by as much as itself, so that it exceeds its optimum by no more than
        |gradient by the weights|^2 / (2 penalty), the duality gap. The bias counts by the mean curvature.
        """
        vector = self.start + self._weights(step)
        model, bank = self.objective.model, self.algebra.set(vector)
        gradient = torch.zeros_like(vector)
        total = torch.zeros(len(bank.probes), dtype=torch.float64, device=vector.device)
        for seen, labels in self.batches():
            losses, slopes = self._slopes(partial(model.solver.loss, model.target, labels=labels), seen)
            gradient += slopes
            total += losses
        biases, weights = bank.bias.numel(), vector.clone()
        weights[-biases:] = 0
        slopes = model.stream.reduce(gradient) + self.penalty * weights
        gradient = self._gradient(slopes)
        slopes[-biases:] = self.penalty**0.5 * gradient[-biases:]
        squares = torch.stack([self.algebra.inner(each[None], each[None])[:, 0, 0] for each in (weights, slopes)])
        total = model.stream.reduce(total) + self.penalty / 2 * squares[0]
        return total, squares[1] / (2 * self.penalty) / total, gradient

    def _slopes(self, loss: Callable[[Tensor], Tensor], seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return a loss of the bank's logits, and the gradient of its sum by weights and biases, shape (N,)."""
        with torch.enable_grad():
            losses = loss(self.bank(seen))
            parts = torch.autograd.grad(losses.sum(), [self.bank.weight, self.bank.bias])
        return losses.detach(), torch.cat([part.flatten() for part in parts])

    def _weights(self, vector: Tensor) -> Tensor:
        """Return the weights and biases that a step stands for."""
        result = torch.empty_like(vector)
        for stack, inverses, wide in self._wide(vector, result):
            for block in stack.blocks:
                seen = stack.view(vector, block).flatten(1, 2)
                wide[:, -seen.shape[1] :, : block.stop] += torch.bmm(
                    seen, inverses[:, block.start : block.stop, : block.stop]
                )
            for block in stack.blocks:
                made = stack.view(result, block).flatten(1, 2)
                made.copy_(wide[:, -made.shape[1] :, block.start : block.stop])
        return result

    def _gradient(self, vector: Tensor) -> Tensor:
        """Return the gradient by the step, from that by weights and biases."""
        result = torch.empty_like(vector)
        for stack, inverses, wide in self._wide(vector, result):
            for block in stack.blocks:
                seen = stack.view(vector, block).flatten(1, 2)
                wide[:, -seen.shape[1] :, block.start : block.stop] = seen
            for block in stack.blocks:
                made = stack.view(result, block).flatten(1, 2)
                factor = inverses[:, block.start : block.stop, : block.stop]
                torch.bmm(wide[:, -made.shape[1] :, : block.stop], factor.transpose(1, 2), out=made)
        return result

    def _wide(self, vector: Tensor, result: Tensor) -> Iterator[tuple[Stack, Tensor, Tensor]]:
        """Yield every stack with its inverses and zeros for all its weights, (G, m C, k); scale the biases."""
        biases = self.bank.bias.numel()
        result[-biases:] = self.scale * vector[-biases:]
        for stack, inverses in zip(self.bank.stacks, self.factors, strict=True):
            groups, count = stack.probes.shape
            yield stack, inverses, vector.new_zeros(groups, count * stack.classes, inverses.shape[-1])


def in_memory(model: RedundancyProbe, read: Batches, images: float) -> Batches:
    """Return what reads the batches of so many images in every pass: from memory where it holds them."""
    if not _fits(model, images, sum(model.widths.values())):
        return read
    inputs, labels = (torch.cat(parts) for parts in zip(*read(), strict=True))
    rows = max(ROWS, model.task.batch_size)
    return lambda: zip(inputs.split(rows), labels.split(rows), strict=True)


def _fits(model: RedundancyProbe, images: float, width: int) -> bool:
    """Return whether memory holds so many numbers of so many images of all processes."""
    return 4 * images * width / model.trainer.world_size <= KEPT * free_memory()
