"""Build networks by name, timm models or callables that return an `nn.Module`, with their preprocessing."""

import difflib
import inspect
import itertools
import json
import logging
import pkgutil
import sys
import sysconfig
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import resolve_data_config, resolve_model_data_config
from timm.models import PretrainedCfg
from torch import nn

from lightning_modules.backbones.weights import no_pickled_code
from lightning_modules.files import one_line

Built = tuple[nn.Module, dict[str, Any], list[str] | None]
"""A network, its preprocessing (timm's data configuration), and the names of a timm model's classifiers, else None."""
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # Prefixes of names that timm looks up outside of its own registry


@dataclass(frozen=True)
class PretrainedCfgOverlay:
    """The preprocessing that weights expect, where it differs from the architecture's default (timm's term).

    Args:
        input_size: Channels (3, or 1 for grey), height and width, for example [3, 224, 224].
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        interpolation: `bicubic`, `bilinear` or another of timm's names.
        crop_pct: Side of the centre crop over side of the resized image.
    """

    input_size: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None

    def given(self, channels: int = 3) -> dict[str, Any]:
        """Return the keys that are set, lists as tuples, as timm has them; refuse values that are out of range.

        `channels` are those of the images where `input_size` does not say.
        """
        n = self.input_size[0] if self.input_size else channels
        known = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "input_size": (
                lambda v: len(v) == 3 and v[0] in (1, 3) and min(v) > 0,
                "channels (3, or 1 for grey), height and width",
            ),
            "mean": (lambda v: len(v) == n and all(map(isfinite, v)), f"{n} numbers, finite, one per channel"),
            "std": (lambda v: len(v) == n and all(0 < x < inf for x in v), f"{n} numbers above 0, one per channel"),
            "interpolation": (known.__contains__, f"one of {', '.join(known)}"),
            "crop_pct": (lambda v: 0 < v <= 1, "above 0, at most 1"),
        }
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in given.items():
            holds, right = rules[name]
            if not holds(value):
                raise MisconfigurationException(f"pretrained_cfg_overlay.{name} is {value}; it must be {right}.")
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def build(
    name: str, pretrained: bool, kwargs: dict[str, Any], overlay: PretrainedCfgOverlay, num_classes: int = 0
) -> Built:
    """Build a timm model, or the network that the callable with an import path returns.

    Args:
        name: A timm model, with or without a pretrained tag, or the import path.
        pretrained: Whether it must come with its own pretrained weights; otherwise they may be random.
        kwargs: Passed on to the model's constructor or the callable.
        overlay: Preprocessing, where it differs from the model's default, of which a callable has none.
        num_classes: Outputs of a timm model's classifier; 0 leaves it out.

    Raises:
        MisconfigurationException: If the name is unknown, `kwargs` do not fit, or weights or preprocessing are absent.
    """
    if not name.startswith(HUBS) and not timm.is_model(name.split(".")[0]):
        return _build_callable(name, pretrained, kwargs, overlay)
    _check_tag(name)
    given = overlay.given(_channels(kwargs, overlay) or 3)
    settings: dict[str, Any] = {"pretrained_cfg_overlay": given, "num_classes": num_classes}

    def create(pretrained: bool) -> nn.Module:
        before = logging.root.manager.disable
        logging.disable()  # libraries' retries and warnings would come before our own one line
        try:
            with no_pickled_code():
                return timm.create_model(name, pretrained=pretrained, **settings, **kwargs)
        finally:
            logging.disable(before)

    try:
        network = create(pretrained)
    except Exception as error:  # hubs, sockets, architectures and timm itself raise whatever they like
        problem = (
            f"The pretrained weights of {name} cannot be had ({one_line(error)}); give a file with "
            f"--model.backbone.weights FILE, or say --model.backbone.weights random."
        )
        if not name.startswith(HUBS):
            try:
                create(pretrained=False)
            except Exception as cause:
                problem = f"{name} does not take kwargs {kwargs} ({one_line(cause)})."
        raise MisconfigurationException(problem) from error
    return network, _in_channels(resolve_model_data_config(network), _channels(kwargs, overlay)), _classifier(network)


def timm_preprocessing(name: str, overlay: PretrainedCfgOverlay, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of a timm model without building it; refuse a pretrained tag that timm has not."""
    _check_tag(name)
    channels = _channels(kwargs, overlay)
    cfg = replace(timm.get_pretrained_cfg(name) or PretrainedCfg(), **overlay.given(channels or 3))
    return _in_channels(resolve_data_config(pretrained_cfg=cfg.to_dict()), channels)


def completed(
    name: str | None,
    kwargs: dict[str, Any] | None,
    overlay: PretrainedCfgOverlay,
    weights: str,
    made: dict[str, Any],
    option: str = "model.backbone",
) -> tuple[str, dict[str, Any], PretrainedCfgOverlay]:
    """Return name, kwargs and preprocessing; what is not given is what a file of weights says (`weights.made`).

    `option` is what names of these arguments begin with in an error.

    Raises:
        MisconfigurationException: If the name is nowhere, or name or kwargs are given that contradict the file.
    """
    architecture = made.get("architecture", name)
    if architecture is None:
        raise MisconfigurationException(
            f"{option}.name is null, and weights {weights} do not say what they are of; name the architecture."
        )
    if made:
        of, as_json = architecture.partition(".")[0], partial(json.dumps, sort_keys=True, default=str)
        wrong = f"name is {name}" if name and name.partition(".")[0] != of else ""
        if kwargs and as_json(kwargs) != as_json(made["kwargs"]):  # where a tuple is a list
            wrong = wrong or f"kwargs are {kwargs}"
        if wrong:
            raise MisconfigurationException(
                f"{option}.{wrong}, but {weights} holds the weights of {as_call(of, made['kwargs'])}; leave it out, as "
                f"with --{option}.name null --{option}.kwargs null."
            )
    given = {key: value for key, value in vars(overlay).items() if value is not None}
    overlay = PretrainedCfgOverlay(**made.get("preprocessing", {}) | given)
    return name or architecture, kwargs or made.get("kwargs", {}), overlay


def as_call(name: str, kwargs: dict[str, Any]) -> str:
    """Return a model's name with its arguments, where there are any, as `resnet26(stem_type=deep)`."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in kwargs.items())})" if kwargs else name


def describe_preprocessing(preprocessing: dict[str, Any]) -> str:
    """Return size, resizing and normalisation as `3 x 224 x 224, bicubic, crop 0.95, mean 0.485 ..., std 0.229 ...`."""
    size = " x ".join(map(str, preprocessing["input_size"]))
    mean, std = (" ".join(f"{value:g}" for value in preprocessing[key]) for key in ("mean", "std"))
    return f"{size}, {preprocessing['interpolation']}, crop {preprocessing['crop_pct']:g}, mean {mean}, std {std}"


def _channels(kwargs: dict[str, Any], overlay: PretrainedCfgOverlay) -> int | None:
    """Return how many channels `kwargs` ask of a timm model, if they do; refuse a number that images do not have."""
    channels = kwargs.get("in_chans")
    size = overlay.input_size
    if channels is not None and (channels not in (1, 3) or (size and size[0] != channels)):
        beside = f", pretrained_cfg_overlay.input_size {size}" if size else ""
        raise MisconfigurationException(
            f"kwargs.in_chans is {channels}{beside}; images have 3 channels, or 1 where both say so, and are then "
            f"made grey."
        )
    return channels


def _in_channels(preprocessing: dict[str, Any], channels: int | None) -> dict[str, Any]:
    """Return preprocessing with so many channels, grey with the average of the colours' means and deviations."""
    colours, *size = preprocessing["input_size"]
    averaged = {
        key: (sum(preprocessing[key]) / colours,)
        for key in ("mean", "std")
        if channels == 1 and len(preprocessing[key]) == colours
    }
    return preprocessing | averaged | {"input_size": (channels or colours, *size)}


def _classifier(network: Any) -> list[str]:
    """Return the names of a timm model's classifiers, or of the identities in their place."""
    names = network.pretrained_cfg.get("classifier") or ()
    modules = dict(network.named_modules())
    found = []
    for name in [names] if isinstance(names, str) else names:
        ancestors = itertools.accumulate(name.split("."), "{}.{}".format)
        # A head that became an identity took all its modules along, not just the classifier.
        found.append(next((each for each in ancestors if isinstance(modules.get(each), nn.Identity)), name))
    return found


def _build_callable(name: str, pretrained: bool, kwargs: dict[str, Any], overlay: PretrainedCfgOverlay) -> Built:
    make, given = _import(name), overlay.given()
    absent = ", ".join(key for key in ("input_size", "mean", "std") if key not in given)
    if absent:
        raise MisconfigurationException(
            f"{name} does not say how it wants its images; set model.backbone.pretrained_cfg_overlay: {absent}."
        )
    if pretrained:
        # How torchvision's constructors, new and old, are asked for their trained weights.
        asked = {"weights": "DEFAULT", "pretrained": True}
        known = [key for key in asked if key in inspect.signature(make).parameters]
        kwargs = {key: asked[key] for key in known[:1]} | kwargs
    with no_pickled_code():
        try:
            network = make(**kwargs)
        except Exception as error:  # it is somebody else's code, and may need a network connection
            raise MisconfigurationException(f"{name}({kwargs}) fails ({one_line(error)}).") from error
        if not isinstance(network, nn.Module):
            raise MisconfigurationException(f"{name} returns {type(network).__name__}, not an nn.Module.")
        if pretrained:  # weights that differ when it is made again with other random numbers were not loaded
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch.initial_seed() ^ 0x5EED)
                again = make(**kwargs).state_dict()
            random = [key for key, value in network.state_dict().items() if not torch.equal(value, again[key])]
            if random:
                raise MisconfigurationException(
                    f"{name} comes with random weights ({', '.join(random[:3])}); give a file with "
                    f"--model.backbone.weights FILE, or say --model.backbone.weights random."
                )
    return network, {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"} | given, None


def _check_tag(name: str) -> None:
    """Refuse a pretrained tag (`resnet50.TAG`) that timm does not have, and name near ones."""
    architecture, _, tag = name.partition(".")
    if tag and not name.startswith(HUBS):
        known = timm.list_pretrained(f"{architecture}.*")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0) or known[:3]
            raise MisconfigurationException(f"timm has no weights {name!r}; there are {', '.join(near) or 'none'}.")


def _import(name: str) -> Callable[..., Any]:
    """Return the callable with this import path, if calling it is safe; else refuse the name and suggest near ones."""
    here, reason = str(Path.cwd()), ""
    if here not in sys.path:
        sys.path.append(here)  # last, so that a file there hides no installed package
    try:
        found = pkgutil.resolve_name(name) if "." in name else None
    except Exception as error:  # a file of one's own may raise whatever it likes
        found, reason = None, f" ({one_line(error)}; looked for in {here} and on Python's path)"
    if not callable(found):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists timm's."
        raise MisconfigurationException(
            f"{name!r} is neither a timm model nor the import path of a callable{reason}{hint}"
        )
    if not _may_be_called(found):
        raise MisconfigurationException(
            f"{name} is not known to return an nn.Module and is not called; give a subclass of nn.Module, or a "
            f"function that is annotated to return one."
        )
    return found


def _may_be_called(make: Callable[..., Any]) -> bool:
    """Return whether it is safe to call this: a network's class, a function annotated to return one, or own code.

    A configuration must not run whatever else is installed, such as `os.system`. A function without an annotation is
    called only where it is the user's own: neither in the standard library nor among the installed packages.
    """
    try:
        returns = make if isinstance(make, type) else typing.get_type_hints(make).get("return")
    except (NameError, TypeError, AttributeError):
        returns = None
    if returns is not None:
        return isinstance(returns, type) and issubclass(returns, nn.Module)
    file = getattr(sys.modules.get(getattr(make, "__module__", "")), "__file__", None)
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return file is not None and not any(Path(file).resolve().is_relative_to(path) for path in installed)
