import numpy as np
import torch

from lightning_modules.features.moments import Moments


def summed(representations, labels, classes, batch=37, **options):
    moments = Moments(representations.shape[1], classes, **options)
    for rows, of_rows in zip(representations.split(batch), labels.split(batch), strict=True):
        moments.update(rows, of_rows)
    return moments


def test_moments_are_numpys_on_real_features(real_features):
    representations, labels = real_features.train, real_features.train_labels
    values, targets = representations.double().numpy(), np.eye(12)[labels.numpy()]
    centred = values - values.mean(0)
    moments = summed(representations, labels, 12)
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
