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


class Sequences(nn.Module):
    """Tokens, which attention mixes over images where it takes tokens first, as it does by default."""

    def __init__(self, batch_first):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.turned = nn.Identity()
        self.named = nn.Identity()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        tokens = self.encoder(self.patches(x).flatten(2).mT)
        self.attention(tokens, tokens, tokens)
        self.turned(tokens.transpose(0, 1))
        self.named({"tokens": tokens})
        return self.fc(input=tokens.mean(1))


class Volumes(nn.Module):
    """Sees channels as depth, so that its kernels have five axes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x[:, None]).mean((2, 3, 4)))


class BatchStatistics(nn.Module):
    """Normalises with the statistics of the batch, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.squeeze = nn.Identity()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        self.squeeze(x.mean((2, 3)).squeeze())
        return self.fc(self.norm(x).mean((2, 3)))


class Stepped(nn.Module):
    """Smooth up to `conv`, and then not: `sign` is flat, `cut` no longer belongs to the image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2)
        self.sign = nn.Identity()
        self.cut = nn.Identity()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        signs = self.sign(self.conv(x).sign())
        return self.fc(self.cut(signs.detach()).mean((2, 3)))


class Fixed(nn.Module):
    """Takes 64 x 32 pixels alone; `turned` is channels last, `pool` and `latents` are as long for every image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.turned = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.latents = nn.Identity()
        self.neck = nn.Linear(8 * 16 * 8, 12)
        self.late = nn.Identity()
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.stem(x)
        self.turned(x.permute(0, 2, 3, 1))
        self.latents(self.pool(x).flatten(2))
        return self.head(self.late(self.neck(x.flatten(1)).unflatten(1, (3, 4))).flatten(1))


def no_net():
    return {"conv": 1}


def path_of(function):
    """Return a function's import path."""
    return f"{function.__module__}.{function.__name__}"
