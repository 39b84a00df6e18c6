import numpy as np
import torch

from lightning_modules.statistics import largest_curvature, mean_and_std


def test_mean_and_std_are_numpys_over_any_batches():
    values = torch.randn(101, 7, generator=torch.Generator().manual_seed(0)) * 3 + 50
    values[:, 2] = 4.25
    mean, std = mean_and_std(values.split(13), lambda sums: sums)
    expected = values.double().numpy().std(0)
    expected[2] = 1  # a neuron that never changes is left at zero, not divided by zero
    np.testing.assert_allclose(mean, values.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, expected, rtol=1e-9)


def test_curvature_is_half_the_largest_eigenvalue_of_the_seen_second_moments():
    values = torch.randn(200, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).relu()
    masks = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    found = largest_curvature(values, masks, iterations=200)
    for mask, value in zip(masks, found, strict=True):
        seen = np.concatenate([values.numpy()[:, mask.numpy()], np.ones((200, 1))], 1)
        expected = np.linalg.eigvalsh(seen.T @ seen / 200).max() / 2
        np.testing.assert_allclose(value, expected, rtol=1e-6)
