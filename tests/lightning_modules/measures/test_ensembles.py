import numpy as np
import pytest
import torch
from evaluation import evaluate, random_logits

from lightning_modules.measures import Ensembles
from lightning_modules.subsets.plan import Plan
from lightning_modules.subsets.selections import Layer
from lightning_modules.subsets.selections import random as at_random

FRACTIONS = [0.1, 0.4, 0.9]
PROBES = Plan(["random", "first"], FRACTIONS, 3).probes({"penultimate": 40}, together=True)
LABELS = torch.randint(5, (150,), generator=torch.Generator().manual_seed(1))


def test_ensembles_are_counted_as_numpy_counts_them():
    logits = random_logits(PROBES, 5, LABELS)
    (table,) = evaluate(Ensembles(), PROBES, LABELS, logits=logits, fractions=FRACTIONS).values()
    assert len(table) == 3 * len(FRACTIONS)  # none of `first`, which is not seeded
    right = (logits.argmax(1) == LABELS).numpy()
    for fraction in FRACTIONS:
        rows = table[table["fraction"] == fraction].set_index("rule")
        members = [i for i, p in enumerate(PROBES) if (p.selection, p.fraction) == ("random", fraction)]
        of_members = logits[members].double().numpy()
        mean = (np.exp(of_members) / np.exp(of_members).sum(1, keepdims=True)).mean(0)
        votes = np.eye(5)[of_members.argmax(1)].sum(0).T
        voted = np.where(votes == votes.max(0), mean, -1).argmax(0)
        assert rows.loc["mean_probability", "accuracy"] == (mean.argmax(0) == LABELS.numpy()).mean()
        assert rows.loc["mean_logit", "accuracy"] == (of_members.mean(0).argmax(0) == LABELS.numpy()).mean()
        assert rows.loc["majority_vote", "accuracy"] == (voted == LABELS.numpy()).mean()
        together = len(set(torch.cat([at_random(Layer(40), seed)[: int(40 * fraction)] for seed in range(3)]).tolist()))
        alike = [i for i, p in enumerate(PROBES) if (p.selection, p.neurons) == ("random", together)] or [0]
        row = rows.loc["mean_probability"]
        assert (row["members"], row["neurons"], row["single_neurons"]) == (3, together, PROBES[alike[0]].neurons)
        assert row["single_accuracy"] == np.mean(right[alike].mean(1))
    assert table["single_neurons"].iloc[-1] == 40  # the subsets of nine tenths hold all neurons together


def test_estimates_that_are_probabilities_already_are_averaged_as_they_are():
    from types import SimpleNamespace

    logits = 9 * random_logits(PROBES, 5, LABELS)
    linear = SimpleNamespace(probabilities=lambda logits: logits)
    (table,) = evaluate(Ensembles(), PROBES, LABELS, logits=logits, fractions=FRACTIONS, solver=linear).values()
    members = [i for i, p in enumerate(PROBES) if (p.selection, p.fraction) == ("random", 0.1)]
    expected = (logits[members].double().mean(0).argmax(0) == LABELS).double().mean()
    assert table.iloc[0]["accuracy"] == expected.item()


def test_an_ensemble_and_the_probe_beside_it_have_the_same_bits():
    probes = Plan("random", [0.4, 0.9], 3, bits=[32, 2]).probes({"penultimate": 40}, together=True)
    logits = random_logits(probes, 5, LABELS)
    (table,) = evaluate(Ensembles(), probes, LABELS, logits=logits, fractions=[0.4, 0.9]).values()
    right = (logits.argmax(1) == LABELS).double().mean(1)
    assert table["bits"].tolist() == [32] * 6 + [2] * 6
    for row in table[table["rule"] == "mean_logit"].itertuples():
        alike = [i for i, p in enumerate(probes) if (p.bits, p.neurons) == (row.bits, row.single_neurons)]
        assert row.single_accuracy == pytest.approx(right[alike].mean().item())
        members = [i for i, p in enumerate(probes) if (p.bits, p.fraction) == (row.bits, row.fraction)]
        assert row.accuracy == (logits[members].mean(0).argmax(0) == LABELS).double().mean().item()


def test_where_nothing_differs_by_the_seed_alone_there_are_none():
    assert evaluate(Ensembles(), Plan("first", 0.5, 3).probes({"penultimate": 10}), LABELS) == {}
