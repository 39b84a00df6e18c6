import numpy as np
import torch
from evaluation import evaluate, random_logits

from lightning_modules.measures import Accuracy
from lightning_modules.subsets.plan import Plan

PROBES = Plan(["random", "first"], [0.2, 0.5], 2, 2).probes({"one": 10, "two": 20})
LABELS = torch.randint(4, (150,), generator=torch.Generator().manual_seed(1))  # the fifth class has no images


def test_counts_and_losses_are_those_of_numpy():
    logits = random_logits(PROBES, 5, LABELS)
    found = evaluate(Accuracy(), PROBES, LABELS, logits=logits, widths={"one": 10, "two": 20})
    values, labels = logits.double().numpy(), LABELS.numpy()
    right = values.argmax(1) == labels
    np.testing.assert_array_equal(found["images"], 150)
    np.testing.assert_array_equal(found["accuracy"], right.sum(1) / 150)
    losses = np.log(np.exp(values).sum(1)) - values[:, labels, np.arange(150)]
    np.testing.assert_allclose(found["loss"], losses.mean(1), rtol=1e-6)
    classes = found["classes"]
    assert list(classes) == ["layer", "selection", "bits", "fraction", "seed", "split", "class", "images", "correct"]
    assert classes["class"].tolist() == [f"class {label}" for label in range(5)] * len(PROBES)
    by_probe = classes.groupby(["layer", "selection", "fraction", "seed"], sort=False)
    for (key, rows), probe, hits in zip(by_probe, PROBES, right, strict=True):
        assert key == (probe.layer, probe.selection, probe.fraction, probe.seed)
        assert rows["images"].tolist() == np.bincount(labels, minlength=5).tolist()
        assert rows["correct"].tolist() == np.bincount(labels[hits], minlength=5).tolist()


def test_every_probe_is_paired_with_the_first_full_probe_of_its_layer():
    logits = random_logits(PROBES, 5, LABELS)
    found = evaluate(Accuracy(), PROBES, LABELS, logits=logits, widths={"one": 10, "two": 20})
    right = (logits.argmax(1) == LABELS).numpy()
    for layer in ("one", "two"):
        places = [place for place, probe in enumerate(PROBES) if probe.layer == layer]
        for place in places:
            reference = right[places[0]]
            assert found["gained"][place] == (right[place] & ~reference).sum()
            assert found["lost"][place] == (reference & ~right[place]).sum()
        assert found["gained"][places[0]] == found["lost"][places[0]] == 0
        assert found["gained"][places[1]] > 0
    np.testing.assert_array_equal(found["per_image"], right)
