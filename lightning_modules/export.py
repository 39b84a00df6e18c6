"""A subset and its probe as files that need nothing of this project: safetensors, JSON and a torch.export program."""

import json
import math
import platform
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import timm
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.backbones import weights
from lightning_modules.backbones.build import PretrainedCfgOverlay, is_timm_model
from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.files import whole
from lightning_modules.probes.bank import ProbeBank
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Probe

USE = {
    "neurons": "logits = representations[:, subset['indices']] @ subset['weight'].T + subset['bias']",
    "basis": "logits = (representations - subset['mean']) @ subset['basis'] @ subset['weight'].T + subset['bias']",
    "program": "kept = torch.export.load('backbone.pt2').module()(images); "
    "logits = kept @ subset['weight'].T + subset['bias']",
}
"""What the card says of `subset = safetensors.torch.load_file('subset.safetensors')`."""


def export(run: str, selection: str, fraction: float, output: str, seed: int = 0, layer: str | None = None) -> None:
    """Write one subset of a finished run, with its probe, as files that need nothing of this project.

    `subset.safetensors` holds float32 `weight` (C, k) and `bias` (C,), for raw representations: a standardisation is
    folded in. Beside them are the `indices` (k,) of the neurons, or, where the coordinates are of another basis, its
    `basis` (D, k) and `mean` (D,). `card.json` says what it is and how to use it. For a timm backbone, `backbone.pt2`
    is a torch.export program from preprocessed images (B, C, H, W), for any B, to the kept coordinates (B, k).

    Args:
        run: Folder of the run.
        selection: Selection of the subset, or full.
        fraction: Fraction of the subset.
        output: Folder that the files are written to.
        seed: Subset seed.
        layer: Layer of the subset; null is the only one of the run.

    Raises:
        MisconfigurationException: If the run has no such probe, or its backbone is not to be had any more.
    """
    folder = Path(run).expanduser()
    config, checkpoint = _read(folder)
    said, state = checkpoint["probes"]["belonging"], checkpoint["state_dict"]
    probes = [Probe(*each) for each in said["probes"]]
    index = _find(probes, selection, fraction, seed, layer, folder)
    probe = probes[index]
    backbone = _backbone(config["model"]["init_args"]["backbone"], probe.layer)
    if backbone and backbone.provenance()["weights"] != said["weights"]:
        raise MisconfigurationException(
            f"The weights of {backbone.label} are not those that {folder} was measured with; its model.backbone is "
            f"{config['model']['init_args']['backbone']}."
        )

    tensors = _tensors(probes, index, state, len(said["classes"]))
    program = _program(backbone, tensors) if backbone and is_timm_model(backbone.name) else None
    card = {
        **{"task": said["task"], "classes": said["classes"], "backbone": said["backbone"], "layer": probe.layer},
        **{"selection": probe.selection, "fraction": probe.fraction, "seed": probe.seed, "neurons": probe.neurons},
        "width": next(each.neurons for each in probes if each.layer == probe.layer),
        "accuracy": _accuracies(folder / "results.csv", probe),
        "preprocessing": backbone.preprocessing if backbone else None,
        "use": [USE["neurons" if "indices" in tensors else "basis"], *[USE["program"]] * bool(program)],
        "versions": {
            **{"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            "safetensors": safetensors.__version__,
        },
    }
    target = Path(output).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "backbone.pt2").unlink(missing_ok=True)  # of an earlier export
        with whole(target / "subset.safetensors") as file:
            save_file(tensors, file)
        if program:
            with whole(target / "backbone.pt2") as file:
                torch.export.save(program, file)
        with whole(target / "card.json") as file:
            file.write_text(json.dumps(card, indent=2) + "\n")
    except OSError as error:
        raise MisconfigurationException(
            f"The subset cannot be written to {target} ({error.strerror or error}); name another --output."
        ) from error
    for name in ("subset.safetensors", "card.json", *["backbone.pt2"] * bool(program)):
        print(target / name)


class KeptCoordinates(nn.Module):
    """A backbone that returns only the coordinates of one subset.

    Args:
        backbone: The backbone, which reads one layer.
        tensors: `indices`, or `basis` and `mean`.
    """

    def __init__(self, backbone: FrozenBackbone, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        for name in {"indices", "basis", "mean"} & set(tensors):
            self.register_buffer(name, tensors[name])

    def forward(self, images: Tensor) -> Tensor:
        """Return the kept coordinates, shape (B, k), of preprocessed images, shape (B, C, H, W)."""
        representations = self.backbone(images)
        if hasattr(self, "indices"):
            return representations.index_select(1, self.indices)
        return (representations - self.mean) @ self.basis


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and the checkpoint of a run."""
    files = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    for file in files:
        if not file.is_file():
            raise MisconfigurationException(f"{folder} is no folder of a run: it holds no {file.relative_to(folder)}.")
    checkpoint = weights.read_torch(files[1], "checkpoint")
    if "belonging" not in checkpoint.get("probes", {}):
        raise MisconfigurationException(f"{files[1]} holds no probes; name a run that measured some.")
    return yaml.safe_load(files[0].read_text()), checkpoint


def _find(probes: list[Probe], selection: str, fraction: float, seed: int, layer: str | None, run: Path) -> int:
    """Return the place of the probe that is asked for."""
    layers = list(dict.fromkeys(probe.layer for probe in probes))
    if (layer is None and len(layers) > 1) or layer not in (None, *layers):
        raise MisconfigurationException(f"--layer is {layer or 'not given'}; {run} has {', '.join(layers)}.")
    here = [(place, probe) for place, probe in enumerate(probes) if probe.layer == (layer or layers[0])]
    alike = [(place, probe) for place, probe in here if probe.selection == selection]
    if not alike:
        names = dict.fromkeys(probe.selection for _, probe in here)
        raise MisconfigurationException(f"--selection is {selection!r}; {run} has {', '.join(names)}.")
    of_size = [(place, probe) for place, probe in alike if math.isclose(probe.fraction, fraction)]
    if not of_size:
        fractions = sorted({probe.fraction for _, probe in alike})
        raise MisconfigurationException(
            f"--fraction is {fraction:g}; for {selection} {run} has {', '.join(f'{each:g}' for each in fractions)}."
        )
    for place, probe in of_size:
        if probe.seed == seed:
            return place
    seeds = ", ".join(str(probe.seed) for _, probe in of_size)
    raise MisconfigurationException(f"--seed is {seed}; for {selection} {fraction:g} {run} has {seeds}.")


def _backbone(settings: dict[str, Any] | None, layer: str) -> FrozenBackbone | None:
    """Return a run's backbone, read at one layer; None where it has none."""
    if settings is None:
        return None
    overlay = PretrainedCfgOverlay(**(settings.get("pretrained_cfg_overlay") or {}))
    return FrozenBackbone(**settings | {"pretrained_cfg_overlay": overlay, "layer": layer})


def _tensors(probes: list[Probe], index: int, state: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return what `subset.safetensors` holds; products and sums in float64."""
    widths = {probe.layer: probe.neurons for probe in reversed(probes) if probe.selection == "full"}
    widths = {layer: widths[layer] for layer in dict.fromkeys(probe.layer for probe in probes)}

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    coordinates, bank = Coordinates(probes, widths), ProbeBank(probes, classes)
    coordinates.load_state_dict(part("coordinates."))
    bank.load_state_dict(part(f"kept.{int(state['kept_accuracy'][:, index].argmax())}."))
    weight, bias = (each.double() for each in bank.get_probe(index))
    mean, std = coordinates.by_layer(torch.stack([state["mean"], state["std"]]).double())[probes[index].layer]
    chosen = coordinates.subset(index).clone()  # not with the storage of the whole order
    basis = coordinates.basis(index)
    if basis is None:
        weight = weight / std[chosen]
        found = {"indices": chosen, "weight": weight, "bias": bias - weight @ mean[chosen]}
    else:
        matrix, centre = (each.double() for each in basis)
        found = {"basis": matrix[:, chosen] / std.unsqueeze(1), "mean": mean + std * centre}
        found |= {"weight": weight, "bias": bias}
    return {name: (value.float() if value.is_floating_point() else value).contiguous() for name, value in found.items()}


def _accuracies(file: Path, probe: Probe) -> dict[str, float | None]:
    """Return a probe's accuracy on validation and test; None where the run did not come so far."""
    found: dict[str, float | None] = {"val": None, "test": None}
    if file.is_file():
        table = pd.read_csv(file)
        rows = table[(table.layer == probe.layer) & (table.selection == probe.selection) & (table.seed == probe.seed)]
        rows = rows[rows.fraction == probe.fraction]
        found |= dict(zip(rows.split, rows.accuracy.astype(float), strict=True))
    return found


def _program(backbone: FrozenBackbone, tensors: dict[str, Tensor]) -> torch.export.ExportedProgram | None:
    """Return the kept coordinates as a program, for batches of any size; None, and say so, where that cannot be."""
    images = torch.zeros(2, *backbone.preprocessing["input_size"])
    backbone.network.to(memory_format=torch.contiguous_format)  # how programs store weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                KeptCoordinates(backbone, tensors).eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    except Exception as error:  # what torch.export raises for an architecture that it cannot follow is its own affair
        print(f"There is no backbone.pt2: {backbone.name} cannot be exported ({str(error).partition(chr(10))[0]}).")
        return None
