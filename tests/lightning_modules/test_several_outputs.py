"""Real fits of several labels and of numbers, against scikit-learn."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from made_up import tables
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score

from datamodules import Embeddings
from datamodules.outputs import Regression
from lightning_modules import RedundancyProbe, measures, probes
from lightning_modules.results.results import Results

WIDTH, LABELS, NUMBERS = 12, 4, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Vectors with four labels and two numbers of different units."""
    folder, random = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    vectors = random.normal(size=(400, WIDTH)).astype(np.float32) + 0.5
    noisy = vectors @ random.normal(size=(WIDTH, LABELS + NUMBERS)) + random.normal(size=(400, LABELS + NUMBERS))
    numbers = noisy[:, LABELS:] * [1.0, 1000.0] + [0.0, 5000.0]
    labels = noisy[:, :LABELS] > [0, 0, 1, 3]
    np.savez(folder / "vectors.npz", features=vectors, split=np.repeat(["train", "val", "test"], [200, 100, 100]))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "numbers.npy", numbers)
    return folder


def fit(files, target, solver, epochs=1, **model):
    """Fit, and return the model, its task, and the vectors and labels of each split as NumPy arrays, float64."""
    seed_everything(0)
    name = "labels.npy" if target == "multilabel" else "numbers.npy"
    vectors = str(files / "vectors.npz")
    task = Embeddings(vectors, str(files / name), vectors, target=target, batch_size=50)
    model = RedundancyProbe(None, **{"fractions": [0.5], "seeds": 2, "solver": solver, **model})
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.fit(model, datamodule=task)
    trainer.validate(model, datamodule=task, verbose=False)
    trainer.test(model, datamodule=task, verbose=False)
    parts = {}
    for split, images in task.images.items():
        parts[split] = images[torch.arange(len(images))].double().numpy(), images.labels.double().numpy()
    return model, task, parts


def outputs_of(model, parts, index, split="test"):
    weight, bias = (each.double().numpy() for each in model.grid.final_probe(index))
    return parts[split][0][:, model.coordinates.subset(index).numpy()] @ weight.T + bias


def test_logistic_is_one_versus_rest_of_scikit_learn(files):
    model, task, parts = fit(files, "multilabel", probes.Logistic(penalty=2.0, tolerance=1e-10))
    (vectors, labels), (_, wanted) = parts["train"], parts["test"]
    results = model.results()
    rows = results.table("results", "test")
    classes = results.table("classes", "test")
    for index, row in enumerate(rows.itertuples()):
        subset = model.coordinates.subset(index).numpy()
        probe = [LogisticRegression(C=0.5, tol=1e-10, max_iter=5000) for _ in range(LABELS)]
        for place, each in enumerate(probe):
            each.fit(vectors[:, subset], labels[:, place])
        weight, bias = model.grid.final_probe(index)
        np.testing.assert_allclose(weight, np.concatenate([each.coef_ for each in probe]), atol=2e-3)
        np.testing.assert_allclose(bias, np.concatenate([each.intercept_ for each in probe]), atol=2e-3)
        scores = outputs_of(model, parts, index)
        expected = average_precision_score(wanted, scores, average=None)
        assert row.mean_average_precision == pytest.approx(expected.mean(), abs=1e-6)
        of_probe = classes.iloc[LABELS * index : LABELS * (index + 1)]
        np.testing.assert_allclose(of_probe["mean_average_precision"], expected, atol=1e-6)
        assert of_probe["images"].tolist() == wanted.sum(0).tolist()
        cross_entropy = np.logaddexp(0, scores) - wanted * scores
        assert row.loss == pytest.approx(cross_entropy.sum(1).mean(), rel=1e-4)
    assert set(classes["class"]) == set(task.target.names)
    np.testing.assert_allclose(results.per_image["test"].mean(1), rows["mean_average_precision"], atol=1e-6)


def test_ridge_is_scikit_learns_on_labels_and_on_numbers(files):
    for target, metric in (("multilabel", "mean_average_precision"), ("regression", "r2")):
        model, task, parts = fit(files, target, probes.Ridge(0.1), selection=["random", "greedy", "backward"])
        (vectors, labels), (others, wanted) = parts["train"], parts["test"]
        penalty = 0.1 * ((vectors - vectors.mean(0)) ** 2).sum(0).mean()
        rows = model.results().table("results", "test")
        for index, row in enumerate(rows.itertuples()):
            subset = model.coordinates.subset(index).numpy()
            expected = Ridge(penalty).fit(vectors[:, subset], labels).predict(others[:, subset])
            outputs = torch.from_numpy(outputs_of(model, parts, index)).T.unsqueeze(0)
            if target == "regression":
                scale = np.abs(expected).mean(0)
                np.testing.assert_allclose(task.target.decide(outputs)[0] / scale, expected / scale, atol=1e-5)
                measured, squared = r2_score(wanted, expected), (wanted - expected) / labels.std(0)
            else:
                np.testing.assert_allclose((outputs[0].T + 1) / 2, expected, atol=1e-5)
                measured, squared = average_precision_score(wanted, expected), 2 * (wanted - expected)
            assert getattr(row, metric) == pytest.approx(measured, abs=1e-5)
            assert row.loss == pytest.approx((squared**2).sum(1).mean(), rel=1e-4)
        assert rows.groupby("selection", sort=False)[metric].mean()["greedy"] > 0.5


def test_sgd_comes_to_the_optimum_of_either_loss(files):
    model, _, parts = fit(files, "regression", probes.SGD(0.02, weight_decay=0, step_size=15), epochs=30)
    for index, row in enumerate(model.results().table("results", "test").itertuples()):
        subset = model.coordinates.subset(index).numpy()
        (vectors, labels), (others, wanted) = parts["train"], parts["test"]
        least_squares = Ridge(1e-9).fit(vectors[:, subset], labels).predict(others[:, subset])
        assert row.r2 == pytest.approx(r2_score(wanted, least_squares), abs=0.01)
    assert not model.solver.remarks(model)
    sgd = probes.SGD(0.3, weight_decay=0.03, step_size=15, keep="last")
    model, _, parts = fit(files, "multilabel", sgd, epochs=30)
    for index in range(len(model.probes)):
        vectors, labels = parts["train"][0][:, model.coordinates.subset(index).numpy()], parts["train"][1]
        vectors = np.c_[vectors, np.ones(len(vectors))]  # the bias is penalised, too
        weight, _ = model.grid.final_probe(index)
        for place in range(LABELS):
            probe = LogisticRegression(C=1 / (200 * 0.03), fit_intercept=False, tol=1e-8).fit(vectors, labels[:, place])
            np.testing.assert_allclose(weight[place], probe.coef_[0, :-1], atol=0.05)


def test_a_run_says_r2_wherever_it_would_say_accuracy(cli, files, tmp_path):
    arguments = ("--config", "embeddings.yaml", "--data.features", str(files / "vectors.npz"), "--name", "aged")
    labels = ("--data.labels", str(files / "numbers.npy"), "--data.splits", str(files / "vectors.npz"))
    small = ("--model.fractions", "0.5", "--model.seeds", "2", "--trainer.enable_progress_bar", "false")
    small += ("--pictures", "svg")
    status, out, err = cli("fit", *arguments, *labels, "--data.target", "regression", *small)
    assert status == 0, err
    assert "vectors_regression, none: test R² on 100 images" in out
    assert "To keep 90 % of the R²" in out
    run = tmp_path / "runs" / "aged"
    for said in (out, err, (run / "report.html").read_text(), (run / "curve.svg").read_text()):
        assert "accuracy" not in said.replace("mean_class_accuracy", "")
    assert "Numbers that lose most" in (run / "report.html").read_text()
    rows = pd.read_csv(run / "results.csv")
    full = json.loads((run / "summary.json").read_text())["layers"][0]["full_r2"]
    assert full == pytest.approx(rows["r2"][3], abs=1e-9)
    status, _, err = cli("predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last")
    assert status == 0, err
    which = ("--selection", "random", "--fraction", "0.5", "--seed", "1")
    status, _, err = cli("export", "--run", str(run), *which, "--output", "kept")
    assert status == 0, err
    predicted = pd.read_csv(run / "predictions.csv")
    said, wanted = (
        predicted[name].str.split(";", expand=True).astype(float).to_numpy() for name in ("random/0.5/1", "label")
    )
    assert rows["r2"].iloc[-1] == pytest.approx(r2_score(wanted, said), abs=1e-5)
    card, told = json.loads((tmp_path / "kept" / "card.json").read_text()), {}
    vectors = torch.from_numpy(np.load(files / "vectors.npz")["features"][300:])
    exec(card["use"][0], {"features": vectors, "subset": load_file(tmp_path / "kept" / "subset.safetensors")}, told)
    np.testing.assert_allclose(told["numbers"], said, rtol=1e-4, atol=1e-2)


def test_of_an_r2_below_zero_there_is_no_share_to_keep():
    curve = {"random": {0.1: [-0.5, -0.6], 0.5: [-0.2, -0.1]}}
    made = tables(curve, curve)["results"].rename(columns={"accuracy": "r2"})
    made.loc[made["selection"] == "full", "r2"] = -0.1
    per_image = {split: np.repeat(rows["r2"].to_numpy()[:, None], 50, 1) for split, rows in made.groupby("split")}
    results = Results({"results": made}, [], Regression(["age"]), per_image)
    assert results.curve("test")[["ratio", "ratio_low", "ratio_high"]].isna().all(axis=None)
    assert (results.redundancy("test", [0.9])["redundancy"] == 0).all()
    said = "To keep 90 % of the R²: there is none to keep, as the full layer's is -0.100 on 1,000 validation images or"
    assert results.answers("penultimate")[0.9]["text"].startswith(said)


def test_what_does_not_go_with_several_labels_or_numbers_is_refused(files):
    for target, model, said in (
        ("multilabel", {"solver": probes.KNN()}, "model.solver is KNN, but the task has 4 labels, which takes SGD, Lo"),
        ("regression", {"solver": probes.Logistic()}, "the task has 2 numbers to predict, which takes SGD or Ridge."),
        (
            "multilabel",
            {"selection": "fisher"},
            "'fisher', which needs classes, but the task has 4 labels; take of",
        ),
        (
            "multilabel",
            {"measures": measures.Inequality()},
            "lists Inequality, which needs classes; the task has 4",
        ),
        ("regression", {"measures": measures.Ensembles()}, "lists Ensembles, which needs classes; the task has 2 numb"),
        ("regression", {"measures": measures.Robustness()}, "lists Robustness, which needs classes; the task has 2 nu"),
        ("regression", {"solver": probes.SGD(5.0)}, "learning_rate is 5, with which the squared error of these featu"),
    ):
        with pytest.raises(MisconfigurationException) as error:
            fit(files, target, **{"solver": None, **model})
        assert said in str(error.value)
