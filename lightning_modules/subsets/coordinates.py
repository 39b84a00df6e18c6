"""From representations to what probes see: neurons or the coordinates of another basis, in each selection's order."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.plan import Probe
from lightning_modules.subsets.selections import BASES, SELECTIONS, Layer, order


class Nest(NamedTuple):
    """The probes of one layer, selection and seed: their subsets are prefixes of one nest."""

    layer: str
    selection: str
    seed: int
    probes: tuple[int, ...]
    """Places of the probes, by ascending size."""
    sizes: tuple[int, ...]
    """How many coordinates each of them sees."""


def nests(probes: Sequence[Probe]) -> list[list[Nest]]:
    """Group the probes of a run into nests, and nests by their subset sizes, so that alike ones come together."""
    members: dict[tuple[str, str, int], list[int]] = {}
    for index, probe in enumerate(probes):
        members.setdefault((probe.layer, probe.selection, probe.seed), []).append(index)
    alike: dict[tuple[int, ...], list[Nest]] = {}
    for key, indices in members.items():
        indices.sort(key=lambda index: probes[index].neurons)
        sizes = tuple(probes[index].neurons for index in indices)
        alike.setdefault(sizes, []).append(Nest(*key, tuple(indices), sizes))
    return list(alike.values())


def _is_informed(basis: str) -> bool:
    """Return whether a basis depends on the training images."""
    return any(rule.informed for rule in SELECTIONS.values() if rule.basis == basis)


class Coordinates(nn.Module):
    """Gathers the coordinates of every nest, as far as its largest subset goes.

    Orders and bases that depend on the training images are filled in by `look`, and belong to a run's checkpoint.

    Args:
        probes: The probes of a run.
        widths: D of each layer, in the order in which representations hold them.
    """

    rows: Tensor

    def __init__(self, probes: Sequence[Probe], widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = widths
        self.nests = [nest for alike in nests(probes) for nest in alike]
        self._starts: dict[tuple[str, str | None, int], int] = {}
        end = 0
        for layer, width in widths.items():
            self._starts[layer, None, 0] = end
            end += width
        for nest in self.nests:
            if self._space(nest) not in self._starts:
                self._starts[self._space(nest)] = end
                end += widths[nest.layer]
        for place, (layer, basis, _) in enumerate(self._bases()):
            informed = _is_informed(basis)
            self.register_buffer(f"matrix_{place}", torch.zeros(widths[layer], widths[layer]), persistent=informed)
            self.register_buffer(f"centre_{place}", torch.zeros(widths[layer]), persistent=informed)
        self.register_buffer("rows", torch.zeros(sum(o.sizes[-1] for o in self.nests), dtype=torch.int64))
        self._fill({layer: Layer(width) for layer, width in widths.items()}, informed=False)

    @property
    def informed(self) -> bool:
        """Whether any nest depends on the training images."""
        return any(SELECTIONS[nest.selection].informed for nest in self.nests)

    def look(self, layers: dict[str, Layer]) -> None:
        """Fill in the orders and bases that depend on the training images."""
        self._fill(layers, informed=True)

    def forward(self, representations: Tensor) -> Tensor:
        """Return the coordinates of all nests, shape (R, B), for representations of shape (B, sum of widths).

        The nests come in the order of `nests`, each with as many rows as its largest subset has coordinates.
        """
        with torch.autocast(representations.device.type, enabled=False):
            return self.spaces(representations).index_select(0, self.rows)

    def spaces(self, representations: Tensor) -> Tensor:
        """Return all neurons and then the coordinates of every basis, shape (M, B)."""
        columns = representations.new_empty(representations.shape[::-1])
        columns.t().copy_(representations)  # in half the time of `contiguous`
        spaces, layers = [columns], self.by_layer(representations)
        for place, (layer, *_) in enumerate(self._bases()):
            matrix, centre = (getattr(self, f"{part}_{place}").to(columns.dtype) for part in ("matrix", "centre"))
            spaces.append(matrix.t() @ (layers[layer].t() - centre.unsqueeze(1)))
        return torch.cat(spaces) if len(spaces) > 1 else columns

    def of(self, layer: str) -> list[Nest]:
        """Return the nests of a layer."""
        return [nest for nest in self.nests if nest.layer == layer]

    def by_layer(self, representations: Tensor) -> dict[str, Tensor]:
        """Cut representations, shape (B, sum of widths), into those of each layer, shape (B, D)."""
        return dict(zip(self.widths, representations.split(list(self.widths.values()), dim=1), strict=True))

    def ordering(self, nest: Nest) -> Ordering:
        """Return what statistics know a nest by; its basis is in float64 and not centred."""
        matrix, _ = self._basis(nest) or (None, None)
        order = self._rows_of(nest) - self._starts[self._space(nest)]
        return Ordering(order, nest.sizes, None if matrix is None else matrix.double())

    def centre(self, nest: Nest) -> Tensor:
        """Return the coordinates of what a nest's basis takes for its origin, in the nest's order, float64."""
        basis = self._basis(nest)
        if basis is None:
            return torch.zeros(nest.sizes[-1], dtype=torch.float64, device=self.rows.device)
        return self.ordering(nest).coordinates(basis[1].double().unsqueeze(0)).squeeze(0)

    def subset(self, index: int) -> Tensor:
        """Return the coordinates that a probe sees, shape (k,), as places in its layer or basis."""
        nest = self._nest_of(index)
        return self.ordering(nest).order[: nest.sizes[nest.probes.index(index)]]

    def basis(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return the matrix, shape (D, D), and centre, shape (D,), of the basis a probe sees; None for neurons."""
        return self._basis(self._nest_of(index))

    def masks(self) -> Tensor:
        """Return which of `spaces` each probe sees, shape (P, M), boolean."""
        count = sum(len(nest.probes) for nest in self.nests)
        masks = torch.zeros(
            count,
            max(start + self.widths[layer] for (layer, *_), start in self._starts.items()),
            dtype=torch.bool,
            device=self.rows.device,
        )
        for nest in self.nests:
            rows = self._rows_of(nest)
            for index, size in zip(nest.probes, nest.sizes, strict=True):
                masks[index, rows[:size]] = True
        return masks

    def _nest_of(self, index: int) -> Nest:
        return next(nest for nest in self.nests if index in nest.probes)

    def _bases(self) -> Iterator[tuple[str, str, int]]:
        for layer, basis, seed in self._starts:
            if basis is not None:
                yield layer, basis, seed

    def _basis(self, nest: Nest) -> tuple[Tensor, Tensor] | None:
        """Return the matrix, shape (D, D), and centre, shape (D,), of a nest's basis; None for neurons."""
        for place, space in enumerate(self._bases()):
            if space == self._space(nest):
                return getattr(self, f"matrix_{place}"), getattr(self, f"centre_{place}")
        return None

    def _space(self, nest: Nest) -> tuple[str, str | None, int]:
        """Return what names the space that a nest picks from; bases without chance serve several selections."""
        rule = SELECTIONS[nest.selection]
        return nest.layer, rule.basis, nest.seed if rule.basis and rule.by_chance else 0

    def _rows_of(self, nest: Nest) -> Tensor:
        start = 0
        for each in self.nests:
            if each == nest:
                return self.rows[start : start + nest.sizes[-1]]
            start += each.sizes[-1]
        raise KeyError(nest)

    def _fill(self, layers: dict[str, Layer], informed: bool) -> None:
        for place, (layer, name, seed) in enumerate(self._bases()):
            if informed == _is_informed(name):
                basis = BASES[name](layers[layer], seed)
                getattr(self, f"matrix_{place}").copy_(basis.matrix)
                getattr(self, f"centre_{place}").copy_(basis.centre)
        for nest in self.nests:
            if SELECTIONS[nest.selection].informed == informed:
                whole = order(nest.selection, layers[nest.layer], nest.seed)
                self._rows_of(nest).copy_(whole[: nest.sizes[-1]] + self._starts[self._space(nest)])
