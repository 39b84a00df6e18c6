"""Selections that search: each next neuron is chosen for what it adds to those before it, from moments alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.features.moments import rounding
from lightning_modules.subsets.bases import penalised

if TYPE_CHECKING:
    from lightning_modules.subsets.selections import Layer

BLOCK = 64  # neurons that are eliminated before what remains is computed anew
TIE = 1e-9  # scores that differ by a smaller share are equal, and the smaller index goes first


def greedy(layer: "Layer", seed: int) -> Tensor:
    """Order neurons by forward selection: each next one lowers the ridge objective on the labels most.

    The objective min |Y - X_S W|_F^2 + penalty |W|_F^2 of centred features X on the chosen neurons S; its decrease is
    exact. Neurons that never change are last.
    """
    return _eliminate(penalised(layer.moments.scatter, layer.moments), layer.moments.cross)


def backward(layer: "Layer", seed: int) -> Tensor:
    """Order neurons by backward elimination: of those that are left, the one goes last that the objective needs least.

    The objective is that of `greedy`. Without neuron j it rises by |w_j|^2 / (A^-1)_jj, A = X'X + penalty (Hassibi and
    Stork, 1993), and the inverse for those left is what eliminating j from A^-1 leaves.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalised(layer.moments.scatter, layer.moments)))
    weight = inverse @ layer.moments.cross
    dropped = _eliminate(inverse.flip(0, 1), weight.flip(0), least=True)  # of equals the larger index is dropped first
    return (layer.width - 1 - dropped).flip(0)


def column_subset(layer: "Layer", seed: int) -> Tensor:
    """Order neurons, without labels, so that each next one helps most to reconstruct all others by least squares.

    It lowers the Frobenius norm of the residual of the centred features most (Farahat et al., 2011). Neurons that are
    combinations of those before them are last.
    """
    return _eliminate(layer.moments.scatter, None, rounding(layer.width) * layer.moments.squares)


def harmless(layer: "Layer", seed: int) -> Tensor:
    """Order neurons by what each is worth to a ridge probe on the full layer: the most useful first, harmful ones last.

    The worth of a neuron is the rise of the error that generalised cross-validation foretells (Golub, Heath and Wahba,
    1979) when it alone is dropped: |Y - X W|_F^2 / (1 - f / n)^2 over the n images of train, with f the degrees of
    freedom of the fit, tr (A^-1 X'X) + 1, and A = X'X + penalty. Without neuron j they fall by 1 - penalty |h_j|^2 /
    h_jj, with h_j a column of A^-1. Validation has no part in it, so what it says of a subset stays true.
    """
    moments = layer.moments
    scatter, cross, count = moments.scatter, moments.cross, moments.count
    system = penalised(scatter, moments)
    penalty = (system - scatter).diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    weight, diagonal = inverse @ cross, inverse.diagonal()
    (risen,) = rises(system, cross, [(scatter, cross)])
    residual = moments.target_squares + ((scatter @ weight - 2 * cross) * weight).sum()
    freedom = len(system) - penalty * diagonal.sum()
    without = freedom - 1 + penalty * inverse.square().sum(0) / diagonal
    worth = (residual + risen) / (count - 1 - without).square() - residual / (count - 1 - freedom).square()
    return worth.argsort(descending=True, stable=True).cpu()


def rises(system: Tensor, cross: Tensor, errors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the rise of each error when one neuron is dropped and the others' weights are solved anew, shape (D,).

    Without j the weights W = A^-1 B are W - h_j w_j' / h_jj, with h_j a column of the inverse of the `system` A.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    weight, diagonal = inverse @ cross, inverse.diagonal()
    moved, found = weight.square().sum(1) / diagonal, []
    for quadratic, linear in errors:
        slope = 2 * (weight * (inverse @ (linear - quadratic @ weight))).sum(1)
        found.append((slope + (inverse * (quadratic @ inverse)).sum(0) * moved) / diagonal)
    return found


def _eliminate(system: Tensor, targets: Tensor | None, floor: Tensor | None = None, *, least: bool = False) -> Tensor:
    """Order neurons by taking the one with the largest (or least) |b_j|^2 / a_jj and eliminating it, again and again.

    A is the symmetric `system`, shape (D, D), and b_j a row of B, `targets` of shape (D, C) or A itself. Eliminating j
    leaves A - a_j a_j' / a_jj and B - a_j b_j' / a_jj. This is a pivoted Cholesky factorisation: within a block only
    the columns that are taken are brought up to date, and the norms |b_j|^2 by them. Costs D^3 operations.

    Args:
        floor: Entries a_jj up to which a neuron says nothing more, shape (D,); such ones are last, by their index.
    """
    width = len(system)
    left, taken = torch.arange(width, device=system.device), list[int]()
    floor = system.new_zeros(width) if floor is None else floor
    while len(left):
        rows = system if targets is None else targets  # B at the beginning of the block
        size = min(BLOCK, len(left))
        panel, shares = system.new_zeros(len(left), size), system.new_zeros(size, rows.shape[1])
        diagonal, norms = system.diagonal().clone(), rows.square().sum(1)
        free = torch.ones_like(left, dtype=torch.bool)
        for step in range(size):
            scores = (norms.clamp(min=0) / diagonal).masked_fill(diagonal <= floor, 0)
            if least:
                scores = scores.masked_fill(~free, torch.inf)
                pick = int((scores <= scores.min() * (1 + TIE)).int().argmax())
            else:
                scores = scores.masked_fill(~free, 0)
                if not scores.max() > 0:
                    return torch.cat([left.new_tensor(taken), left[free]]).cpu()
                pick = int((scores >= scores.max() * (1 - TIE)).int().argmax())
            done, root = panel[:, :step], diagonal[pick].sqrt()
            column = (system[:, pick] - done @ done[pick]) / root
            share = (rows[pick] - done[pick] @ shares[:step]) / root
            norms -= column * (2 * (rows @ share - done @ (shares[:step] @ share)) - column * share.square().sum())
            diagonal -= column.square()
            panel[:, step], shares[step], free[pick] = column, share, False
            taken.append(int(left[pick]))
        panel = panel[free]
        if targets is not None:
            targets = targets[free] - panel @ shares
        system = system[free][:, free] - panel @ panel.t()
        left, floor = left[free], floor[free]
    return torch.tensor(taken)
