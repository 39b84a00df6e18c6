"""Load weights from safetensors and torch files into a network: every parameter, and no pickled code is run."""

import contextlib
import itertools
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

from lightning_modules.files import CONFIGS

CONTAINERS = ("state_dict", "model")  # Keys of a checkpoint under which training code keeps the state dict
PREFIXES = ("module", "model", "backbone", "network", "encoder", "_orig_mod")
"""Names of wrapper modules that precede every parameter's name, alone or nested (`module.model.`)."""
COMPANIONS = ("attacker", "normalizer")  # Modules that adversarial-training libraries save beside the network


def find(path: str) -> Path:
    """Return the file `path`, looked up in the current folder and then in `configs/`; refuse one that is in neither."""
    for candidate in (Path(path).expanduser(), CONFIGS / path):
        if candidate.is_file():
            return candidate
    raise MisconfigurationException(
        f"There is no file of weights {path!r}; model.backbone.weights takes a file, 'pretrained' or 'random'."
    )


def read(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a safetensors or torch file, perhaps under one of `CONTAINERS`; refuse others."""
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
    before = os.environ.get(variable, "0")  # to torch the same as none
    os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ[variable] = before


def read_torch(path: Path, what: str) -> Any:
    """Load a torch file of tensors and plain types; refuse code, which is never run, and what is no `what`."""
    with path.open("rb") as file:
        start = file.read(2)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise all kinds of errors on a broken file
        is_pickle = start == b"PK" or start[:1] == b"\x80"  # in a zip file or bare
        if is_pickle and isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
            raise MisconfigurationException(
                f"{path} is a pickle that holds code, which is never run; where you trust it, convert it once with "
                f"`safetensors.torch.save_file(torch.load({str(path)!r}, weights_only=False)['state_dict'], "
                f"'weights.safetensors')`."
            ) from error
        raise MisconfigurationException(f"{path} is no {what}, or not a whole one.") from error


def load(network: nn.Module, path: Path, classifier: Collection[str]) -> None:
    """Load every parameter and buffer of `network` from a file; refuse one whose names or shapes do not match.

    Prefixes of wrappers (`PREFIXES`) are stripped. Entries of the classifier, whose modules are named, and of
    `COMPANIONS` are ignored; batch norm's `num_batches_tracked` may be missing, as evaluation never reads it.
    """
    wanted = without(network.state_dict(), classifier)
    given = without(_unwrap(read(path), wanted), classifier)
    mismatches = {
        "missing": [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in mismatches.items()
        if names
    ]
    if problems:
        raise MisconfigurationException(f"{path} does not hold the weights of this backbone: {'; '.join(problems)}.")
    network.load_state_dict(given, strict=False)


def without(state: dict[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without the entries of these modules."""
    parts = tuple(f"{module}." for module in modules)
    return {name: value for name, value in state.items() if not name.startswith(parts)}


def _unwrap(given: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Drop companions, and strip the prefix of wrappers under which most of the wanted names are found."""
    kept, prefixes = {}, {""}
    for name, value in given.items():
        parts = name.split(".")
        wrappers = list(itertools.takewhile(PREFIXES.__contains__, parts))
        if wrappers == parts or parts[len(wrappers)] not in COMPANIONS:
            kept[name] = value
            prefixes.update(itertools.accumulate(f"{wrapper}." for wrapper in wrappers))
    found = {prefix: sum(prefix + name in kept for name in wanted) for prefix in sorted(prefixes, key=len)}
    best = max(found, key=found.__getitem__)
    return {name.removeprefix(best): value for name, value in kept.items()}
