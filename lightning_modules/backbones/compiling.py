"""Compile a network for extraction with torch.compile, together with what reads its layers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.backbones.layers import Place, note_layers
from lightning_modules.files import one_line

OFF = "--model.backbone.compile off"


def compiled(
    network: nn.Module, places: dict[str, Place], keep: Callable[[str, Any], Any], mode: str, label: str
) -> Callable[[Tensor], dict[str, Any]]:
    """Return what does as `read_layers` with a copy of the network, compiled for the size of batch it first gets.

    Args:
        network: In evaluation mode, on its device. On a CPU its weights become constants of the compiled code.
        places: Where it is read.
        keep: What is kept of a layer's output, compiled too.
        mode: Of torch.compile, `default` or `max-autotune`.
        label: What an error calls the network.

    Raises:
        MisconfigurationException: On a CPU without a C++ compiler; when first called, if it cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # these take seconds to import
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    on_cpu = next(network.parameters(), torch.empty(0)).device.type == "cpu"
    if on_cpu:
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise MisconfigurationException(
                f"model.backbone.compile is {mode}, which needs a C++ compiler on a CPU, and there is none: install "
                f"g++ (or name one in the environment variable CXX), or set {OFF}."
            ) from error
    network = copy.deepcopy(network)  # what notes its layers stays
    kept: dict[str, Any] = {}
    note_layers(network, places, keep, kept)

    @torch.compile(dynamic=False, mode=mode)
    def read(images: Tensor) -> dict[str, Any]:
        network(images)
        found = dict(kept)
        kept.clear()  # compiled code is for what it finds when it is called, so let it find the same
        return found

    def run(images: Tensor) -> dict[str, Any]:
        try:
            with config.patch(freezing=on_cpu):  # an option of torch.compile comes too late for it
                return read(images)
        except TorchDynamoException as error:
            raise MisconfigurationException(
                f"{label} cannot be compiled ({one_line(error)[:300]}); set {OFF}."
            ) from error

    return run
