"""Selections that search, against trying every neuron in turn."""

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lightning_modules.features.moments import Moments
from lightning_modules.subsets import searches
from lightning_modules.subsets.bases import PENALTY, discriminants
from lightning_modules.subsets.selections import Layer, order


def layer_of(representations, labels, classes):
    moments = Moments(representations.shape[1], classes)
    moments.update(representations, labels)
    return Layer(moments.width, moments)


def least_squares(features, targets, penalty):
    """The least of |targets - features W|^2 + penalty |W|^2."""
    width = features.shape[1]
    rows = np.r_[features, penalty**0.5 * np.eye(width)]
    wanted = np.r_[targets, np.zeros((width, targets.shape[1]))]
    return np.square(wanted - rows @ np.linalg.lstsq(rows, wanted, rcond=1e-9)[0]).sum()


def first_of_least(values, ties=1e-9):
    return int(np.flatnonzero(values <= min(values) + ties * max(values))[0])


def by_trying(representations, targets, penalty, backward=False):
    """The order from the objective of every subset that a search could go on with, the smaller index among equals."""
    centred, targets = representations - representations.mean(0), targets - targets.mean(0)
    order, left = [], list(range(centred.shape[1]))
    while left:
        tried = left[::-1] if backward else left  # of equals backward elimination drops the larger index
        subsets = [[i for i in left if i != j] if backward else [*order, j] for j in tried]
        best = tried[first_of_least([least_squares(centred[:, s], targets, penalty) for s in subsets])]
        order.append(best)
        left.remove(best)
    return order[::-1] if backward else order


def foretold_error(features, targets, penalty):
    """The error that generalised cross-validation foretells, from the matrix that turns targets into fitted values."""
    images = len(features)
    fitted = features @ np.linalg.solve(features.T @ features + penalty * np.eye(features.shape[1]), features.T)
    fitted += 1 / images
    return np.square(targets - fitted @ targets).mean() / (1 - np.trace(fitted) / images) ** 2


@pytest.mark.parametrize("images", [40, 12])  # more and fewer than neurons
def test_harmless_drops_those_first_without_which_cross_validation_foretells_least(images):
    generator = torch.Generator().manual_seed(images)
    values = torch.randn(images, 14, generator=generator) @ torch.randn(14, 14, generator=generator) + 4
    labels = torch.arange(images) % 3
    exact, one_hot = values.double().numpy(), np.eye(3)[labels]
    centred, penalty = exact - exact.mean(0), PENALTY * exact.var(0).mean() * images
    without = [foretold_error(np.delete(centred, j, 1), one_hot, penalty) for j in range(14)]
    assert (np.array(without) < foretold_error(centred, one_hot, penalty)).any()
    assert order("harmless", layer_of(values, labels, 3), 0).tolist() == np.argsort(without)[::-1].tolist()


@pytest.mark.parametrize("images", [40, 9])  # more and fewer than neurons
def test_searches_take_what_trying_every_neuron_takes(monkeypatch, images):
    monkeypatch.setattr(searches, "BLOCK", 4)  # several blocks, and a last one that is not full
    generator = torch.Generator().manual_seed(images)
    values = torch.randn(images, 14, generator=generator) @ torch.randn(14, 14, generator=generator) + 4
    values[:, 3], values[:, 9] = values[:, 1], 2 * values[:, 0] - values[:, 5]
    values[:, [2, 11]] = 0.1  # never change
    labels = torch.arange(images) % 3
    layer, one_hot, exact = layer_of(values, labels, 3), np.eye(3)[labels], values.double().numpy()
    penalty = PENALTY * exact.var(0).mean() * images
    assert order("greedy", layer, 0).tolist() == by_trying(exact, one_hot, penalty)
    assert order("backward", layer, 0).tolist() == by_trying(exact, one_hot, penalty, backward=True)
    for name in ("greedy", "backward"):
        assert order(name, layer, 0)[-2:].tolist() == [2, 11]
    found, expected = order("column_subset", layer, 0).tolist(), by_trying(exact, exact - exact.mean(0), 0)
    rank = np.linalg.matrix_rank(exact - exact.mean(0), tol=1e-5)
    assert found[: rank - 1] == expected[: rank - 1]  # the last direction is every neuron's that has it
    assert found[rank:] == sorted(found[rank:])


def test_neurons_that_are_equal_or_never_change_go_by_their_index():
    labels = torch.tensor([0, 1, 0, 1, 0])
    for name in ("greedy", "backward", "column_subset"):
        assert order(name, layer_of(torch.full((5, 4), 3.3), labels, 2), 0).tolist() == [0, 1, 2, 3]
        assert order(name, layer_of(torch.arange(5.0).square().repeat(3, 1).t(), labels, 2), 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("width", [40, 300])  # fewer neurons than images, and more
def test_discriminants_span_those_of_scikit_learn_on_real_features(real_features, width):
    representations, labels = real_features.train[:, :width], real_features.train_labels
    values = representations.double().numpy()

    class Penalised(EmpiricalCovariance):
        def fit(self, X, y=None):
            super().fit(X)
            self.covariance_ += PENALTY * values.var(0).mean() * np.eye(width)
            return self

    reference = LinearDiscriminantAnalysis("eigen", covariance_estimator=Penalised()).fit(values, labels.numpy())
    layer = layer_of(representations, labels, 13)  # a class more than there are images of
    basis = discriminants(layer.moments).numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(width), atol=1e-10)
    for k in (1, 4, 11):
        theirs, _ = np.linalg.qr(reference.scalings_[:, :k])
        np.testing.assert_allclose(basis[:, :k] @ basis[:, :k].T, theirs @ theirs.T, atol=1e-6)
    scatter = basis[:, 11:].T @ layer.moments.scatter.numpy() @ basis[:, 11:]
    variances = scatter.diagonal()
    np.testing.assert_allclose(scatter, np.diag(variances), atol=1e-9 * variances.max())
    assert (np.diff(variances) <= 1e-9 * variances.max()).all()
    assert order("discriminant", layer, 0).tolist() == list(range(width))


def test_there_are_no_more_discriminants_than_neurons_or_than_classes_that_differ():
    labels = torch.tensor([0, 1, 2, 3] * 5)
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) + labels.unsqueeze(1)
    one_class = labels == 1
    for few, of_few in (
        (values, labels),
        (values[:, :1], labels),
        (0 * values, labels),
        (values[one_class], labels[one_class]),
    ):
        basis = discriminants(layer_of(few, of_few, 4).moments)
        torch.testing.assert_close(basis.t() @ basis, torch.eye(few.shape[1], dtype=torch.float64))
