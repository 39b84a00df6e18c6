"""Bases and orders, on real features and against scikit-learn."""

import numpy as np
import pytest
import torch
from evaluation import STEPS
from sklearn.decomposition import PCA

from lightning_modules.features.moments import Moments
from lightning_modules.subsets.bases import Quantiser
from lightning_modules.subsets.bases import levels as levels_of
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Plan
from lightning_modules.subsets.selections import OFFERED, SELECTIONS

WIDTHS = {"early": 12, "late": 30}
FRACTIONS = [0.1, 0.5, 1.0]


def features(count=80):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(count, 42, generator=generator) @ torch.randn(42, 42, generator=generator)
    return values + 5, torch.randint(3, (count,), generator=generator)


def fitted(selections, inputs, labels, widths=WIDTHS, bits=32):
    coordinates = Coordinates(Plan(selections, FRACTIONS, 2, bits=bits).probes(widths), widths)
    sums = {}
    for layer, part in coordinates.by_layer(inputs).items():
        moments = Moments(widths[layer], 3)
        other = Moments(widths[layer], 3)  # as on another process
        moments.update(part[:30], labels[:30])
        other.update(part[30:], labels[30:])
        sums[layer] = moments + other
    coordinates.fit(sums)
    return coordinates


def test_every_probe_sees_what_its_subset_and_basis_say():
    inputs, labels = features()
    coordinates = fitted(OFFERED, inputs, labels, bits=[32, 2])
    sources = coordinates.sources(inputs)
    gathered, spaces, masks = coordinates(inputs), coordinates.spaces(inputs), coordinates.masks()
    start = 0
    for group in coordinates.groups:
        ordering, part = coordinates.ordering(group), sources[coordinates.source(group)].double()
        expected = ordering.coordinates(part) - coordinates.centre(group)
        rows = gathered[start : start + group.sizes[-1]]
        np.testing.assert_allclose(rows.t(), expected, atol=2e-4)
        for index, size in zip(group.probes, group.sizes, strict=True):
            assert torch.equal(coordinates.subset(index), ordering.order[:size])
            seen = {tuple(row.tolist()) for row in spaces[masks[index]]}
            assert seen == {tuple(row.tolist()) for row in rows[:size]}
        start += group.sizes[-1]
    assert start == len(gathered)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_few_bits_are_the_nearest_of_levels_around_the_mean_over_train(bits):
    inputs, labels = features()
    inputs[:, 3] = 7  # never changes
    coordinates = fitted(["random", "pca", "random_projection"], inputs, labels, bits=[32, bits])
    unseen = torch.cat([inputs[:5] + 0.5, 100 * inputs[5:10]])  # some beyond all levels
    known, found, ends = coordinates(inputs), coordinates(unseen), 0
    parts = {}
    for group in coordinates.groups:
        rows, ends = slice(ends, ends + group.sizes[-1]), ends + group.sizes[-1]
        parts[group.layer, group.selection, group.seed, group.bits] = known[rows].t(), found[rows].t()
    of_few = {key: value for key, value in parts.items() if key[3] == bits}
    assert len(of_few) == 2 * (2 + 1 + 2)
    for (*group, _), (train, other) in of_few.items():
        exact, exact_other = (part.double().numpy()[:, : train.shape[1]] for part in parts[*group, 32])
        mean, deviation = exact.mean(0), exact.std(0)
        levels = mean + deviation * STEPS[bits] * (np.arange(2**bits)[:, None, None] - (2**bits - 1) / 2)
        for stored, values in ((train, exact), (other, exact_other)):
            nearest = np.abs(levels - values).min(0)
            np.testing.assert_allclose(np.abs(stored.numpy() - values), nearest, atol=1e-4 * np.abs(values).max())
        assert max(len(column.unique()) for column in train.t()) <= 2**bits
    # The step errs least on normal numbers.
    values = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    low, step = levels_of(torch.zeros(1), torch.ones(1), bits)
    errors = [
        ((Quantiser(low * scale, step * scale, bits)(values) - values).square() * (-values.square() / 2).exp()).sum()
        for scale in (0.98, 1, 1.02)
    ]
    assert errors[1] == min(errors)


def test_principal_components_are_those_of_scikit_learn():
    inputs, labels = features()
    coordinates = fitted(["pca", "pca_least"], inputs, labels)
    gathered = coordinates(inputs)
    start = 0
    for group in coordinates.groups:
        rows = gathered[start : start + group.sizes[-1]].t().numpy()
        start += group.sizes[-1]
        reference = PCA().fit_transform(coordinates.by_layer(inputs)[group.layer].double().numpy())
        if group.selection == "pca_least":
            reference = reference[:, ::-1]
        if group.selection != "full":
            np.testing.assert_allclose(np.abs(rows), np.abs(reference[:, : rows.shape[1]]), atol=1e-3)


def test_with_fewer_images_than_neurons_the_least_component_still_varies():
    inputs, labels = features(20)
    coordinates = fitted(["pca_least"], inputs, labels)
    group = next(group for group in coordinates.groups if (group.layer, group.selection) == ("late", "pca_least"))
    assert coordinates.ordering(group).order[:19].tolist() == list(range(18, -1, -1))
    assert coordinates.ordering(group).order.sort().values.tolist() == list(range(30))


@pytest.mark.parametrize("selection", [name for name, rule in SELECTIONS.items() if rule.seeded and rule.basis])
def test_projections_nest_and_differ_by_seed(selection):
    inputs, labels = features()
    coordinates = fitted([selection], inputs, labels)
    first, second = (group for group in coordinates.groups if (group.layer, group.selection) == ("early", selection))
    part = coordinates.by_layer(inputs)["early"]
    one, other = (coordinates.ordering(group).coordinates(part) for group in (first, second))
    assert not torch.allclose(one, other)
    again = fitted([selection], inputs, labels)
    assert torch.equal(again.ordering(first).coordinates(part), one)


def test_what_is_fitted_is_in_the_state_and_what_a_seed_gives_is_not():
    inputs, labels = features()
    coordinates = fitted(["pca", "random_projection", "fisher"], inputs, labels, bits=[32, 2])
    plan = Plan(["pca", "random_projection", "fisher"], FRACTIONS, 2, bits=[32, 2])
    fresh = Coordinates(plan.probes(WIDTHS), WIDTHS)
    assert not torch.equal(fresh(inputs), coordinates(inputs))
    fresh.load_state_dict(coordinates.state_dict())
    assert torch.equal(fresh(inputs), coordinates(inputs))
    saved = [value for value in coordinates.state_dict().values() if value.ndim == 2]
    assert sorted(map(len, saved)) == [12, 30]
