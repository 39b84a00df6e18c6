"""Read a network at its layers, and find out which axes of an output are images, neurons and space."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Place = tuple[str, bool]
"""A module's name, "" for the whole network, and whether what enters it is read in place of what it returns."""
SAME = 1e-3  # share of a layer's largest value up to which two of its values may differ by rounding


def read_layers(
    network: nn.Module, images: Tensor, places: dict[str, Place], keep: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """Run the network and return what `keep`, called with a layer and its output, makes of each layer that is run.

    It is called while the network runs, as the next module may overwrite an output in place. A layer that runs several
    times in one pass is kept as it was last.
    """
    kept: dict[str, Any] = {}
    with note_layers(network, places, keep, kept):
        network(images)
    return kept


def note_layers(
    network: nn.Module, places: dict[str, Place], keep: Callable[[str, Any], Any], kept: dict[str, Any]
) -> contextlib.ExitStack:
    """Have the network put what `keep` makes of its layers into `kept` whenever it runs; return what ends that."""

    def hook(layer: str, enters: bool) -> Callable[..., None]:
        def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            kept[layer] = keep(layer, next(iter((*arguments, *named.values())), None) if enters else output)

        return note

    hooks = contextlib.ExitStack()
    for layer, (module, enters) in places.items():
        each = network.get_submodule(module).register_forward_hook(hook(layer, enters), with_kwargs=True)
        hooks.callback(each.remove)
    return hooks


@torch.no_grad()
def check_rows(
    network: nn.Module, size: tuple[int, ...], places: dict[str, Place], label: str
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's output for one image of `size`; refuse a layer whose rows are not the images.

    Two images and then the second alone are read: the first axis must be as long as the batch, and a row must not
    depend on what else is in it, as where windows or tokens come first or statistics are those of the batch.
    """

    def keep(layer: str, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise MisconfigurationException(
                f"model.backbone.layer {layer!r} of {label} gives {shape}; it must give (images, neurons), "
                f"tokens (images, tokens, neurons) or a map (images, neurons, height, width)."
            )
        return output.clone()

    # Images of unlike contrast, so that statistics of a batch differ with what is in it.
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2]).view(2, 1, 1, 1)
    both = read_layers(network, images, places, keep)
    alone = read_layers(network, images[1:], places, keep)
    for layer in places:
        if layer not in both or layer not in alone:
            raise MisconfigurationException(f"model.backbone.layer {layer!r} of {label} is never run.")
        pair, single = both[layer], alone[layer]
        if len(pair) != 2 or len(single) != 1 or pair.shape[1:] != single.shape[1:]:
            raise MisconfigurationException(
                f"model.backbone.layer {layer!r} of {label} gives {tuple(pair.shape)} for 2 images and "
                f"{tuple(single.shape)} for one; its first axis must be the images. Name a layer around it."
            )
        if (pair[1] - single[0]).abs().max() > SAME * pair.abs().max():
            raise MisconfigurationException(
                f"model.backbone.layer {layer!r} of {label} gives an image other values beside another image than "
                f"alone, so its rows are not the images. Where attention takes tokens first, set batch_first."
            )
    return {layer: tuple(alone[layer].shape) for layer in places}


def neuron_axes(
    network: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    places: dict[str, Place],
    enlarged: Iterable[Callable[[], tuple[nn.Module, Tensor]]],
    label: str,
) -> dict[str, int]:
    """Return which axis of each layer's output holds the neurons: the one that keeps its length for a larger image.

    Args:
        network: The network.
        shapes: The shape of each layer's output for one image.
        places: Where the layers are.
        enlarged: Return a network and an image of twice the size for it, tried in turn, as not every network takes one.
        label: What an error calls the network.

    Raises:
        MisconfigurationException: If that leaves it open; the message names the layer.
    """
    axes = {layer: _axis_by_kind(network.get_submodule(places[layer][0]), shape) for layer, shape in shapes.items()}
    for make in enlarged:
        left = {layer: places[layer] for layer, axis in axes.items() if axis is None}
        if not left:
            break
        axes |= {layer: _axis_that_stays(shapes[layer], shape) for layer, shape in _shapes(make, left).items()}
    for layer, axis in axes.items():
        if axis is None:
            raise MisconfigurationException(
                f"Which axis of model.backbone.layer {layer!r} of {label} holds the neurons is open: it gives "
                f"{shapes[layer]} for one image, and a larger image does not tell (the network takes none, or not "
                f"exactly one axis stays as long). Name another layer, or keep every value as a neuron with "
                f"model.backbone.pooling flatten."
            )
    return {layer: axis for layer, axis in axes.items() if axis is not None}


@torch.no_grad()
def _shapes(make: Callable[[], tuple[nn.Module, Tensor]], places: dict[str, Place]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the outputs for an image, of those layers that are run before the network refuses it."""
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.suppress(Exception):  # a network may raise whatever it likes
        read_layers(*make(), places, lambda layer, output: shapes.update({layer: tuple(output.shape)}))
    return shapes


def _axis_by_kind(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Return the axis that PyTorch documents for its own modules, and what follows from two axes; None where open."""
    if len(shape) == 2:
        return 1
    if type(module).__module__.startswith("torch.nn."):
        if type(module) is nn.Linear:
            return len(shape) - 1
        if type(module).__name__.endswith("2d") and len(shape) == 4:
            return 1
    return None


def _axis_that_stays(shape: tuple[int, ...], larger: tuple[int, ...]) -> int | None:
    """Return the one axis that is as long for a larger image; of several, the one that is longer than 1."""
    if len(larger) != len(shape):
        return None
    stay = [axis for axis in range(1, len(shape)) if shape[axis] == larger[axis]]
    longer = [axis for axis in stay if shape[axis] > 1] or stay
    return longer[0] if len(longer) == 1 else None
