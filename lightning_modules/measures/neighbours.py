"""Nearest neighbours: how many of an image's are still its nearest on a subset of the neurons."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.measures.measure import Batch, Measure, Picture
from lightning_modules.measures.similarities import similarities
from lightning_modules.results.curves import curve
from lightning_modules.results.results import Results
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.selections import FULL

QUERIES = 512  # vectors whose neighbours are searched at once
DECIMALS = 10  # of a cosine that count; what differs less is a tie
COLUMNS = ["layer", "selection", "fraction", "neurons", "seed", "split", "queries", "gallery", "neighbours", "kept"]


class Neighbours(Measure):
    """How many of a test image's nearest training images, by cosine, every subset finds: the table `neighbours`.

    Costs 2 n m D operations for n test and m training images for every seed of every selection.

    Args:
        neighbours: How many to look for; fewer than 1 is a MisconfigurationException.
    """

    table = "neighbours"
    needs_clean_features = True
    queries: list[Tensor]

    def __init__(self, neighbours: int = 10) -> None:
        super().__init__()
        if neighbours < 1:
            raise MisconfigurationException(f"Neighbours: neighbours is {neighbours}; it must be 1 or more.")
        self.neighbours = neighbours

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
            counts = neighbours_kept(queries[layer], stored, orderings, neighbours)
            for group, of_group in zip(groups, counts, strict=True):
                for index, kept in zip(group.probes, self.context.reduce(of_group).tolist(), strict=True):
                    rows.append(self.context.probes[index]._asdict() | {"kept": kept / (neighbours * total)})
        table = pd.DataFrame(rows).assign(split=self.split, queries=total, gallery=len(gallery), neighbours=neighbours)
        return {"neighbours": table[COLUMNS]}

    def shown(self, results: Results, split: str) -> dict[str, pd.DataFrame]:
        """Return nothing, as the picture says it all."""
        return {}

    def lines(self, rows: pd.DataFrame) -> dict[str, pd.Series]:
        """Return the share of neighbours kept, mean over seeds."""
        groups = rows[rows["selection"] != FULL].groupby(["layer", "selection", "fraction", "split"])
        return {"neighbours kept": groups["kept"].mean()}

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw the share of nearest neighbours that subsets keep against fraction."""
        from lightning_modules.reporting import figures

        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        kept = curve(rows[rows["selection"] != FULL], split, "kept")
        several = kept["layer"].nunique() > 1
        series = kept["layer"] + " " + kept["selection"] if several else kept["selection"]
        styles = figures.styles(series)
        figure, ((axes,),) = figures.grid(1, 1, results.title)
        for name, points in kept.groupby(series, sort=False):
            figures.line(axes, points, styles[name], figures.seeds_label(name, points), "mean", "std", scale=100)
        figures.fraction_axis(axes, kept)
        axes.set_ylabel(f"of the {rows['neighbours'].iloc[0]} nearest neighbours kept (%)")
        axes.set_ylim(0, 103)
        figures.legend(figure, [axes])
        caption = "How many of an image's nearest neighbours are still its nearest, by cosine similarity."
        return {"neighbours": Picture(figure, caption)}


def neighbours_kept(queries: Tensor, gallery: Tensor, orderings: Sequence[Ordering], neighbours: int) -> list[Tensor]:
    """Count how many of the queries' nearest gallery vectors, by cosine on the full layer, subsets find too.

    The inner products of nested subsets add up, so that an ordering costs one product of the queries, shape (n, D),
    with the gallery, shape (m, D), 2 n m D operations in float64, and a search through n m cosines for each size. Ties
    go to the smaller index; a vector of zeros has cosine 0 with all.

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
            for index, found in enumerate(_nearest(part, stored, ordering.sizes, neighbours)):
                kept[index] += (of_full == found.unsqueeze(1)).sum()
        results.append(kept)
    return results


def _nearest(queries: Tensor, gallery: Tensor, sizes: Sequence[int], neighbours: int) -> Iterator[Tensor]:
    """Yield the nearest gallery vectors' indices on the first k coordinates, for each k, shape (n, neighbours)."""
    # Keys are whole numbers of which no two are equal, so that the choice among ties is the same everywhere.
    ties = torch.arange(len(gallery) - 1, -1, -1, device=queries.device)
    for cosines in similarities(queries.double(), gallery.double(), sizes, "cosine"):
        keys = (cosines * 10**DECIMALS).round().long() * len(gallery) + ties
        yield keys.topk(neighbours, dim=1).indices
