import numpy as np
import pytest
import torch
from evaluation import evaluate
from sklearn.linear_model import Ridge

from lightning_modules.features.moments import Moments
from lightning_modules.measures import Neurons
from lightning_modules.probes.ridge import PENALTIES
from lightning_modules.subsets.plan import Plan

COLUMNS = ["layer", "neuron", "split", "variance", "fisher", "rise_val", "rise_test", "rise_in_half"]
COLUMNS += ["substitute", "correlation"]
WIDTHS, CLASSES, SEEDS = {"wide": 25, "narrow": 6, "one": 1}, 3, [1, 4, 5]


def made_up_splits(width):
    """Features and labels of train, val and test; of the wide layer one neuron never changes, one repeats another."""
    generator = torch.Generator().manual_seed(width)
    mixing, splits = torch.randn(width, width, generator=generator), {}
    for split, images in (("train", 40), ("val", 31), ("test", 23)):
        labels = torch.arange(images) % CLASSES
        values = torch.randn(images, width, generator=generator) @ mixing + labels.unsqueeze(1) * (
            torch.arange(width) % 2
        )
        if width > 10:
            values[:, 3], values[:, 7] = 1.5, -2 * values[:, 5]
        splits[split] = values, labels
    return splits


def errors(splits, neurons, alpha):
    """Squared errors of scikit-learn's ridge probe on these neurons, on val and test."""
    one_hot = {split: np.eye(CLASSES)[labels] for split, (_, labels) in splits.items()}
    values = {split: features.double().numpy()[:, neurons] for split, (features, _) in splits.items()}
    if not neurons:
        said = {split: one_hot["train"].mean(0) for split in ("val", "test")}
    else:
        probe = Ridge(alpha, solver="cholesky").fit(values["train"], one_hot["train"])
        said = {split: probe.predict(values[split]) for split in ("val", "test")}
    return [np.square(one_hot[split] - said[split]).sum(1).mean() for split in ("val", "test")]


@pytest.fixture(scope="module")
def found():
    layers = {layer: made_up_splits(width) for layer, width in WIDTHS.items()}
    sums = {
        split: {layer: Moments(width, CLASSES) for layer, width in WIDTHS.items()} for split in ("train", "val", "test")
    }
    for layer, splits in layers.items():
        for split, (values, labels) in splits.items():
            sums[split][layer].update(values, labels)
    probes = Plan(["random", "fisher"], 0.5, SEEDS).probes(WIDTHS)
    labels = layers["wide"]["test"][1]
    inputs = torch.cat([layers[layer]["test"][0] for layer in WIDTHS], 1)
    known = {"inputs": inputs, "widths": WIDTHS, "classes": CLASSES, "moments": sums.__getitem__}
    assert evaluate(Neurons(), probes, labels, split="val", **known) == {}
    return layers, evaluate(Neurons(), probes, labels, **known)["neurons"]


def test_rises_are_those_of_probes_that_are_solved_anew_without_each_neuron(found):
    layers, table = found
    assert list(table) == COLUMNS
    assert table["split"].eq("test").all()
    for layer, splits in layers.items():
        rows, width = table[table["layer"] == layer], WIDTHS[layer]
        assert rows["neuron"].tolist() == list(range(width))
        everything, train = list(range(width)), splits["train"][0].double().numpy()
        alphas = [penalty * train.var(0).mean() * len(train) for penalty in PENALTIES]
        alpha = min(alphas, key=lambda each: errors(splits, everything, each)[0])
        full = errors(splits, everything, alpha)
        without = np.array([errors(splits, [i for i in everything if i != j], alpha) for j in everything])
        np.testing.assert_allclose(rows[["rise_val", "rise_test"]], without - full, rtol=1e-6, atol=1e-8)
        in_half = np.zeros(width)
        # A subset seed's permutation, cut in the middle.
        for seed in SEEDS:
            permutation = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).tolist()
            for half in (permutation[: -(-width // 2)], permutation[-(-width // 2) :]):
                for j in half:
                    rise = errors(splits, [i for i in half if i != j], alpha)[0] - errors(splits, half, alpha)[0]
                    in_half[j] += rise / len(SEEDS)
        np.testing.assert_allclose(rows["rise_in_half"], in_half, rtol=1e-6, atol=1e-8)


def test_substitutes_correlate_most_and_what_never_changes_has_none(found):
    layers, table = found
    values = layers["wide"]["train"][0].double().numpy()
    rows = table[table["layer"] == "wide"]
    changing = [j for j in range(25) if j != 3]
    expected = np.corrcoef(values[:, changing].T) - np.eye(24)
    best = np.abs(expected).argmax(1)
    np.testing.assert_allclose(rows["correlation"].iloc[changing], expected[np.arange(24), best], rtol=1e-6)
    assert rows["substitute"].iloc[changing].tolist() == [changing[each] for each in best]
    assert rows.set_index("neuron").loc[[5, 7], "substitute"].tolist() == [7, 5]
    constant = rows.iloc[3]
    assert (constant["variance"], constant["correlation"], abs(constant["rise_val"])) == (0, 0, 0)
    assert np.isnan(constant["fisher"])
    np.testing.assert_allclose(rows["variance"], values.var(0), rtol=1e-6, atol=1e-12)
