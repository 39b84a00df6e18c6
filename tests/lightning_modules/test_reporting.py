import json

import pandas as pd
import pytest

from lightning_modules.reporting import report

FULL = {"full": {1.0: [0.9]}}


def tables(val, test):
    """Results and class counts of a made-up run of 100 neurons, from accuracies by selection, fraction and seed."""
    results, classes = [], []
    for split, measured in (("val", val), ("test", test)):
        for selection, by_fraction in (FULL | measured).items():
            for fraction, accuracies in by_fraction.items():
                for seed, accuracy in enumerate(accuracies):
                    row = {"selection": selection, "fraction": fraction, "seed": seed, "split": split}
                    results.append(
                        {"task": "made-up", "backbone": "net", "layer": "penultimate"}
                        | row
                        | {"neurons": int(100 * fraction), "width": 100, "images": 1000, "accuracy": accuracy}
                    )
                    classes += [row | {"class": c, "images": 500, "correct": int(500 * accuracy)} for c in "ab"]
    return pd.DataFrame(results), pd.DataFrame(classes)


def summary(folder, val, test):
    printed = report(folder, *tables(val, test), ["be careful"], {"fit": 1.0})
    said = json.loads((folder / "summary.json").read_text())
    assert said["answer"] in printed
    assert "Note: be careful" in printed
    return said


def test_validation_chooses_and_test_only_tells(tmp_path):
    val = {"random": {0.1: [0.70, 0.72], 0.2: [0.82, 0.84], 0.5: [0.88, 0.90]}}
    test = {"random": {0.1: [0.89, 0.89], 0.2: [0.60, 0.64], 0.5: [0.88, 0.90]}}
    answer = summary(tmp_path, val, test)["answers"]["0.9"]
    assert (answer["selection"], answer["fraction"], answer["neurons"]) == ("random", 0.2, 20)
    assert answer["points_lost_mean"] == pytest.approx(90 - 62)
    assert answer["points_lost_std"] == pytest.approx(2)
    assert answer["bytes_kept_percent"] == pytest.approx(20)


def test_where_nothing_is_enough_all_neurons_are_kept(tmp_path):
    low = {"random": {0.1: [0.2], 0.5: [0.3]}}
    said = summary(tmp_path, low, low)
    assert "keep all 100 neurons" in said["answer"]
    assert said["diffused_redundancy"]["random"]["threshold"]["0.9"] == 0


def test_the_cheapest_of_several_selections_is_the_answer(tmp_path):
    measured = {"random": {0.1: [0.5, 0.5], 0.5: [0.89, 0.89]}, "first": {0.1: [0.88], 0.5: [0.9]}}
    answer = summary(tmp_path, measured, measured)["answers"]["0.9"]
    assert (answer["selection"], answer["neurons"], answer["points_lost_std"]) == ("first", 10, None)
