"""Drives measures over a split as RedundancyProbe does, without a fit."""

from types import SimpleNamespace

import numpy as np
import torch

from datamodules.targets import Multiclass
from lightning_modules.measures import Batch, Context
from lightning_modules.subsets.coordinates import Coordinates

SOFTMAX = SimpleNamespace(
    loss=lambda target, logits, labels: target.loss(logits, labels), probabilities=lambda logits: logits.softmax(1)
)
"""A solver whose probes are scores of a softmax."""


STEPS = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.03076}
"""Of the uniform quantisers that err least on a normal distribution (Max, 1960, table II), over its deviation."""


def quantised(values, train, bits):
    """Coordinates of vectors, shape (n, k), in so few bits, by mean and deviation over train; float32 as in a run."""
    step = np.maximum(STEPS[bits] * train.std(0), 1e-30)
    low = (train.mean(0) - step * (2**bits - 1) / 2).astype(np.float32)
    values, step = values.astype(np.float32), step.astype(np.float32)
    return low + step * np.clip(np.round((values - low) / step), 0, 2**bits - 1)


def random_logits(probes, classes, labels, seed=0):
    """Logits that are right about every other image, shape (P, C, n)."""
    logits = torch.randn(len(probes), classes, len(labels), generator=torch.Generator().manual_seed(seed))
    return logits + 1.5 * torch.nn.functional.one_hot(labels, classes).t()


def evaluate(measure, probes, labels, *, logits=None, inputs=None, widths=None, classes=5, split="test", **changes):
    """Return what a measure computes of images that come in batches of 37."""
    inputs = torch.zeros(len(labels), 1) if inputs is None else inputs
    logits = random_logits(probes, classes, labels) if logits is None else logits
    widths = widths or {"penultimate": max(probe.neurons for probe in probes)}
    known = {
        "probes": probes,
        "fractions": sorted({probe.fraction for probe in probes}),
        "coordinates": Coordinates(probes, widths),
        "target": Multiclass([f"class {label}" for label in range(classes)]),
        "solver": SOFTMAX,
        "device": torch.device("cpu"),
        "reduce": lambda sums: sums,
        "features": lambda split: None,
        "moments": lambda split: {},
    }
    measure.setup(Context(**known | changes))
    for repeat in range(2):  # what was counted before a reset does not count
        measure.split = split
        measure.reset()
        for indices in torch.arange(len(labels) if repeat else 3).split(37):
            measure.update(Batch(inputs[indices], logits[:, :, indices], labels[indices], indices))
    return measure.compute()
