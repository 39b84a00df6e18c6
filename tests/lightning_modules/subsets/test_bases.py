import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from lightning_modules.features.moments import Moments
from lightning_modules.subsets.bases import (
    gaussian_projection,
    orthogonal_projection,
    positive_projection,
    principal_components,
)
from lightning_modules.subsets.selections import BASES, Layer, order


def summed(representations, labels=None, classes=1, **options):
    moments = Moments(representations.shape[1], classes, **options)
    moments.update(representations, torch.zeros(len(representations), dtype=torch.int64) if labels is None else labels)
    return moments


@pytest.mark.parametrize("width", [1280, 64])  # more and fewer neurons than images
def test_principal_components_are_scikit_learns(real_features, width):
    representations = real_features.train[:, :width]
    reference = PCA(svd_solver="full").fit(representations.double().numpy())
    found = principal_components(summed(representations))
    assert found.rank == min(width, len(representations) - 1)
    expected = reference.explained_variance_[: found.rank] * (len(representations) - 1) / len(representations)
    np.testing.assert_allclose(found.variances[: found.rank], expected, rtol=1e-5)
    for k in (1, 5, 40):
        theirs, mine = reference.components_[:k], found.components[:, :k].numpy()
        np.testing.assert_allclose(mine @ mine.T, theirs.T @ theirs, atol=1e-5 * np.abs(theirs.T @ theirs).max())
    largest = found.components.abs().argmax(0)
    assert found.components[largest, torch.arange(width)].gt(0).all()


def test_components_are_applied_without_centring_or_whitened_as_scikit_learn_whitens(real_features):
    representations = real_features.train[:, :64].double()
    representations[:, 3] = 1.0  # a neuron that never changes, so that one component is none
    layer, images = Layer(64, summed(representations)), len(representations)
    pca, uncentred, whitened = (BASES[name](layer, 0) for name in ("pca", "pca_uncentred", "pca_whitened"))
    assert torch.equal(uncentred.matrix, pca.matrix)
    assert not uncentred.centre.any()
    values = (representations - whitened.centre) @ whitened.matrix
    theirs = PCA(63, svd_solver="full", whiten=True).fit_transform(representations.numpy())
    theirs *= np.sqrt(images / (images - 1))  # of the population, not the sample
    np.testing.assert_allclose(values[:, :63].abs(), np.abs(theirs), rtol=1e-5, atol=1e-6)
    assert not values[:, 63].any()


def test_rank_counts_neither_constant_nor_repeated_neurons():
    representations = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) + 10
    representations[:, 2] = 3.3
    representations[:, 5] = representations[:, 0] * 0.5
    assert principal_components(summed(representations)).rank == 6


@pytest.mark.parametrize("classes", [12, 2])
def test_rankings_are_numpys_on_real_features(real_features, classes):
    chosen = real_features.train_labels < classes
    representations, labels = real_features.train[chosen], real_features.train_labels[chosen]
    values, labels_there = representations.double().numpy(), labels.numpy()
    # One class more than there are images of.
    moments = summed(representations, labels, classes + 1, outer=False)
    between = sum(
        (labels_there == c).sum() * (values[labels_there == c].mean(0) - values.mean(0)) ** 2 for c in range(classes)
    )
    within = sum(values[labels_there == c].var(0) * (labels_there == c).sum() for c in range(classes))
    ratio = np.where(within > 0, between / np.where(within > 0, within, 1), -1)
    np.testing.assert_array_equal(order("fisher", Layer(moments.width, moments), 0), np.argsort(-ratio, kind="stable"))
    np.testing.assert_array_equal(
        order("variance", Layer(moments.width, moments), 0), np.argsort(-values.var(0), kind="stable")
    )


def test_extreme_neurons_are_ranked_first_and_last_and_ties_go_to_the_smaller_index():
    labels = torch.tensor([0, 0, 1, 1])
    columns = [[5.1] * 4, [1.0, 2, 1, 2], [0.1, 0.1, 0.7, 0.7], [1.0, 2, 3, 4], [5.1] * 4, [1.0, 2, 3, 4]]
    moments = summed(torch.tensor(columns).t(), labels, 2)
    assert order("fisher", Layer(moments.width, moments), 0).tolist() == [2, 3, 5, 1, 0, 4]
    assert order("variance", Layer(moments.width, moments), 0).tolist() == [3, 5, 1, 2, 0, 4]


def test_projections_are_seeded_and_what_they_say():
    for draw in (gaussian_projection, orthogonal_projection, positive_projection):
        before = torch.get_rng_state()
        assert draw(96, 1).equal(draw(96, 1))
        assert not draw(96, 1).equal(draw(96, 2))
        assert before.equal(torch.get_rng_state())
    gaussian = gaussian_projection(400, 0)
    np.testing.assert_allclose(gaussian.mean(), 0, atol=1e-3)
    np.testing.assert_allclose(gaussian.std(), 400**-0.5, rtol=0.01)
    rotation = orthogonal_projection(96, 0)
    np.testing.assert_allclose(rotation.t() @ rotation, np.eye(96), atol=1e-12)
    # QR without the correction gives a diagonal whose mean is far below zero.
    diagonals = torch.stack([orthogonal_projection(8, seed).diagonal() for seed in range(400)])
    np.testing.assert_allclose(diagonals.mean(0), 0, atol=0.08)
    positive = positive_projection(400, 3)
    theirs = torch.nn.functional.normalize(torch.rand(400, 400, generator=torch.Generator().manual_seed(3)), dim=0)
    assert torch.equal(positive, theirs.double())
    np.testing.assert_allclose((positive.t() @ positive)[0, 1:].mean(), 0.75, atol=0.02)
