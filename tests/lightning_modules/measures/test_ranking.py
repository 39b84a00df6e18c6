"""What is measured of rankings is what trec_eval measures, ties included."""

import math

import numpy as np
import pytest
import torch
from evaluation import evaluate, quantised

from datamodules.targets import Judgements, Relevance
from lightning_modules.features.moments import Moments
from lightning_modules.measures import Ranking
from lightning_modules.probes import Search
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Plan

IDENTIFIERS = [f"d{number}" for number in range(60)]  # as bytes, d9 comes after d10


def ranked(similarities, names):
    return sorted(names, key=lambda name: (np.float32(similarities[name]), name.encode()), reverse=True)


def trec_eval(similarities, grades):
    """What trec_eval says of one query, from similarities and grades by document."""
    ranking = ranked(similarities, similarities)
    relevant = [name for name, grade in grades.items() if grade > 0]

    def discounted(gains):
        return sum(max(0, gain) / math.log2(rank + 2) for rank, gain in enumerate(gains[:10]))

    def recall(depth):
        return len(set(ranking[:depth]) & set(relevant)) / len(relevant)

    precisions, ranks = [], []
    for rank, name in enumerate(ranking[:100], start=1):
        if name in relevant:
            ranks.append(rank)
            precisions.append(len(ranks) / rank)
    if not relevant:
        return dict.fromkeys(("ndcg@10", "recall@10", "recall@100", "map@100", "mrr@10"), 0)
    return {
        "ndcg@10": discounted([grades.get(name, 0) for name in ranking]) / discounted(sorted(grades.values())[::-1]),
        "recall@10": recall(10),
        "recall@100": recall(100),
        "map@100": sum(precisions) / len(relevant),
        "mrr@10": 1 / ranks[0] if ranks and ranks[0] <= 10 else 0,
    }


def similarity(query, document, kind):
    if kind == "l2":
        return -np.square(query - document).sum()
    lengths = np.linalg.norm(query) * np.linalg.norm(document) if kind == "cosine" else 1
    return query @ document / lengths if lengths else 0.0


@pytest.mark.parametrize("kind", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("documents", [60, 7])
def test_every_metric_of_every_subset_is_trec_evals_ties_included(monkeypatch, kind, documents):
    monkeypatch.setattr("lightning_modules.measures.ranking.QUERIES", 8)  # several parts, the last of them smaller
    monkeypatch.setattr("lightning_modules.measures.ranking.DOCUMENTS", 25)
    random = np.random.default_rng(0)
    corpus = random.integers(-1, 2, (documents, 12)).astype(np.float32)  # many documents are equally similar
    queries = random.integers(-1, 2, (20, 12)).astype(np.float32)
    grades = random.integers(-1, 4, (20, 5))
    grades[3] = 0  # a query without a relevant document
    judged = np.stack([random.permutation(documents)[:5] for _ in range(20)])
    judged[:4, -1], grades[:4, -1] = -1, 0  # queries of which fewer were judged
    barred = np.where(np.arange(20) % 3, -1, judged[:, 0])
    judgements = Judgements(*map(torch.tensor, (judged, grades, barred)))
    probes = Plan(["random", "first"], [0.1, 0.5, 0.9], 2).probes({"none": 12})
    found = evaluate(
        Ranking(),
        probes,
        torch.zeros(20, dtype=torch.int64),
        inputs=torch.from_numpy(queries),
        widths={"none": 12},
        target=Relevance(IDENTIFIERS[:documents], {"test": judgements}),
        solver=Search(kind),
        features=lambda split, start, stop: torch.from_numpy(corpus)[start:stop],
    )
    assert found["images"].tolist() == [20] * len(probes)
    for index, probe in enumerate(probes):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(probe.seed)).tolist()
        seen = (order if probe.selection == "random" else list(range(12)))[: probe.neurons]
        wanted = []
        for query, names, of_query, out in zip(queries, judged, grades, barred, strict=True):
            alike, exact = (
                {
                    name: similarity(query[its].astype(float), document[its].astype(float), kind)
                    for place, (name, document) in enumerate(zip(IDENTIFIERS, corpus, strict=False))
                    if place != out
                }
                for its in (seen, order)
            )
            of_query = dict(zip(names.tolist(), of_query.tolist(), strict=True))
            of_query = {IDENTIFIERS[name]: grade for name, grade in of_query.items() if name >= 0}
            wanted.append(trec_eval(alike, of_query))
            for best in (10, 20, 40, 100):  # of those that are taken, the second stage alone says in which order
                taken = ranked(alike, alike)[:best]
                again = trec_eval({name: exact[name] for name in taken}, of_query)
                wanted[-1][f"ndcg@10_rescored_{best}"] = again["ndcg@10"]
        for name in wanted[0]:
            assert found[name][index].item() == pytest.approx(np.mean([each[name] for each in wanted]), abs=1e-9)
        assert found["per_image"][index].tolist() == pytest.approx([each["ndcg@10"] for each in wanted], abs=1e-6)


def test_documents_in_one_direction_are_ties_wherever_they_lie(monkeypatch):
    monkeypatch.setattr("lightning_modules.measures.ranking.DOCUMENTS", 67)  # other products are in another order
    queries = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    corpus = queries[:1] * 2.0 ** (torch.arange(101) % 5).unsqueeze(1)
    judged = Judgements(torch.full((3, 1), 40), torch.ones(3, 1), torch.full((3,), -1))
    names = [f"{(place + 60) % 101:03d}" for place in range(101)]  # that at 40 is the last
    found = evaluate(
        Ranking(),
        Plan("random", 0.5, 3).probes({"none": 384}),
        torch.zeros(3, dtype=torch.int64),
        inputs=queries,
        widths={"none": 384},
        target=Relevance(names, {"test": judged}),
        solver=Search(),
        features=lambda split, start, stop: corpus[start:stop],
    )
    assert found["mrr@10"].tolist() == [1] * 4


def test_in_few_bits_the_levels_are_searched():
    random = np.random.default_rng(0)
    corpus, queries = (random.normal(size=(count, 12)).astype(np.float32) for count in (60, 20))
    judged = np.stack([random.permutation(60)[:8] for _ in range(20)])
    target = Relevance(
        IDENTIFIERS, {"test": Judgements(torch.tensor(judged), torch.ones(20, 8).long(), torch.full((20,), -1))}
    )
    probes = Plan("random", 0.5, 1, bits=2).probes({"none": 12})
    coordinates, moments = Coordinates(probes, {"none": 12}), Moments(12, 1)
    moments.update(torch.from_numpy(corpus), torch.zeros(60, dtype=torch.int64))
    coordinates.fit({"none": moments})

    def search(stored, sought, which, **changes):
        known = {"widths": {"none": 12}, "target": target, "solver": Search("cosine")} | changes
        vectors = torch.from_numpy(stored)
        known["features"] = lambda split, start, stop: vectors[start:stop]
        labels = torch.zeros(20, dtype=torch.int64)
        return evaluate(Ranking(), which, labels, inputs=torch.from_numpy(sought), **known)["ndcg@10"]

    exact, _, all_in_few = search(corpus, queries, probes, coordinates=coordinates).tolist()
    few = search(quantised(corpus, corpus, 2), quantised(queries, corpus, 2), probes[:1])
    assert all_in_few == pytest.approx(few.item(), abs=1e-9)
    assert all_in_few != exact
    one_sided = Search("cosine", quantised="stored")  # queries as they are
    documents_in_few = search(corpus, queries, probes, coordinates=coordinates, solver=one_sided)[-1].item()
    few = search(quantised(corpus, corpus, 2), queries, probes[:1])
    assert documents_in_few == pytest.approx(few.item(), abs=1e-9)
    assert documents_in_few not in (exact, all_in_few)
