"""The frozen backbone: a pre-trained network that turns images into representations, read at one or several layers."""

import contextlib
import difflib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_modules.backbones import weights as weight_files
from lightning_modules.backbones.build import PretrainedCfgOverlay, as_call, build, completed, describe_preprocessing
from lightning_modules.backbones.compiling import compiled
from lightning_modules.backbones.folding import folded
from lightning_modules.backbones.layers import Place, check_rows, neuron_axes, read_layers
from lightning_modules.files import one_line

PENULTIMATE = "penultimate"  # The layer before the classifier
JOINED = "+"  # What joins the names of layers that are read as one


class GivenVectors(nn.Module):
    """The stand-in for a backbone where the task holds vectors, shape (n, width): they are the representations."""

    label = "none"
    preprocessing: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.widths = {"none": width}

    def provenance(self) -> dict[str, Any]:
        """Return what the representations depend on beside the vectors: nothing."""
        return {"weights": self.label, "preprocessing": {}}

    def describe(self) -> str:
        """Return what the representations are, in one line."""
        return f"none: vectors of the task ({self.widths['none']:,} numbers each)"


@final
class FrozenBackbone(nn.Module):
    """A pre-trained network that turns images into representations and never changes.

    Always in evaluation mode: no parameter and no batch-norm statistic moves, dropout is off. Gradients flow to images
    that require them, and nowhere else.

    Args:
        name: A timm model with its pretrained tag (`resnet50.a1_in1k`, `hf-hub:...`), or the import path of a callable
            that returns an `nn.Module` (`torchvision.models.squeezenet1_1`), also in the current folder: of an
            installed package only such a class or what is annotated so, as a configuration must not run whatever else
            is installed. Null, as nulls of `kwargs` and `pretrained_cfg_overlay`, takes what a file of weights that
            `Pretraining` wrote says of itself.
        weights: `pretrained`; a safetensors or torch file, or the index of several, here or on the Hub
            (`hf-hub:<owner>/<name>/<file>`); or `random`, the only way to run an untrained network.
        kwargs: Passed on to the model's constructor, for example `{pad_type: same}`; for grey images `{in_chans: 1}`.
        pretrained_cfg_overlay: Preprocessing, where it differs from the model's default, of which a callable has none.
        layer: `penultimate`, what enters the classifier (of a callable's network, the linear or convolutional layer
            that runs last); the name of a module, whose output is read; several of these joined by `+`, which are one
            layer of all their neurons; or a list of such layers, read in one pass.
        pooling: How maps (B, D, H, W), also with channels last, and tokens (B, N, D) become vectors: `mean` averages
            over space, `flatten` keeps the value at every position as a neuron of its own.
        compile: With which mode of torch.compile the network is compiled for extraction: `default`, `max-autotune` or,
            `off`, none.

    Raises:
        MisconfigurationException: If a name is unknown, weights or preprocessing are absent or do not fit, a layer's
            rows are not the images, or it is open which of its axes holds the neurons.
    """

    def __init__(
        self,
        name: str | None = None,
        weights: str = "pretrained",
        kwargs: dict[str, Any] | None = None,
        pretrained_cfg_overlay: PretrainedCfgOverlay = PretrainedCfgOverlay(),  # noqa: B008 (frozen)
        layer: str | list[str] = PENULTIMATE,
        pooling: Literal["mean", "flatten"] = "mean",
        compile: Literal["off", "default", "max-autotune"] = "off",
    ) -> None:
        super().__init__()
        self.weights = weights
        file = None if weights in ("pretrained", "random") else weight_files.find(weights)
        made = weight_files.made(file) if file else {}
        name, self.kwargs, pretrained_cfg_overlay = completed(name, kwargs, pretrained_cfg_overlay, weights, made)
        self.name = name
        self._overlay = pretrained_cfg_overlay
        self._objective = f" of {made['objective']}" if made else ""
        self.layers = [layer] if isinstance(layer, str) else layer
        parts = [each.split(JOINED) for each in self.layers]
        if not parts or any(len(set(each)) < len(each) for each in (self.layers, *parts)):
            raise MisconfigurationException(f"model.backbone.layer is {layer}; give at least one layer, each once.")
        self.pooling = pooling
        self.compile_mode = compile
        self.network: Any
        built = build(name, weights == "pretrained", self.kwargs, pretrained_cfg_overlay)
        self.network, self.preprocessing, classifier = built
        self.eval().requires_grad_(False)
        self.is_timm = classifier is not None  # then the network is built without a classifier, and ends penultimate
        end = [] if self.is_timm else self._modules_from_classifier_on()
        # The classifier is not loaded, unless a callable's network is read there or after it.
        self._places = {part: self._place(part, end) for part in itertools.chain.from_iterable(parts)}
        self._unread = classifier or ([] if set(self._places) & set(end) else end[:1])
        if file is not None:
            weight_files.load(self.network, file, self._unread)
        # Convolutions over channels-last images are never slower on current CPUs and GPUs, up to three times faster.
        for parameter in self.network.parameters():
            if parameter.ndim == 4:  # torch's own conversion of a network fails at five axes
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        shapes = self._try(partial(check_rows, self.network, self.preprocessing["input_size"], self._places, name))
        # Copies of the network, in no attribute of their own, so that their weights are no part of the state.
        self._folded: dict[torch.device, nn.Module] = {}
        self._running: list[nn.Module] = []  # the one that runs in place of the network, if any
        self._compiled: dict[torch.device, Callable[[Tensor], dict[str, Tensor]]] = {}
        self._compiled_size = 0  # of the batches that go through it
        self._axes = (
            neuron_axes(self.network, shapes, self._places, self._enlarged(), name) if pooling == "mean" else {}
        )
        # Measured, as what models say of their width is not always so.
        widths = {part: shape[self._axes[part]] if self._axes else prod(shape[1:]) for part, shape in shapes.items()}
        self.widths = {layer: sum(widths[part] for part in layer.split(JOINED)) for layer in self.layers}

    @property
    def label(self) -> str:
        """What results call the backbone: its name, with the weights where they are not the pretrained ones."""
        if self.weights == "pretrained":
            return self.name
        stem = Path(self.weights).stem
        return stem if stem.startswith(self.name) else f"{self.name}-{stem}"

    def describe(self) -> str:
        """Return name, weights, layers with their widths, and preprocessing in one line."""
        given = f"weights {self.weights}{self._objective}"
        weights = {"pretrained": "pretrained", "random": "random weights"}.get(self.weights, given)
        layers = " + ".join(f"{layer} ({width:,} neurons)" for layer, width in self.widths.items())
        pooling = "" if self.pooling == "mean" else f", pooling {self.pooling}"
        network, preprocessing = as_call(self.name, self.kwargs), describe_preprocessing(self.preprocessing)
        return f"{network}, {weights}, layer {layers}{pooling}, {preprocessing}"

    def provenance(self) -> dict[str, Any]:
        """Return what the representations of an image depend on, apart from the image and the precision."""
        digest = hashlib.blake2b(digest_size=16)
        for key, value in sorted(weight_files.without(self.network.state_dict(), self._unread).items()):
            digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return {
            "name": self.name,
            "kwargs": repr(self.kwargs),
            "network": repr(self.network),
            "weights": digest.hexdigest(),
            "layers": self.layers,
            "pooling": self.pooling,
            "axes": self._axes,
            "preprocessing": {key: str(value) for key, value in sorted(self.preprocessing.items())},
        }

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in evaluation mode whatever is asked, so that batch norm and dropout stay frozen too."""
        return super().train(False) if self.training else self  # Lightning asks twice an epoch, of every module

    def forward(self, images: Tensor) -> Tensor:
        """Return the representations of `images`, shape (B, C, H, W), as float32 of shape (B, sum of widths)."""
        return torch.cat(list(self._read(images).values()), dim=1)

    @property
    def preparation(self) -> str:
        """What `inference` makes of the network, on which the last digits of representations depend."""
        return "folded" + ("" if self.compile_mode == "off" else f", compiled ({self.compile_mode})")

    @contextlib.contextmanager
    def inference(self, batch: int = 0) -> Iterator[None]:
        """Within, run a copy that is folded, which is faster and equal up to rounding.

        Where `compile` says so, batches of exactly `batch` images run compiled code. Copy and code are made once.
        A MisconfigurationException is raised on a CPU without a C++ compiler.
        """
        device = next(self.parameters(), torch.empty(0)).device
        if device not in self._folded:
            self._folded[device] = folded(self.network, self._places, self.preprocessing["input_size"])
        self._running = [self._folded[device]]
        if batch and self.compile_mode != "off" and device not in self._compiled:
            self._compiled[device] = compiled(self._running[0], self._places, self._pool, self.compile_mode, self.name)
        self._compiled_size = batch if device in self._compiled else 0
        try:
            with torch.inference_mode(False), torch.no_grad():  # always the same, as other modes are compiled anew
                yield
        finally:
            self._running, self._compiled_size = [], 0

    def check_differentiable(self) -> None:
        """Refuse a layer that has no gradient with respect to the image.

        A MisconfigurationException is raised; the message names the layer.
        """
        size = 1, *self.preprocessing["input_size"]
        image = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(False), torch.enable_grad():
            image = image.to(next(self.parameters(), image).device).requires_grad_()
            for layer in self.layers:
                gradient, reason = None, "it does not depend on it smoothly"
                try:
                    output = self._read(image * 1)[layer]  # not the image itself, which a network may change in place
                    (gradient,) = torch.autograd.grad(output.square().sum(), image, allow_unused=True)
                except RuntimeError as error:  # what is cut off from the image, or cannot be run backwards
                    reason = one_line(error)
                if gradient is None or not gradient.any():
                    raise MisconfigurationException(
                        f"Layer {layer!r} of {self.name} has no gradient with respect to the image ({reason}); attacks "
                        f"and inversions need one, so name another layer."
                    )

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        """Return the output of each layer for `images`, as float32 of shape (B, D), in the order of `layers`."""
        images = images.contiguous(memory_format=torch.channels_last)
        if self._compiled_size and len(images) == self._compiled_size:  # programs are for any number, so ask last
            found = self._compiled[images.device](images)
        else:
            network = self._running[0] if self._running else self.network
            found = read_layers(network, images, self._places, self._pool)
        for layer, output in found.items():
            if output.shape[0] != images.shape[0]:
                raise MisconfigurationException(
                    f"model.backbone.layer {layer!r} of {self.name} gives {output.shape[0]} rows for "
                    f"{images.shape[0]} images."
                )
        return {layer: torch.cat([found[part].float() for part in layer.split(JOINED)], dim=1) for layer in self.layers}

    def _place(self, layer: str, end: list[str]) -> Place:
        """Return where a layer is read; `end` are the names of a callable network's classifier and what follows it."""
        if layer == PENULTIMATE:
            if not self.is_timm and not end:
                raise MisconfigurationException(f"{self.name} has no linear or convolutional layer; name a layer.")
            return (end[0], True) if end else ("", False)
        names = [name for name, _ in self.network.named_modules() if name]
        if layer not in names:
            near = difflib.get_close_matches(layer, names, n=3, cutoff=0.3) or names[-3:]
            raise MisconfigurationException(
                f"{self.name} has no layer {layer!r}; near it are {', '.join(near)} (or 'penultimate')."
            )
        return layer, False

    def _pool(self, layer: str, output: Tensor) -> Tensor:
        """Return a layer's output as vectors, shape (B, D)."""
        if self.pooling == "flatten" or output.ndim == 2:
            return output.flatten(1).clone()
        space = [axis for axis in range(1, output.ndim) if axis != self._axes[layer]]
        if output.ndim == 3:  # tokens; class and register tokens come first and are no part of the image
            tokens = output.shape[space[0]]
            patches = getattr(getattr(self.network, "patch_embed", None), "num_patches", None)
            prefix = getattr(self.network, "num_prefix_tokens", 0)
            start = 0 if tokens in (patches, 1) else prefix
            output = output.narrow(space[0], start, tokens - start)
        return output.mean(space)

    def _enlarged(self) -> list[Callable[[], tuple[nn.Module, Tensor]]]:
        """Return what gives a network and an image of twice the size: this one, or one that is built for that size."""
        channels, height, width = self.preprocessing["input_size"]
        image = torch.zeros(1, channels, 2 * height, 2 * width)
        size = 2 * height if height == width else (2 * height, 2 * width)

        def built(key: str) -> tuple[nn.Module, Tensor]:
            with torch.random.fork_rng(devices=[]):
                return build(self.name, False, self.kwargs | {key: size}, self._overlay)[0].eval(), image

        # What timm and torchvision call the size that a network is built for, as most vision transformers are.
        return [lambda: (self.network, image), partial(built, "img_size"), partial(built, "image_size")]

    def _modules_from_classifier_on(self) -> list[str]:
        """Run the network once; return the linear or convolutional layer that runs last, and all that ends after it."""
        ended: list[nn.Module] = []
        with register_module_forward_hook(lambda module, *_: ended.append(module)):
            self._try(lambda: self.network(torch.zeros(2, *self.preprocessing["input_size"])))
        last = max((i for i, each in enumerate(ended) if isinstance(each, nn.Linear | nn.Conv2d)), default=len(ended))
        names = {module: name for name, module in self.network.named_modules()}
        return [names[module] for module in ended[last:] if module in names]

    def _try(self, run: Callable[[], Any]) -> Any:
        """Return what `run` returns, or refuse a network that cannot take images of the input size."""
        try:
            return run()
        except (RuntimeError, AssertionError, ValueError) as error:
            raise MisconfigurationException(
                f"{self.name} cannot take images of {tuple(self.preprocessing['input_size'])} ({one_line(error)}); set "
                f"model.backbone.pretrained_cfg_overlay.input_size or kwargs."
            ) from error
