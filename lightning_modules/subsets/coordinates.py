"""From features to what probes see: neurons, or coordinates of another basis, in the order of each selection."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.features.moments import Moments, by_layer
from lightning_modules.subsets.bases import Ordering, Quantiser, levels
from lightning_modules.subsets.plan import Probe, ProbeGroup, probe_groups
from lightning_modules.subsets.selections import BASES, SELECTIONS, Layer, order


def _is_fitted(basis: str) -> bool:
    """Return whether a basis is computed from the training split."""
    return any(rule.fitted for rule in SELECTIONS.values() if rule.basis == basis)


class Space(NamedTuple):
    """D coordinates that probe groups pick from: a layer's neurons or another basis, as they are or in few bits."""

    layer: str
    basis: str | None = None  # of `BASES`; None for the layer's own neurons
    seed: int = 0  # of the basis
    bits: int = 32


class Coordinates(nn.Module):
    """Gathers the coordinates of every probe group, as far as its largest subset goes.

    Orders, bases and levels that are fitted to the training split are filled in by `fit` and saved in checkpoints;
    seeded ones are drawn again. `widths` are D of each layer, in the order in which features hold them.
    """

    rows: Tensor

    def __init__(self, probes: Sequence[Probe], widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = widths
        self.groups = [group for alike in probe_groups(probes) for group in alike]
        # Where each space starts among the rows of `spaces`: the layers' neurons, the bases, then all in few bits.
        wanted = [self._space(group) for group in self.groups]
        spaces = dict.fromkeys([*map(Space, widths), *(space._replace(bits=32) for space in wanted), *wanted])
        starts = itertools.accumulate((widths[space.layer] for space in spaces), initial=0)
        self._starts = dict(zip(spaces, starts, strict=False))
        self._bases = [space for space in spaces if space.basis is not None and space.bits == 32]
        self._quantised = [space for space in spaces if space.bits < 32]
        for place, (layer, basis, *_) in enumerate(self._bases):
            fitted = _is_fitted(str(basis))
            self.register_buffer(f"matrix_{place}", torch.zeros(widths[layer], widths[layer]), persistent=fitted)
            self.register_buffer(f"centre_{place}", torch.zeros(widths[layer]), persistent=fitted)
        for place, (layer, *_) in enumerate(self._quantised):
            self.register_buffer(f"low_{place}", torch.zeros(widths[layer]))
            self.register_buffer(f"step_{place}", torch.ones(widths[layer]))
        ends = list(itertools.accumulate(group.sizes[-1] for group in self.groups))
        self._slices = {
            group.key: slice(end - group.sizes[-1], end) for group, end in zip(self.groups, ends, strict=True)
        }
        self.register_buffer("rows", torch.zeros(ends[-1], dtype=torch.int64))
        self._fill({layer: Layer(width) for layer, width in widths.items()}, fitted=False)

    @property
    def fitted(self) -> bool:
        """Whether any selection, or levels of few bits, are fitted to the training split."""
        return bool(self._quantised) or any(SELECTIONS[group.selection].fitted for group in self.groups)

    def fit(self, moments: Mapping[str, Moments]) -> None:
        """Compute what is fitted to the training split, orders, bases and levels, from the moments of each layer."""
        self._fill({layer: Layer(width, moments[layer]) for layer, width in self.widths.items()}, fitted=True)
        spreads = {}
        for space in dict.fromkeys(space._replace(bits=32) for space in self._quantised):
            of_layer, basis = moments[space.layer], self._basis(space)
            spreads[space] = of_layer.mean, of_layer.variance
            if basis is not None:
                matrix, centre = (part.double() for part in basis)
                variance = (matrix * (of_layer.scatter @ matrix)).sum(0) / of_layer.count
                spreads[space] = (of_layer.mean - centre) @ matrix, variance
        for place, space in enumerate(self._quantised):
            low, step = levels(*spreads[space._replace(bits=32)], space.bits)
            getattr(self, f"low_{place}").copy_(low)
            getattr(self, f"step_{place}").copy_(step)

    def forward(self, features: Tensor, quantised: bool = True) -> Tensor:
        """Return the coordinates of all groups, shape (R, B), of features of shape (B, sum of widths).

        The groups come in the order of `groups`, each with as many rows as its largest subset has coordinates; without
        `quantised` those in few bits are as they were before.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self.spaces(features, quantised).index_select(0, self.rows)

    def spaces(self, features: Tensor, quantised: bool = True) -> Tensor:
        """Return all neurons, then the coordinates of every basis, and of both in few bits, shape (M, B)."""
        columns = features.new_empty(features.shape[::-1])
        columns.t().copy_(features)  # in half the time of `contiguous`
        found = {Space(layer): part.t() for layer, part in self.by_layer(columns.t()).items()}
        layers = self.by_layer(features)
        for space in self._bases:
            matrix, centre = (part.to(columns.dtype) for part in self._basis(space) or ())
            found[space] = matrix.t() @ (layers[space.layer].t() - centre.unsqueeze(1))
        for place, space in enumerate(self._quantised):
            exact = found[space._replace(bits=32)]
            found[space] = self._quantiser(place)(exact.t()).t() if quantised else exact
        return torch.cat([columns, *list(found.values())[len(layers) :]]) if len(found) > len(layers) else columns

    @property
    def source_widths(self) -> dict[Space, int]:
        """D of each of `sources`."""
        return {space: self.widths[space.layer] for space in (*map(Space, self.widths), *self._quantised)}

    def sources(self, features: Tensor) -> dict[Space, Tensor]:
        """Return what moments are of, not centred, shape (B, D): every layer, from which bases follow, and few bits."""
        spaces, found = self.spaces(features) if self._quantised else features.t(), {}
        for space, width in self.source_widths.items():
            found[space] = spaces[self._starts[space] : self._starts[space] + width].t()
            basis = self._basis(space)
            if basis is not None:
                matrix, centre = (part.double() for part in basis)
                found[space] = found[space] + (centre @ matrix).to(features.dtype)
        return found

    def source(self, group: ProbeGroup) -> Space:
        """Return which of `sources` has the moments that a group's `ordering` is to be applied to."""
        return self._space(group) if group.bits < 32 else Space(group.layer)

    def of_source(self, source: Space) -> list[ProbeGroup]:
        """Return the probe groups of one of `sources`."""
        return [group for group in self.groups if self.source(group) == source]

    def rows_of(self, groups: Sequence[ProbeGroup]) -> Tensor:
        """Return which rows of `spaces` some groups see, one after the other; they may have fewer probes than here."""
        return torch.cat([self.rows[self._slices[group.key]][: group.sizes[-1]] for group in groups])

    def by_layer(self, features: Tensor) -> dict[str, Tensor]:
        """Split features, shape (B, sum of widths), into those of each layer, shape (B, D)."""
        return by_layer(features, self.widths)

    def ordering(self, group: ProbeGroup) -> Ordering:
        """Return a group's order, sizes and, over a layer, basis, as statistics of its `source` take them."""
        return self._ordering(group) if group.bits == 32 else self._ordering(group)._replace(basis=None)

    def centre(self, group: ProbeGroup) -> Tensor:
        """Return the coordinates of the point that a group's basis is centred on, in the group's order, float64."""
        basis = self._basis(self._space(group))
        if basis is None:
            return torch.zeros(group.sizes[-1], dtype=torch.float64, device=self.rows.device)
        return self._ordering(group).coordinates(basis[1].double().unsqueeze(0)).squeeze(0)

    def subset(self, index: int) -> Tensor:
        """Return the coordinates that a probe sees, shape (k,), as places in its layer or basis."""
        group = self._group_of(index)
        return self.ordering(group).order[: group.sizes[group.probes.index(index)]]

    def basis(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return the matrix, shape (D, D), and centre, shape (D,), of the basis a probe sees; None for neurons."""
        return self._basis(self._space(self._group_of(index)))

    def quantiser(self, index: int) -> Quantiser | None:
        """Return the levels of the coordinates that a probe sees, shape (k,) in their order; None for float32."""
        group = self._group_of(index)
        if group.bits == 32:
            return None
        low, step, bits = self._quantiser(self._quantised.index(self._space(group)))
        subset = self.subset(index)
        return Quantiser(low[subset], step[subset], bits)

    def masks(self) -> Tensor:
        """Return which of `spaces` each probe sees, shape (P, M), boolean."""
        count = sum(len(group.probes) for group in self.groups)
        end = max(start + self.widths[layer] for (layer, *_), start in self._starts.items())
        masks = torch.zeros(count, end, dtype=torch.bool, device=self.rows.device)
        for group in self.groups:
            rows = self.rows[self._slices[group.key]]
            for index, size in zip(group.probes, group.sizes, strict=True):
                masks[index, rows[:size]] = True
        return masks

    def _group_of(self, index: int) -> ProbeGroup:
        return next(group for group in self.groups if index in group.probes)

    def _ordering(self, group: ProbeGroup) -> Ordering:
        """Return a group's order, sizes and basis over its layer; the basis is float64 and not centred."""
        matrix, _ = self._basis(self._space(group)) or (None, None)
        order = self.rows[self._slices[group.key]] - self._starts[self._space(group)]
        return Ordering(order, group.sizes, None if matrix is None else matrix.double())

    def _basis(self, space: Space) -> tuple[Tensor, Tensor] | None:
        """Return the matrix, shape (D, D), and centre, shape (D,), of a space's basis; None for neurons."""
        if space.basis is None:
            return None
        place = self._bases.index(space._replace(bits=32))
        return getattr(self, f"matrix_{place}"), getattr(self, f"centre_{place}")

    def _quantiser(self, place: int) -> Quantiser:
        return Quantiser(getattr(self, f"low_{place}"), getattr(self, f"step_{place}"), self._quantised[place].bits)

    def _space(self, group: ProbeGroup) -> Space:
        """Return the space that a group picks from; bases without a seed serve several groups."""
        rule = SELECTIONS[group.selection]
        return Space(group.layer, rule.basis, group.seed if rule.basis and rule.seeded else 0, group.bits)

    def _fill(self, layers: dict[str, Layer], fitted: bool) -> None:
        for place, (layer, name, seed, _) in enumerate(self._bases):
            if fitted == _is_fitted(str(name)):
                basis = BASES[str(name)](layers[layer], seed)
                getattr(self, f"matrix_{place}").copy_(basis.matrix)
                getattr(self, f"centre_{place}").copy_(basis.centre)
        for group in self.groups:
            if SELECTIONS[group.selection].fitted == fitted:
                ordered = order(group.selection, layers[group.layer], group.seed)
                self.rows[self._slices[group.key]] = ordered[: group.sizes[-1]] + self._starts[self._space(group)]
