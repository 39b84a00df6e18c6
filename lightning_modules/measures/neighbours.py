"""Nearest neighbours: how many of an image's are still its nearest on a subset of the neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.measures.measure import Batch, Measure, Picture
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.selections import FULL

if TYPE_CHECKING:
    from lightning_modules.results.results import Results

QUERIES = 512
"""Vectors whose neighbours are searched at once."""
COSINES = 10
"""Decimals of a cosine that count; what differs less is a tie."""


class Neighbours(Measure):
    """How many of a test image's nearest training images, by cosine, every subset finds: the table `neighbours`.

    Costs 2 n m D operations for n test and m training images for every seed of every selection.

    Args:
        neighbours: How many to look for.

    Raises:
        MisconfigurationException: If it is less than one.
    """

    table = "neighbours"
    needs_clean_features = True

    def __init__(self, neighbours: int = 10) -> None:
        super().__init__()
        if neighbours < 1:
            raise MisconfigurationException(f"Neighbours: neighbours is {neighbours}; it must be 1 or more.")
        self.neighbours = neighbours
        self.queries: list[Tensor] = []

    def reset(self) -> None:
        """Forget the queries."""
        super().reset()
        self.queries = []

    def update(self, batch: Batch) -> None:
        """Note this process' share of the queries; validation has none."""
        if self.split == "test":
            self.queries.append(batch.inputs)

    def compute(self) -> Mapping[str, pd.DataFrame]:
        """Return the table; none where the features of train are not kept."""
        gallery = self.context.features("train") if self.split == "test" else None
        if gallery is None:
            return {}
        coordinates, gallery = self.context.coordinates, gallery.to(self.context.device)
        queries = coordinates.by_layer(torch.cat([gallery[:0], *self.queries]))
        neighbours = min(self.neighbours, len(gallery))
        total = int(self.context.reduce(torch.tensor(sum(map(len, self.queries)), device=self.context.device)))
        rows = []
        for layer, stored in coordinates.by_layer(gallery).items():
            groups = coordinates.of_layer(layer)
            orderings = [coordinates.ordering(group) for group in groups]
            counts = neighbours_kept(queries[layer], stored, orderings, neighbours=neighbours)
            for group, of_group in zip(groups, counts, strict=True):
                for index, kept in zip(group.probes, self.context.reduce(of_group).tolist(), strict=True):
                    probe = self.context.probes[index]
                    keys = ("layer", "selection", "fraction", "neurons", "seed")
                    rows.append(
                        {
                            **{key: getattr(probe, key) for key in keys},
                            "split": self.split,
                            "queries": total,
                            "gallery": len(gallery),
                            "neighbours": neighbours,
                            "kept": kept / (neighbours * total),
                        }
                    )
        return {"neighbours": pd.DataFrame(rows)}

    def lines(self, rows: pd.DataFrame) -> dict[str, pd.Series]:
        """Return the share of neighbours kept, mean over seeds."""
        groups = rows[rows["selection"] != FULL].groupby(["layer", "selection", "fraction", "split"])
        return {"neighbours kept": groups["kept"].mean()}

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return nothing, as the picture says it all."""
        return {}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw the share of nearest neighbours that subsets keep against fraction."""
        from lightning_modules.reporting import figures

        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        figure, ((axes,),) = figures.grid(1, 1, results.title)
        rows = rows[rows["selection"] != FULL]
        several = rows["layer"].nunique() > 1
        rows = rows.assign(series=rows["layer"] + " " + rows["selection"] if several else rows["selection"])
        groups = rows.groupby(["series", "fraction"], sort=False)["kept"]
        kept = groups.agg(mean="mean", std=lambda values: values.std(ddof=0), seeds="size").reset_index()
        for series, style in figures.styles(kept["series"]).items():
            points = kept[kept["series"] == series].sort_values("fraction")
            figures.line(axes, points, "mean", "std", style, figures.seeds_label(series, points), scale=100)
        figures.fraction_axis(axes, kept)
        axes.set_ylabel(f"of the {rows['neighbours'].iloc[0]} nearest neighbours kept (%)")
        axes.set_ylim(0, 103)
        figures.legend(figure, axes)
        caption = "How many of an image's nearest neighbours are still its nearest, by cosine similarity."
        return {"neighbours": Picture(figure, caption)}


def neighbours_kept(
    queries: Tensor, gallery: Tensor, orderings: Sequence[Ordering], neighbours: int = 10
) -> list[Tensor]:
    """Count how many of the queries' nearest gallery vectors, by cosine on the full layer, subsets find too.

    The inner products of nested subsets add up, so that an ordering costs one product of the n queries with the m
    gallery vectors, 2 n m D operations in float64, and a search through n m cosines for each size. Ties go to the
    smaller index; a vector of zeros has cosine 0 with all.

    Args:
        queries: Shape (n, D).
        gallery: Shape (m, D), at least `neighbours`.
        orderings: The subsets.
        neighbours: How many are looked for.

    Returns:
        One int64 tensor per ordering, shape (sizes,): neighbours kept over all queries, of `neighbours` * n.
    """
    width = queries.shape[1]
    wanted = [next(_nearest(part, gallery, [width], neighbours)).unsqueeze(2) for part in queries.split(QUERIES)]
    results = []
    for ordering in orderings:
        stored, parts = ordering.coordinates(gallery), ordering.coordinates(queries).split(QUERIES)
        kept = torch.zeros(len(ordering.sizes), dtype=torch.int64, device=queries.device)
        for part, of_full in zip(parts, wanted, strict=True):
            for place, found in enumerate(_nearest(part, stored, ordering.sizes, neighbours)):
                kept[place] += (of_full == found.unsqueeze(1)).sum()
        results.append(kept)
    return results


def _nearest(queries: Tensor, gallery: Tensor, sizes: Sequence[int], neighbours: int) -> Iterator[Tensor]:
    """Yield the places of the nearest gallery vectors on the first k coordinates, for each k, shape (n, neighbours)."""
    products = torch.zeros(len(queries), len(gallery), dtype=torch.float64, device=queries.device)
    query_norms, gallery_norms = products.new_zeros(len(queries), 1), products.new_zeros(len(gallery))
    # Keys are whole numbers of which no two are equal, so that the choice among ties is the same everywhere.
    ties = torch.arange(len(gallery) - 1, -1, -1, device=queries.device)
    start = 0
    for size in sizes:
        rows, columns = queries[:, start:size].double(), gallery[:, start:size].double()
        products.addmm_(rows, columns.t())
        query_norms += rows.square().sum(1, keepdim=True)
        gallery_norms += columns.square().sum(1)
        start = size
        cosines = products / (query_norms * gallery_norms).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        keys = (cosines * 10**COSINES).round().long() * len(gallery) + ties
        yield keys.topk(neighbours, dim=1).indices
