import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from scipy.special import log_softmax
from torch import nn
from torch.nn import functional as F

from datamodules import Digits
from lightning_modules import Pretraining
from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.objectives import CrossEntropy, Objective


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


# What others may write in a file of their own


def penultimate(network, images):
    return network.forward_head(network.forward_features(images), pre_logits=True)


class Matryoshka(Objective):
    """Has a head of its own for each of some first neurons (Kusupati et al., 2022)."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths

    def setup(self, network, target):
        self.heads = nn.ModuleList(nn.Linear(width, target.outputs) for width in self.widths)

    def forward(self, network, images, labels):
        features = penultimate(network, images)
        logits = [head(features[:, : head.in_features]) for head in self.heads] + [network.get_classifier()(features)]
        return sum(F.cross_entropy(each, labels, reduction="sum") for each in logits)


class DeCov(Objective):
    """Adds the squared covariances of neurons (Cogswell et al., 2016)."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, network, images, labels):
        features = penultimate(network, images)
        covariances = features.T.cov(correction=0)
        penalty = 0.5 * (covariances.square().sum() - covariances.diagonal().square().sum())
        cross_entropy = F.cross_entropy(network.get_classifier()(features), labels, reduction="sum")
        return cross_entropy + len(labels) * self.strength * penalty


class Adversarial(Objective):
    """Takes the loss at images moved by `epsilon` in each pixel, against the network (Goodfellow et al., 2015)."""

    def __init__(self, epsilon: float = 8 / 255) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, network, images, labels):
        mean, std = (images.new_tensor(network.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
        moved = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), labels), moved)
        moved = (images + self.epsilon / std * gradient.sign()).clamp(-mean / std, (1 - mean) / std)
        return F.cross_entropy(network(moved), labels, reduction="sum")


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (Matryoshka([8, 24]), "Matryoshka(widths=[8, 24])"),
        (DeCov(), "DeCov(strength=0.1)"),
        (Adversarial(0.5), "Adversarial(epsilon=0.5)"),
    ],
    ids=["Matryoshka", "DeCov", "Adversarial"],
)
def test_an_objective_of_ones_own_has_the_network_and_heads_to_train(tmp_path, objective, said):
    overlay = PretrainedCfgOverlay([3, 32, 32], [0.5] * 3, [0.5] * 3, "bilinear", 1.0)
    model = Pretraining("test_resnet", str(tmp_path / "weights.safetensors"), None, overlay, objective)
    task = Digits([0, 1], batch_size=64)
    task.preprocessing = model.preprocessing
    assert model.describe(task)["objective"] == said
    trainer = Trainer(
        max_epochs=2,
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
