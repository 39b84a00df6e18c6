import numpy as np
import pytest
import torch
from evaluation import evaluate, random_logits

from lightning_modules.measures import Inequality
from lightning_modules.measures.inequality import class_inequality
from lightning_modules.subsets.plan import Plan


def test_a_class_without_images_does_not_count():
    probes = Plan("random", 0.5, 2).probes({"penultimate": 10})
    labels = torch.randint(4, (150,), generator=torch.Generator().manual_seed(1))
    logits = random_logits(probes, 5, labels)
    found = evaluate(Inequality(), probes, labels, logits=logits)
    for place, predicted in enumerate(logits.argmax(1)):
        by_class = [(predicted[labels == label] == label).double().mean().item() for label in range(4)]
        assert found["mean_class_accuracy"][place] == pytest.approx(np.mean(by_class))
        assert found["largest_gap"][place] == pytest.approx(max(by_class) - min(by_class))


@pytest.mark.parametrize("seed", range(3))
def test_class_inequality_is_that_of_its_definitions(seed):
    random = np.random.default_rng(seed)
    images = np.array([40, 0, 7, 120, 1])
    correct = random.integers(0, images + 1, (4, 3, 5))
    given = class_inequality(correct, images)
    for place in np.ndindex(4, 3):
        x = [correct[*place, c] / images[c] for c in (0, 2, 3, 4)]
        pairs = sum(abs(a - b) for a in x for b in x)
        assert given["gini"][place] == pytest.approx(pairs / (2 * 16 * np.mean(x)), rel=1e-12)
        assert given["coefficient_of_variation"][place] == pytest.approx(np.std(x) / np.mean(x), rel=1e-12)
        assert given["largest_gap"][place] == pytest.approx(max(x) - min(x))


def test_of_means_it_is_that_of_accuracies_averaged_over_seeds_before():
    probes = Plan(["random", "first"], [0.2, 0.5], 3).probes({"one": 10, "two": 20})
    labels = torch.randint(4, (150,), generator=torch.Generator().manual_seed(1))
    logits = random_logits(probes, 5, labels)
    found = evaluate(Inequality(), probes, labels, logits=logits, widths={"one": 10, "two": 20})
    rows = found["inequality_of_means"]
    assert len(rows) == 2 * (1 + 2 + 2)
    right = (logits.argmax(1) == labels).double().numpy()
    for row in rows.itertuples():
        alike = [i for i, p in enumerate(probes) if (p.layer, p.selection, p.bits, p.fraction) == row[1:5]]
        means = [right[alike][:, labels.numpy() == label].mean() for label in range(4)]
        assert (row.seeds, row.split) == (len(alike), "test")
        assert row.coefficient_of_variation == pytest.approx(np.std(means) / np.mean(means))
        pairs = sum(abs(one - other) for one in means for other in means)
        assert row.gini == pytest.approx(pairs / (2 * 16 * np.mean(means)))
    random = rows.query("layer == 'two' and selection == 'random' and fraction == 0.2")["gini"].item()
    of_each = [found["gini"][i] for i, p in enumerate(probes) if (p.layer, p[0], p[1]) == ("two", "random", 0.2)]
    assert random < np.mean(of_each)


def test_where_no_class_or_one_class_is_right():
    images = np.array([10, 10, 10, 10])
    none = class_inequality(np.zeros(4), images)
    names = ["mean_class_accuracy", "gini", "coefficient_of_variation", "largest_gap"]
    assert [(name, float(value)) for name, value in none.items()] == [(name, 0) for name in names]
    only = class_inequality(np.array([10, 0, 0, 0]), images)
    assert float(only["gini"]) == pytest.approx(3 / 4)
    assert float(only["largest_gap"]) == 1
