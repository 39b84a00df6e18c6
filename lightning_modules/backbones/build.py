"""Build networks by name, timm models or callables that return an `nn.Module`, with their preprocessing."""

import contextlib
import difflib
import importlib
import inspect
import logging
import math
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import resolve_data_config, resolve_model_data_config
from timm.models import PretrainedCfg
from torch import nn

from lightning_modules.backbones import weights as weight_files
from lightning_modules.files import one_line

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""How timm can resize images."""
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of names that timm looks up outside of its own registry."""


@dataclass(frozen=True)
class PretrainedCfgOverlay:
    """The preprocessing that weights expect, where it differs from the architecture's default (timm's term).

    Args:
        input_size: Channels, height and width, for example [3, 224, 224].
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

    def given(self) -> dict[str, Any]:
        """Return the keys that are set, lists as tuples, as timm has them.

        Raises:
            MisconfigurationException: If a value is out of range or has the wrong length.
        """
        channels = self.input_size[0] if self.input_size else 3
        for name, value, holds, right in (
            ("input_size", self.input_size, lambda v: len(v) == 3 and min(v) > 0, "channels, height and width"),
            ("mean", self.mean, lambda v: all(map(math.isfinite, v)), "finite numbers"),
            ("mean", self.mean, lambda v: len(v) == channels, f"{channels} numbers, one per channel"),
            ("std", self.std, lambda v: len(v) == channels, f"{channels} numbers, one per channel"),
            ("std", self.std, lambda v: all(0 < each < math.inf for each in v), f"{channels} numbers above 0"),
            ("interpolation", self.interpolation, INTERPOLATIONS.__contains__, f"one of {', '.join(INTERPOLATIONS)}"),
            ("crop_pct", self.crop_pct, lambda v: 0 < v <= 1, "above 0, at most 1"),
        ):
            if value is not None and not holds(value):
                raise MisconfigurationException(f"pretrained_cfg_overlay.{name} is {value}; it must be {right}.")
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in asdict(self).items()
            if value is not None
        }


def build(
    name: str, pretrained: bool, kwargs: dict[str, Any], overlay: PretrainedCfgOverlay
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model without its classifier, or the network of a callable as it is; return its preprocessing too.

    Args:
        name: A timm model, or the import path of a callable.
        pretrained: Whether it must come with its own pretrained weights; otherwise they may be random.
        kwargs: Passed on to the model's constructor or the callable.
        overlay: Preprocessing, where it differs from the model's default; a callable has none and needs `input_size`,
            `mean` and `std`.

    Returns:
        The network, and its preprocessing as timm's data configuration: `input_size`, `mean`, `std`, `interpolation`,
        `crop_pct`, `crop_mode`.

    Raises:
        MisconfigurationException: If the name is unknown, `kwargs` are not taken, pretrained weights cannot be had, or
            the preprocessing of a callable is not given.
    """
    if not is_timm_model(name):
        return _build_callable(name, pretrained, kwargs, overlay)
    network = build_timm(name, pretrained, kwargs, overlay)
    return network, resolve_model_data_config(network)


def is_timm_model(name: str) -> bool:
    """Return whether `name` is for timm to resolve."""
    return name.startswith(HUBS) or timm.is_model(name.split(".")[0])


def build_timm(
    name: str, pretrained: bool, kwargs: dict[str, Any], overlay: PretrainedCfgOverlay, num_classes: int = 0
) -> nn.Module:
    """Build a timm model.

    Args:
        name: Its name, with or without a pretrained tag.
        pretrained: Whether to load its pretrained weights; otherwise they are random.
        kwargs: Passed on to the model's constructor.
        overlay: Preprocessing, where it differs from the model's default.
        num_classes: Outputs of the classifier; 0 leaves the classifier out.

    Raises:
        MisconfigurationException: If there are no such weights, they cannot be loaded, or `kwargs` are not taken.
    """
    _check_tag(name)
    given = overlay.given() or None

    def create(pretrained: bool) -> nn.Module:
        with _quiet("timm", "huggingface_hub"), weight_files.no_pickled_code():
            return timm.create_model(
                name, pretrained=pretrained, pretrained_cfg_overlay=given, num_classes=num_classes, **kwargs
            )

    try:
        return create(pretrained)
    except Exception as error:  # hubs, sockets, architectures and timm itself raise whatever they like
        if not name.startswith(HUBS):
            try:
                create(pretrained=False)
            except Exception as cause:
                raise MisconfigurationException(f"{name} does not take kwargs {kwargs} ({one_line(cause)}).") from cause
        raise MisconfigurationException(
            f"The pretrained weights of {name} cannot be had ({one_line(error)}); give a file with "
            f"--model.backbone.weights FILE, or say --model.backbone.weights random."
        ) from error


def timm_preprocessing(name: str, overlay: PretrainedCfgOverlay) -> dict[str, Any]:
    """Return the preprocessing of a timm architecture (timm's data configuration) without building it.

    Raises:
        MisconfigurationException: If timm has no such weights.
    """
    _check_tag(name)
    cfg = replace(timm.get_pretrained_cfg(name) or PretrainedCfg(), **overlay.given())
    return resolve_data_config(pretrained_cfg=cfg.to_dict())


def as_call(name: str, kwargs: dict[str, Any]) -> str:
    """Return a model's name with its arguments, where there are any, as `resnet26(stem_type=deep)`."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in kwargs.items())})" if kwargs else name


def describe_preprocessing(preprocessing: dict[str, Any]) -> str:
    """Return size, resizing and normalisation as `3 x 224 x 224, bicubic, crop 0.95, mean 0.485 ..., std 0.229 ...`."""
    size = " x ".join(map(str, preprocessing["input_size"]))
    mean, std = (" ".join(f"{value:g}" for value in preprocessing[key]) for key in ("mean", "std"))
    return f"{size}, {preprocessing['interpolation']}, crop {preprocessing['crop_pct']:g}, mean {mean}, std {std}"


def classifier_names(network: Any) -> list[str]:
    """Return the names of a timm model's classifiers, or of the identities that stand in their place."""
    value = network.pretrained_cfg.get("classifier")
    names = [] if value is None else [value] if isinstance(value, str) else list(value)
    modules = dict(network.named_modules())
    found = []
    for name in names:
        parts = name.split(".")
        ancestors = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        # A head that became an identity as a whole took all its modules along, not just the classifier.
        found.append(next((each for each in ancestors if isinstance(modules.get(each), nn.Identity)), name))
    return found


def _build_callable(
    name: str, pretrained: bool, kwargs: dict[str, Any], overlay: PretrainedCfgOverlay
) -> tuple[nn.Module, dict[str, Any]]:
    make = _import(name)
    if not _returns_network(make):
        raise MisconfigurationException(
            f"{name} is not known to return an nn.Module and is not called; give a subclass of nn.Module, or a "
            f"function that is annotated to return one."
        )
    given = overlay.given()
    absent = [key for key in ("input_size", "mean", "std") if key not in given]
    if absent:
        raise MisconfigurationException(
            f"{name} does not say how it wants its images; set model.backbone.pretrained_cfg_overlay: "
            f"{', '.join(absent)}."
        )
    if pretrained:
        parameters = inspect.signature(make).parameters
        # How torchvision's constructors, new and old, are asked for their trained weights.
        for parameter, value in (("weights", "DEFAULT"), ("pretrained", True)):
            if parameter in parameters:
                kwargs = {parameter: value} | kwargs
                break
    with weight_files.no_pickled_code():
        try:
            network = make(**kwargs)
        except Exception as error:  # it is somebody else's code, and may need a network connection
            raise MisconfigurationException(f"{name}({kwargs}) fails ({one_line(error)}).") from error
        if not isinstance(network, nn.Module):
            raise MisconfigurationException(f"{name} returns {type(network).__name__}, not an nn.Module.")
        if pretrained:
            _refuse_random_weights(name, network, lambda: make(**kwargs))
    return network, {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"} | given


def _check_tag(name: str) -> None:
    """Refuse a pretrained tag (`resnet50.TAG`) that timm does not have, and name near ones."""
    architecture, _, tag = name.partition(".")
    if tag and not name.startswith(HUBS):
        known = timm.list_pretrained(f"{architecture}.*")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0) or known[:3]
            raise MisconfigurationException(f"timm has no weights {name!r}; there are {', '.join(near) or 'none'}.")


def _import(name: str) -> Callable[..., Any]:
    """Return the callable with this import path, or refuse the name and suggest near ones of timm's."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError, TypeError, ValueError):
        found = None
    if not callable(found):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists timm's."
        raise MisconfigurationException(f"{name!r} is neither a timm model nor the import path of a callable{hint}")
    return found


def _returns_network(make: Callable[..., Any]) -> bool:
    """Return whether it is safe to call this: a network's class, a function annotated to return one, or own code.

    A configuration must not run whatever else is installed, such as `os.system`. A function without an annotation is
    called only where it is the user's own: neither in the standard library nor among the installed packages.
    """
    try:
        returns = make if isinstance(make, type) else typing.get_type_hints(make).get("return")
    except (NameError, TypeError, AttributeError):
        returns = None
    if isinstance(returns, type) and issubclass(returns, nn.Module):
        return True
    file = getattr(sys.modules.get(getattr(make, "__module__", "")), "__file__", None)
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = file is not None and not any(Path(file).resolve().is_relative_to(path) for path in installed)
    return own and returns is None and not isinstance(make, type)


def _refuse_random_weights(name: str, network: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Refuse weights that differ when the network is made again with other random numbers: they were not loaded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() ^ 0x5EED)
        again = make().state_dict()
    random = [key for key, value in network.state_dict().items() if not torch.equal(value, again[key])]
    if random:
        raise MisconfigurationException(
            f"{name} comes with random weights ({', '.join(random[:3])}); give a file with --model.backbone.weights "
            f"FILE, or say --model.backbone.weights random."
        )


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence these loggers meanwhile: libraries' retries and warnings would come before our own one line."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
