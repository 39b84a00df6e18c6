"""From features to what probes see: neurons, or coordinates of another basis, in the order of each selection."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.features.moments import Moments
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.plan import Probe, ProbeGroup, probe_groups
from lightning_modules.subsets.selections import BASES, SELECTIONS, Layer, order


def _is_fitted(basis: str) -> bool:
    """Return whether a basis is computed from the training split."""
    return any(rule.fitted for rule in SELECTIONS.values() if rule.basis == basis)


class Coordinates(nn.Module):
    """Gathers the coordinates of every probe group, as far as its largest subset goes.

    Orders and bases that are fitted to the training split are filled in by `fit` and saved in checkpoints; seeded ones
    are drawn again. `widths` are D of each layer, in the order in which features hold them.
    """

    rows: Tensor

    def __init__(self, probes: Sequence[Probe], widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = widths
        self.groups = [group for alike in probe_groups(probes) for group in alike]
        # Where each space starts among the rows of `spaces`: the layers' neurons first, then the bases.
        self._starts: dict[tuple[str, str | None, int], int] = {}
        end = 0
        for layer, width in widths.items():
            self._starts[layer, None, 0] = end
            end += width
        for group in self.groups:
            if self._space(group) not in self._starts:
                self._starts[self._space(group)] = end
                end += widths[group.layer]
        self._bases = [(layer, basis, seed) for layer, basis, seed in self._starts if basis is not None]
        for place, (layer, basis, _) in enumerate(self._bases):
            fitted = _is_fitted(basis)
            self.register_buffer(f"matrix_{place}", torch.zeros(widths[layer], widths[layer]), persistent=fitted)
            self.register_buffer(f"centre_{place}", torch.zeros(widths[layer]), persistent=fitted)
        ends = list(itertools.accumulate(group.sizes[-1] for group in self.groups))
        self._slices = {
            group[:3]: slice(end - group.sizes[-1], end) for group, end in zip(self.groups, ends, strict=True)
        }
        self.register_buffer("rows", torch.zeros(ends[-1], dtype=torch.int64))
        self._fill({layer: Layer(width) for layer, width in widths.items()}, fitted=False)

    @property
    def fitted(self) -> bool:
        """Whether any selection is fitted to the training split."""
        return any(SELECTIONS[group.selection].fitted for group in self.groups)

    def fit(self, moments: Mapping[str, Moments]) -> None:
        """Compute the orders and bases that are fitted to the training split, from the moments of each layer."""
        self._fill({layer: Layer(width, moments[layer]) for layer, width in self.widths.items()}, fitted=True)

    def forward(self, features: Tensor) -> Tensor:
        """Return the coordinates of all groups, shape (R, B), of features of shape (B, sum of widths).

        The groups come in the order of `groups`, each with as many rows as its largest subset has coordinates.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self.spaces(features).index_select(0, self.rows)

    def spaces(self, features: Tensor) -> Tensor:
        """Return all neurons and then the coordinates of every basis, shape (M, B)."""
        columns = features.new_empty(features.shape[::-1])
        columns.t().copy_(features)  # in half the time of `contiguous`
        spaces, layers = [columns], self.by_layer(features)
        for place, (layer, *_) in enumerate(self._bases):
            matrix, centre = (getattr(self, f"{part}_{place}").to(columns.dtype) for part in ("matrix", "centre"))
            spaces.append(matrix.t() @ (layers[layer].t() - centre.unsqueeze(1)))
        return torch.cat(spaces) if len(spaces) > 1 else columns

    def rows_of(self, groups: Sequence[ProbeGroup]) -> Tensor:
        """Return which rows of `spaces` some groups see, one after the other; they may have fewer probes than here."""
        return torch.cat([self.rows[self._slices[group[:3]]][: group.sizes[-1]] for group in groups])

    def of_layer(self, layer: str) -> list[ProbeGroup]:
        """Return the probe groups of a layer."""
        return [group for group in self.groups if group.layer == layer]

    def by_layer(self, features: Tensor) -> dict[str, Tensor]:
        """Split features, shape (B, sum of widths), into those of each layer, shape (B, D)."""
        return dict(zip(self.widths, features.split(list(self.widths.values()), dim=1), strict=True))

    def ordering(self, group: ProbeGroup) -> Ordering:
        """Return a group's order, sizes and basis as statistics take them; the basis is float64 and not centred."""
        matrix, _ = self._basis(group) or (None, None)
        order = self.rows[self._slices[group[:3]]] - self._starts[self._space(group)]
        return Ordering(order, group.sizes, None if matrix is None else matrix.double())

    def centre(self, group: ProbeGroup) -> Tensor:
        """Return the coordinates of the point that a group's basis is centred on, in the group's order, float64."""
        basis = self._basis(group)
        if basis is None:
            return torch.zeros(group.sizes[-1], dtype=torch.float64, device=self.rows.device)
        return self.ordering(group).coordinates(basis[1].double().unsqueeze(0)).squeeze(0)

    def subset(self, index: int) -> Tensor:
        """Return the coordinates that a probe sees, shape (k,), as places in its layer or basis."""
        group = self._group_of(index)
        return self.ordering(group).order[: group.sizes[group.probes.index(index)]]

    def basis(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return the matrix, shape (D, D), and centre, shape (D,), of the basis a probe sees; None for neurons."""
        return self._basis(self._group_of(index))

    def masks(self) -> Tensor:
        """Return which of `spaces` each probe sees, shape (P, M), boolean."""
        count = sum(len(group.probes) for group in self.groups)
        end = max(start + self.widths[layer] for (layer, *_), start in self._starts.items())
        masks = torch.zeros(count, end, dtype=torch.bool, device=self.rows.device)
        for group in self.groups:
            rows = self.rows[self._slices[group[:3]]]
            for index, size in zip(group.probes, group.sizes, strict=True):
                masks[index, rows[:size]] = True
        return masks

    def _group_of(self, index: int) -> ProbeGroup:
        return next(group for group in self.groups if index in group.probes)

    def _basis(self, group: ProbeGroup) -> tuple[Tensor, Tensor] | None:
        """Return the matrix, shape (D, D), and centre, shape (D,), of a group's basis; None for neurons."""
        space = self._space(group)
        if space not in self._bases:
            return None
        place = self._bases.index(space)
        return getattr(self, f"matrix_{place}"), getattr(self, f"centre_{place}")

    def _space(self, group: ProbeGroup) -> tuple[str, str | None, int]:
        """Return layer, basis and seed of the space a group picks from; bases without a seed serve several groups."""
        rule = SELECTIONS[group.selection]
        return group.layer, rule.basis, group.seed if rule.basis and rule.seeded else 0

    def _fill(self, layers: dict[str, Layer], fitted: bool) -> None:
        for place, (layer, name, seed) in enumerate(self._bases):
            if fitted == _is_fitted(name):
                basis = BASES[name](layers[layer], seed)
                getattr(self, f"matrix_{place}").copy_(basis.matrix)
                getattr(self, f"centre_{place}").copy_(basis.centre)
        for group in self.groups:
            if SELECTIONS[group.selection].fitted == fitted:
                ordered = order(group.selection, layers[group.layer], group.seed)
                self.rows[self._slices[group[:3]]] = ordered[: group.sizes[-1]] + self._starts[self._space(group)]
