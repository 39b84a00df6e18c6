"""Ranking: how well exact search on every subset finds the relevant documents of each query, in one stage and two."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_modules.measures.measure import Batch, Measure, Picture
from lightning_modules.measures.similarities import similarities
from lightning_modules.progress import Progress
from lightning_modules.results.results import Results
from lightning_modules.results.tables import PER_IMAGE, Column
from lightning_modules.subsets.selections import FULL

METRICS = {
    "ndcg@10": "nDCG@10",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
    "map@100": "MAP@100",
    "mrr@10": "MRR@10",
}
RESCORED = {f"ndcg@10_rescored_{best}": best for best in (10, 20, 40, 100)}
"""Columns of two stages, and how many documents of the first are ranked again."""
DEPTH = 100  # documents of a ranking that are looked at
QUERIES, DOCUMENTS = 512, 8192  # of which similarities are computed at once
COORDINATES = 2**24  # of documents that are held at once
NOTHING = -0x7F800001 << 32  # a key below all others: that of minus infinity


class Ranking(Measure):
    """nDCG@10, recall@10 and @100, MAP@100 and MRR@10 of exact search, as trec_eval computes them, means over queries.

    And nDCG@10 of two stages: the best 10, 20, 40 or 100 documents that a subset finds are ranked again by the full
    layer. Similarities are computed in float64 and rounded to float32; of equal ones the document whose id is last as
    bytes goes first. Costs 2 n m D operations for n queries and m documents for every seed of every selection, and
    memory for the best documents alone.
    """

    columns = (
        *(Column(name, label, logged=True, drawn=name == "recall@100") for name, label in METRICS.items()),
        *(Column(name, f"nDCG@10, {best} rescored") for name, best in RESCORED.items()),
        *map(Column, ("images", "loss")),
    )
    needs_clean_features = True
    queries: list[tuple[Tensor, Tensor]]

    def reset(self) -> None:
        """Forget the queries."""
        super().reset()
        self.queries = []

    def update(self, batch: Batch) -> None:
        """Note this process' share of the queries."""
        self.queries.append((batch.inputs, batch.indices))

    def compute(self) -> Mapping[str, Tensor]:
        """Return the columns, and the nDCG@10 of each query by every probe, shape (P, n); `images` are queries."""
        inputs, places = (torch.cat(parts) for parts in zip(*self.queries, strict=True))
        keys, names = self._search(inputs), [*METRICS, *RESCORED]
        total = int(self.context.reduce(torch.tensor(len(places), device=keys.device)))
        values = torch.zeros(len(names), keys.shape[1], total, dtype=torch.float64, device=keys.device)
        for probe, of_probe in enumerate(keys.unbind(1)):
            for queries, rows in zip(places.split(QUERIES), of_probe.split(QUERIES, 1), strict=True):
                measured = self._measured(rows, queries)
                values[:, probe, queries] = torch.stack([measured[name] for name in names])
        values = self.context.reduce(values)  # each process has zeros where others have queries
        return {
            "images": torch.full((keys.shape[1],), total),
            "loss": torch.full((keys.shape[1],), torch.nan),  # there is none
            **dict(zip(names, values.mean(2), strict=True)),
            PER_IMAGE: values[0].float(),
        }

    def _measured(self, keys: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Return the metrics of a probe for n queries of the split, from their keys, (2, n, depth) as of `_search`."""
        target = self.context.target
        by_tie = target.ties.argsort().to(keys.device)

        def named(keys: Tensor) -> Tensor:
            return by_tie[keys & 0xFFFFFFFF].masked_fill(keys == NOTHING, -1)

        def measured(keys: Tensor) -> dict[str, Tensor]:
            return ranking_metrics(*target.relevance(self.split, queries, named(keys)))

        first, full = keys.masked_fill(named(keys) == target.barred(self.split, queries).unsqueeze(1), NOTHING)
        order = first.argsort(1, descending=True)[:, :DEPTH]  # without the one that was barred, if it was found
        first, full = first.gather(1, order), full.gather(1, order)
        again = {name: measured(full[:, :best].sort(descending=True).values) for name, best in RESCORED.items()}
        return measured(first) | {name: each["ndcg@10"] for name, each in again.items()}

    def _search(self, queries: Tensor) -> Tensor:
        """Return the best documents of every probe, shape (2, P, n, depth), for queries, shape (n, sum of widths).

        One pass over the corpus, in blocks, for all probes. A document is kept as a key, one whole number: its
        similarity as the higher 32 bits and its place among the ids as the lower ones, so that no two are equal. First
        by the subset, best first, and then the same documents by the full layer.
        """
        coordinates, groups = self.context.coordinates, self.context.coordinates.groups
        ties = self.context.target.ties.to(queries.device)
        shape = 2, len(self.context.probes), len(queries), min(DEPTH + 1, len(ties))  # one may be barred
        best = torch.full(shape, NOTHING, device=queries.device)
        sizes = [group.sizes[-1] for group in groups]

        def seen(features: Tensor, quantised: bool) -> list[Tensor]:
            """Return what the largest probe of each group sees, shape (B, k)."""
            return [part.t() for part in coordinates(features.double(), quantised).split(sizes)]

        asked = seen(queries, self.context.solver.quantised == "both")
        block = max(1, min(DOCUMENTS, COORDINATES // sum(sizes)))
        starts, shown = range(0, len(ties), block), rank_zero_only.rank == 0  # type: ignore[attr-defined]
        for start in Progress(len(starts), "Searching", "block", shown, iterable=starts):
            features = self.context.features("train", start, start + block)
            assert features is not None  # as features are clean
            places, stored = ties[start : start + block], seen(features, True)
            for rows in (slice(first, first + QUERIES) for first in range(0, len(queries), QUERIES)):
                full: dict[str, Tensor] = {}  # similarities by layer; its group comes first
                for group, mine, theirs in zip(groups, asked, stored, strict=True):
                    alike = similarities(mine[rows], theirs, group.sizes, self.context.solver.similarity)
                    for probe, values in zip(group.probes, (each.float() for each in alike), strict=True):
                        if group.selection == FULL:
                            full[group.layer] = values
                        best[:, probe, rows] = _better(best[:, probe, rows], values, full[group.layer], places)
        return best

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw nDCG@10 of one stage and of two against the bytes that are searched, a panel per layer and selection."""
        from lightning_modules.reporting import figures

        means, headline = results.curve(split), results.headline
        groups = list(means[means["selection"] != FULL].groupby(["layer", "selection"], sort=False))
        lines = {"mean": "one stage"} | {name: f"best {best} ranked again" for name, best in RESCORED.items()}
        figure, flat = figures.panels(len(groups), results.title)
        for axes, ((layer, selection), points) in zip(flat, groups, strict=True):
            points = points.assign(saved=-points["bytes"])
            for (column, label), style in zip(lines.items(), figures.styles(lines).values(), strict=True):
                best = figures.pareto_frontier(points, "saved", column)  # over subsets and bits
                figures.line(axes, best, style, label, column, x="bytes", scale=headline.scale)
            figures.logarithmic_axis(axes, points["bytes"], "bytes of a vector that is searched")
            several = len(results.layers) > 1
            figures.value_axis(axes, f"{split} {headline.heading}", f"{layer} {selection}" if several else selection)
        figures.legend(figure, flat)
        caption = "Search in two stages: the best documents by what is searched are ranked again by the full layer. "
        return {"rescored": Picture(figure, f"{caption}Stores that another of no more bytes beats are left out.")}


def _as_keys(values: Tensor) -> Tensor:
    """Return whole numbers that are ordered as float32 values are, times 2^32."""
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32


def _as_values(keys: Tensor) -> Tensor:
    """Return the float32 values that keys begin with."""
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)


def _better(best: Tensor, values: Tensor, full: Tensor, places: Tensor) -> Tensor:
    """Return the best keys of each query after more documents, those of the subset descending, shape (2, n, depth).

    Few of these are as good as the worst that is kept, so that no others become keys.

    Args:
        best: Those before, of the subset and of the full layer, shape (2, n, depth).
        values: Similarities of the documents, float32, shape (n, m).
        full: The same by the full layer.
        places: Of the documents among the ids, shape (m,).
    """
    depth, worst = best.shape[2], best[0, :, -1:]
    least = _as_values(worst)
    if depth < values.shape[1] and (worst == NOTHING).any():  # where all would be good, as many as are kept
        least = torch.maximum(least, values.topk(depth).values[:, -1:])
    good = values >= least
    rows, columns = good.nonzero(as_tuple=True)
    counts = good.sum(1)
    more = best.new_full((*best.shape[:2], int(counts.max())), NOTHING)
    ranks = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    more[:, rows, ranks] = _as_keys(torch.stack([values[rows, columns], full[rows, columns]])) + places[columns]
    joined = torch.cat([best, more], 2)
    return joined.gather(2, joined[0].topk(depth).indices.expand(2, -1, -1))


def ranking_metrics(gains: Tensor, ideal: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """Return what trec_eval measures of rankings, for each of n queries, float64, shape (n,).

    A gain counts over log2 of 1 + rank. Where nothing is relevant, all are 0.

    Args:
        gains: Of what was found, best first, 0 or more, shape (n, depth).
        ideal: The largest gains that there are, descending, shape (n, J).
        relevant: How many gains are 1 or more, shape (n,).
    """
    hits, relevant = (gains > 0).double(), relevant.clamp(min=1)
    ranks = torch.arange(1, gains.shape[1] + 1, device=gains.device, dtype=torch.float64)

    def discounted(gains: Tensor) -> Tensor:
        first = gains[:, :10].double()
        return (first / (torch.arange(first.shape[1], device=gains.device, dtype=torch.float64) + 2).log2()).sum(1)

    best = discounted(ideal)
    return {
        "ndcg@10": discounted(gains) / best.masked_fill(best == 0, 1),
        "recall@10": hits[:, :10].sum(1) / relevant,
        "recall@100": hits[:, :100].sum(1) / relevant,
        "map@100": (hits * hits.cumsum(1) / ranks)[:, :100].sum(1) / relevant,
        "mrr@10": (hits / ranks)[:, :10].amax(1),
    }
