"""Ranking: how well exact search on every subset finds the relevant documents of each query."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_modules.measures.measure import Batch, Measure
from lightning_modules.measures.similarities import similarities
from lightning_modules.progress import Progress
from lightning_modules.results.tables import PER_IMAGE, Column

DEPTH = 100  # documents of a ranking that are looked at
QUERIES, DOCUMENTS = 512, 8192  # of which similarities are computed at once
COORDINATES = 2**24  # of documents that are held at once
NOTHING = -0x7F800001 << 32  # a key below all others: that of minus infinity


class Ranking(Measure):
    """nDCG@10, recall@10 and @100, MAP@100 and MRR@10 of exact search, as trec_eval computes them.

    Means over queries. Similarities are computed in float64 and rounded to float32; of equal ones the document whose id
    is last as bytes goes first. Costs 2 n m D operations for n queries and m documents for every seed of every
    selection, and memory for the best documents alone.
    """

    columns = (
        Column("ndcg@10", "nDCG@10", logged=True),
        Column("recall@10", "recall@10", logged=True),
        Column("recall@100", "recall@100", logged=True, drawn=True),
        Column("map@100", "MAP@100"),
        Column("mrr@10", "MRR@10"),
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
        judged = self.context.target.judged[self.split]
        inputs, places = (torch.cat(parts) for parts in zip(*self.queries, strict=True))
        found = self._search(inputs)
        documents, grades, barred = (each.to(found.device)[places] for each in judged)
        found = found.masked_fill(found == barred.unsqueeze(1), -1)
        found = found.gather(2, (found < 0).byte().argsort(dim=2, stable=True))[..., :DEPTH]
        names = [column.name for column in self.columns[:5]]
        values = torch.zeros(len(names), len(found), len(judged.grades), dtype=torch.float64, device=found.device)
        for probe, of_probe in enumerate(found):
            parts = (each.split(QUERIES) for each in (of_probe, documents, grades))
            of_queries = [ranking_metrics(*part) for part in zip(*parts, strict=True)]
            for place, name in enumerate(names):
                values[place, probe, places] = torch.cat([each[name] for each in of_queries])
        values = self.context.reduce(values)  # each process has zeros where others have queries
        means = values.mean(2)
        return {
            "images": torch.full((len(found),), values.shape[2]),
            "loss": torch.full((len(found),), torch.nan),  # there is none
            **dict(zip(names, means, strict=True)),
            PER_IMAGE: values[0].float(),
        }

    def _search(self, queries: Tensor) -> Tensor:
        """Return the best documents of every probe, best first, shape (P, n, depth), for queries (n, sum of widths).

        One pass over the corpus, in blocks, for all probes. A document is kept as one whole number, its similarity as
        the higher 32 bits and its place among the ids as the lower ones, so that no two are equal.
        """
        coordinates, groups = self.context.coordinates, self.context.coordinates.groups
        ties = self.context.target.ties.to(queries.device)
        shape = len(self.context.probes), len(queries), min(DEPTH + 1, len(ties))  # one may be barred
        best = torch.full(shape, NOTHING, device=queries.device)
        sizes = [group.sizes[-1] for group in groups]

        def seen(features: Tensor) -> list[Tensor]:
            """Return what the largest probe of each group sees, shape (B, k)."""
            return [part.t() for part in coordinates(features.double()).split(sizes)]

        asked = [part.split(QUERIES) for part in seen(queries)]
        block = max(1, min(DOCUMENTS, COORDINATES // sum(sizes)))
        starts, shown = range(0, len(ties), block), rank_zero_only.rank == 0  # type: ignore[attr-defined]
        for start in Progress(len(starts), "Searching", "block", shown, iterable=starts):
            features = self.context.features("train", start, start + block)
            assert features is not None  # as features are clean
            places = ties[start : start + block]
            for group, parts, stored in zip(groups, asked, seen(features), strict=True):
                for number, part in enumerate(parts):
                    rows = slice(number * QUERIES, (number + 1) * QUERIES)
                    alike = similarities(part, stored, group.sizes, self.context.solver.similarity)
                    for probe, values in zip(group.probes, alike, strict=True):
                        best[probe, rows] = _better(best[probe, rows], values.float(), places)
        return ties.argsort()[best & 0xFFFFFFFF]


def _as_keys(values: Tensor) -> Tensor:
    """Return whole numbers that are ordered as float32 values are, times 2^32."""
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32


def _as_values(keys: Tensor) -> Tensor:
    """Return the float32 values that keys begin with."""
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)


def _better(best: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Return the best keys of each query, descending, shape (n, depth), after more documents.

    Few of these are as good as the worst that is kept, so that no others become keys.

    Args:
        best: Those before, descending, shape (n, depth).
        values: Similarities of the documents, float32, shape (n, m).
        places: Of the documents among the ids, shape (m,).
    """
    good = values >= _as_values(best[:, -1:])
    rows, columns = good.nonzero(as_tuple=True)
    counts = good.sum(1)
    more = best.new_full((len(best), int(counts.max())), NOTHING)
    more[rows, torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]] = (
        _as_keys(values[good]) + places[columns]
    )
    return torch.cat([best, more], 1).topk(best.shape[1]).values


def ranking_metrics(found: Tensor, documents: Tensor, grades: Tensor) -> dict[str, Tensor]:
    """Return what trec_eval measures of rankings, for each of n queries, float64, shape (n,).

    A gain is a grade over log2 of 1 + rank; a document is relevant from grade 1 on. Where none is, all are 0.

    Args:
        found: Documents, best first, shape (n, depth).
        documents: Those that were judged, no two alike in a row but for -1, shape (n, J).
        grades: What they were judged to be, 0 for -1, shape (n, J).
    """
    gains = torch.where(found.unsqueeze(2) == documents.unsqueeze(1), grades.unsqueeze(1), 0).sum(2).clamp(min=0)
    ideal, _ = grades.clamp(min=0).sort(descending=True)
    hits, relevant = (gains > 0).double(), (grades > 0).sum(1).clamp(min=1)
    ranks = torch.arange(1, found.shape[1] + 1, device=found.device, dtype=torch.float64)

    def discounted(gains: Tensor) -> Tensor:
        first = gains[:, :10].double()
        return (first / (torch.arange(first.shape[1], device=found.device, dtype=torch.float64) + 2).log2()).sum(1)

    best = discounted(ideal)
    return {
        "ndcg@10": discounted(gains) / best.masked_fill(best == 0, 1),
        "recall@10": hits[:, :10].sum(1) / relevant,
        "recall@100": hits[:, :100].sum(1) / relevant,
        "map@100": (hits * hits.cumsum(1) / ranks)[:, :100].sum(1) / relevant,
        "mrr@10": (hits / ranks)[:, :10].amax(1),
    }
