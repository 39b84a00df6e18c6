import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.linear_model import Ridge

from lightning_modules.features.moments import Moments
from lightning_modules.probes.ridge import ridge_probes
from lightning_modules.subsets.bases import Ordering, orthogonal_projection


def summed(representations, labels, classes):
    moments = Moments(representations.shape[1], classes)
    moments.update(representations, labels)
    return moments


def explicit(train, train_labels, val, val_labels, classes, part, val_part, penalty):
    """Fit and judge with scikit-learn, from the images themselves."""
    values = train.double().numpy()
    scale = ((values - values.mean(0)) ** 2).sum(0).mean()
    model = Ridge(alpha=penalty * scale, solver="svd").fit(part, np.eye(classes)[train_labels])
    residuals = np.eye(classes)[val_labels] - (val_part @ model.coef_.T + model.intercept_)
    return model, (residuals**2).sum(1).mean()


@pytest.mark.parametrize(("width", "classes"), [(1280, 12), (50, 2)])
def test_probes_and_their_penalties_are_scikit_learns_on_real_features(real_features, width, classes):
    penalties = [1e-2, 1e-1, 1, 1e1]
    kept, kept_val = real_features.train_labels < classes, real_features.test_labels < classes
    train, labels = real_features.train[kept, :width], real_features.train_labels[kept]
    val, val_labels = real_features.test[kept_val, :width], real_features.test_labels[kept_val]
    groups = [
        Ordering(torch.randperm(width, generator=torch.Generator().manual_seed(3)), [1, 1, 20, width]),
        Ordering(torch.arange(width), [10, width // 2], orthogonal_projection(width, 1)),
    ]
    moments = summed(train, labels, classes), summed(val, val_labels, classes)
    for group, probes in zip(groups, ridge_probes(*moments, groups, penalties), strict=True):
        values, val_values = (
            x.double().numpy() if group.basis is None else x.double().numpy() @ group.basis.numpy()
            for x in (train, val)
        )
        for size, probe in zip(group.sizes, probes, strict=True):
            columns = group.order[:size].numpy()
            part, val_part = values[:, columns], val_values[:, columns]
            tried = [
                explicit(train, labels, val, val_labels, classes, part, val_part, penalty) for penalty in penalties
            ]
            errors = [error for _, error in tried]
            assert probe.penalty == penalties[int(np.argmin(errors))]
            model = tried[int(np.argmin(errors))][0]
            theirs = np.broadcast_to(model.coef_, (classes, size))
            np.testing.assert_allclose(probe.weight, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
            np.testing.assert_allclose(probe.bias, model.intercept_, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(probe.error, min(errors), rtol=1e-5)


def test_a_penalty_that_leaves_a_system_undetermined_is_not_taken():
    representations = torch.rand(20, 40, generator=torch.Generator().manual_seed(0))
    representations[:, 5] = 2.5
    labels = torch.arange(20) % 2
    moments = summed(representations, labels, 2)
    group = Ordering(torch.arange(40), [3, 6, 30])
    # Without penalty three neurons can be fitted; not a constant one, nor more neurons than images.
    found = ridge_probes(moments, moments, [group], [0, 0.5])[0]
    assert [probe.penalty for probe in found] == [0, 0.5, 0.5]
    assert all(probe.weight.isfinite().all() for probe in found)
    with pytest.raises(MisconfigurationException, match="1e-18 determines a probe on 30 neurons"):
        ridge_probes(moments, moments, [group], [0, 1e-18])


def test_of_penalties_that_err_alike_the_larger_is_taken():
    # A neuron that says nothing about the labels has weight zero under any penalty.
    representations = torch.tensor([[1.0], [-1], [1], [-1]])
    moments = summed(representations, torch.tensor([0, 0, 1, 1]), 2)
    (probe,) = ridge_probes(moments, moments, [Ordering(torch.arange(1), [1])], [1.0, 10.0, 0.1])[0]
    assert probe.penalty == 10
    assert probe.error == 0.5
