import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.subsets import FULL, SELECTIONS, Probe, check, neurons, order, plan, subset

FRACTIONS = [0.0005, 0.01, 0.1, 0.29, 0.5, 1.0]


@pytest.mark.parametrize("width", [1, 7, 512, 2048])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_random_subset_is_the_start_of_the_papers_permutation(width, seed):
    permutation = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    for fraction in FRACTIONS:
        k = neurons(fraction, width)
        assert torch.equal(subset(Probe("random", fraction, k, seed), width), permutation[:k])


@pytest.mark.parametrize("selection", [FULL, *SELECTIONS])
@pytest.mark.parametrize("seed", [0, 4])
def test_every_selection_orders_all_neurons_and_its_subsets_nest(selection, seed):
    whole = order(selection, 50, seed)
    assert whole.sort().values.tolist() == list(range(50))
    smaller = set()
    for fraction in FRACTIONS:
        picked = subset(Probe(selection, fraction, neurons(fraction, 50), seed), 50).tolist()
        assert len(set(picked)) == len(picked) == max(1, int(50 * fraction))
        assert smaller <= set(picked)
        smaller = set(picked)


def test_the_full_layer_and_first_keep_the_layers_order():
    assert subset(Probe(FULL, 1.0, 9, 3), 9).tolist() == list(range(9))
    assert subset(Probe("first", 0.5, 4, 3), 9).tolist() == [0, 1, 2, 3]


def test_only_chance_feels_the_seed():
    for selection, rule in SELECTIONS.items():
        assert torch.equal(order(selection, 40, 0), order(selection, 40, 1)) != rule.by_chance


@pytest.mark.parametrize("selection", [FULL, *SELECTIONS])
def test_global_random_numbers_are_neither_read_nor_moved(selection):
    torch.manual_seed(1)
    once = order(selection, 100, 2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = order(selection, 100, 2)
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
    assert plan(["random", "first"], [0.5, 0.1], seeds=[3, 0], full_seeds=[0, 1], width=20) == [
        (FULL, 1.0, 20, 0),
        (FULL, 1.0, 20, 1),
        ("random", 0.1, 2, 3),
        ("random", 0.5, 10, 3),
        ("random", 0.1, 2, 0),
        ("random", 0.5, 10, 0),
        ("first", 0.1, 2, 0),
        ("first", 0.5, 10, 0),
    ]


def test_fractions_of_the_same_k_keep_their_own_rows():
    probes = plan(["random"], [0.01, 0.02, 0.1, 1.0], seeds=[0], full_seeds=[0], width=10)
    assert [(probe.fraction, probe.neurons) for probe in probes[1:]] == [(0.01, 1), (0.02, 1), (0.1, 1), (1.0, 10)]
    assert torch.equal(subset(probes[1], 10), subset(probes[3], 10))


RUN = {"selections": ["random", "first"], "fractions": [0.1, 1.0], "seeds": [0, 5]}


def test_a_run_that_can_be_is_not_refused():
    check(**RUN)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"selections": []}, ["model.selection", "empty"]),
        ({"fractions": []}, ["model.fractions", "empty"]),
        ({"seeds": []}, ["model.seeds", "empty"]),
        ({"selections": ["first", "random", "first"]}, ["model.selection", "first", "twice"]),
        ({"fractions": [0.5, 0.25, 0.5]}, ["model.fractions", "0.5", "twice"]),
        ({"seeds": [1, 7, 7]}, ["model.seeds", "7", "twice"]),
        ({"selections": ["randon"]}, ["model.selection", "'randon'", *SELECTIONS]),
        ({"selections": [FULL]}, ["model.selection", "'full'"]),
        ({"fractions": [0.5, 0.0]}, ["model.fractions", "has 0;", "(0, 1]"]),
        ({"fractions": [-0.5]}, ["model.fractions", "-0.5", "(0, 1]"]),
        ({"fractions": [1.5]}, ["model.fractions", "1.5", "(0, 1]"]),
        ({"fractions": [float("nan")]}, ["model.fractions", "nan", "(0, 1]"]),
        ({"seeds": [0, -3]}, ["model.seeds", "-3"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(change, named):
    with pytest.raises(MisconfigurationException) as error:
        check(**RUN | change)
    message = str(error.value)
    assert "\n" not in message
    assert [name for name in named if name not in message] == []
