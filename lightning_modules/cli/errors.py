"""A user's mistake ends in one line that names what is wrong and what would be right."""

import ast
import contextlib
import difflib
import inspect
import os
import re
import sys
import sysconfig
import traceback
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import DistError

from lightning_modules.files import one_line

TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "a word"}
TYPES |= {"list[int]": "a list of whole numbers", "list[float]": "a list of numbers", "list[str]": "a list of words"}
"""What types are called to a user."""
CONNECTIONS = re.compile(r"gloo|NCCL|connection (closed|reset|refused)|broken pipe|TCPStore", re.IGNORECASE)
"""What PyTorch says where another process is gone."""


class Classes(NamedTuple):
    """Classes of which an option takes one."""

    base: type  # What all of them are derived from, also those that are given by an import path
    offered: Sequence[type]  # Those that are given by name


class Options(dict[str, list[str]]):
    """All options without their dashes, each with the names of the classes that take it.

    Args:
        parts: Options that take a class, whose arguments are options too, and so on.
        others: Options that belong to no class.
    """

    def __init__(self, parts: Mapping[str, Classes], others: Iterable[str] = ()) -> None:
        super().__init__({key: [] for key in (*parts, *others)})
        self.classes = dict(parts)
        for part in (found := list(parts)):
            for kind in self.classes[part].offered:
                hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
                for name in arguments(kind):
                    key = f"{part}.{name}"
                    self.setdefault(key, []).append(kind.__name__)
                    for base in (hints.get(name), *typing.get_args(hints.get(name))):
                        ours = isinstance(base, type) and base.__module__.startswith("lightning_modules.")
                        if ours and key not in self.classes:
                            self.classes[key] = Classes(base, _concrete(base))
                            found.append(key)

    def prefix(self, kind: type) -> str:
        """Return what the options of a class begin with."""
        return next((f"{key}." for key, classes in self.classes.items() if issubclass(kind, classes.base)), "")


def _concrete(base: type) -> list[type]:
    """Return a class and its subclasses, without those that are abstract or private."""
    kinds = [base]
    for kind in kinds:
        kinds += kind.__subclasses__()
    offered = {kind for kind in kinds if not inspect.isabstract(kind) and not kind.__name__.startswith("_")}
    return sorted(offered, key=lambda kind: kind.__name__)


def arguments(kind: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class, with those of its bases where it hands others on to them."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            found = dict(inspect.signature(base).parameters) | found
            several = [name for name, each in found.items() if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
            if not several:
                break
            found = {name: each for name, each in found.items() if name not in several}
    return found


def explain(message: str, options: Options, prefix: str = "") -> str:
    """Return what jsonargparse says of a mistake as one line that names the wrong value and what would be right.

    Names in the message begin with `prefix` on the command line.
    """
    unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", message)
    if unknown:
        return _unknown(prefix + unknown[1], options)
    required = re.search(r"the following arguments are required: (.*)", message)
    if required:
        keys = [prefix + re.sub(r"^(?:fit|validate|test|predict)\.", "", each) for each in required[1].split(", ")]
        if "trainer" in options:
            return f"Nothing sets {' and '.join(keys)}; give a --config, as quickstart.yaml, or --{keys[0]}."
        named = ["RUN" if each == "runs" else f"--{each}" for each in keys]  # these come without a flag
        return f"Give {' and '.join(named)} too; --help tells what they are."
    wrong = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if not wrong:
        return message.partition("Given value type")[0]
    key, problem = prefix + wrong[1], wrong[2]
    path = re.search(r"Problem with given class_path '(.*?)':\s+(.*)", problem)
    if path:
        return f"--{key} is {path[1]!r}, which cannot be imported ({path[2]})."
    base, offered = options.classes.get(key, Classes(object, [object]))
    unnamed = re.search(r"Given value: (\{.*\}|NestedArg\(.*\))$", problem)
    if unnamed and list(offered) != [base]:
        return _without_class(key, unnamed[1], base, options)
    word = re.search(r"dot import path string: (\S+)|Unable to load config '(.*?)'|Given value: ([\w.]+)$", problem)
    name = (word[1] or word[2] or word[3]) if word else ""
    if name and list(offered) != [base]:
        if "." in name:
            return f"--{key} is {name!r}, which is no {base.__name__}, or lacks one of its methods."
        right = nearest_class(name, [kind.__name__ for kind in offered])
        return f"--{key} is {right}, or the import path of another {base.__name__}."
    if word and not word[3]:
        return f"--{key} is {name!r}; it must be settings, as `--{key} '{{name: value}}'` or `--{key}.name value`."
    value = re.search(r"Given value: (.*)|Got value: (.*)", problem)
    types = re.search(r"Subtypes: \[(.*)\]\n|Expected an? (.*?)(?:\. Got value|$)", problem)
    if not (value and types):
        return message.partition("Given value type")[0]
    kinds = re.sub(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]", r"\1\2", types[1] or types[2])
    kinds = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kinds).replace("dict[str, Any]", "dict")
    right = " or ".join(TYPES.get(each, each) for each in kinds.split(", "))
    return f"{key} is {(value[1] or value[2]).replace('None', 'null')}; it must be {right}."


def _without_class(key: str, given: str, base: type, options: Options) -> str:
    """Say that arguments of a class are given, as jsonargparse prints them, and not which class it is."""
    nested = re.fullmatch(r"NestedArg\(key='(\w+)', val=(.*)\)", given)
    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError, SyntaxError):
        found = {nested[1]: ast.literal_eval(nested[2])} if nested else ast.literal_eval(given)
    found = found.get("init_args", found) or {}
    offered = [kind.__name__ for kind in options.classes[key].offered]
    right = next((name for name in offered if all(name in options.get(f"{key}.{each}", []) for each in found)), None)
    right = right or offered[0]
    listed = ", ".join(f"{name}: {value}" for name, value in found.items())
    return (
        f"{key} has {', '.join(found) or 'arguments'} and no class_path, which says what {base.__name__} it is; write "
        f"{key}: {{class_path: {right}, init_args: {{{listed}}}}}, or say --{key} {right} before all else of it."
    )


def _unknown(key: str, options: Options) -> str:
    """Say what is to be said of an option that there is not, or that another class has."""
    part, _, last = key.rpartition(".")
    names = {each: each.rpartition(".")[2] for each in options if each != key}
    below = {each: name for each, name in names.items() if not part or each.startswith(f"{part}.")}
    near = [last] if last in below.values() else difflib.get_close_matches(last, set(below.values()), n=1)
    found = [each for each in below if below[each] in near] or [each for each in names if names[each] == last]
    found.sort(key=lambda each: -difflib.SequenceMatcher(None, each, key).ratio())
    hint = f"did you mean {' or '.join(found[:2])}?"
    if options.get(key):
        hint = hint if near == [last] else f"choose that with --{part}, or leave --{key} out."
        return f"--{key} is an option of {' and '.join(options[key])}; {hint}"
    everything = f"`{program()} fit --help` lists all." if "trainer" in options else "--help lists all."
    return f"There is no option {key!r}; {hint if found else everything}"


def nearest_class(name: str, known: Sequence[str]) -> str:
    """Return what is to be said of a name that is none of the known, with the nearest of them."""
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1)
    hint = next((f"; did you mean {each}? I" for each in known if each.lower() in near), "; i")
    return f"{name!r}{hint}t must be one of {', '.join(known)}"


def fail(message: str) -> NoReturn:
    """End with one line and exit status 2; a process of several says which of them it is."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    who = f" (process {rank_zero_only.rank + 1} of {processes})" if processes > 1 else ""  # type: ignore[attr-defined]
    print(f"error{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def told(error: Exception) -> str:
    """Return what a user is told of an exception: a mistake's own words, or its kind and where to look."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, MisconfigurationException):
        # A loader's worker wraps its traceback around the message; the message is the last line.
        return lines[-1].partition("MisconfigurationException: ")[2] or str(error)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and isinstance(error, RuntimeError) and (isinstance(error, DistError) or CONNECTIONS.search(str(error))):
        return "Another process of this run is gone, which says itself why; this one ends with it."
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    frames = traceback.extract_tb(error.__traceback__)
    frame = [*frames[-1:], *(each for each in frames if not each.filename.startswith(installed))][-1]
    what = lines[-1] if "Traceback" in str(error) else f"{type(error).__name__}: {one_line(error)}"
    return f"{what} (line {frame.lineno} of {frame.filename}); --debug shows the whole traceback."


def program() -> str:
    """Return what this command line is called by: the installed command, or train.py."""
    return name if (name := Path(sys.argv[0]).name) == "diffused-redundancy" else "train.py"
