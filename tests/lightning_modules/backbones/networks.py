"""Small networks, and what the tests of backbones do with them."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_modules.backbones.build import PretrainedCfgOverlay
from lightning_modules.backbones.frozen import FrozenBackbone

SMALL = PretrainedCfgOverlay(input_size=[3, 64, 64])
PLAIN = PretrainedCfgOverlay(input_size=[3, 64, 64], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])


def images(size=64, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def refusal(*args, **kwargs):
    """Return the one line that a backbone is refused with."""
    with pytest.raises(MisconfigurationException) as error:
        FrozenBackbone(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


def shaken(network):
    """Move every parameter and statistic from its initial value."""
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) / 50)
    return network.eval()


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.neck = nn.Linear(6, 5)
        self.fc = nn.Linear(5, classes)

    def forward(self, x):
        return self.fc(self.dropout(self.penultimate(x)))

    def penultimate(self, x):
        return self.neck(self.act(self.bn(self.conv(x))).mean((2, 3)))


def random_net(classes=4):
    return Net(classes)


def fixed_net(classes=4):
    net = Net(classes)
    for place, value in enumerate(net.state_dict().values()):
        value.fill_(place / 10)
    return net


def net_by_weights(weights=None):
    assert weights in (None, "DEFAULT")
    return fixed_net() if weights else random_net()


def net_by_flag(pretrained=False):
    return fixed_net() if pretrained else random_net()


def unweighted_net():
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten())


def no_net():
    return {"conv": 1}


def path_of(function):
    """Return a function's import path."""
    return f"{function.__module__}.{function.__name__}"
