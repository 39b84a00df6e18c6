"""Fold batch norms, and on a CPU paddings and activations, into convolutions: the same in fewer operations."""

import copy
import math
from collections import Counter
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_modules.backbones.layers import Place, read_layers

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS = {nn.ReLU: ("relu", ()), nn.ReLU6: ("hardtanh", (0.0, 6.0))}  # oneDNN's names and arguments
ROUNDING = 1e-4  # share of a layer's largest value by which a folded network may differ


@torch.no_grad()
def folded(network: nn.Module, places: dict[str, Place], size: tuple[int, ...]) -> nn.Module:
    """Return a network in evaluation mode with batch norms folded into what precedes them, or itself if it has none.

    A batch norm is folded if in one pass it alone sees the output of a convolution or linear layer; on a CPU with it
    what timm makes of the two, the padding before and the ReLU after. The result is a copy, tried on noise: where it
    does not give what the network gives at each of `places`, up to rounding, as where a convolution itself is read, the
    network is returned as it is.

    Args:
        network: On any device.
        places: Where it is read, see `read_layers`.
        size: Of an image, (C, H, W); of others the result is not the same, as padding depends on it.
    """
    if not any(type(module) in NORMS for module in network.modules()):
        return network
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(network.parameters(), noise).device).contiguous(memory_format=torch.channels_last)
    prepared = copy.deepcopy(network)
    try:
        for before, norm, entering in _pairs(prepared, noise):
            _fold(prepared, before, norm, entering)
        expected, found = (read_layers(each, noise, places, _kept) for each in (network, prepared))
    except (AssertionError, AttributeError, TypeError):  # a norm over another axis, or one whose numbers are looked at
        return network
    equal = all(_equal(found[layer], expected[layer]) for layer in expected)
    return prepared if equal else network


def _fold(network: nn.Module, before: str, norm: str, size: tuple[int, ...]) -> None:
    """Fold a batch norm into the layer before it, in place; what else it did, a module in its place does.

    What enters the layer has the spatial `size`.
    """
    layer, batch_norm = network.get_submodule(before), cast(nn.BatchNorm2d, network.get_submodule(norm))
    fused = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    linear: nn.Module = fused(layer, batch_norm)  # type: ignore[type-var]
    if type(linear) is Conv2dSame and linear.dilation == (1, 1) and linear.weight.device.type == "cpu":
        linear = _evenly_padded(linear, size)
    after = [batch_norm.drop, batch_norm.act] if isinstance(batch_norm, BatchNormAct2d) else []
    after = [each for each in after if not isinstance(each, nn.Identity)]
    if len(after) == 1 and _Activated.can_be(linear, after[0]):
        linear, after = _Activated(linear, after[0]), []
    network.set_submodule(before, linear)
    network.set_submodule(norm, nn.Sequential(*after))


def _evenly_padded(convolution: Conv2dSame, size: tuple[int, ...]) -> nn.Conv2d:
    """Return a convolution that need not copy its input to pad it by one row more at the end than at the start.

    It pads by as many at the start, where its kernel has a further row of zeros.
    """
    kernel, stride = convolution.kernel_size, cast(tuple[int, int], convolution.stride)
    rows, columns = (get_same_padding(size[axis], kernel[axis], stride[axis], 1) for axis in (0, 1))
    weight = nn.functional.pad(convolution.weight, (columns % 2, 0, rows % 2, 0))
    made = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (kernel[0] + rows % 2, kernel[1] + columns % 2),
        stride,
        (-(-rows // 2), -(-columns // 2)),
        groups=convolution.groups,
    )
    made.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    made.bias = convolution.bias
    return made


class _Activated(nn.Module):
    """A convolution that writes its output once, with the activation applied: one pass over it less.

    oneDNN's own operation, by which torch.compile does the same on a CPU. It knows neither gradients nor autocast.
    """

    def __init__(self, convolution: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.convolution, self.activation = cast(nn.Conv2d, convolution), activation

    @staticmethod
    def can_be(convolution: nn.Module, activation: nn.Module) -> bool:
        """Return whether there is such an operation for this convolution, no kind of its own, on this machine."""
        return (
            type(convolution) is nn.Conv2d
            and isinstance(convolution.padding, tuple)
            and convolution.padding_mode == "zeros"
            and convolution.weight.device.type == "cpu"
            and type(activation) in ACTIVATIONS
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        )

    def forward(self, images: Tensor) -> Tensor:
        layer = self.convolution
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or images.dtype != torch.float32:
            return self.activation(layer(images))
        shape = layer.padding, layer.stride, layer.dilation, layer.groups
        name, arguments = ACTIVATIONS[type(self.activation)]
        return torch.ops.mkldnn._convolution_pointwise(images, layer.weight, layer.bias, *shape, name, arguments, "")


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the names of layers and of batch norms that alone see what they return, each run once by the network.

    With them stands the spatial size of what enters the layer.
    """
    runs: Counter[nn.Module] = Counter()
    seen: Counter[int] = Counter()
    made: dict[int, nn.Module] = {}
    sizes: dict[nn.Module, tuple[int, ...]] = {}
    entered: dict[nn.Module, int] = {}
    alive = []  # so that no two tensors of the pass have one identity

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[module] += 1
        seen.update(id(each) for each in inputs)
        alive.extend([inputs, output])
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and inputs:
            made[id(output)], sizes[module] = module, tuple(inputs[0].shape[2:])
        if type(module) in NORMS and inputs and module.running_mean is not None:
            entered[module] = id(inputs[0])

    leaves = [module for module in network.modules() if type(module) in NORMS or not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    network(images)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in network.named_modules()}
    return [
        (names[made[tensor]], names[norm], sizes[made[tensor]])
        for norm, tensor in entered.items()
        if tensor in made and seen[tensor] == 1 and runs[norm] == runs[made[tensor]] == 1
    ]


def _kept(_: str, output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else output


def _equal(found: Any, expected: Any) -> bool:
    largest = float(expected.abs().max())  # not finite where weights are not
    return math.isfinite(largest) and torch.allclose(found, expected, rtol=0, atol=ROUNDING * largest)
