"""Real fits on real images, through the Trainer: the invariants of training, and independent implementations."""

import copy
import csv
import tempfile
import zlib

import numpy as np
import pytest
import torch
from evaluation import quantised
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn import linear_model

from datamodules import Digits, Embeddings
from lightning_modules import FrozenBackbone, RedundancyProbe
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.probes import Solver
from lightning_modules.probes.bank import ProbeBank
from lightning_modules.probes.ridge import Ridge
from lightning_modules.probes.sgd import SGD

OVERLAY = PretrainedCfgOverlay([3, 32, 32], [0.5] * 3, [0.5] * 3, "bilinear", 1.0)
KWARGS = {"channels": [12, 24, 48, 96], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8}
FEATURES = tempfile.TemporaryDirectory()
"""Where fits that look at the same images find what another has extracted."""


def build(layer="penultimate", **changes):
    """Return the quickstart's model, with changes."""
    backbone = FrozenBackbone("resnet26", "digits_0to4.safetensors", KWARGS, OVERLAY, layer)
    settings = {"fractions": [0.02, 0.1, 0.5], "seeds": 2, "cache_dir": FEATURES.name}
    return RedundancyProbe(backbone, **settings | changes)


def fit(folder, model, epochs=3, data=None, **trainer):
    """Fit on the digits 5 to 9 and return the model, its task and its trainer."""
    seed_everything(0)
    task = Digits([5, 6, 7, 8, 9], **{"batch_size": 64, "num_workers": 0, **(data or {})})
    task.preprocessing = model.preprocessing
    trainer = Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        **{
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "accelerator": "cpu",
            **trainer,
        },
    )
    trainer.fit(model, datamodule=task)
    trainer.validate(model, datamodule=task, verbose=False)
    trainer.test(model, datamodule=task, verbose=False)
    return model, task, trainer


@pytest.mark.parametrize("features", ["clean", 2, "off"])
def test_the_backbone_is_bit_identical_after_a_fit(tmp_path, features):
    model = build(features=features)
    before = copy.deepcopy(model.backbone.state_dict())
    fit(tmp_path, model, data={"augmentation": "paper"}, epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.backbone.parameters())
    assert not torch.equal(ProbeBank(model.probes, 5).weight, model.grid.banks[0].weight)


def test_without_augmentation_features_kept_give_what_features_off_does(tmp_path):
    once, _, _ = fit(tmp_path / "once", build(cache_dir=None), data={"augmentation": "none"}, epochs=2)
    always, _, _ = fit(
        tmp_path / "always", build(cache_dir=None, features="off"), data={"augmentation": "none"}, epochs=2
    )
    torch.testing.assert_close(once.grid.banks[0].weight, always.grid.banks[0].weight, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "once" / "feature_cache").is_dir()
    assert not (tmp_path / "always" / "feature_cache").exists()


def test_augmented_views_differ_and_are_cycled(tmp_path):
    model, task, _ = fit(tmp_path, build(features=2), data={"augmentation": "paper", "view": "squash"})
    first, second = task.features("train")
    everything = torch.arange(len(first))
    assert not torch.allclose(first[everything], second[everything], atol=1e-2)
    results = model.results().tables["results"]
    assert results[["features", "augmentation", "view"]].drop_duplicates().to_numpy().tolist() == [
        [2, "paper", "squash"]
    ]
    assert model.describe(task)["features"] == "2 augmented views, images squashed whole to the input size"


def test_probes_in_a_run_do_not_feel_each_other(tmp_path):
    together, _, _ = fit(tmp_path, build(selection=["random", "first"]))
    alone, _, _ = fit(tmp_path, build(fractions=0.1, seeds=[1]))
    index = together.probes.index(alone.probes[1])
    for mine, theirs in zip(alone.grid.banks[0].get_probe(1), together.grid.banks[0].get_probe(index), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_accuracies_and_losses_are_those_of_numpy(tmp_path):
    model, task, _ = fit(tmp_path, build())
    labels = task.images["test"].labels.numpy()
    inputs = task.features("test")[0][torch.arange(len(labels))].numpy()
    results = model.results().tables["results"]
    for index in range(len(model.probes)):
        weight, bias = (part.numpy() for part in model.grid.kept[0].get_probe(index))
        logits = inputs[:, model.coordinates.subset(index).numpy()] @ weight.T + bias
        right = logits.argmax(1) == labels
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        loss = (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]).mean()
        row = results[(results["split"] == "test")].iloc[index]
        assert row["accuracy"] * row["images"] == pytest.approx(right.sum(), abs=1e-9)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_trained_to_the_optimum_probes_agree_with_scikit_learn(tmp_path):
    decay = 5e-2
    model, task, _ = fit(
        tmp_path,
        build(standardise=True, solver=SGD(0.05, weight_decay=decay, keep="last", step_size=1000)),
        epochs=400,
        data={"batch_size": 538},
        check_val_every_n_epoch=400,
    )
    parts = {}
    for split in ("train", "test"):
        labels = task.images[split].labels
        values = task.features(split)[0][torch.arange(len(labels))].double().numpy()
        parts[split] = values, labels.numpy()
    mean, std = parts["train"][0].mean(0), parts["train"][0].std(0)
    std[std < 1e-9] = 1
    results = model.results().tables["results"]
    for index, row in enumerate(results[results["split"] == "test"].itertuples()):
        subset = model.coordinates.subset(index).numpy()
        # The bias is penalised like a weight here, so it is one: a neuron that is always one.
        sliced = {
            split: np.c_[((values - mean) / std)[:, subset], np.ones(len(values))]
            for split, (values, _) in parts.items()
        }
        reference = linear_model.LogisticRegression(
            C=1 / (len(sliced["train"]) * decay), fit_intercept=False, max_iter=5000, tol=1e-8
        )
        reference.fit(sliced["train"], parts["train"][1])
        assert row.accuracy == pytest.approx(reference.score(sliced["test"], parts["test"][1]), abs=0.01)
        weight, _ = model.grid.kept[0].get_probe(index)
        np.testing.assert_allclose(weight.numpy(), reference.coef_[:, :-1], atol=1e-3)


def read_metrics(folder):
    rows = csv.DictReader(next(folder.rglob("metrics.csv")).open())
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def test_each_probe_keeps_its_earliest_best_epoch(tmp_path):
    model, _, _ = fit(tmp_path, build(seeds=[3]), epochs=12, logger=CSVLogger(tmp_path))
    history = [row for row in read_metrics(tmp_path) if "val/accuracy/full/1" in row][:12]
    results = model.results().tables["results"]
    kept = results[results["split"] == "val"]
    assert kept["epoch"].nunique() > 1
    for row in kept.itertuples():
        accuracies = [epoch[f"val/accuracy/{row.selection}/{row.fraction:g}"] for epoch in history]
        assert row.epoch == int(np.argmax(accuracies))
        assert row.accuracy == pytest.approx(max(accuracies), abs=1e-6)


def test_the_last_epoch_is_kept_where_that_is_asked_for(tmp_path):
    model, _, _ = fit(tmp_path, build(solver=SGD(keep="last")), epochs=4, check_val_every_n_epoch=3)
    assert model.results().tables["results"]["epoch"].unique().tolist() == [3]
    assert torch.equal(model.grid.kept[0].weight, model.grid.banks[0].weight)


def test_a_sweep_keeps_each_probes_best_rate_on_validation(tmp_path):
    rates = [0.1, 0.0001]
    swept, _, _ = fit(tmp_path, build(solver=SGD(rates, weight_decay=[0.0])), epochs=5)
    single = [fit(tmp_path, build(solver=SGD(rate, weight_decay=0.0)), epochs=5)[0] for rate in rates]
    val = [
        model.results().tables["results"].query("split == 'val'")["accuracy"].to_numpy() for model in (swept, *single)
    ]
    np.testing.assert_allclose(val[0], np.maximum(val[1], val[2]), atol=1e-9)
    chosen = swept.results().tables["results"].query("split == 'val'")["learning_rate"].to_numpy()
    np.testing.assert_array_equal(chosen, np.where(val[1] >= val[2], *rates))


def test_a_refit_trains_on_train_and_validation_for_the_epochs_that_were_chosen(tmp_path):
    rates, decay, drop = [0.05, 0.002], 1e-2, 3
    settings = {"solver": SGD(rates, weight_decay=decay, step_size=drop), "fractions": [0.02, 0.1], "standardise": True}
    model, task, _ = fit(tmp_path, build(**settings, refit=True), epochs=6)
    before, _, _ = fit(tmp_path, build(**settings), epochs=6)
    (refitted, once), by_split = (each.results().tables["results"] for each in (model, before)), ["split"]
    val, val_before = (dict(list(each.groupby(by_split)))["val",] for each in (refitted, once))
    assert val.equals(val_before)  # measured before the refit, as it chose
    assert val[["learning_rate", "epoch"]].drop_duplicates().shape[0] > 1
    (train, labels), (more, more_labels) = (rows_of(task, split) for split in ("train", "val"))
    std = train.std(0)
    inputs = (np.r_[train, more] - train.mean(0)) / np.where(std < 1e-9, 1, std)
    targets = np.eye(5)[np.r_[labels, more_labels]]
    test, test_labels = rows_of(task, "test")
    test = (test - train.mean(0)) / np.where(std < 1e-9, 1, std)
    for index, chosen in enumerate(val.itertuples()):
        subset = model.coordinates.subset(index).numpy()
        state = [part.double().numpy() for part in ProbeBank(model.probes, 5).get_probe(index)]  # as it starts
        speed = [np.zeros_like(part) for part in state]
        for epoch in range(chosen.epoch + 1):
            shuffled = torch.Generator().manual_seed(zlib.crc32(f"{task.seed}/{epoch}".encode()))
            for rows in torch.randperm(len(inputs), generator=shuffled).split(64):
                seen = inputs[rows][:, subset]
                powers = np.exp(seen @ state[0].T + state[1])
                errors = (powers / powers.sum(1, keepdims=True) - targets[rows]) / len(rows)
                for place, slope in enumerate((errors.T @ seen, errors.sum(0))):
                    speed[place] = 0.9 * speed[place] + slope + decay * state[place]
                    state[place] = state[place] - chosen.learning_rate * 0.1 ** (epoch // drop) * speed[place]
        for mine, theirs in zip(model.grid.final_probe(index), state, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
        right = ((test[:, subset] @ state[0].T + state[1]).argmax(1) == test_labels).mean()
        measured = refitted.query("split == 'test'")["accuracy"].iloc[index]
        assert measured == pytest.approx(right, abs=1.1 / len(test))  # an image may lie on a border


def test_a_refit_that_did_not_come_or_cannot_is_told(tmp_path, monkeypatch):
    stop = LambdaCallback(on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", True))
    with pytest.raises(
        MisconfigurationException, match=r"before the last of trainer\.max_epochs, after which model\.re"
    ):
        fit(tmp_path, build(refit=True), callbacks=[stop])
    save = LambdaCallback(on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(tmp_path / "halfway.ckpt"))
    _, task, trainer = fit(tmp_path, build(refit=True), callbacks=[save])
    with pytest.raises(MisconfigurationException, match="did not come to its refit"):
        trainer.test(build(refit=True), datamodule=task, ckpt_path=tmp_path / "halfway.ckpt")
    monkeypatch.setattr(Ridge, "refit", Solver.refit)
    with pytest.raises(MisconfigurationException, match=r"solver ridge cannot refit; leave model\.refit false"):
        fit(tmp_path, build(refit=True, solver=Ridge()))


def test_metric_names_and_means_are_those_of_the_contract(tmp_path):
    model, _, trainer = fit(tmp_path, build())
    results = model.results().tables["results"].query("split == 'test'")
    for (selection, fraction), rows in results.groupby(["selection", "fraction"]):
        logged = trainer.logged_metrics[f"test/accuracy/{selection}/{fraction:g}"].item()
        assert logged == pytest.approx(rows["accuracy"].mean(), abs=1e-6)


def test_steps_too_long_for_the_papers_projection_are_named_and_shorter_ones_train_it(tmp_path, caplog):
    settings = {"selection": "positive_projection", "fractions": [0.01, 0.5]}
    fit(tmp_path, build(**settings), epochs=1)
    assert "past the edge of stability at 3.8, for positive_projection 0.01 (x2), positive_projection" in caplog.text
    model, task, _ = fit(tmp_path, build(**settings, solver=SGD(5e-4)), epochs=20)
    columns = torch.rand(384, 384, generator=torch.Generator().manual_seed(1))
    columns = columns / columns.norm(dim=0)
    features = torch.from_numpy(rows_of(task, "test")[0]).float()
    start = sum(group.sizes[-1] for group in model.coordinates.groups[:-1])
    torch.testing.assert_close(model.coordinates(features)[start:].t(), features @ columns[:, :192])
    assert not any("diverged" in remark for remark in model.solver.remarks(model))
    accuracies = model.results().tables["results"].query("split == 'test' and fraction == 0.5")["accuracy"]
    assert accuracies.min() > 0.4  # of five digits


def test_a_diverging_probe_is_named(tmp_path):
    model, _, _ = fit(tmp_path, build(solver=SGD(3000.0)), epochs=2)
    assert any("diverged for full" in remark and "\n" not in remark for remark in model.solver.remarks(model))


def test_an_unfinished_training_is_named(tmp_path):
    model, _, _ = fit(tmp_path, build(solver=SGD(1e-3), standardise=True), epochs=3)
    assert any("not finished for full, random 0.02 (x2)" in remark for remark in model.solver.remarks(model))


def test_steps_past_the_edge_of_stability_are_named(tmp_path, caplog):
    fit(tmp_path, build(solver=SGD(5.0)), epochs=1)
    assert "past the edge of stability at 3.8, for full" in caplog.text
    caplog.clear()
    fit(tmp_path, build(solver=SGD(1e-4)), epochs=1)
    assert "past the edge" not in caplog.text


def test_features_that_are_not_finite_end_with_the_layer_and_the_image(tmp_path):
    model = build()
    with torch.no_grad():
        model.backbone.network.bn1.weight.fill_(float("nan"))
    with pytest.raises(MisconfigurationException, match=r"^Layer 'penultimate' of .* not finite for image 0 of train"):
        fit(tmp_path, model)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val"), ({"precision": "bf16-true"}, "trainer.precision")],
)
def test_what_would_let_probes_feel_each_other_or_round_them_is_refused(tmp_path, trainer, said):
    with pytest.raises(MisconfigurationException, match=said):
        fit(tmp_path, build(), **trainer)


# ------------------------------------------------------------------------------- one pass, every measure


def rows_of(task, split):
    """The features of a split and its labels."""
    labels = task.images[split].labels
    return task.features(split)[0][torch.arange(len(labels))].double().numpy(), labels.numpy()


def test_layers_read_in_one_pass_are_those_read_alone(tmp_path):
    both = build(layer=["layer2", "penultimate"])
    together, task, _ = fit(tmp_path, both)
    assert together.widths == {"layer2": 96, "penultimate": 384}
    results = together.results().tables["results"]
    assert results.groupby(["layer", "split"])["selection"].apply(lambda names: (names == "full").sum()).eq(1).all()
    start = 0
    for layer, width in together.widths.items():
        alone, alone_task, _ = fit(tmp_path / layer, build(layer=layer))
        values, _ = rows_of(alone_task, "test")
        np.testing.assert_allclose(rows_of(task, "test")[0][:, start : start + width], values, atol=1e-5)
        start += width
        for index, probe in enumerate(alone.probes):
            mine = together.grid.banks[0].get_probe(together.probes.index(probe))
            for one, other in zip(mine, alone.grid.banks[0].get_probe(index), strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("standardise", "refit", "bits"), [(False, False, 32), (True, False, 32), (True, True, 32), (False, True, [4, 1])]
)
def test_ridge_probes_are_those_of_scikit_learn(tmp_path, standardise, refit, bits):
    penalties = [1e-3, 1e-1, 10.0]
    settings = {"selection": ["random", "pca", "fisher"], "standardise": standardise, "refit": refit, "bits": bits}
    model, task, _ = fit(tmp_path, build(solver=Ridge(penalties), **settings))
    (train, labels), (val, val_labels), (test, test_labels) = (rows_of(task, s) for s in ("train", "val", "test"))
    if standardise:
        mean, std = train.mean(0), train.std(0)
        std[std < 1e-9] = 1
        train, val, test = ((part - mean) / std for part in (train, val, test))
    final, final_labels = (np.r_[train, val], np.r_[labels, val_labels]) if refit else (train, labels)
    results = model.results().tables["results"]
    judged, results = (results[results["split"] == split].reset_index() for split in ("val", "test"))
    for index, row in enumerate(results.itertuples()):
        probe, subset = model.probes[index], model.coordinates.subset(index).numpy()
        basis, parts = model.coordinates.basis(index), (train, val, test, final)
        scale, final_scale = (part.var(0).mean() * len(part) for part in (train, final))
        if basis is not None:
            parts = [(part - basis[1].double().numpy()) @ basis[0].double().numpy() for part in parts]
        if probe.bits < 32:
            parts = [quantised(part, parts[0], probe.bits).astype(float) for part in parts]
            scale, final_scale = (parts[place].var(0).mean() * len(parts[place]) for place in (0, 3))
        seen = [part[:, subset] for part in parts]
        fits = [linear_model.Ridge(alpha=penalty * scale).fit(seen[0], np.eye(5)[labels]) for penalty in penalties]
        errors = [np.square(each.predict(seen[1]) - np.eye(5)[val_labels]).sum(1).mean() for each in fits]
        best = int(np.argmin(errors))
        assert row.penalty == penalties[best]
        assert judged["loss"][index] == pytest.approx(errors[best], rel=1e-4)
        ends = linear_model.Ridge(alpha=penalties[best] * final_scale).fit(seen[3], np.eye(5)[final_labels])
        if probe.bits == 32 or basis is None:  # where components lie between two levels, rounding decides
            assert row.accuracy == (ends.predict(seen[2]).argmax(1) == test_labels).mean()
            np.testing.assert_allclose(model.grid.final_probe(index)[0], ends.coef_, rtol=1e-4, atol=1e-6)
        assert row.loss == pytest.approx(
            np.square(ends.predict(seen[2]) - np.eye(5)[test_labels]).sum(1).mean(), rel=1e-4
        )


@pytest.mark.parametrize("features", ["clean", 2, "off"])
def test_what_depends_on_the_images_comes_from_the_clean_view_of_train(tmp_path, features):
    model, _, _ = fit(tmp_path, build(selection=["pca"], features=features), data={"augmentation": "paper"}, epochs=1)
    clean, _, _ = fit(tmp_path / "clean", build(selection=["pca"]), epochs=1)
    for name, value in clean.coordinates.state_dict().items():
        torch.testing.assert_close(model.coordinates.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_images_find_those_of_their_class_in_train(tmp_path):
    model, task, _ = fit(tmp_path, build(), data={"target": "retrieval"})
    assert task.label == "digits_retrieval"
    assert model.solver.name == "search"
    (train, labels), (test, wanted) = rows_of(task, "train"), rows_of(task, "test")
    rows = model.results().tables["results"].query("split == 'test'").reset_index()
    discounts = 1 / np.log2(np.arange(2, 12))
    for index, probe in enumerate(model.probes):
        seen = torch.randperm(384, generator=torch.Generator().manual_seed(probe.seed)).numpy()[: probe.neurons]
        stored, asked = (part[:, seen] for part in (train, test))
        stored, asked = (part / np.linalg.norm(part, axis=1, keepdims=True).clip(1e-30) for part in (stored, asked))
        found = labels[np.argsort(-(asked @ stored.T).astype(np.float32), axis=1, kind="stable")[:, :10]]
        gains = found == wanted[:, None]
        assert rows["ndcg@10"][index] == pytest.approx((gains @ discounts).mean() / discounts.sum(), abs=1e-6)
        assert rows["recall@10"][index] == pytest.approx((gains.sum(1) / np.bincount(labels)[wanted]).mean(), abs=1e-6)
    with pytest.raises(MisconfigurationException, match="Ranking needs model"):
        fit(tmp_path, build(features="off"), data={"target": "retrieval"})


def test_vectors_need_no_backbone(tmp_path):
    _, task, _ = fit(tmp_path, build(), epochs=1)
    vectors, _ = rows_of(task, "train")
    np.savez(tmp_path / "vectors.npz", features=vectors, labels=task.images["train"].labels)
    model = RedundancyProbe(None, fractions=[0.1, 0.5], solver=Ridge())
    trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=Embeddings(str(tmp_path / "vectors.npz")))
    assert (model.label, model.widths) == ("none_random", {"none": 384})
    assert trainer.current_epoch == 0
    with pytest.raises(MisconfigurationException, match="holds images; name a backbone"):
        fit(tmp_path, RedundancyProbe(None))
