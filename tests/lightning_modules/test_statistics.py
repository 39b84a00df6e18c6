import numpy as np
import torch

from lightning_modules.features.moments import Moments, largest_curvature


def summed(representations, labels, classes, batch=37, **options):
    moments = Moments(representations.shape[1], classes, **options)
    for rows, of_rows in zip(representations.split(batch), labels.split(batch), strict=True):
        moments.update(rows, of_rows)
    return moments


def test_moments_are_numpys_on_real_features(real_features):
    representations, labels = real_features.train, real_features.train_labels
    values, targets = representations.double().numpy(), np.eye(12)[labels.numpy()]
    centred = values - values.mean(0)
    for options in ({}, {"shift": representations[0] + 3}):
        moments = summed(representations, labels, 12, **options)
        np.testing.assert_array_equal(moments.counts, targets.sum(0))
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(moments.variance, values.var(0), rtol=1e-9)
        np.testing.assert_allclose(moments.scatter, centred.T @ centred, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moments.cross, centred.T @ targets, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moments.class_means[3], values[labels == 3].mean(0), rtol=1e-9, atol=1e-12)
    lean = summed(representations, labels, 12, outer=False)
    np.testing.assert_allclose(lean.variance, values.var(0), rtol=1e-9)


def test_two_processes_sum_to_one():
    values = torch.randn(90, 6, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(90) % 2
    one, first, second, idle = (Moments(6, 2) for _ in range(4))
    one.update(values, labels)
    first.update(values[:70], labels[:70])
    second.update(values[70:], labels[70:])
    for moments in (second, idle):
        moments.reduce(lambda sums: sums)
    others = iter([[second.sums[name], idle.sums[name]] for name in first.sums])
    first.reduce(lambda sums: sum(next(others), sums))
    assert first.count == 90
    for name in ("mean", "variance", "scatter", "cross"):
        np.testing.assert_allclose(getattr(first, name), getattr(one, name), rtol=1e-12, atol=1e-12)


def test_a_neuron_that_never_changes_has_no_variance_at_all():
    values = torch.rand(1000, 3, generator=torch.Generator().manual_seed(4))
    values[:, 1] = 0.1
    moments = summed(values, torch.zeros(1000, dtype=torch.int64), 1)
    assert moments.variance[1] == 0
    assert moments.scatter[1].eq(0).all()
    assert moments.variance[[0, 2]].gt(0.05).all()


def test_a_shift_keeps_the_digits_of_a_mean_far_above_its_spread():
    values = torch.randn(500, 4, generator=torch.Generator().manual_seed(5)) + 1e5
    expected = np.cov(values.double().numpy().T, bias=True) * 500
    moments = summed(values, torch.zeros(500, dtype=torch.int64), 1, shift=values[0])
    np.testing.assert_allclose(moments.scatter, expected, rtol=1e-10)


def test_curvature_is_half_the_largest_eigenvalue_of_the_seen_second_moments():
    values = torch.randn(200, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).relu()
    masks = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    found = largest_curvature(values, masks, iterations=200)
    for mask, value in zip(masks, found, strict=True):
        seen = np.concatenate([values.numpy()[:, mask.numpy()], np.ones((200, 1))], 1)
        expected = np.linalg.eigvalsh(seen.T @ seen / 200).max() / 2
        np.testing.assert_allclose(value, expected, rtol=1e-6)
