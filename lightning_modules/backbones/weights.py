"""Load weights from safetensors and torch files into a network: every parameter, and no pickled code is run."""

import contextlib
import os
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

CONTAINERS = ("state_dict", "model")
"""Keys of a checkpoint under which training code keeps the state dict."""
PREFIXES = ("module", "model", "backbone", "network", "encoder", "_orig_mod")
"""Names of wrapper modules that precede every parameter's name, alone or nested (`module.model.`)."""
COMPANIONS = ("attacker", "normalizer")
"""Modules that adversarial-training libraries save beside the network."""


def find(path: str) -> Path:
    """Return the file `path`, looked up in the current folder and then in `configs/`.

    Raises:
        MisconfigurationException: If it is in neither.
    """
    shipped = Path(__file__).parents[2] / "configs" / path
    for candidate in (Path(path).expanduser(), shipped):
        if candidate.is_file():
            return candidate
    raise MisconfigurationException(
        f"There is no file of weights {path!r}; model.backbone.weights takes a file, 'pretrained' or 'random'."
    )


def read(path: Path) -> dict[str, Tensor]:
    """Return the state dict that a safetensors or torch file holds, at its top level or under one of `CONTAINERS`.

    Raises:
        MisconfigurationException: If the file is neither, is cut short, holds code, or holds no state dict.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise MisconfigurationException(f"{path} is not a complete safetensors file ({error}).") from error
    content = read_torch(path, "file of weights")
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise MisconfigurationException(f"{path} holds no state dict, neither itself nor under {CONTAINERS}.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def no_pickled_code() -> Iterator[None]:
    """Make every `torch.load` meanwhile, also in other libraries, refuse files whose pickle holds code."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def read_torch(path: Path, what: str) -> Any:
    """Load a torch file of tensors and plain types; refuse one whose pickle holds code.

    Args:
        path: The file.
        what: What the file should be, for the message.

    Raises:
        MisconfigurationException: If the file is no torch file, is cut short, or holds code.
    """
    with path.open("rb") as file:
        start = file.read(2)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise all kinds of errors on a broken file
        if (
            isinstance(error, pickle.UnpicklingError)
            and start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
            and "nsupported" in str(error)
        ):
            raise MisconfigurationException(
                f"{path} is a pickle that holds code, which is never run; where you trust it, convert it once with "
                f"`safetensors.torch.save_file(torch.load({str(path)!r}, weights_only=False)['state_dict'], "
                f"'weights.safetensors')`."
            ) from error
        raise MisconfigurationException(f"{path} is no {what}, or not a whole one.") from error


def load(network: nn.Module, path: Path, classifier: Collection[str]) -> None:
    """Load every parameter and buffer of `network` from the file at `path`, whose names and shapes must match.

    Prefixes of wrappers (`PREFIXES`) are stripped. Ignored are entries of the classifier and of `COMPANIONS`, and that
    batch norm's `num_batches_tracked` may be missing, which evaluation never reads.

    Args:
        network: The network.
        path: A safetensors or torch file.
        classifier: Names of the classifier's modules, which are not loaded.

    Raises:
        MisconfigurationException: If any other name or shape does not match; the message lists the first few.
    """
    wanted = {name: value.shape for name, value in network.state_dict().items() if not is_part_of(name, classifier)}
    given = _unwrap(read(path), wanted)
    given = {name: value for name, value in given.items() if not is_part_of(name, classifier)}
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unknown = [name for name in given if name not in wanted]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise MisconfigurationException(f"{path} does not hold the weights of this backbone: {'; '.join(problems)}.")
    network.load_state_dict(given, strict=False)


def is_part_of(name: str, modules: Collection[str]) -> bool:
    """Return whether the parameter, buffer or module `name` is one of `modules` or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _unwrap(given: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Drop companions, and strip the prefix of wrappers under which most of the wanted names are found."""

    def strip(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}

    def is_companion(name: str) -> bool:
        parts = name.split(".")
        while parts and parts[0] in PREFIXES:
            parts.pop(0)
        return bool(parts) and parts[0] in COMPANIONS

    given = {name: value for name, value in given.items() if not is_companion(name)}
    prefixes = {""}
    for name in given:
        parts = name.split(".")
        while parts and parts[-1] not in PREFIXES:
            parts.pop()
        for depth in range(1, len(parts) + 1):
            if all(part in PREFIXES for part in parts[:depth]):
                prefixes.add(".".join(parts[:depth]) + ".")
    best = max(sorted(prefixes, key=len), key=lambda prefix: len(strip(prefix).keys() & set(wanted)))
    outside = {name: value for name, value in given.items() if not name.startswith(best)}
    return strip(best) | outside
