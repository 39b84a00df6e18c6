"""Closed-form probes: ridge regression of the labels on any subset, from moments alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.features.moments import Moments, rounding
from lightning_modules.measures.measure import Column
from lightning_modules.probes.solver import Solver
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.coordinates import Space

if TYPE_CHECKING:
    from lightning_modules.redundancy_probe import RedundancyProbe

TOGETHER = 0.7  # of the largest of sizes that are solved at once
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Ridge(Solver):
    """Least squares with a penalty on the weights, in closed form from X'X and X'Y: no epochs, no learning rate.

    `loss` in the results is the squared error, summed over outputs. Costs 2 n D^2 operations for n images, and D^3 / 3
    for each penalty, selection and seed.

    Args:
        penalty: Penalty over the mean diagonal of the full layer's centred X'X; of a list every probe takes the one
            with the smallest squared error on validation.

    Raises:
        MisconfigurationException: If a penalty is negative, or there is none.
    """

    name = "ridge"
    trains = False
    second_moments = True
    columns = (Column("penalty", "penalty"),)

    def __init__(self, penalty: float | list[float] = list(PENALTIES)) -> None:  # noqa: B006 (never changed)
        self.penalty = penalty if isinstance(penalty, list) else [penalty]
        if not self.penalty:
            raise MisconfigurationException("model.solver.penalty needs at least one value.")
        for value in self.penalty:
            if not (value >= 0 and math.isfinite(value)):
                raise MisconfigurationException(f"model.solver.penalty is {value:g}; it must be 0 or more.")

    def candidates(self) -> list[tuple[float, ...]]:
        """Return one candidate: each probe's penalty is chosen when it is solved."""
        return [(math.nan,)]

    def loss(self, target: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error to the target's matrix, for several classes the one-hot labels."""
        return target.squared_error(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the logits: least squares on one-hot labels estimates probabilities already."""
        return logits

    def prepare(self, model: RedundancyProbe) -> None:
        """Solve every probe from sums over train and validation."""
        train, val = (model.stream.moments(split, model.coordinates.sources) for split in ("train", "val"))
        for source in train:
            moments, everything = (train[source], val[source]), range(len(model.probes))
            for index, probe in _solved(model, source, moments, everything, self.penalty):
                model.grid.set_probe(index, probe.weight, probe.bias)
                model.grid.hyperparameters[0, index, 0] = probe.penalty
        model.grid.kept_epoch.zero_()

    def refit(self, model: RedundancyProbe) -> None:
        """Solve every probe from the sums of train and validation together, with the penalty that was chosen."""
        train, val = (model.stream.moments(split, model.coordinates.sources) for split in ("train", "val"))
        chosen = model.grid.hyperparameters[0, :, 0].tolist()
        for source in train:
            both = train[source] + val[source]
            for penalty in set(chosen):
                which = [index for index, its in enumerate(chosen) if its == penalty]
                for index, probe in _solved(model, source, (both, both), which, [penalty]):
                    model.grid.refitted.set_probe(index, probe.weight, probe.bias)
        model.grid.is_refitted.fill_(True)

    def provenance(self) -> dict[str, Any]:
        """Return the solver: its penalties are chosen anew only by a fit."""
        return {"solver": self.name}


class RidgeProbe(NamedTuple):
    """A linear probe in closed form, in float64."""

    weight: Tensor  # Shape (C, k), over the subset in its order
    bias: Tensor  # Shape (C,); not penalised
    penalty: float  # The chosen one
    error: float  # Its squared error on validation, summed over outputs, mean over images


class _Split(NamedTuple):
    """Moments of a split over the coordinates of the largest subset."""

    scatter: Tensor  # (k, k)
    cross: Tensor  # (k, C)
    mean: Tensor  # (k,)
    shares: Tensor  # mean of the targets, of classes the share of each, (C,)
    squares: Tensor  # of the centred targets, summed
    images: Tensor

    def errors(self, weights: Tensor, biases: Tensor) -> list[float]:
        """Return the squared errors of m probes, shapes (m, C, n) and (m, C), on the first n coordinates.

        Each is the mean over images.
        """
        size = weights.shape[2]
        fitted = ((weights @ self.scatter[:size, :size] - 2 * self.cross[:size].t()) * weights).sum((1, 2))
        missed = self.shares - biases - weights @ self.mean[:size]
        return ((self.squares + fitted) / self.images + missed.square().sum(1)).tolist()


def ridge_probes(
    train: Moments, val: Moments, orderings: Sequence[Ordering], penalties: Sequence[float]
) -> list[list[RidgeProbe]]:
    """Fit a probe on every subset, each with the penalty that errs least on validation.

    A probe minimises |Y - Z W' - 1 b'|_F^2 + penalty * s * |W|_F^2 over the training images, with s the mean diagonal
    of the *full layer's* centred X'X, so that a penalty means the same for every subset and basis. Subsets nest: the
    Cholesky factor of the largest one's system holds those of all others as leading blocks, and so do forward and back
    substitution. The validation error follows from that split's moments. Of equal errors the larger penalty is taken.

    Returns:
        For each ordering the probes of its sizes.

    Raises:
        MisconfigurationException: If all penalties are too small for the system of a subset to be solved.
    """
    matrices = [moments.scatter for moments in (train, val)]
    scale = float(matrices[0].diagonal().mean())
    results = []
    for ordering in orderings:
        fitted, judged = (
            _split(moments, scatter, ordering) for moments, scatter in zip((train, val), matrices, strict=True)
        )
        best: list[RidgeProbe | None] = [None] * len(ordering.sizes)
        for penalty in sorted(penalties, reverse=True):
            system = fitted.scatter.clone()
            system.diagonal().add_(penalty * scale)
            factor = _factor(system)
            half = torch.linalg.solve_triangular(factor, fitted.cross[: len(factor)], upper=False)
            stop = sum(size <= len(factor) for size in ordering.sizes)
            while stop:  # from the largest sizes down, those together that are not much smaller
                width = ordering.sizes[stop - 1]
                start = sum(size < TOGETHER * width for size in ordering.sizes)
                part = ordering._replace(sizes=ordering.sizes[start:stop])
                # What is zero beyond a subset stays so when the upper triangle is solved: one solution serves all.
                masked = (part.masks().to(half).unsqueeze(2) * half[:width].unsqueeze(1)).flatten(1)
                solved = torch.linalg.solve_triangular(factor[:width, :width].t(), masked, upper=True)
                weights = solved.view(width, stop - start, -1).permute(1, 2, 0).contiguous()  # (m, C, n)
                biases = fitted.shares - weights @ fitted.mean[:width]
                for place, error in enumerate(judged.errors(weights, biases), start):
                    known, size = best[place], ordering.sizes[place]
                    if known is None or error < known.error:
                        own = weights[place - start, :, :size].clone()
                        best[place] = RidgeProbe(own, biases[place - start], penalty, error)
                stop = start
        for size, probe in zip(ordering.sizes, best, strict=True):
            if probe is None:
                raise MisconfigurationException(
                    f"No ridge penalty of {', '.join(format(penalty, 'g') for penalty in penalties)} determines a "
                    f"probe on {size} neurons; give a larger one."
                )
        results.append([probe for probe in best if probe is not None])
    return results


def _solved(
    model: RedundancyProbe,
    source: Space,
    moments: tuple[Moments, Moments],
    which: Sequence[int],
    penalties: Sequence[float],
) -> Iterator[tuple[int, RidgeProbe]]:
    """Yield those probes of a source that are in `which`, by `ridge_probes`, as they are over the bank's inputs."""
    members = {group: [i for i in group.probes if i in which] for group in model.coordinates.of_source(source)}
    members = {group: indices for group, indices in members.items() if indices}
    sizes = [[model.probes[index].neurons for index in indices] for indices in members.values()]
    orderings = [model.coordinates.ordering(group) for group in members]
    orderings = [each._replace(sizes=its) for each, its in zip(orderings, sizes, strict=True)]
    solved = ridge_probes(*moments, orderings, penalties)
    for (group, indices), probes in zip(members.items(), solved, strict=True):
        centre = model.coordinates.centre(group)
        for index, probe in zip(indices, probes, strict=True):
            # Moments are of coordinates that are not centred; the bank's are.
            yield index, probe._replace(bias=probe.bias + probe.weight @ centre[: probe.weight.shape[1]])


def _split(moments: Moments, scatter: Tensor, ordering: Ordering) -> _Split:
    return _Split(
        ordering.square(scatter),
        ordering.coordinates(moments.cross.t()).t(),
        ordering.coordinates(moments.mean.unsqueeze(0)).squeeze(0),
        moments.target_mean,
        moments.target_squares,
        moments.count,
    )


def _factor(system: Tensor) -> Tensor:
    """Return the lower Cholesky factor of the largest leading block that is positive definite beyond rounding."""
    size = len(system)
    factor = system[:0, :0]
    while size:
        factor, failed = torch.linalg.cholesky_ex(system[:size, :size])
        if failed == 0:
            break
        size = int(failed) - 1
    # A pivot is what a neuron still varies given those before it; one of rounding errors would make huge weights.
    known = factor.diagonal().square() > rounding(len(system)) * system.diagonal()[: len(factor)]
    size = len(factor) if known.all() else int(known.int().argmin())
    return factor[:size, :size]
