import numpy as np
import pytest
import torch
from evaluation import evaluate

from lightning_modules.measures import CKA, LayerRanks
from lightning_modules.subsets.plan import Plan


@pytest.mark.parametrize("measure", [LayerRanks, CKA])
def test_ranks_are_those_of_the_singular_values(real_features, measure):
    widths = {"wide": 1280, "narrow": 100}  # more neurons than images, and fewer
    inputs = torch.cat([real_features.train, real_features.train[:, :100]], 1)
    probes = Plan("random", 0.1, 1).probes(widths)
    labels = real_features.train_labels
    table = evaluate(measure(), probes, labels, inputs=inputs, widths=widths, classes=12, split="val")["layers"]
    assert list(table) == ["layer", "width", "split", "images", "participation_ratio", "effective_rank"]
    for row, part in zip(table.itertuples(), inputs.split([1280, 100], dim=1), strict=True):
        values = part.double().numpy()
        assert (row.width, row.split, row.images) == (values.shape[1], "val", len(labels))
        singular = np.linalg.svd(values, compute_uv=False)
        shares = singular / singular.sum()
        np.testing.assert_allclose(row.effective_rank, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-5)
        variances = np.linalg.svd(values - values.mean(0), compute_uv=False) ** 2
        np.testing.assert_allclose(row.participation_ratio, variances.sum() ** 2 / (variances**2).sum(), rtol=1e-9)
