"""Made-up tables of runs, as measures would leave them."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lightning_modules.measures.inequality import class_inequality

ACCURACY = SimpleNamespace(metric="accuracy", label="accuracy", unit="%", chance=None, items="images", parts="classes")
"""The target of these runs."""
FULL = {"full": {1.0: [0.9]}}


def tables(val, test):
    """Results and class counts of a made-up run of 100 neurons, from accuracies by curve, fraction and seed.

    A curve is called as in pictures: by its selection, and for few bits by these, too.
    """
    results, classes = [], []
    for split, measured in (("val", val), ("test", test)):
        for name, by_fraction in (FULL | measured).items():
            selection, bits = re.fullmatch(r"(.+?)(?:_(\d)bit)?", name).groups("32")
            for fraction, accuracies in by_fraction.items():
                for seed, accuracy in enumerate(accuracies):
                    row = {"layer": "penultimate", "selection": selection, "bits": int(bits), "fraction": fraction}
                    row |= {"seed": seed, "split": split}
                    results.append(
                        {"task": "made-up", "backbone": "net"}
                        | row
                        | {"neurons": int(100 * fraction), "width": 100, "images": 1000, "accuracy": accuracy}
                    )
                    classes += [row | {"class": c, "images": 500, "correct": int(500 * accuracy)} for c in "ab"]
    return {"results": pd.DataFrame(results), "classes": pd.DataFrame(classes)}


def per_image(tables):
    """Which of its 1,000 images each probe of such a run has right: as many as its accuracy says, the easiest."""
    by_split = tables["results"].groupby("split", sort=False)["accuracy"]
    return {split: np.arange(1000) < (1000 * means.to_numpy()[:, None]).round() for split, means in by_split}


CURVE = {
    "random": {0.1: [0.50, 0.56, 0.59], 0.2: [0.82, 0.79, 0.85], 0.5: [0.88, 0.90, 0.86]},
    "first": {0.1: [0.4], 0.2: [0.6], 0.5: [0.7]},
}


def full_run():
    """All tables that a run can have, with two layers and two selections."""
    results, classes = tables(CURVE, CURVE).values()
    classes["correct"] -= 40 * (classes["class"] == "b")
    counts = classes["correct"].to_numpy().reshape(-1, 2)
    results = results.assign(**class_inequality(counts, np.array([500, 500])), accuracy=counts.sum(1) / 1000)
    results = results.assign(cka=results["fraction"], cka_debiased=0.9 * results["fraction"], cka_chance=0.1, gained=20)
    results["lost"] = results["gained"] + 860 - counts.sum(1)
    found = {
        "results": pd.concat([results.assign(layer="layer<3>"), results], ignore_index=True),
        "classes": pd.concat([classes.assign(layer="layer<3>"), classes]),
    }
    found["results"].loc[found["results"]["layer"] == "layer<3>", "accuracy"] -= 0.1
    subset = {"layer": "penultimate", "selection": "random", "bits": 32, "fraction": 0.1, "neurons": 10}
    subset["split"] = "test"
    found["layers"] = pd.DataFrame(
        [{"layer": "penultimate", "width": 100, "split": "test", "images": 1000, "participation_ratio": 12.5}]
    )
    single = {"single_fraction": 0.2, "single_neurons": 20, "single_accuracy": 0.8, "images": 1000, "accuracy": 0.7}
    rules = ("mean_probability", "mean_logit", "majority_vote")
    found["ensembles"] = pd.DataFrame([subset | single | {"members": 2, "rule": rule} for rule in rules])
    found["inequality_of_means"] = pd.DataFrame(
        [
            subset
            | {"fraction": fraction, "neurons": int(100 * fraction), "gini": 0.1, "coefficient_of_variation": 0.2}
            for fraction in (0.1, 0.2)
        ]
    )
    found["neighbours"] = pd.DataFrame([subset | {"seed": seed, "neighbours": 10, "kept": 0.3} for seed in (0, 1)])
    found["neurons"] = pd.DataFrame(
        {"layer": "penultimate", "split": "test", "rise_val": rise, "rise_test": abs(rise), "rise_in_half": 2 * rise}
        for rise in np.linspace(-1, 3, 100)
    ).assign(neuron=range(100))
    return found
