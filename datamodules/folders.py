"""Which files below a folder are data, and which split the names of folders and files put them into."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.images import printable, reading

ENDINGS = (*IMG_EXTENSIONS, ".gif")
"""How names of image files end, in lower case."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of each split in folders, file names and on the Hub."""
Words = tuple[list[str], list[str]]  # those of a name before and after the one that names a split


def files_below(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Return the files with these endings, relative to `folder` and in the order of their paths; links are followed.

    Hidden files and folders are left out, and so is `__MACOSX`, which a Mac's archives leave beside the data. A
    MisconfigurationException is raised if one is a link to a file that is not there.
    """
    found: list[Path] = []
    waiting = [folder]
    for here in waiting:  # grows while it is gone through
        with reading(here), os.scandir(here) as entries:
            for entry in (each for each in entries if visible([each.name])):
                path = here / entry.name
                if entry.is_dir():
                    if not (entry.is_symlink() and here.resolve().is_relative_to(path.resolve())):  # no loop
                        waiting.append(path)
                elif entry.name.lower().endswith(tuple(endings)):
                    if entry.is_symlink() and not path.exists():
                        link = printable(f"{path} is a link to {path.readlink()}")
                        raise MisconfigurationException(f"{link}, which is not there.")
                    found.append(path.relative_to(folder))
    return sorted(found)


def visible(names: Iterable[str]) -> list[str]:
    """Return the names that are neither hidden nor those of a Mac's leftovers."""
    return [name for name in names if not name.startswith(".") and name != "__MACOSX"]


def by_split(files: Sequence[Path], naming: Callable[[Path], Sequence[str]]) -> dict[str, tuple[list[Path], str]]:
    """Return the files of each split and what put them there; `naming` returns the parts of a path that may name it.

    The outermost part counts that is called as a split, beside numbers of shards (`test`, `test-00000-of-00002`), or
    as a part of train is but for the split's name (`birds_test`, beside `birds_train`). All other files are train.
    """
    parts = {file: list(naming(file)) for file in files}
    every = {part for names in parts.values() for part in names}
    trains = [([], []), *(words for part in every for split, words in _meanings(part) if split == "train")]
    meaning = {part: next((split for split, words in _meanings(part) if words in trains), None) for part in every}
    found: dict[str, tuple[list[Path], set[str]]] = {}
    for file, names in parts.items():
        part = next((name for name in names if meaning[name]), "")
        chosen, reasons = found.setdefault(meaning.get(part) or "train", ([], set()))
        chosen.append(file)
        in_folder = part in file.parts[:-1]
        reasons.add((f"folder {part}" if in_folder else f"file {file.name}") if part else "no split is named")
    return {split: (chosen, _and_more(sorted(reasons))) for split, (chosen, reasons) in found.items()}


def _meanings(name: str) -> list[tuple[str, Words]]:
    """Return the splits that words of a name may stand for, train last, each with the words before and after it."""
    words = re.findall("[a-z]+", re.sub(r"(-of-\d+)?(-[0-9a-f]{16})?$", "", name.lower()))
    return [
        (split, (words[:place], words[place + 1 :]))
        for split, names in reversed(SPLIT_NAMES.items())  # any name of train is as one of train, so it is asked last
        for place, word in enumerate(words)
        if word in names
    ]


def _and_more(reasons: Sequence[str]) -> str:
    return f"{reasons[0]} and {len(reasons) - 1} more" if len(reasons) > 1 else reasons[0]
