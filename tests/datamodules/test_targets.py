"""What a target says of labels and logits, against loops over images."""

import math

import numpy as np
import pytest
import torch
from replicas import refusal

from datamodules import Digits
from datamodules.images import ArrayImages
from datamodules.targets import Multiclass

TARGET = Multiclass(["ant", "bee", "cow"])
LABELS = torch.tensor([2, 0, 0, 1])
LOGITS = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))  # probes, classes, images


def labelled(labels):
    return ArrayImages(np.zeros((len(labels), 8, 8), np.uint8), torch.tensor(labels))


def test_losses_are_summed_over_images_for_each_probe():
    for probe in range(5):
        images = [(LOGITS[probe, :, i].double(), int(LABELS[i])) for i in range(4)]
        cross_entropy = sum(math.log(sum(math.exp(v) for v in each)) - float(each[label]) for each, label in images)
        squared = sum((float(v) - (c == label)) ** 2 for each, label in images for c, v in enumerate(each))
        assert TARGET.loss(LOGITS, LABELS)[probe].item() == pytest.approx(cross_entropy, rel=1e-5)
        assert TARGET.squared_error(LOGITS, LABELS)[probe].item() == pytest.approx(squared, rel=1e-5)
    assert TARGET.squared_error(LOGITS, LABELS).dtype == torch.float32
    assert TARGET.squared_error(LOGITS.double(), LABELS).dtype == torch.float64


def test_least_squares_regresses_on_one_hot_labels():
    expected = torch.tensor([[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    assert torch.equal(TARGET.matrix(LABELS), expected)
    assert TARGET.matrix(LABELS).dtype == torch.float64


def test_the_largest_logit_decides_and_decisions_have_names():
    decisions = TARGET.decide(LOGITS)
    assert torch.equal(decisions, LOGITS.argmax(1))
    assert TARGET.name(decisions).tolist() == [[TARGET.classes[i] for i in row] for row in decisions.tolist()]
    assert TARGET.name(LABELS).tolist() == ["cow", "ant", "ant", "bee"]


def test_what_is_shown_of_a_target():
    assert (TARGET.outputs, TARGET.chance, TARGET.describe()) == (3, pytest.approx(1 / 3), "3 classes")
    assert (TARGET.metric, TARGET.measure, TARGET.label, TARGET.unit) == ("accuracy", "Accuracy", "accuracy", "%")


class Relabelled(Digits):
    """Digits with other classes and labels."""

    def __init__(self, classes, labels):
        super().__init__()
        self.target = Multiclass(classes)
        self.labels = labels

    def load(self):
        return dict.fromkeys(("train", "val", "test"), labelled(self.labels))


@pytest.mark.parametrize(
    ("classes", "labels", "named"),
    [
        ([], [0, 0], ["digits has 0 classes (none)", "two"]),
        (["a"], [0, 0], ["digits has 1 classes (a)", "two"]),
        (["a", "b", "c"], [1, 1, 1], ["digits", "'b'", "two"]),
        (["a", "b"], [0, 1, 2], ["image 2 in train of digits is 2", "0 to 1"]),
        (["a", "b"], [0, -1, 1], ["image 1 in train of digits is -1", "0 to 1"]),
    ],
)
def test_a_task_of_one_class_or_with_labels_that_are_none_is_refused(classes, labels, named):
    message = refusal(Relabelled(classes, labels).setup)
    assert [name for name in named if name not in message] == []


def test_classes_without_a_training_image_are_named(caplog):
    Relabelled([f"c{i}" for i in range(9)], [0, 8]).setup()
    (line,) = [message for message in caplog.messages if "not in train" in message]
    assert "7 of 9 classes of digits" in line
    assert "c1, c2, c3, c4, c5, ..." in line
