import numpy as np
import pytest
import torch
from torch import nn

from datamodules.targets import Multiclass
from lightning_modules.probes.bank import ProbeBank
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Plan, Probe

WIDTH, CLASSES = 60, 4
PROBES = Plan(["random", "first"], [0.01, 0.02, 0.05, 0.3, 0.9, 1.0], [0, 1, 7], 2).probes({"penultimate": WIDTH})
COORDINATES = Coordinates(PROBES, {"penultimate": WIDTH})


def data(count=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=dtype).relu()
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def linear(bank, index):
    """A separate nn.Linear with a probe's initial weights."""
    weight, bias = bank.get_probe(index)
    alone = nn.Linear(weight.shape[1], CLASSES).to(weight.dtype)
    with torch.no_grad():
        alone.weight.copy_(weight)
        alone.bias.copy_(bias)
    return alone


def sgd(parameters, rate=0.1):
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)


def test_logits_are_those_of_the_sliced_features():
    bank = ProbeBank(PROBES, CLASSES)
    inputs, _ = data()
    logits = bank(COORDINATES(inputs)).detach().numpy()
    for index in range(len(PROBES)):
        weight, bias = (part.numpy() for part in bank.get_probe(index))
        expected = inputs.numpy()[:, COORDINATES.subset(index).numpy()] @ weight.T + bias
        np.testing.assert_allclose(logits[index].T, expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float32, 5, 1e-6), (torch.float64, 60, 1e-10)])
def test_a_probe_trains_as_a_separate_linear_layer_does(dtype, steps, tolerance):
    bank = ProbeBank(PROBES, CLASSES).to(dtype)
    inputs, labels = data(dtype=dtype)
    alone = [linear(bank, index) for index in range(len(PROBES))]
    optimizers = [sgd(layer.parameters()) for layer in alone]
    together = sgd(bank.parameters())
    for step in range(steps):
        batch = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(step))[:16]
        together.zero_grad()
        (Multiclass("abcd").loss(bank(COORDINATES(inputs[batch])), labels[batch]).sum() / len(batch)).backward()
        together.step()
        for index, (layer, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            optimizer.zero_grad()
            seen = inputs[batch][:, COORDINATES.subset(index)]
            nn.functional.cross_entropy(layer(seen), labels[batch]).backward()
            optimizer.step()
    for index, layer in enumerate(alone):
        weight, bias = bank.get_probe(index)
        torch.testing.assert_close(weight, layer.weight, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(bias, layer.bias, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("index", [0, 1, 4, 9, len(PROBES) - 1])
def test_a_probe_starts_the_same_in_any_company(index):
    bank, alone = ProbeBank(PROBES, CLASSES), ProbeBank([PROBES[index]], CLASSES)
    for mine, theirs in zip(alone.get_probe(0), bank.get_probe(index), strict=True):
        assert torch.equal(mine, theirs)


def test_probes_start_as_nn_linear_does():
    wide = ProbeBank([Probe("random", 1.0, 4000, 3)], 50)
    weight, bias = wide.get_probe(0)
    reference = nn.Linear(4000, 50)
    assert weight.abs().max() <= 4000**-0.5 >= bias.abs().max()
    assert weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.01)
    assert not torch.equal(weight, ProbeBank([Probe("random", 1.0, 4000, 4)], 50).get_probe(0)[0])


def test_building_a_bank_leaves_global_random_numbers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ProbeBank(PROBES, CLASSES)
    assert torch.equal(before, torch.get_rng_state())


def test_a_bank_stores_no_weight_that_a_mask_would_hide():
    bank = ProbeBank(PROBES, CLASSES)
    assert sum(p.numel() for p in bank.parameters()) == sum((probe.neurons + 1) * CLASSES for probe in PROBES)


def test_copying_takes_the_chosen_probes_and_no_others():
    mine, theirs = ProbeBank(PROBES, CLASSES), ProbeBank(PROBES, CLASSES)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    before = [mine.get_probe(index) for index in range(len(PROBES))]
    which = torch.arange(len(PROBES)) % 3 == 0
    mine.copy_probes(theirs, which)
    for index in range(len(PROBES)):
        expected = theirs.get_probe(index) if which[index] else before[index]
        assert all(torch.equal(a, b) for a, b in zip(mine.get_probe(index), expected, strict=True))


def test_probes_stay_in_float32_under_autocast():
    bank = ProbeBank(PROBES, CLASSES)
    inputs, _ = data()
    with torch.autocast("cpu", torch.bfloat16):
        logits = bank(COORDINATES(inputs))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, bank(COORDINATES(inputs)))
