"""A user's mistake ends in one line that names what is wrong and what would be right."""

import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import DistError

TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "a word"}
TYPES |= {"list[int]": "a list of whole numbers", "list[float]": "a list of numbers", "list[str]": "a list of words"}
"""What types are called to a user."""
CONNECTIONS = re.compile(r"gloo|NCCL|connection (closed|reset|refused)|broken pipe|TCPStore", re.IGNORECASE)
"""What PyTorch says where another process is gone."""


class Options(NamedTuple):
    """What can be set on a command line, so that the nearest can be named to one who mistypes it."""

    keys: Mapping[str, list[str]]
    """Every option without its dashes, with the names of the classes that take it."""
    choices: Mapping[str, list[str]]
    """Names of the classes of which an option takes one."""


def options_of(parts: Mapping[str, Iterable[type]], further: Iterable[str] = ()) -> Options:
    """Return the options of classes, of the project's own classes among their arguments, and so on.

    Args:
        parts: Classes of which each option takes one.
        further: Options that belong to no class.
    """
    options = Options({key: [] for key in further}, {})
    packages = {kind.__module__.partition(".")[0] for kinds in parts.values() for kind in kinds} - {"lightning"}

    def collect(part: str, kinds: list[type]) -> None:
        options.keys.setdefault(part, [])  # type: ignore[attr-defined]
        if len(kinds) > 1:
            options.choices[part] = [kind.__name__ for kind in kinds]  # type: ignore[index]
        for kind in kinds:
            hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
            for name in inspect.signature(kind).parameters:
                key = f"{part}.{name}"
                known = key in options.keys
                options.keys.setdefault(key, []).append(kind.__name__)  # type: ignore[attr-defined]
                own: list[type] = [each for base in _classes(hints.get(name)) for each in _concrete(base, packages)]
                if own and not known:
                    collect(key, own)

    for part, given in parts.items():
        collect(part, list(given))
    return options


def _classes(hint: Any) -> Iterator[type]:
    """Yield the classes in a type hint."""
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes(part)


def _concrete(base: type, packages: set[str]) -> Iterator[type]:
    """Yield a class of these packages and its subclasses, without those that are abstract."""
    if base.__module__.partition(".")[0] in packages:
        if not inspect.isabstract(base):
            yield base
        subclasses: list[type] = base.__subclasses__()
        for derived in subclasses:
            yield from _concrete(derived, packages)


def explain(message: str, options: Options) -> str:
    """Return what jsonargparse says of a mistake as one line that names the wrong value and what would be right.

    Args:
        message: What jsonargparse says.
        options: The options that there are.
    """
    unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", message)
    if unknown:
        return _unknown(unknown[1], options)
    said = re.search(r'Parser key "([\w.]+)"', message)
    key = next(iter(nearest_keys(said[1], options, 1)), said[1]) if said else ""
    path = re.search(r"Problem with given class_path '(.*?)':\s+(.*)", message)
    if path:
        return f"--{key} is {path[1]!r}, which cannot be imported ({path[2]})."
    word = re.search(r"Expected a dot import path string: (\S+)|Given value: (\w+)$", message)
    if word and key in options.choices:
        return f"--{key} is {nearest_class(word[1] or word[2], options.choices[key])}, or a class's import path."
    word = re.search(r"Unable to load config \'(.*?)\'|dot import path string: (\S+)", message)
    if word and key:
        name = word[1] or word[2]
        return f"--{key} is {name!r}; it must be settings, as `--{key} '{{name: value}}'` or `--{key}.name value`."
    required = re.search(r"the following arguments are required: (.*)", message)
    if required:
        keys = [next(iter(nearest_keys(each, options, 1)), each) for each in required[1].split(", ")]
        if "trainer" not in options.keys:
            named = ["RUN" if each == "runs" else f"--{each}" for each in keys]  # these come without a flag
            return f"Give {' and '.join(named)} too; --help tells what they are."
        return f"Nothing sets {' and '.join(keys)}; give a --config, as quickstart.yaml, or --{keys[0]}."
    wrong = re.search(r'Parser key "[\w.]+":\s*(.*)', message, re.DOTALL)
    if wrong:
        value = re.search(r"Given value: (.*)|Got value: (.*)", wrong[1])
        types = re.search(r"Subtypes: \[(.*)\]\n|Expected an? (.*?)(?:\. Got value|$)", wrong[1])
        if value and types:
            kinds = re.sub(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]", r"\1\2", types[1] or types[2])
            kinds = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kinds).replace("dict[str, Any]", "dict")
            right = " or ".join(TYPES.get(each, each) for each in kinds.split(", "))
            return f"{key} is {value[1] or value[2]}; it must be {right}."
    return message.partition("Given value type")[0]


def _unknown(name: str, options: Options) -> str:
    """Say what is to be said of an option that there is not, or that another class has."""
    near = nearest_keys(name, options)
    if near and near[0].rpartition(".")[2] == name.rpartition(".")[2] and options.keys[near[0]]:
        key, owners = near[0], options.keys[near[0]]
        part = key.rpartition(".")[0]
        return f"--{key} is an option of {' and '.join(owners)}; choose that with --{part}, or leave --{key} out."
    everything = "`train.py fit --help` lists all." if "trainer" in options.keys else "--help lists all."
    hint = f"did you mean {' or '.join(near)}?" if near else everything
    return f"There is no option {name!r}; {hint}"


def nearest_class(name: str, known: list[str]) -> str:
    """Return what is to be said of a name that is none of the known, with the nearest of them."""
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1)
    hint = next((f"; did you mean {each}? I" for each in known if each.lower() in near), "; i")
    return f"{name!r}{hint}t must be one of {', '.join(known)}"


def nearest_keys(key: str, options: Options, cutoff: float = 0.6) -> list[str]:
    """Return the options whose last part is nearest to that of `key`, at most two."""
    last = {each: each.rpartition(".")[2] for each in options.keys}
    near = difflib.get_close_matches(key.rpartition(".")[2], set(last.values()), n=1, cutoff=cutoff)
    found = [each for each in last if last[each] in near]
    given = [word.lstrip("-").partition("=")[0] for word in sys.argv if word.startswith("--")]
    parts = {word.rpartition(".")[0] for word in given if word.endswith(key)}  # settles what several parts know
    found = [each for each in found if each.rpartition(".")[0] in parts] or found
    return sorted(found, key=lambda each: -difflib.SequenceMatcher(None, each, key).ratio())[:2]


def fail(message: str) -> NoReturn:
    """End with one line and exit status 2; a process of several says which of them it is."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    who = f" (process {rank_zero_only.rank + 1} of {processes})" if processes > 1 else ""  # type: ignore[attr-defined]
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    print(f"error{who}: {' '.join(lines)}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_left_alone(error: RuntimeError) -> bool:
    """Return whether an error says that another process of this run is gone, in the middle of an exchange with it."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return processes > 1 and (isinstance(error, DistError) or bool(CONNECTIONS.search(str(error))))
