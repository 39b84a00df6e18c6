"""Votes of nearest neighbours through the command line, on real features, against scikit-learn."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lightning_modules.probes import knn
from tests.lightning_modules.probes.test_logistic import fit, seen

__all__ = ["fit"]  # the fixture
COUNTS = [1, 5, 20]


def reference(inputs, labels, count):
    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    return KNeighborsClassifier(count, metric="cosine", algorithm="brute", weights=weights).fit(inputs, labels)


def test_every_probe_votes_as_in_scikit_learn_in_blocks_of_any_size(fit, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 100)
    model, task = fit(knn.KNN(COUNTS), fractions=[0.1, 0.5])
    results = model.results().tables["results"]
    assert results["voters"].nunique() > 1
    for index in range(len(model.probes)):
        (inputs, labels), (more, more_labels), (other, other_labels) = (
            seen(model, task, index, split) for split in ("train", "val", "test")
        )
        right = [reference(inputs, labels, count).score(more, more_labels) for count in COUNTS]
        val, test = (results[results["split"] == split].iloc[index] for split in ("val", "test"))
        assert right[COUNTS.index(val["voters"])] == max(right) == val["accuracy"]
        ours = reference(inputs, labels, int(val["voters"])).predict_proba(other)
        assert test["accuracy"] == (ours.argmax(1) == other_labels).mean()
        losses = -np.log(np.maximum(ours, 1e-6))
        expected = (losses[np.arange(len(other)), other_labels] + np.log(np.exp(-losses).sum(1))).mean()
        assert test["loss"] == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(knn, "BLOCK", 4096)
    monkeypatch.setattr(knn, "KEPT", 0)  # coordinates of train are computed for every batch
    whole, _ = fit(knn.KNN(COUNTS), fractions=[0.1, 0.5])
    pd.testing.assert_frame_equal(whole.results().tables["results"], results)


def test_among_equally_near_ones_the_first_of_train_vote(fit):
    model, task = fit(knn.KNN(3), fractions=0.001, seeds=1, selection="random")  # one neuron, never negative
    index = next(index for index, probe in enumerate(model.probes) if probe.neurons == 1)
    (inputs, labels), (other, other_labels) = (seen(model, task, index, split) for split in ("train", "test"))
    cosines = np.sign(other) @ np.sign(inputs).T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :3]
    votes = np.zeros((len(other), 5))
    for column in range(3):
        near = nearest[:, column]
        np.add.at(votes, (np.arange(len(other)), labels[near]), np.exp(cosines[np.arange(len(other)), near] / 0.07))
    row = model.results().tables["results"].query("split == 'test'").iloc[index]
    assert row["accuracy"] == (votes.argmax(1) == other_labels).mean()


def test_a_checkpoint_tests_and_predicts_the_same_and_export_refuses(cli, tmp_path):
    quiet = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    quiet += ("--pictures=[]",)
    status, out, err = cli(
        *("fit", "--config=quickstart.yaml", "--model.solver=KNN", "--model.solver.neighbours=[5,20]", *quiet),
        *("--model.fractions=[0.1]", "--model.seeds=1", "--model.measures=Inequality", "--name=votes"),
    )
    assert status == 0, err
    assert "To keep 90 % of the accuracy" in out
    run = tmp_path / "runs" / "votes"
    for verb in ("test", "predict"):
        status, _, err = cli(verb, f"--config={run / 'config.yaml'}", "--ckpt_path=last")
        assert status == 0, err
    fitted = pd.read_csv(run / "results.csv").query("split == 'test'").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(run / "test.csv"), fitted)
    predictions = pd.read_csv(run / "predictions.csv")
    assert len(predictions) >= fitted["images"].iloc[0]
    status, _, err = cli(
        *("export", "--run", str(run), "--selection=random", "--fraction=0.1", f"--output={tmp_path / 'kept'}")
    )
    assert status == 2
    assert "are votes of neighbours (knn) and have no weights to export" in err
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(value.numel() for name, value in state.items() if name.startswith("grid.kept.")) == 0
