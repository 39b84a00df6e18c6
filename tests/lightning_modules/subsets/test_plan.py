import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.features.moments import Moments
from lightning_modules.subsets.plan import (
    BITS,
    Plan,
    describe,
    ensembles,
    held_together,
    mean_by_fraction,
    neurons,
    probe_groups,
    references,
    stored_bytes,
)
from lightning_modules.subsets.selections import FULL, SELECTIONS, Layer, order

FRACTIONS = [0.0005, 0.01, 0.1, 0.29, 0.5, 1.0]


def layer(width):
    """A layer with 60 images of three classes, for the selections that are fitted."""
    moments = Moments(width, 3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    moments.update(torch.randn(60, width, generator=generator) + labels.unsqueeze(1), labels)
    return Layer(width, moments)


@pytest.mark.parametrize("width", [1, 7, 512, 2048])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_random_subset_is_the_start_of_the_papers_permutation(width, seed):
    permutation = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    for fraction in FRACTIONS:
        k = neurons(fraction, width)
        assert torch.equal(order("random", Layer(width), seed)[:k], permutation[:k])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", [0, 4])
def test_every_selection_orders_all_coordinates(selection, seed):
    assert order(selection, layer(50), seed).sort().values.tolist() == list(range(50))


def test_the_full_layer_and_first_keep_the_layers_order():
    assert order(FULL, Layer(9), 3).tolist() == order("first", Layer(9), 3).tolist() == list(range(9))


def test_neurons_are_ranked_by_what_train_says_of_them():
    moments = Moments(3, 2)
    labels = torch.tensor([0, 0, 1, 1])
    moments.update(torch.tensor([[1.0, -9.0, 0.0], [1.2, 9.0, 0.0], [2.0, -8.0, 0.0], [2.2, 8.0, 0.0]]), labels)
    assert order("variance", Layer(3, moments), 0).tolist() == [1, 0, 2]
    assert order("fisher", Layer(3, moments), 0).tolist() == [0, 1, 2]


def test_the_seed_matters_to_seeded_selections_alone():
    for selection, rule in SELECTIONS.items():
        if rule.basis is None:
            assert torch.equal(order(selection, layer(40), 0), order(selection, layer(40), 1)) != rule.seeded


@pytest.mark.parametrize("selection", SELECTIONS)
def test_global_random_numbers_are_neither_read_nor_moved(selection):
    torch.manual_seed(1)
    once = order(selection, layer(100), 2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = order(selection, layer(100), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("fraction", "width", "k"),
    [
        (0.29, 100, 29),  # 28.999999999999996 in floating point
        (0.57, 100, 57),
        (0.07, 100, 7),
        (0.0005, 512, 1),  # 0.256
        (0.0005, 2048, 1),
        (0.001, 2048, 2),
        (0.005, 384, 1),  # 1.92
        (0.9, 2048, 1843),  # 1843.2
        (0.999, 100, 99),
        (1.0, 1280, 1280),
        (1.0, 1, 1),
        (1e-9, 10, 1),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
    ],
)
def test_k_is_rounded_down_but_at_least_one(fraction, width, k):
    assert neurons(fraction, width) == k


@pytest.mark.parametrize("width", [64, 96, 100, 384, 512, 768, 1000, 1280, 2048])
def test_k_is_exact_where_the_fraction_is(width):
    for hundredths in range(1, 101):
        assert neurons(hundredths / 100, width) == max(1, hundredths * width // 100)


def test_a_plan_has_the_full_layer_first_then_selections_by_seed_and_fraction():
    probes = Plan(["random", "first"], [0.5, 0.1], seeds=[3, 0], full_seeds=2).probes({"a": 20, "b": 10})
    assert [probe[:5] for probe in probes if probe.layer == "a"] == [
        (FULL, 1.0, 20, 0, "a"),
        (FULL, 1.0, 20, 1, "a"),
        ("random", 0.1, 2, 3, "a"),
        ("random", 0.5, 10, 3, "a"),
        ("random", 0.1, 2, 0, "a"),
        ("random", 0.5, 10, 0, "a"),
        ("first", 0.1, 2, 0, "a"),
        ("first", 0.5, 10, 0, "a"),
    ]
    assert [probe.neurons for probe in probes if probe.layer == "b"] == [10, 10, 1, 5, 1, 5, 1, 5]
    assert references(probes).tolist() == [0] * 8 + [8] * 8
    assert {probe.bits for probe in probes} == {32}


def test_in_few_bits_every_selection_also_has_all_coordinates_and_the_full_layer_stays_the_reference():
    plan = Plan(["random", "pca", "random_projection"], [0.1, 0.5], seeds=2, bits=[32, 4, 1])
    probes = plan.probes({"a": 20}, together=True)
    # All neurons are the same for every seed, all coordinates of a random basis are not.
    assert [(probe.series, probe.seed) for probe in probes if probe.fraction == 1.0] == [
        *(("full", 0), ("random_4bit", 0), ("random_1bit", 0), ("pca_4bit", 0), ("pca_1bit", 0)),
        *((f"random_projection_{bits}bit", seed) for bits in (4, 1) for seed in (0, 1)),
    ]
    assert references(probes).unique().tolist() == [0]
    for bits in (32, 4, 1):
        asked = [probe[:5] for probe in probes if probe.bits == bits and probe.fraction < 1]
        assert asked == [probe[:5] for probe in probes if probe.bits == 32 and probe.fraction < 1]
    groups = [group for alike in probe_groups(probes) for group in alike]
    assert len(groups) == 1 + 3 * (2 + 1 + 2)
    names = mean_by_fraction(probes, [0.0] * len(probes), "val/accuracy")
    assert {"val/accuracy/full/1", "val/accuracy/random/0.5", "val/accuracy/random_4bit/0.5"} <= set(names)
    assert describe(probes, [probe.bits == 1 and probe.fraction == 0.1 for probe in probes]) == (
        "random_1bit 0.1 (x2), pca_1bit 0.1, random_projection_1bit 0.1 (x2)"
    )
    assert [stored_bytes(9, bits) for bits in BITS] == [36, 9, 5, 3, 2]


def test_fractions_of_the_same_k_keep_their_own_rows():
    probes = Plan("random", [0.01, 0.02, 0.1, 1.0], seeds=[0]).probes({"a": 10})
    assert [(probe.fraction, probe.neurons) for probe in probes[1:]] == [(0.01, 1), (0.02, 1), (0.1, 1), (1.0, 10)]


def test_numbers_of_neurons_stand_in_place_of_fractions():
    plan = Plan(["random", "first"], [0.5], seeds=2, neurons=[3, 1, 20])
    probes = plan.probes({"a": 20, "b": 60}, together=True)
    asked = [(probe.neurons, probe.fraction) for probe in probes if (probe.layer, probe.selection) == ("b", "first")]
    assert asked == [(1, 1 / 60), (3, 3 / 60), (20, 20 / 60)]
    of_a = [probe for probe in probes if probe.layer == "a"]
    assert [of_a[each[0]].neurons for each in ensembles(of_a, plan.asked("a", 20))] == [1, 3, 20]
    assert plan.describe() == "random, first x 1, 3, 20 neurons x 2 seeds, and the full layer"
    for width in (7, 100, 384, 2048):  # k / D stands for k exactly
        assert [probe.neurons for probe in Plan("first", 1.0, 1, 1, range(1, width + 1)).probes({"a": width})[1:]] == [
            *range(1, width + 1)
        ]
    with pytest.raises(MisconfigurationException, match="has 20, but layer c has 19 neurons; give at most 19"):
        plan.probes({"a": 20, "c": 19})


def test_ensembles_have_a_probe_with_as_many_neurons_beside_them():
    seeds = [0, 1, 2]
    probes = Plan(["random", "first"], [0.1, 0.5], 3).probes({"a": 40}, together=True)
    members = ensembles(probes, [0.1, 0.5])
    assert [[(probes[i].fraction, probes[i].seed) for i in each] for each in members] == [
        [(0.1, 0), (0.1, 1), (0.1, 2)],
        [(0.5, 0), (0.5, 1), (0.5, 2)],
    ]
    for each in members:
        size = probes[each[0]].neurons
        drawn = {n for seed in seeds for n in order("random", Layer(40), seed)[:size].tolist()}
        together = held_together("random", size, seeds, 40)
        assert together == len(drawn)
        assert sum(p.neurons == together for p in probes if p.selection == "random") == len(seeds)
    assert {probe.fraction for probe in probes if probe.selection == "first"} == {0.1, 0.5}


def test_probes_are_named_by_selection_and_fraction_and_many_by_their_range():
    probes = Plan("random", [0.1, 0.2, 0.3, 0.4], 2).probes({"a": 40})
    few = [probe.fraction in (0.1, 0.4, 1.0) for probe in probes]
    assert describe(probes, few) == "full, random 0.1 (x2), random 0.4 (x2)"
    assert describe(probes, [True] * len(probes)) == "full, random 0.1 to 0.4 (x8)"
