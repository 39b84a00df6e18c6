"""The frozen backbone: any timm model, or any callable that returns a module, read at one layer."""

import contextlib
import ctypes
import difflib
import hashlib
import importlib
import inspect
import logging
import math
import os
import sys
import sysconfig
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from lightning_modules.backbones import weights as weight_files

PENULTIMATE = "penultimate"
"""The layer before the classifier."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""How timm can resize images."""


@dataclass(frozen=True)
class PretrainedCfgOverlay:
    """What weights want of an image where it differs from the architecture's default (a part of timm's term).

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
        """Return the keys that are set, with tuples as timm has them.

        Raises:
            MisconfigurationException: If a value can be no part of a preprocessing.
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
                raise MisconfigurationException(
                    f"model.backbone.pretrained_cfg_overlay.{name} is {value}; it must be {right}."
                )
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in asdict(self).items()
            if value is not None
        }


class GivenVectors(nn.Module):
    """Stands where there is no backbone: vectors are the representations.

    Args:
        width: D.
    """

    label = "none"
    layers = ("none",)
    preprocessing: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths = {"none": width}

    def identity(self) -> dict[str, Any]:
        """Return what the representations depend on beside the vectors: nothing."""
        return {"weights": self.label, "preprocessing": {}}


@final
class FrozenBackbone(nn.Module):
    """A pre-trained network that turns images into representations and never changes.

    Always in evaluation mode and without gradients: no parameter and no batch-norm statistic moves, dropout is off.

    Args:
        name: A timm model with its pretrained tag (`resnet50.a1_in1k`, `hf-hub:...`), or the import path of a callable
            that returns an `nn.Module` (`torchvision.models.squeezenet1_1`). An installed one must be such a class or
            be annotated to return one, so that a configuration cannot run whatever else is installed.
        weights: `pretrained`; a safetensors or torch file; or `random`, the only way to run an untrained network.
        kwargs: Passed on to the model's constructor, for example `{pad_type: same}`.
        pretrained_cfg_overlay: Preprocessing, where it differs from the model's default. A callable needs at least
            `input_size`, `mean` and `std`.
        layer: `penultimate`, what enters the classifier; or the name of a module; or a list of them, which are read in
            the same pass and stand side by side in the representation. Of a callable's network, `penultimate` is what
            enters the linear or convolutional layer that runs last.
        pooling: What becomes of spatial maps and tokens: `mean` averages them, `flatten` makes every place's values
            neurons of their own.

    Raises:
        MisconfigurationException: If a name is unknown, weights cannot be had or do not fit, the preprocessing of a
            callable is not given, or the layer has no fixed width.
    """

    def __init__(
        self,
        name: str,
        weights: str = "pretrained",
        kwargs: dict[str, Any] | None = None,
        pretrained_cfg_overlay: PretrainedCfgOverlay = PretrainedCfgOverlay(),
        layer: str | list[str] = "penultimate",
        pooling: Literal["mean", "flatten"] = "mean",
    ) -> None:
        super().__init__()
        self.name = name
        self.weights = weights
        self.kwargs = kwargs or {}
        self.layers = [layer] if isinstance(layer, str) else layer
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise MisconfigurationException(f"model.backbone.layer is {layer}; give at least one layer, each once.")
        self.pooling = pooling
        overlay = pretrained_cfg_overlay.given()
        self.network: Any
        file = None if weights in ("pretrained", "random") else weight_files.find(weights)
        if is_timm_model(name):
            self.network, self.preprocessing = _build_timm(name, weights, self.kwargs, overlay)
            self._classifier = _removed(self.network)
            self.eval().requires_grad_(False)
        else:
            self.network, self.preprocessing = _build_callable(name, weights, self.kwargs, overlay)
            self.eval().requires_grad_(False)
            self._classifier = self._unread()
        self._captured: dict[str, Tensor] = {}
        self._reads_output = is_timm_model(name)
        for each in self.layers:
            if each != PENULTIMATE:
                self._capture(each, each, inputs=False)
            elif not self._reads_output:
                self._capture(each, self._classifier[0], inputs=True)
        if file is not None:
            weight_files.load(self.network, file, self._classifier)
        # Convolutions over channels-last images are never slower on current CPUs and GPUs, up to three times faster.
        self.network.to(memory_format=torch.channels_last)
        self.widths = self._widths()

    @property
    def width(self) -> int:
        """Neurons of all layers that are read."""
        return sum(self.widths.values())

    @property
    def label(self) -> str:
        """What results call the backbone: its name, with the weights where they are not the pretrained ones."""
        if self.weights == "pretrained":
            return self.name
        stem = Path(self.weights).stem
        return stem if stem.startswith(self.name) else f"{self.name}-{stem}"

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in evaluation mode whatever is asked, so that batch norm and dropout stay frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the representations of `images`, shape (B, C, H, W), as float32 of shape (B, sum of widths)."""
        return torch.cat(list(self._read(images).values()), dim=1)

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        """Return what each layer gives for `images`, as float32 of shape (B, D)."""
        output = self.network(images.contiguous(memory_format=torch.channels_last))
        if self._reads_output and PENULTIMATE in self.layers:
            self._captured[PENULTIMATE] = self._pool(output, PENULTIMATE)
        captured, self._captured = self._captured, {}
        for layer in self.layers:
            if layer not in captured:
                raise MisconfigurationException(f"model.backbone.layer {layer!r} of {self.name} is never run.")
        return {layer: captured[layer].float() for layer in self.layers}

    def identity(self) -> dict[str, Any]:
        """Return what the representations of an image depend on, apart from the image and the precision."""
        seen = hashlib.blake2b(digest_size=16)
        for key, value in sorted(self.network.state_dict().items()):
            if weight_files.below(key, self._classifier):
                continue
            seen.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
            seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {
            "name": self.name,
            "kwargs": repr(self.kwargs),
            "network": repr(self.network),
            "weights": seen.hexdigest(),
            "layers": self.layers,
            "pooling": self.pooling,
            "preprocessing": {key: str(value) for key, value in sorted(self.preprocessing.items())},
        }

    def _pool(self, output: Any, layer: str) -> Tensor:
        """Make neurons of a module's output, shape (B, D); a copy, as what follows may overwrite it."""
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise MisconfigurationException(
                f"model.backbone.layer {layer!r} of {self.name} gives {shape}; it must give (images, neurons), "
                f"tokens (images, tokens, neurons) or a map (images, neurons, height, width)."
            )
        if self.pooling == "flatten":
            return output.flatten(1).clone()
        if output.ndim == 3:  # tokens; class and register tokens come first and are no part of the image
            patches = getattr(getattr(self.network, "patch_embed", None), "num_patches", None)
            prefix = getattr(self.network, "num_prefix_tokens", 0)
            return output[:, 0 if len(output[0]) == patches else prefix :].mean(1)
        if output.ndim == 4:
            _, height, width, depth = output.shape
            last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            if (height == width) != (width == depth):  # the map is square, as the images are
                last = height == width
            return output.mean((1, 2) if last else (2, 3))
        return output.clone()

    def _widths(self) -> dict[str, int]:
        """Look at what comes out of each layer: what models say of their width is not always so."""
        try:
            with torch.no_grad():
                read = self._read(torch.zeros(2, *self.preprocessing["input_size"]))
            return {layer: output.shape[1] for layer, output in read.items()}
        except (RuntimeError, AssertionError, ValueError) as error:
            raise MisconfigurationException(
                f"{self.name} cannot take images of {tuple(self.preprocessing['input_size'])} "
                f"({_one_line(error)}); set model.backbone.pretrained_cfg_overlay.input_size or kwargs."
            ) from error

    def _capture(self, layer: str, module: str, inputs: bool) -> None:
        names = [name for name, _ in self.network.named_modules() if name]
        if module not in names:
            near = difflib.get_close_matches(module, names, n=3, cutoff=0.3) or names[-3:]
            raise MisconfigurationException(
                f"{self.name} has no layer {module!r}; near it are {', '.join(near)} (or 'penultimate')."
            )

        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self._captured[layer] = self._pool(arguments[0] if inputs else output, layer)

        self.network.get_submodule(module).register_forward_hook(hook)

    def _unread(self) -> list[str]:
        """Name the linear or convolutional layer that runs last, unless the layer that is read ends no sooner."""
        order: list[str] = []
        hooks = [
            module.register_forward_hook(lambda *_, name=name: order.append(name))
            for name, module in self.network.named_modules()
        ]
        try:
            with torch.no_grad():
                self.network(torch.zeros(1, *self.preprocessing["input_size"]))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise MisconfigurationException(
                f"{self.name} cannot take images of {tuple(self.preprocessing['input_size'])} ({_one_line(error)})."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        weighted = [
            place
            for place, name in enumerate(order)
            if isinstance(self.network.get_submodule(name), nn.Linear | nn.Conv2d)
        ]
        if PENULTIMATE in self.layers and not weighted:
            raise MisconfigurationException(f"{self.name} has no linear or convolutional layer; name a layer.")
        return [order[weighted[-1]]] if weighted and not set(self.layers) & set(order[weighted[-1] :]) else []


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it allocates next.

    A pass frees and allocates maps of tens of MB at each layer. glibc gives each back to the system at once, which
    clears it page by page when it is asked for again: half of the time of a MobileNetV2 on a CPU and more. Other
    allocators are left as they are (man 3 mallopt).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        never_mapped, never_trimmed = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(*never_mapped)
        mallopt(*never_trimmed)


def is_timm_model(name: str) -> bool:
    """Return whether `name` is for timm to resolve."""
    return name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name.split(".")[0])


def _build_timm(
    name: str, weights: str, kwargs: dict[str, Any], overlay: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    from_hub = name.startswith(("hf-hub:", "hf_hub:"))
    tag = name.partition(".")[2]
    if not from_hub and tag and name not in timm.list_pretrained(f"{name.split('.')[0]}.*"):
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        near = difflib.get_close_matches(name, tags, n=3, cutoff=0) or tags[:3]
        raise MisconfigurationException(f"timm has no weights {name!r}; there are {', '.join(near) or 'none'}.")

    def create(pretrained: bool) -> nn.Module:
        with _quiet("timm", "huggingface_hub"), weight_files.pickles_closed():
            return timm.create_model(
                name, pretrained=pretrained, pretrained_cfg_overlay=overlay or None, num_classes=0, **kwargs
            )

    try:
        network = create(weights == "pretrained")
    except Exception as error:  # hubs, sockets, architectures and timm itself raise whatever they like
        if not from_hub:
            try:
                create(pretrained=False)
            except Exception as cause:
                raise MisconfigurationException(
                    f"{name} does not take model.backbone.kwargs {kwargs} ({_one_line(cause)})."
                ) from cause
        raise MisconfigurationException(
            f"The pretrained weights of {name} cannot be had ({_one_line(error)}); give a file with "
            f"--model.backbone.weights FILE, or say --model.backbone.weights random."
        ) from error
    return network, resolve_model_data_config(network)


def _build_callable(
    name: str, weights: str, kwargs: dict[str, Any], overlay: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    absent = [key for key in ("input_size", "mean", "std") if key not in overlay]
    build = _import(name)
    if not _builds_networks(build):
        raise MisconfigurationException(
            f"{name} is not known to return an nn.Module and is not called; give a subclass of nn.Module, or a "
            f"function that is annotated to return one."
        )
    if absent:
        raise MisconfigurationException(
            f"{name} does not say how it wants its images; set model.backbone.pretrained_cfg_overlay: "
            f"{', '.join(absent)}."
        )
    if weights == "pretrained":
        parameters = inspect.signature(build).parameters
        # How torchvision's constructors, new and old, are asked for their trained weights.
        for parameter, value in (("weights", "DEFAULT"), ("pretrained", True)):
            if parameter in parameters:
                kwargs = {parameter: value} | kwargs
                break
    try:
        with weight_files.pickles_closed():
            network = build(**kwargs)
    except Exception as error:  # it is somebody else's code, and may need a network
        raise MisconfigurationException(f"{name}({kwargs}) fails ({_one_line(error)}).") from error
    if not isinstance(network, nn.Module):
        raise MisconfigurationException(f"{name} returns {type(network).__name__}, not an nn.Module.")
    if weights == "pretrained":
        with weight_files.pickles_closed():
            _refuse_random(name, network, lambda: build(**kwargs))
    preprocessing = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"} | overlay
    return network, preprocessing


def _builds_networks(build: Callable[..., Any]) -> bool:
    """Return whether calling this can be meant: a network's class, a function that says so, or one of one's own."""
    try:
        returns = build if isinstance(build, type) else typing.get_type_hints(build).get("return")
    except (NameError, TypeError, AttributeError):
        returns = None
    if isinstance(returns, type) and issubclass(returns, nn.Module):
        return True
    file = getattr(sys.modules.get(getattr(build, "__module__", "")), "__file__", None)
    places = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = [Path(sysconfig.get_path(place)).resolve() for place in places]
    own = file is not None and not any(Path(file).resolve().is_relative_to(path) for path in installed)
    return own and returns is None and not isinstance(build, type)


def _refuse_random(name: str, network: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Build a second time from other random numbers: weights that were loaded from somewhere stay the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() ^ 0x5EED)
        again = build().state_dict()
    random = [key for key, value in network.state_dict().items() if not torch.equal(value, again[key])]
    if random:
        raise MisconfigurationException(
            f"{name} comes with random weights ({', '.join(random[:3])}); give a file with --model.backbone.weights "
            f"FILE, or say --model.backbone.weights random."
        )


def _import(name: str) -> Callable[..., Any]:
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


def _removed(network: Any) -> list[str]:
    """Return the names of a timm model's classifiers, or of what stands in their place, with all that was below it."""
    value = network.pretrained_cfg.get("classifier")
    names = [] if value is None else [value] if isinstance(value, str) else list(value)
    modules = dict(network.named_modules())
    removed = []
    for name in names:
        parts = name.split(".")
        ancestors = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        removed.append(next((each for each in ancestors if isinstance(modules.get(each), nn.Identity)), name))
    return removed


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def _quiet(*names: str) -> Any:
    """Keep libraries from printing retries and warnings before our own one line."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
