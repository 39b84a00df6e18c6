"""The frozen backbone: a pre-trained network that turns images into representations, read at one or several layers."""

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_modules.backbones import weights as weight_files
from lightning_modules.backbones.build import PretrainedCfgOverlay, as_call, build, describe_preprocessing
from lightning_modules.files import one_line

PENULTIMATE = "penultimate"  # The layer before the classifier


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

    Always in evaluation mode and without gradients: no parameter and no batch-norm statistic moves, dropout is off.

    Args:
        name: A timm model with its pretrained tag (`resnet50.a1_in1k`, `hf-hub:...`), or the import path of a callable
            that returns an `nn.Module` (`torchvision.models.squeezenet1_1`): of an installed package only such a class
            or what is annotated so, as a configuration must not run whatever else is installed.
        weights: `pretrained`; a safetensors or torch file; or `random`, the only way to run an untrained network.
        kwargs: Passed on to the model's constructor, for example `{pad_type: same}`.
        pretrained_cfg_overlay: Preprocessing, where it differs from the model's default, of which a callable has none.
        layer: `penultimate`, what enters the classifier (of a callable's network, the linear or convolutional layer
            that runs last); the name of a module, whose output is read; or a list of them, read in one pass and
            concatenated.
        pooling: How maps (B, D, H, W) and tokens (B, N, D) become vectors: `mean` averages over space, `flatten` keeps
            the value at every position as a neuron of its own.

    Raises:
        MisconfigurationException: If a name is unknown, weights or preprocessing are absent, or do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str = "pretrained",
        kwargs: dict[str, Any] | None = None,
        pretrained_cfg_overlay: PretrainedCfgOverlay = PretrainedCfgOverlay(),  # noqa: B008 (frozen)
        layer: str | list[str] = PENULTIMATE,
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
        file = None if weights in ("pretrained", "random") else weight_files.find(weights)
        self.network: Any
        built = build(name, weights == "pretrained", self.kwargs, pretrained_cfg_overlay)
        self.network, self.preprocessing, classifier = built
        self.eval().requires_grad_(False)
        self._captured: dict[str, Tensor] = {}
        self.is_timm = classifier is not None  # then the network is built without a classifier, and ends penultimate
        end = [] if self.is_timm else self._modules_from_classifier_on()
        # The classifier is not loaded, unless a callable's network is read there or after it.
        self._unread = classifier or ([] if set(self.layers) & set(end) else end[:1])
        for each in self.layers:
            if each != PENULTIMATE or end:
                self._capture(each, end[0] if each == PENULTIMATE else each)
            elif not self.is_timm:
                raise MisconfigurationException(f"{name} has no linear or convolutional layer; name a layer.")
        if file is not None:
            weight_files.load(self.network, file, self._unread)
        # Convolutions over channels-last images are never slower on current CPUs and GPUs, up to three times faster.
        self.network.to(memory_format=torch.channels_last)
        # Measured, as what models say of their width is not always so.
        self.widths = {layer: output.shape[1] for layer, output in self._try(self._read).items()}

    @property
    def label(self) -> str:
        """What results call the backbone: its name, with the weights where they are not the pretrained ones."""
        if self.weights == "pretrained":
            return self.name
        stem = Path(self.weights).stem
        return stem if stem.startswith(self.name) else f"{self.name}-{stem}"

    def describe(self) -> str:
        """Return name, weights, layers with their widths, and preprocessing in one line."""
        weights = {"pretrained": "pretrained", "random": "random weights"}.get(self.weights, f"weights {self.weights}")
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
            "preprocessing": {key: str(value) for key, value in sorted(self.preprocessing.items())},
        }

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in evaluation mode whatever is asked, so that batch norm and dropout stay frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the representations of `images`, shape (B, C, H, W), as float32 of shape (B, sum of widths)."""
        return torch.cat(list(self._read(images).values()), dim=1)

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        """Return the output of each layer for `images`, as float32 of shape (B, D)."""
        output = self.network(images.contiguous(memory_format=torch.channels_last))
        captured, self._captured = self._captured, {}
        if self.is_timm and PENULTIMATE in self.layers:
            captured[PENULTIMATE] = self._pool(output, PENULTIMATE)
        for layer in self.layers:
            if layer not in captured:
                raise MisconfigurationException(f"model.backbone.layer {layer!r} of {self.name} is never run.")
        return {layer: captured[layer].float() for layer in self.layers}

    def _capture(self, layer: str, module: str) -> None:
        """Have each pass keep what `module` returns, or what enters it where `layer` is penultimate."""
        names = [name for name, _ in self.network.named_modules() if name]
        if module not in names:
            near = difflib.get_close_matches(module, names, n=3, cutoff=0.3) or names[-3:]
            raise MisconfigurationException(
                f"{self.name} has no layer {module!r}; near it are {', '.join(near)} (or 'penultimate')."
            )

        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self._captured[layer] = self._pool(arguments[0] if layer == PENULTIMATE else output, layer)

        self.network.get_submodule(module).register_forward_hook(hook)

    def _pool(self, output: Any, layer: str) -> Tensor:
        """Return a module's output as vectors, shape (B, D); a copy, as the next module may overwrite it in place."""
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise MisconfigurationException(
                f"model.backbone.layer {layer!r} of {self.name} gives {shape}; it must give (images, neurons), "
                f"tokens (images, tokens, neurons) or a map (images, neurons, height, width)."
            )
        if self.pooling == "flatten" or output.ndim == 2:
            return output.flatten(1).clone()
        if output.ndim == 3:  # tokens; class and register tokens come first and are no part of the image
            patches = getattr(getattr(self.network, "patch_embed", None), "num_patches", None)
            prefix = getattr(self.network, "num_prefix_tokens", 0)
            return output[:, 0 if len(output[0]) == patches else prefix :].mean(1)
        _, height, width, depth = output.shape
        channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        if (height == width) != (width == depth):  # one pair of axes is square, as the images are: that is space
            channels_last = height == width
        return output.mean((1, 2) if channels_last else (2, 3))

    def _modules_from_classifier_on(self) -> list[str]:
        """Run the network once; return the linear or convolutional layer that runs last, and all that ends after it."""
        ended: list[nn.Module] = []
        with register_module_forward_hook(lambda module, *_: ended.append(module)):
            self._try(self.network)
        last = max((i for i, each in enumerate(ended) if isinstance(each, nn.Linear | nn.Conv2d)), default=len(ended))
        names = {module: name for name, module in self.network.named_modules()}
        return [names[module] for module in ended[last:] if module in names]

    def _try(self, run: Callable[[Tensor], Any]) -> Any:
        """Return `run` of two blank images of the input size, or refuse a network that cannot take them."""
        size = tuple(self.preprocessing["input_size"])
        try:
            with torch.no_grad():
                return run(torch.zeros(2, *size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise MisconfigurationException(
                f"{self.name} cannot take images of {size} ({one_line(error)}); set "
                f"model.backbone.pretrained_cfg_overlay.input_size or kwargs."
            ) from error
