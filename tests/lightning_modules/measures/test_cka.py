from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import evaluate

from lightning_modules.features.moments import Moments
from lightning_modules.measures import CKA
from lightning_modules.measures.cka import DebiasedCKA, foretold_cka, linear_cka
from lightning_modules.subsets.bases import Ordering, orthogonal_projection, principal_components
from lightning_modules.subsets.plan import Plan


def orderings(width, moments):
    """Neurons at random, with a size twice; the least principal components; a random basis, all of it."""
    pca = principal_components(moments)
    return [
        Ordering(torch.randperm(width, generator=torch.Generator().manual_seed(1)), [1, 1, 12, width // 2, width]),
        Ordering(torch.arange(pca.rank).flip(0), [1, pca.rank // 2 + 1], pca.components),
        Ordering(torch.arange(width), [5, width], orthogonal_projection(width, 0)),
    ]


def subsets(representations, ordering):
    values = representations.double().numpy()
    coordinates = values if ordering.basis is None else values @ ordering.basis.numpy()
    return [coordinates[:, ordering.order[:size].numpy()] for size in ordering.sizes]


def biased(kernel, other):
    centring = np.eye(len(kernel)) - 1 / len(kernel)
    return np.trace(kernel @ centring @ other @ centring)


def unbiased(kernel, other):
    kernel, other = kernel - np.diag(np.diag(kernel)), other - np.diag(np.diag(other))
    n, one = len(kernel), np.ones(len(kernel))
    sums = (one @ kernel @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    return (np.trace(kernel @ other) + sums - 2 / (n - 2) * one @ kernel @ other @ one) / (n * (n - 3))


def cka(hsic, part, whole):
    kernel, other = part @ part.T, whole @ whole.T
    return hsic(kernel, other) / np.sqrt(hsic(kernel, kernel) * hsic(other, other))


@pytest.mark.parametrize(("images", "width"), [(120, 512), (240, 60), (4, 30)])
def test_cka_is_that_of_the_kernels_on_real_features(real_features, images, width):
    representations = real_features.train[:: 240 // images, :width]
    labels = real_features.train_labels[:: 240 // images]
    train = Moments(width, 12)
    train.update(representations, labels)
    groups = orderings(width, train)
    processes = [DebiasedCKA(width, 12, groups) for _ in range(2)]
    for rows, of_rows, process in zip(
        representations.chunk(4), labels.chunk(4), [processes[place] for place in (0, 1, 0, 0)], strict=True
    ):
        process.update(rows, of_rows)
    processes[1].reduce(lambda sums: sums)
    others = iter(list(processes[1].sums.values()))
    processes[0].reduce(lambda sums: sums + next(others))
    whole = representations.double().numpy()
    found = zip(groups, linear_cka(processes[0], groups), processes[0].compute(), strict=True)
    for ordering, (plain, _), debiased in found:
        parts = subsets(representations, ordering)
        np.testing.assert_allclose(plain, [cka(biased, part, whole) for part in parts], rtol=1e-5)
        np.testing.assert_allclose(debiased, [cka(unbiased, part, whole) for part in parts], rtol=1e-5, atol=1e-9)


def test_only_the_debiased_cka_of_few_images_is_about_that_of_many():
    representations = torch.randn(60, 400, generator=torch.Generator().manual_seed(0))
    ordering = Ordering(torch.arange(400), [100])
    sums = DebiasedCKA(400, 1, [ordering])
    sums.update(representations, torch.zeros(60, dtype=torch.int64))
    # Independent neurons of equal variance: k / sqrt(k D).
    np.testing.assert_allclose(sums.compute()[0], 0.5, atol=0.05)
    assert linear_cka(sums, [ordering])[0][0] > 0.7


def test_cka_by_chance_is_the_mean_over_all_permutations_of_the_images():
    representations = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10) + 3
    labels = torch.zeros(6, dtype=torch.int64)
    train = Moments(9, 1)
    train.update(representations, labels)
    whole = representations.double().numpy()
    groups = orderings(9, train)
    for ordering, (_, chance) in zip(groups, linear_cka(train, groups), strict=True):
        parts = subsets(representations, ordering)
        means = [np.mean([cka(biased, part[list(p)], whole) for p in permutations(range(6))]) for part in parts]
        np.testing.assert_allclose(chance, means, rtol=1e-6)


def test_foretold_cka_is_that_of_the_mean_products_and_near_what_is_measured(real_features):
    values = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    centred = (values - values.mean(0)).double().numpy()
    scatter = centred.T @ centred
    for k in (1, 3, 6):
        chosen = [list(each) for each in combinations(range(6), k)]
        with_full = np.mean([np.square(scatter[each]).sum() for each in chosen])
        own = np.mean([np.square(scatter[np.ix_(each, each)]).sum() for each in chosen])
        expected = with_full / np.sqrt(own * np.square(scatter).sum())
        np.testing.assert_allclose(foretold_cka(torch.from_numpy(scatter), [k]), expected)
    probes = Plan(["random", "first"], [0.01, 0.05, 0.2, 0.8], 8).probes({"one": 1280})
    found = evaluate(
        CKA(), probes, real_features.test_labels, inputs=real_features.test, widths={"one": 1280}, classes=12
    )
    columns = pd.DataFrame(probes).assign(cka=found["cka"], cka_foretold=found["cka_foretold"])
    drawn = [probe.selection == "random" for probe in probes]
    means = columns[drawn].groupby("fraction")[["cka", "cka_foretold"]].mean()
    np.testing.assert_allclose(means["cka_foretold"], means["cka"], atol=0.05)
    assert columns["cka_foretold"].isna().tolist() == [not each for each in drawn]


def test_independent_representations_reach_the_cka_by_chance_and_no_debiased_one():
    generator = torch.Generator().manual_seed(0)
    representations = torch.randn(50, 30, generator=generator) * torch.rand(30, generator=generator)
    both = torch.cat([representations, 5 * torch.randn(50, 70, generator=generator)], 1)
    # The other representation has the larger part of the variance, so that the full layer is nearly it alone.
    ordering = Ordering(torch.arange(100), [30])
    sums = DebiasedCKA(100, 1, [ordering])
    sums.update(both, torch.zeros(50, dtype=torch.int64))
    ((plain, chance),) = linear_cka(sums, [ordering])
    np.testing.assert_allclose(plain, chance, rtol=0.1)
    np.testing.assert_allclose(sums.compute()[0], 0, atol=0.06)


def test_neurons_that_never_change_and_too_few_images_have_no_cka():
    representations = torch.rand(30, 5, generator=torch.Generator().manual_seed(0))
    representations[:, 1:3] = torch.tensor([0.3, 7.7])
    group = Ordering(torch.tensor([1, 2, 0, 3, 4]), [1, 2, 3])
    sums = DebiasedCKA(5, 1, [group])
    sums.update(representations[:3], torch.zeros(3, dtype=torch.int64))
    assert sums.compute()[0].isnan().all()
    sums.update(representations[3:], torch.zeros(27, dtype=torch.int64))
    assert sums.compute()[0].isnan().tolist() == [True, True, False]
    for values in linear_cka(sums, [group])[0]:
        assert values.isnan().tolist() == [True, True, False]


def test_every_probe_has_the_cka_of_its_subset_with_its_own_layer(real_features):
    widths, labels = {"one": 100, "two": 60}, real_features.test_labels
    probes = Plan(["random", "random_projection"], [0.1, 0.5], 2).probes(widths)
    inputs = real_features.test[:, :160]
    measure = CKA()
    found = evaluate(measure, probes, labels, inputs=inputs, widths=widths, classes=12)
    parts = measure.context.coordinates.by_layer(inputs)
    for place, probe in enumerate(probes):
        values, subset = parts[probe.layer].double(), measure.context.coordinates.subset(place)
        basis = measure.context.coordinates.basis(place)
        seen = (values if basis is None else values @ basis[0].double())[:, subset]
        for column, hsic in (("cka", biased), ("cka_debiased", unbiased)):
            expected = cka(hsic, seen.numpy(), values.numpy())
            np.testing.assert_allclose(found[column][place], expected, rtol=1e-5, err_msg=str(probe))


def test_in_few_bits_it_is_missing_and_in_32_as_without_them():
    inputs, labels = torch.randn(60, 30, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5
    probes = Plan("random", [0.2, 0.5], 2, bits=[32, 2]).probes({"one": 30})
    known = {"inputs": inputs, "widths": {"one": 30}}
    found = evaluate(CKA(), probes, labels, **known)
    alone = evaluate(CKA(), [probe for probe in probes if probe.bits == 32], labels, **known)
    few = torch.tensor([probe.bits < 32 for probe in probes])
    for column in CKA.columns:
        assert found[column.name][few].isnan().all()
        torch.testing.assert_close(found[column.name][~few], alone[column.name], equal_nan=True)
