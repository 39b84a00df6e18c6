import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import Digits
from lightning_modules import FrozenBackbone, RedundancyProbe
from lightning_modules.attacks import PGD
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.backbones.frozen import GivenVectors
from lightning_modules.measures import Robustness
from lightning_modules.probes import Logistic

KEYS = ["layer", "selection", "fraction", "seed"]
EPS, STEP = 0.4, 0.3


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Probes on standardised features of real digits, and what tests them anew with a measure."""
    backbone = FrozenBackbone(
        "resnet26",
        weights="digits_0to4.safetensors",
        kwargs={"channels": [12, 24, 48, 96], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8},
        pretrained_cfg_overlay=PretrainedCfgOverlay([3, 32, 32], [0.4, 0.5, 0.6], [0.5, 0.4, 0.3], "bilinear", 1.0),
    )
    before = copy.deepcopy(backbone.state_dict())
    task = Digits([5, 6, 7, 8, 9], batch_size=64)
    task.preprocessing = backbone.preprocessing
    solver = Logistic(penalty=[100.0])  # so that no two probabilities are so near to 1 that float32 has them equal
    model = RedundancyProbe(
        backbone, [0.05, 0.3], seeds=2, selection=["random", "pca"], solver=solver, standardise=True, measures=[]
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=1, use_distributed_sampler=False, default_root_dir=tmp_path_factory.mktemp("run"), **options
    )
    trainer.fit(model, datamodule=task)
    contexts = model.measures[0].context

    def measured(measure):
        model.measures[1:] = [measure]
        measure.setup(contexts)
        measure.reset()
        trainer.test(model, datamodule=task, verbose=False)
        return model.results().tables

    yield model, measured
    after = backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in backbone.parameters())


def plain_heads(model):
    """Features, and by name every attacked head, from features to the logarithm of probabilities, all in float64."""
    network = copy.deepcopy(model.backbone.network).double()
    mean, std = model.stream.mean.double(), model.stream.std.double()

    def single(index):
        weight, bias = (each.double() for each in model.grid.final_probe(index))
        subset, basis = model.coordinates.subset(index), model.coordinates.basis(index)

        def said(features):
            if basis is not None:
                features = (features - basis[1].double()) @ basis[0].double()
            return (features[:, subset] @ weight.T + bias).log_softmax(1)

        return said

    def together(members):
        return lambda features: torch.stack([member(features).exp() for member in members]).mean(0).log()

    heads = {
        (probe.selection, probe.fraction, str(probe.seed)): single(index) for index, probe in enumerate(model.probes)
    }
    for fraction in (0.05, 0.3):
        members = [heads["random", fraction, seed] for seed in "01"]
        heads["random", fraction, "all"] = together(members)
    return lambda images: (network(images) - mean) / std, heads


def plain_attack(head, image, label, mean, std):
    """Move one image, pixels (C, H, W), by three steps of the formula in L2."""
    moved = image.clone()
    for _ in range(3):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(-head(((moved - mean) / std)[None])[0, label], moved)
        change = moved.detach() + STEP * gradient / gradient.square().sum().sqrt() - image
        moved = (image + change * min(1.0, EPS / float(change.square().sum().sqrt()))).clamp(0, 1)
    return moved


def test_attacked_images_and_what_all_say_of_them_are_those_of_plain_loops(fitted, monkeypatch):
    model, measured = fitted
    seen, attack = [], PGD.__call__

    def spy(self, classify, images, labels, *rest):
        seen.append((images, labels, attack(self, classify, images, labels, *rest)))
        return seen[-1][-1]

    monkeypatch.setattr(PGD, "__call__", spy)
    tables = measured(Robustness(EPS, steps=3, step_size=STEP, images=9))
    rows = tables["transfer"]
    assert set(rows["images"]) == {9}
    mean, std = (torch.tensor(model.preprocessing[key]).double().view(3, 1, 1) for key in ("mean", "std"))
    pixels, moved = (torch.cat([each[place] for each in seen]).double() * std + mean for place in (0, 2))
    labels = torch.cat([each[1] for each in seen])
    assert 0.9 * EPS < (moved - pixels).flatten(1).norm(dim=1).max() < EPS + 1e-6
    assert moved.min() > -1e-6
    assert moved.max() < 1 + 1e-6

    features, heads = plain_heads(model)
    order = list(dict.fromkeys(zip(*(rows[f"source_{key}"] for key in KEYS[1:]), strict=True)))
    assert set(order) == set(heads)
    # Test batches of 64 come one after the other, and in each all images of one head after those of the next.
    batches = [int(part) for part in torch.bincount(model.measures[1].sample // 64) if part]
    counted = {(source, key): 0 for source in order for key in order}
    untouched = dict.fromkeys(order, 0)
    place, away = 0, []
    for size in batches:
        for source in order:
            for _ in range(size):
                image, label, found = pixels[place], labels[place], moved[place]
                expected = plain_attack(lambda x, s=source: heads[s](features(x)), image.clamp(0, 1), label, mean, std)
                away.append(float((found - expected).abs().max()))
                with torch.no_grad():
                    found_features = features((torch.stack([image, found]) - mean) / std)
                for key, head in heads.items():
                    both = head(found_features).argmax(1)
                    counted[source, key] += bool((both == label).all())
                    untouched[key] += bool(both[0] == label) and source == key
                place += 1
    assert place == len(pixels)
    assert sorted(away)[int(0.9 * len(away))] < 1e-5  # at the kink of a ReLU rounding decides where a step goes
    for row in rows.itertuples():
        source, key = row[2:5], row[6:9]
        assert row.accuracy == pytest.approx(counted[source, key] / 9), (source, key)
        assert row.unattacked_accuracy == pytest.approx(untouched[key] / 9)
        assert row.unattacked_accuracy >= row.accuracy
    results = tables["results"].query("split == 'test'").astype({"seed": str}).set_index(KEYS[1:])
    assert len(results) == 7
    for key, row in results.iterrows():
        assert row["robust_accuracy"] == pytest.approx(counted[key, key] / 9)
        assert row["unattacked_accuracy"] == pytest.approx(untouched[key] / 9)
    assert results["robust_accuracy"].max() < results["unattacked_accuracy"].max()


def test_only_what_is_asked_for_is_attacked_and_restarts_find_more(fitted):
    _, measured = fitted
    found = []
    for restarts in (1, 3):
        attack = {"eps": 0.05, "norm": "Linf", "steps": 1, "step_size": 0.02, "restarts": restarts}
        tables = measured(Robustness(**attack, images=None, fractions=0.3, seeds=[1]))
        rows = tables["results"].query("split == 'test'").set_index(KEYS[1:])["robust_accuracy"]
        assert set(rows.dropna().index) == {("full", 1.0, 0), ("random", 0.3, 1), ("pca", 0.3, 0)}
        assert set(tables["transfer"]["images"]) == {179}
        found.append(rows.dropna())
    assert (found[1] <= found[0]).all()
    assert (found[1] < found[0]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.0}, r"model\.measures\.eps is 0; in L2 it must be above 0\."),
        ({"eps": 4.0, "norm": "Linf"}, r"eps is 4; in Linf it must be above 0, at most 1"),
        ({"steps": 0}, r"steps is 0; it must be at least 1\."),
        ({"step_size": 0.0}, r"step_size is 0; it must be above 0\."),
        ({"images": 0}, r"model\.measures\.images is 0; it must be at least 1\."),
        ({"restarts": -1}, r"restarts is -1; it must be at least 0\."),
        ({"seeds": 0}, r"model\.measures\.seeds is 0; give a number of seeds"),
        ({"fractions": [0.2]}, r"model\.measures\.fractions has 0\.2; the run has 0\.05, 0\.3\."),
        ({"seeds": [0, 5]}, r"model\.measures\.seeds has 5; the run has 0, 1\."),
    ],
)
def test_what_cannot_be_attacked_is_refused(fitted, changes, message):
    model, _ = fitted
    with pytest.raises(MisconfigurationException, match=message):
        Robustness(**changes).setup(model.measures[0].context)


def test_vectors_cannot_be_attacked(fitted):
    model, _ = fitted
    stream = SimpleNamespace(extractor=SimpleNamespace(backbone=GivenVectors(384)))
    with pytest.raises(MisconfigurationException, match=r"lists Robustness, .*, but the task holds vectors"):
        Robustness().setup(dataclasses.replace(model.measures[0].context, stream=stream))
