"""Load weights from safetensors and torch files into a network: every parameter, and no pickled code is run."""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import timm
import torch
from huggingface_hub import constants, errors, hf_hub_download
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_modules.files import CONFIGS, one_line

HUB = "hf-hub:"  # How the address of a file on the Hugging Face Hub starts
MADE = "pretraining"  # Key in a safetensors file's metadata of what `Pretraining` says of it, as JSON
AVERAGED = {"ema", "teacher", "swa", "averaged"}  # Words in the keys of weights that were averaged over training


def find(path: str) -> Path:
    """Return the file `path`, looked up in the current folder and then in `configs/`, or one of the Hub (`HUB`).

    Raises:
        MisconfigurationException: If there is no such file.
    """
    if path.startswith(HUB):
        return _download(path)
    for candidate in (Path(path).expanduser(), CONFIGS / path):
        if candidate.is_file():
            return candidate
    raise MisconfigurationException(
        f"There is no file of weights {path!r}; name a file or hf-hub:<owner>/<name>/<file>, or say 'pretrained' or "
        f"'random'."
    )


def _download(address: str) -> Path:
    """Return `hf-hub:<owner>/<name>[@<revision>]/<file>`, from the cache or downloaded to it, with what it indexes."""
    owner, _, rest = address.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    repository, cache = f"{owner}/{name}", constants.HF_HUB_CACHE
    if not (owner and name and file):
        raise MisconfigurationException(
            f"model.backbone.weights is {address!r}; a file of the Hub is hf-hub:<owner>/<name>/<file>, or of one "
            f"revision hf-hub:<owner>/<name>@<revision>/<file>."
        )

    def get(file: str) -> Path:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision or None))
        except Exception as error:  # sockets, proxies and the Hub raise whatever they like
            reasons = {
                errors.GatedRepoError: f"{repository} is gated; accept its terms there and set HF_TOKEN",
                errors.RepositoryNotFoundError: f"there is no repository {repository}, or it is private",
                errors.RevisionNotFoundError: f"{repository} has no revision {revision}",
                errors.LocalEntryNotFoundError: f"it is not in {cache}, and the Hub is out of reach or switched off",
                errors.EntryNotFoundError: f"{repository} has no file {file}",
            }
            reason = next((said for kind, said in reasons.items() if isinstance(error, kind)), one_line(error))
            raise MisconfigurationException(f"The weights {address} cannot be had: {reason}.") from error
        blob = path.resolve()  # the Hub's large files are named by their hash
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            with blob.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != blob.name:
                    raise MisconfigurationException(f"{path} is not what the Hub has; delete {blob} to load it again.")
        return path

    path = get(file)
    for shard in _shards(path):
        get((PurePosixPath(file).parent / shard).as_posix())
    return path


def read(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors or torch file, or of the files that an index (`.json`) names.

    A tensor of a nested file is named by the keys that lead to it, joined by points (`model.state_dict.conv1.weight`).
    """
    shards = _shards(path)
    if shards:
        return {name: value for shard in shards for name, value in read(path.parent / shard).items()}
    if not path.is_file():
        raise MisconfigurationException(f"{path} is not there, which an index of weights beside it names.")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise MisconfigurationException(f"{path} is not a complete safetensors file ({error}).") from error
    tensors = dict(_tensors(read_torch(path, "file of weights")))
    if not tensors:
        raise MisconfigurationException(f"{path} holds no state dict, under whatever key.")
    return tensors


def made(path: Path) -> dict[str, Any]:
    """Return what `Pretraining` says of a file that it wrote: architecture, kwargs, preprocessing and more; else none.

    Raises:
        MisconfigurationException: If the architecture is not one of timm's: a file must not name code that is to run.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()[MADE])
    except (SafetensorError, KeyError, TypeError):  # another kind of file, without this key, or without any
        return {}
    if not timm.is_model(found["architecture"].partition(".")[0]):
        raise MisconfigurationException(f"{path} says it is of {found['architecture']!r}, which timm does not have.")
    return found


def _shards(path: Path) -> list[str]:
    """Return the files that an index of weights names, without their folder; none for another file."""
    if path.suffix != ".json":
        return []
    try:
        return sorted(map(str, set(json.loads(path.read_bytes())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MisconfigurationException(f"{path} is no index of weights; that has a `weight_map`.") from error


def _tensors(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, (*keys, str(key)))
    elif isinstance(content, Tensor) and keys:
        yield ".".join(keys), content


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
    """Load every parameter and buffer of `network` from the one part of a file that covers it wholly, and say which.

    A part is what lies below one key or prefix, whatever its name. Averaged weights go before those that they are an
    average of, as timm has it. Entries of the classifier, whose modules are named, are ignored, and batch norm's
    `num_batches_tracked` may be missing, as evaluation never reads it.

    Raises:
        MisconfigurationException: If no part covers the network, or several that differ, or if the part has entries
            inside the network's own modules that it does not take, as of further blocks.
    """
    wanted = without(network.state_dict(), classifier)
    required = {name: value for name, value in wanted.items() if not name.endswith("num_batches_tracked")}
    tensors = read(path)
    counts = Counter({"": 0})
    for name in tensors:
        counts.update(prefix for prefix in _prefixes(name) if name.removeprefix(prefix) in required)
    whole = [prefix for prefix in sorted(counts, key=len) if _covers(tensors, prefix, required)]
    averaged = [prefix for prefix in whole if AVERAGED & set(re.split(r"[._]", prefix))]
    best = (averaged or whole or [max(counts, key=counts.__getitem__)])[0]
    for other in (averaged or whole)[1:]:
        if not all(torch.equal(tensors[other + name], tensors[best + name]) for name in required):
            raise MisconfigurationException(
                f"{path} holds the weights of this backbone twice, and they differ: under {best[:-1] or 'no key'!r} "
                f"and under {other[:-1]!r}; save the part that is meant to a file of its own."
            )
    part = {name.removeprefix(best): value for name, value in tensors.items() if name.startswith(best)}
    given = without(part, classifier)
    further = [name for name in given if name not in wanted]
    # A network has no use for what lies beside its modules, nor for buffers that it computes itself.
    modules, computed = dict(network.named_children()), dict(network.named_buffers())
    mismatches = {
        "missing": [name for name in required if name not in given],
        "unknown": [name for name in further if not whole or (name.split(".")[0] in modules and name not in computed)],
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
    network.load_state_dict({name: given[name] for name in wanted if name in given}, strict=False)
    left = [name for name in tensors if not name.startswith(best)] + [best + name for name in further]
    if best or left:
        groups = list(dict.fromkeys(_apart(name, best) for name in left))
        rank_zero_info(
            f"Weights of {path.name}: took {f'what is under {best[:-1]!r}' if best else 'all that the backbone has'}"
            f"{', averaged over training' if best in averaged else ''}; "
            f"left {', '.join(groups[:5]) or 'nothing'}{', ...' if len(groups) > 5 else ''}."
        )


def without(state: dict[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without the entries of these modules."""
    parts = tuple(f"{module}." for module in modules)
    return {name: value for name, value in state.items() if not name.startswith(parts)}


def _prefixes(name: str) -> list[str]:
    """Return the prefixes of `a.b.c` that end where a word does: none, `a.` and `a.b.`."""
    return ["", *(name[: place + 1] for place, letter in enumerate(name) if letter == ".")]


def _covers(tensors: dict[str, Tensor], prefix: str, required: dict[str, Tensor]) -> bool:
    """Return whether all that is required is there under a prefix, in its shape."""
    return all(
        prefix + name in tensors and tensors[prefix + name].shape == value.shape for name, value in required.items()
    )


def _apart(name: str, taken: str) -> str:
    """Return a name up to the first word in which it differs from the prefix of what was taken."""
    words = name.split(".")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words, taken.split("."), strict=False))
    return ".".join(words[: len(list(same)) + 1])
