import numpy as np
import pytest
import torch

from lightning_modules.probes.sgd import largest_curvature


@pytest.mark.parametrize("centred", [False, True])
def test_curvature_is_the_largest_eigenvalue_of_the_seen_second_moments(centred):
    values = 3 * torch.randn(200, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).relu()
    values -= centred * values.mean(0)  # then the bias is an eigenvector, with the eigenvalue 1
    masks = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    found = largest_curvature(values, masks, iterations=200)
    for mask, value in zip(masks, found, strict=True):
        seen = np.concatenate([values.numpy()[:, mask.numpy()], np.ones((200, 1))], 1)
        expected = np.linalg.eigvalsh(seen.T @ seen / 200).max()
        np.testing.assert_allclose(value, expected, rtol=1e-4)
