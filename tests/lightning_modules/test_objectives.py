import re
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from datamodules import Digits
from lightning_modules import Pretraining
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.objectives import (
    Adversarial,
    CrossEntropy,
    DeCov,
    FixedWidth,
    Matryoshka,
    Objective,
    penultimate,
)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_and_its_gradient_are_those_of_the_formula(label_smoothing):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (7,), generator=generator)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5).double())
    loss = CrossEntropy(label_smoothing)(network, images, labels)
    loss.backward()
    weight, bias = (parameter.detach().numpy() for parameter in network.parameters())
    inputs = images.flatten(1).numpy()
    log_shares = log_softmax(inputs @ weight.T + bias, axis=1)
    target = np.eye(5)[labels] * (1 - label_smoothing) + label_smoothing / 5
    assert loss.item() == pytest.approx(-(target * log_shares).sum(), rel=1e-12)
    error = np.exp(log_shares) - target
    np.testing.assert_allclose(network[1].weight.grad, error.T @ inputs, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(network[1].bias.grad, error.sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.5, float("nan")])
def test_label_smoothing_is_a_share(label_smoothing):
    with pytest.raises(MisconfigurationException, match=r"label_smoothing is .*; it must be from 0 to 1"):
        CrossEntropy(label_smoothing)


class Small(nn.Module):
    """What objectives need of a timm model: 20 neurons, batch norm, a mean and deviation of its own, float64."""

    pretrained_cfg: ClassVar = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}

    def __init__(self, classifier=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Tanh())
        self.fc = nn.Linear(20, 5) if classifier is None else classifier
        self.double()

    def forward_features(self, images):
        return self.body(images)

    def forward_head(self, features, pre_logits=False):
        return features if pre_logits else self.fc(features)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

    def get_classifier(self):
        return self.fc


TARGET = SimpleNamespace(outputs=5)


def batch(count=9):
    """Images in [0, 1], normalised for `Small`, and labels."""
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(Small.pretrained_cfg[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    pixels[0, 0] = torch.tensor([[0, 1], [1, 0]])
    return (pixels - mean) / std, torch.randint(5, (count,), generator=generator), mean, std


def cross_entropy(logits, labels):
    return sum(logit.logsumexp(0) - logit[label] for logit, label in zip(logits, labels, strict=True))


def plain_decov(network, objective, images, labels):
    features = network.body(images)
    moved = features - features.mean(0)
    penalty = sum((moved[:, i] * moved[:, j]).mean() ** 2 for i in range(20) for j in range(20) if i != j) / 2
    covariances = np.cov(features.detach().T.numpy(), bias=True)
    assert penalty.item() == pytest.approx(((covariances**2).sum() - (covariances.diagonal() ** 2).sum()) / 2)
    return cross_entropy(network.fc(features), labels) + 0.3 * len(labels) * penalty


def plain_matryoshka(network, objective, images, labels):
    features = network.body(images)
    heads = [(head.weight, head.bias) for head in objective.heads]
    if objective.shared:
        heads = [(network.fc.weight[:, :width], network.fc.bias) for width in (3, 8)]
    logits = [features[:, : weight.shape[1]] @ weight.T + bias for weight, bias in heads]
    assert [weight.shape[1] for weight, _ in heads] == [3, 8]
    return sum(cross_entropy(each, labels) for each in (*logits, network.fc(features)))


def plain_fixed_width(network, objective, images, labels):
    seen = torch.arange(20) < 6
    return cross_entropy(network.fc(network.body(images) * seen), labels)


@pytest.mark.parametrize(
    ("objective", "plain"),
    [
        (DeCov(0.3), plain_decov),
        (Matryoshka([8, 3, 20]), plain_matryoshka),
        (Matryoshka([3, 8], shared=True), plain_matryoshka),
        (FixedWidth(6), plain_fixed_width),
    ],
    ids=["DeCov", "Matryoshka", "Matryoshka, shared", "FixedWidth"],
)
def test_a_loss_and_its_gradient_are_those_of_its_formula(objective, plain):
    network, (images, labels, *_) = Small(), batch()
    objective.setup(network, TARGET)
    objective.double()
    parameters = [*network.parameters(), *objective.parameters()]
    losses = [objective(network, images, labels), plain(network, objective, images, labels)]
    found, expected = (torch.autograd.grad(loss, parameters) for loss in losses)
    assert losses[0].shape == ()
    assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)
    assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_covariances_are_not_of_half_precision():
    network, (images, labels, *_) = Small().float(), batch()
    network.forward_features = lambda images: 1000 * network.body[1](images.flatten(1))
    losses = []
    for half in (False, True):
        with torch.autocast("cpu", torch.float16, half):
            losses.append(DeCov(1.0)(network, images.float(), labels).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_widths_are_doubled_up_to_the_layers_own():
    objective = Matryoshka()
    objective.setup(Small(), TARGET)
    assert [(head.in_features, head.out_features) for head in objective.heads] == [(8, 5), (16, 5)]


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_network_itself_says_what_its_first_neurons_do(optimiser):
    network, objective, (images, labels, *_) = Small(), FixedWidth(6), batch()
    objective.setup(network, TARGET)
    steps = optimiser(network.parameters(), weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        objective(network, images, labels).backward()
        steps.step()
    network.eval()
    features = network.body(images)
    assert_close(network(images), features[:, :6] @ network.fc.weight[:, :6].T + network.fc.bias)
    assert (features[:, 6:].abs() > 0.1).any()


# Attacks


class Linear(nn.Module):
    """A linear network, whose gradients are known by hand."""

    pretrained_cfg = Small.pretrained_cfg

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(12, 5).double()

    def forward(self, images):
        return self.fc(images.flatten(1))


@pytest.mark.parametrize(("norm", "eps", "step_size"), [("L2", 0.4, None), ("L2", 0.4, 0.1), ("Linf", 0.1, 0.04)])
def test_an_attack_is_that_of_plain_loops(norm, eps, step_size):
    network, (images, labels, mean, std) = Linear(), batch()
    found = Adversarial(eps, norm, 4, step_size).attack(network, images, labels)
    weight, bias = (parameter.detach().numpy() for parameter in network.parameters())
    scale, step = np.broadcast_to(std.numpy(), (3, 2, 2)), step_size or eps / 2
    for image, label, moved in zip((images * std + mean).numpy(), labels, found, strict=True):
        x = image.copy()
        for _ in range(4):
            error = softmax(weight @ ((x - mean.numpy()) / scale).ravel() + bias) - np.eye(5)[label]
            gradient = (error @ weight).reshape(3, 2, 2) / scale
            if norm == "L2":
                change = x + step * gradient / np.sqrt((gradient**2).sum()) - image
                change *= min(1, eps / np.sqrt((change**2).sum()))
            else:
                change = np.clip(x + step * np.sign(gradient) - image, -eps, eps)
            x = np.clip(image + change, 0, 1)
        np.testing.assert_allclose(moved * std + mean, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("within", ["training", "validation", "half", "half validation"])
def test_an_attack_stays_in_its_ball_and_raises_the_loss_and_changes_nothing_else(norm, random_start, within):
    network, (images, labels, mean, std) = Small(), batch()
    network.body.append(nn.Dropout(0.5))
    if "half" in within:
        network, images = network.float(), images.float()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    eps = 0.3 if norm == "L2" else 0.1
    objective = Adversarial(eps, norm, random_start=random_start)
    with torch.inference_mode("validation" in within), torch.autocast("cpu", torch.bfloat16, "half" in within):
        given = images * 1  # in inference mode, a tensor of its kind
        moved = objective.attack(network, given, labels.clone())
        network.eval()(given)  # leaves weights of half precision behind
        network.train()
        again = objective.attack(network, given, labels.clone())
    assert network.training
    assert torch.equal(moved, again) != random_start
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    before, after = (each * std + mean for each in (images, moved.clone()))
    change = (after - before).flatten(1)
    lengths = change.norm(dim=1) if norm == "L2" else change.abs().amax(1)
    assert lengths.max() <= eps + 1e-6
    assert lengths.median() > 0.8 * eps
    assert after.min() >= -1e-6
    assert after.max() <= 1 + 1e-6
    network.eval()
    losses = [F.cross_entropy(network(each), labels, reduction="none") for each in (images, moved.clone())]
    assert (losses[1] > losses[0]).all()


def test_random_starts_fill_the_ball():
    images = torch.zeros(4000, 3, 1, 1).double()  # of three dimensions
    inside = Adversarial(0.2, "L2", 1, 1e-9, random_start=True)
    change = inside.pgd.random(images + 0.5) - 0.5
    radii = change.flatten(1).norm(dim=1)
    assert radii.max() <= 0.2 + 1e-9
    assert float((radii < 0.1).double().mean()) == pytest.approx(1 / 8, abs=0.02)  # the volume of half the radius
    np.testing.assert_allclose(change.mean(0).flatten(), 0, atol=0.01)


def test_half_precision_moves_images_whose_loss_it_would_round_to_nothing():
    network, (images, labels, _, std) = Linear().float(), batch()
    with torch.no_grad():
        network.fc.weight.mul_(0.01)
        network.fc.bias.copy_(20 * F.one_hot(torch.tensor(2), 5))
    labels = torch.full_like(labels, 2)  # of probability 1 - 1e-8
    with torch.autocast("cpu", torch.float16):
        moved = Adversarial(0.3, steps=1).attack(network, images.float(), labels)
    assert ((moved.double() - images) * std).flatten(1).norm(dim=1).median() > 0.25


def test_adversarial_cross_entropy_is_that_of_the_attacked_images():
    network, objective, (images, labels, *_) = Small(), Adversarial(0.3), batch()
    attacked = objective.attack(network, images, labels)
    losses = objective(network, images, labels), cross_entropy(network(attacked), labels)
    assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, tuple(network.parameters())) for loss in losses]
    assert_close(gradients[0], gradients[1])


# Wrong input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Adversarial(0.0), "eps is 0; in L2 it must be above 0"),
        (lambda: Adversarial(-1.0, "Linf"), "eps is -1; in Linf it must be above 0, at most 1"),
        (lambda: Adversarial(8.0, "Linf"), "eps is 8; in Linf it must be above 0, at most 1"),
        (lambda: Adversarial(float("nan")), "eps is nan"),
        (lambda: Adversarial(1.0, steps=0), "steps is 0; it must be at least 1"),
        (lambda: Adversarial(1.0, step_size=0.0), "step_size is 0; it must be above 0"),
        (lambda: DeCov(-1.0), "alpha is -1; it must be 0 or more"),
        (
            lambda: Matryoshka([8, 21]).setup(Small(), TARGET),
            "Matryoshka of width 21; it must be from 1 to 20, the neur",
        ),
        (lambda: Matryoshka([0]).setup(Small(), TARGET), "Matryoshka of width 0; it must be from 1 to 20"),
        (lambda: FixedWidth(21).setup(Small(), TARGET), "FixedWidth of width 21; it must be from 1 to 20"),
        (
            lambda: DeCov().setup(Small(nn.Identity()), TARGET),
            "DeCov, which needs one linear classifier; Small has no c",
        ),
        (
            lambda: Matryoshka().setup(nn.Flatten(), TARGET),
            "Matryoshka, which needs one linear classifier; Flatten has n",
        ),
        (
            lambda: FixedWidth(2).setup(Small(nn.Bilinear(2, 2, 2)), TARGET),
            "needs one linear classifier; Small has Bil",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, said):
    with pytest.raises(MisconfigurationException, match=re.escape(said)) as error:
        make()
    assert "\n" not in str(error.value)


# In training


class Auxiliary(Objective):
    """An objective of one's own, with a further head on some first neurons."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def setup(self, network, target):
        self.head = nn.Linear(self.width, target.outputs)

    def forward(self, network, images, labels):
        features = penultimate(network, images)
        logits = network.get_classifier()(features), self.head(features[:, : self.width])
        return sum(F.cross_entropy(each, labels, reduction="sum") for each in logits)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (Auxiliary(8), "Auxiliary(width=8)"),
        (Matryoshka([8, 24]), "Matryoshka(widths=[8, 24], shared=False)"),
        (
            Adversarial(0.5),
            "Adversarial(eps=0.5, norm='L2', steps=3, step_size=None, random_start=False)",
        ),
    ],
    ids=["one's own", "Matryoshka", "Adversarial"],
)
def test_an_objective_has_the_network_and_heads_to_train(tmp_path, objective, said):
    overlay = PretrainedCfgOverlay([3, 8, 8], [0.5] * 3, [0.5] * 3, "bilinear", 1.0)
    model = Pretraining("test_resnet", str(tmp_path / "weights.safetensors"), None, overlay, objective)
    task = Digits([0, 1], batch_size=64)
    task.preprocessing = model.preprocessing
    assert model.describe(task)["objective"] == said
    trainer = Trainer(
        max_epochs=1,
        default_root_dir=tmp_path,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "accelerator": "cpu"},
    )
    torch.manual_seed(0)
    initial = {}
    setup = objective.setup

    def remember(network, target):
        setup(network, target)
        parameters = [*network.named_parameters(), *objective.named_parameters()]
        initial.update({name: value.detach().clone() for name, value in parameters})

    objective.setup = remember
    trainer.fit(model, task)
    final = dict([*model.network.named_parameters(), *objective.named_parameters()])
    assert final.keys() == initial.keys()
    assert [name for name, value in final.items() if torch.equal(value, initial[name])] == []
    backbone = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert load_file(tmp_path / "weights.safetensors").keys() == backbone.keys()
