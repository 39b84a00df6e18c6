"""Logistic regression through the Trainer, on real features, against scikit-learn."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import quantised
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from datamodules import Digits
from lightning_modules import FrozenBackbone, RedundancyProbe, checks
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.probes import Logistic, penalised
from lightning_modules.subsets.plan import Plan

PENALTIES = [0.03, 1.0, 30.0]
KWARGS = {"channels": [12, 24, 48, 96], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Fit probes of digits 5 to 9 on two layers of the shipped backbone; return the model and its task."""
    folder = tmp_path_factory.mktemp("logistic")

    def run(solver, batch_size=100, **changes):
        overlay = PretrainedCfgOverlay([3, 32, 32], [0.5] * 3, [0.5] * 3, "bilinear", 1.0)
        layers = ["layer3", "penultimate"]
        backbone = FrozenBackbone("resnet26", "digits_0to4.safetensors", KWARGS, overlay, layers)
        settings = {"fractions": [0.02, 0.2], "seeds": 2, "selection": ["random", "pca"], "measures": []} | changes
        model = RedundancyProbe(backbone, solver=solver, **settings)
        task = Digits([5, 6, 7, 8, 9], batch_size=batch_size, num_workers=0)
        task.preprocessing = model.preprocessing
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
        trainer = Trainer(default_root_dir=folder, **quiet)
        trainer.fit(model, datamodule=task)
        trainer.validate(model, datamodule=task, verbose=False)
        trainer.test(model, datamodule=task, verbose=False)
        return model, task

    return run


@pytest.fixture(scope="module")
def fitted(fit):
    """A bank that was refitted on train and validation together."""
    return fit(Logistic(PENALTIES), refit=True, seeds=1)


def seen(model, task, index, split):
    """What a probe sees of a split, and the labels."""
    probe, basis, parts = model.probes[index], model.coordinates.basis(index), []
    for name in (split, "train"):
        rows = task.features(name)[0]
        layer = model.coordinates.by_layer(rows[torch.arange(len(rows))].double())[probe.layer]
        values = layer if basis is None else (layer - basis[1]) @ basis[0].double()
        parts.append(values[:, model.coordinates.subset(index)].numpy())
    values = parts[0] if probe.bits == 32 else quantised(*parts, probe.bits).astype(float)
    return values, task.images[split].labels.numpy()


def optimum(inputs, labels, penalty):
    return LogisticRegression(C=1 / penalty, tol=1e-7, max_iter=5000).fit(inputs, labels)


def objective(weight, bias, inputs, labels, penalty):
    logits = inputs @ np.asarray(weight, np.float64).T + np.asarray(bias)
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return losses.sum() + penalty / 2 * np.square(np.asarray(weight, np.float64)).sum()


def test_every_probe_its_penalty_and_its_refit_are_scikit_learns(fitted):
    model, task = fitted
    results = model.results().tables["results"]
    val, test = (results[results["split"] == split].reset_index() for split in ("val", "test"))
    accuracies = []
    assert val["penalty"].nunique() > 1
    for index in range(len(model.probes)):
        (inputs, labels), (more, more_labels), (other, other_labels) = (
            seen(model, task, index, split) for split in ("train", "val", "test")
        )
        tried = [optimum(inputs, labels, penalty) for penalty in PENALTIES]
        losses = [log_loss(more_labels, each.predict_proba(more)) for each in tried]
        best = int(np.argmin(losses))
        penalty = PENALTIES[best]
        assert val["penalty"][index] == penalty
        assert val["loss"][index] == pytest.approx(losses[best], rel=5e-3)
        both, both_labels = np.r_[inputs, more], np.r_[labels, more_labels]
        again = optimum(both, both_labels, penalty)
        for probe, reference, data in (
            (model.grid.kept[0].get_probe(index), tried[best], (inputs, labels)),
            (model.grid.final_probe(index), again, (both, both_labels)),
        ):
            lowest = objective(reference.coef_, reference.intercept_, *data, penalty)
            reached = objective(*probe, *data, penalty)
            assert reached == pytest.approx(lowest, rel=1e-4)
            assert reached / lowest - 1 <= val["excess"][index] + 1e-6
        accuracies.append((test["accuracy"][index], again.score(other, other_labels)))
    ours, theirs = np.mean(accuracies, axis=0)
    assert ours == pytest.approx(theirs, abs=0.002)
    assert (results["excess"] <= 1e-4).all()
    assert model.solver.remarks(model) == []


def test_probes_in_few_bits_reach_scikit_learns_optimum(fit):
    model, task = fit(Logistic(10.0), fractions=0.2, selection="pca", bits=2)
    for index in (index for index, probe in enumerate(model.probes) if probe.bits == 2):
        data = seen(model, task, index, "train")
        reference = optimum(*data, 10.0)
        lowest = objective(reference.coef_, reference.intercept_, *data, 10.0)
        assert objective(*model.grid.final_probe(index), *data, 10.0) == pytest.approx(lowest, rel=1e-3)


def test_a_probe_in_the_bank_takes_the_steps_that_it_takes_alone(fit):
    few = Logistic([1.0, 30.0], max_iterations=8)
    together, _ = fit(few)
    alone, _ = fit(few, selection="random", fractions=0.2, seeds=[1])
    for index, probe in enumerate(alone.probes):
        place = together.probes.index(probe)
        for mine, theirs in zip(alone.grid.final_probe(index), together.grid.final_probe(place), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_features_that_memory_does_not_hold_give_the_same_and_so_do_other_batches(fit, monkeypatch):
    settings = {"selection": "random", "fractions": 0.2, "seeds": [1]}
    once, _ = fit(Logistic(30.0), **settings)
    monkeypatch.setattr(penalised, "KEPT", 0)
    weights = once.grid.kept[0].weight
    for batch_size in (1000, 100):
        again, _ = fit(Logistic(30.0), batch_size=batch_size, **settings)
        torch.testing.assert_close(again.grid.kept[0].weight, weights, rtol=0, atol=2e-3 * float(weights.abs().max()))


def test_converged_probes_are_left_out_of_later_passes_and_the_others_end_where_they_would(fit, monkeypatch):
    settings = {"selection": "random", "seeds": 1}
    monkeypatch.setattr(penalised, "ROUND", 500)
    once, task = fit(Logistic(1.0), **settings)
    counts, starts, evaluate = [], {}, penalised._Whitened.evaluate

    def counted(part, vector):
        counts.append(len(part.bank.probes))
        result = evaluate(part, vector)
        for index, probe in enumerate(part.bank.probes):
            starts.setdefault(probe, (part.bank.get_probe(index)[0].double().numpy(), part.curvatures[probe.layer]))
        return result

    monkeypatch.setattr(penalised._Whitened, "evaluate", counted)
    monkeypatch.setattr(penalised, "ROUND", 5)
    again, _ = fit(Logistic(1.0), **settings)
    others = counts[counts.index(len(again.probes) - 2) :]
    assert counts[0] == 2  # full layers
    assert others == sorted(others, reverse=True)
    assert others[0] > others[-1]
    full = {probe.layer: index for index, probe in enumerate(again.probes) if probe.selection == "full"}
    for index, probe in enumerate(once.probes):
        if probe.selection != "full":  # begins where least squares puts it, from the logits of the full layer
            layer = full[probe.layer]
            (all_inputs, _), (inputs, _) = (seen(again, task, place, "train") for place in (layer, index))
            wanted, inputs = all_inputs @ again.grid.final_probe(layer)[0].double().numpy().T, inputs - inputs.mean(0)
            start, curvature = starts[probe]
            system = inputs.T @ inputs + 1.0 / curvature * np.eye(inputs.shape[1])
            np.testing.assert_allclose(start, np.linalg.solve(system, inputs.T @ wanted).T, atol=2e-3)
        reached = [
            objective(*model.grid.final_probe(index), *seen(model, task, index, "train"), 1.0)
            for model in (again, once)
        ]
        assert reached[0] == pytest.approx(reached[1], rel=1e-4)
    assert (again.grid.hyperparameters[0, :, 1] <= 1e-4).all()


def test_memory_counts_a_factor_for_every_selection_and_seed():
    plan = Plan("random", [0.5], 3).probes({"layer": 100})
    weights, factors = 10 * (101 + 3 * 51), 100**2 + 3 * 50**2
    needed = 4 * (weights * (4 + Logistic.copies) + factors)
    model = SimpleNamespace(probes=plan, solver=Logistic(), measures=[], refit=False, widths={"layer": 0})
    model.coordinates = SimpleNamespace(fitted=False, source_widths={"layer": 0})
    for free, fits in ((needed, True), (needed - 1, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "free_memory", lambda free=free: free)
            with contextlib.nullcontext() if fits else pytest.raises(MisconfigurationException, match="what logistic"):
                checks.memory(model, 10, 1)


def test_a_probe_that_has_not_converged_is_named(fit):
    model, _ = fit(Logistic(1e-2, max_iterations=4), fractions=0.02, seeds=1, selection="random")
    (remark,) = model.solver.remarks(model)
    assert remark.startswith("The optimum was not reached for layer3 full")


def test_a_real_fit_names_penalties(cli, tmp_path):
    status, out, err = cli(
        *("fit", "--config=quickstart.yaml", "--model.solver=Logistic", "--model.solver.penalty=[1,10]"),
        *("--model.fractions=[0.1]", "--model.seeds=1", "--trainer.logger=false", "--model.measures=Inequality"),
        *("--trainer.enable_progress_bar=false", "--name=converged", "--trainer.accelerator=cpu", "--pictures=[]"),
    )
    assert status == 0, err
    rows = pd.read_csv(tmp_path / "runs" / "converged" / "results.csv")
    assert set(rows["penalty"]) <= {1.0, 10.0}
    assert rows["solver"].unique() == "logistic"
    assert "To keep 90 % of the accuracy" in out
