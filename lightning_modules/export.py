"""A subset and its probe as files that need nothing of this project: safetensors, JSON and a torch.export program."""

import json
import platform
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.backbones.frozen import FrozenBackbone, PretrainedCfgOverlay
from lightning_modules.checkpoints import read
from lightning_modules.files import atomic, one_line, writing
from lightning_modules.formats import FORMATS, installed, kept_map
from lightning_modules.probes.grid import Grid
from lightning_modules.results.results import Results
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Probe, stored_bytes
from lightning_modules.subsets.selections import FULL

USE = {
    "neurons": "kept = features[:, subset['indices']]",
    "basis": "kept = (features - subset['mean']) @ subset['basis']",
    "program": "kept = torch.export.load('backbone.pt2').module()(images)",
    "levels": "codes = ((kept - subset['low']) / subset['step']).round().clamp(0, {most}); "
    "kept = subset['low'] + subset['step'] * codes",
    "logits": "logits = kept @ subset['weight'].T + subset['bias']",
    "numbers": "numbers = kept @ subset['weight'].T + subset['bias']",
    "cosine": "kept = torch.nn.functional.normalize(kept)",
}
"""What the card says of `subset = safetensors.torch.load_file('subset.safetensors')`."""

RECIPE = "recipe.py"  # to store vectors with NumPy alone
VIEWS: dict[str, dict[str, Any]] = {"weights": {}, "squash": {"crop_pct": 1.0, "crop_mode": "squash"}}
"""What `data.view` changes of timm's data configuration."""


def export(
    run: str,
    selection: str,
    fraction: float,
    output: str,
    seed: int = 0,
    layer: str | None = None,
    bits: int | None = None,
    formats: str | list[str] | None = None,
) -> None:
    """Write one subset of a finished run, with its probe, as files that need nothing of this project.

    `subset.safetensors` holds float32 `weight` (C, k) and `bias` (C,), for raw features: a standardisation is
    folded in, and so are the units of numbers. Beside them are the `indices` (k,) of the neurons, or, where the
    coordinates are of another basis, its `basis` (D, k) and `mean` (D,); for fewer than 32 bits `low` and `step` (k,)
    of the levels, of which codes of so many bits are to be stored. A search has no `weight` and `bias`. `card.json`
    says what it is and how to use it, `recipe.py` stores vectors so, and reads them back, with NumPy alone. For a timm
    backbone, `backbone.pt2` is a torch.export program from preprocessed images (B, C, H, W), for any B, to the kept
    coordinates (B, k), float32.

    Forms that other libraries read are written where `formats` names them: `faiss`, an empty trained index,
    `index.faiss`, and its transform alone, `transform.faiss`; `onnx`, a graph from features to what is kept,
    `kept.onnx`; `sentence_transformers`, a folder of modules that follow those of an embedding model.

    Args:
        run: Folder of the run.
        selection: Selection of the subset, or full.
        fraction: Fraction of the subset.
        output: Folder that the files are written to.
        seed: Subset seed.
        layer: Layer of the subset; null is the only one of the run.
        bits: Bits of each stored number; null is the only number of the run.
        formats: Further forms, one or a list of faiss, onnx and sentence_transformers.

    Raises:
        MisconfigurationException: If the run has no such probe, its backbone is not to be had any more, or a form is
            unknown or needs a library that is not installed.
    """
    wanted = [formats] if isinstance(formats, str) else formats or []
    for name in wanted:
        if name not in FORMATS:
            raise MisconfigurationException(f"--formats has {name!r}; it must be one of {', '.join(FORMATS)}.")
        if library := FORMATS[name].library:
            installed(library, f"--formats {name}")
    folder, target = Path(run).expanduser(), Path(output).expanduser()
    files = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    for file in files:
        if not file.is_file():
            raise MisconfigurationException(f"{folder} is no folder of a run: it holds no {file.relative_to(folder)}.")
    checkpoint = read(files[1])
    if "probes" not in checkpoint:
        raise MisconfigurationException(f"{files[1]} holds no probes; name a run that measured some.")
    provenance = checkpoint["probes"]["provenance"]
    probes = [Probe(*each) for each in provenance["probes"]]
    widths = {each.layer: each.neurons for each in probes if each.selection == FULL}
    index = _find(probes, folder, layer=layer, selection=selection, bits=bits, fraction=fraction, seed=seed)
    probe, backbone = probes[index], None
    settings = yaml.safe_load(files[0].read_text(encoding="utf-8"))["model"]["init_args"]["backbone"]
    if settings:
        overlay = PretrainedCfgOverlay(**(settings.get("pretrained_cfg_overlay") or {}))
        backbone = FrozenBackbone(**settings | {"pretrained_cfg_overlay": overlay, "layer": probe.layer})
        if backbone.provenance()["weights"] != provenance["weights"]:
            raise MisconfigurationException(
                f"The weights of {backbone.label} are not those that {folder} was measured with; its model.backbone is "
                f"{settings}."
            )
    if provenance["classes"] and not checkpoint["state_dict"]["grid.kept.0.bias"].numel():
        raise MisconfigurationException(
            f"The probes of {folder} are votes of neighbours ({provenance['solver']}) and have no weights to export; "
            f"name a run of another solver."
        )
    tensors = _tensors(probes, index, widths, checkpoint["state_dict"], provenance)
    program = _program(backbone, tensors) if backbone and backbone.is_timm else None
    kept = kept_map(tensors, widths[probe.layer], probe.bits, provenance.get("similarity"))
    metric, measured = "accuracy", {"val": None, "test": None}  # null where a run did not come so far
    if (folder / "results.csv").is_file():
        results = Results.read(folder)
        its = " and ".join(f"{name} == @probe.{name}" for name in ("layer", "selection", "bits", "fraction", "seed"))
        metric = results.headline.name
        measured |= results.rows.query(its).set_index("split")[metric].to_dict()
    starts = ["neurons" if "indices" in tensors else "basis", *["program"] * bool(program)]
    predicted = "numbers" if "units" in provenance else "logits"
    ends = [predicted] if provenance["classes"] else ["cosine"] * (provenance.get("similarity") == "cosine")
    levels = ["levels"] * (probe.bits < 32)
    in_full = levels and provenance.get("quantised") == "stored"
    card = {
        **{name: provenance[name] for name in ("task", "classes", "backbone")},
        **probe._asdict(),
        "width": widths[probe.layer],
        "bytes": stored_bytes(probe.neurons, probe.bits),
        metric: measured,
        "preprocessing": backbone.preprocessing | VIEWS[provenance["data.view"]] if backbone else None,
        "use": ["; ".join(USE[p] for p in (s, *levels, *ends)).format(most=2**probe.bits - 1) for s in starts],
        **({"use_of_queries": "; ".join(USE[p] for p in (starts[0], *ends))} if in_full else {}),
        "formats": {name: FORMATS[name].use(kept) for name in wanted},
        "versions": {"python": platform.python_version()}
        | {library.__name__: library.__version__ for library in (torch, timm, safetensors)},
    }
    with writing(target, "name another folder with --output"):
        target.mkdir(parents=True, exist_ok=True)
        for name in ("backbone.pt2", *(name for each in FORMATS.values() for name in each.files)):
            (target / name).unlink(missing_ok=True)  # of an earlier export
        with atomic(target / "subset.safetensors") as file:
            safetensors.torch.save_file(tensors, file)
        if program:
            with atomic(target / "backbone.pt2") as file:
                torch.export.save(program, file)
        with atomic(target / "card.json") as file:
            file.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        with atomic(target / RECIPE) as file:
            file.write_bytes(Path(__file__).with_name(RECIPE).read_bytes())
        for name in wanted:
            FORMATS[name].write(target, kept)
    print(
        target / "subset.safetensors",
        target / "card.json",
        target / RECIPE,
        *[target / "backbone.pt2"] * bool(program),
        *(target / file for name in wanted for file in FORMATS[name].files),
        sep="\n",
    )


class KeptCoordinates(nn.Module):
    """A backbone that returns only the coordinates of one subset, given by `indices`, or `basis` and `mean`."""

    def __init__(self, backbone: FrozenBackbone, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        for name in {"indices", "basis", "mean"} & set(tensors):
            self.register_buffer(name, tensors[name])

    def forward(self, images: Tensor) -> Tensor:
        """Return the kept coordinates, shape (B, k), of preprocessed images, shape (B, C, H, W)."""
        features = self.backbone(images)
        if hasattr(self, "indices"):
            return features.index_select(1, self.indices)
        return (features - self.mean) @ self.basis


def _find(probes: list[Probe], run: Path, **asked: Any) -> int:
    """Return the index of the probe with these attributes; None stands for the only value that a run has."""
    left, found = list(range(len(probes))), ""
    for name, value in asked.items():
        values = {index: getattr(probes[index], name) for index in left}
        known = list(dict.fromkeys(values.values()))
        wanted = known[0] if value is None and len(known) == 1 else value
        if wanted not in known:
            there = f"{run} has {', '.join(map(str, known))}{found}"
            raise MisconfigurationException(f"--{name} is {'not given' if wanted is None else wanted}; {there}.")
        left = [index for index in left if values[index] == wanted]
        found = f"{found or ' for'} {wanted}"
    return left[0]


def _tensors(
    probes: list[Probe], index: int, widths: dict[str, int], state: dict[str, Tensor], provenance: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what `subset.safetensors` holds; products and sums in float64."""
    candidates, _, hyperparameters = state["grid.hyperparameters"].shape
    values = [(0.0,) * hyperparameters] * candidates
    coordinates = Coordinates(probes, widths)
    grid = Grid(probes, len(provenance["classes"]), values, provenance["refit"])
    measured = nn.ModuleDict({"coordinates": coordinates, "grid": grid})
    measured.load_state_dict({name: state[name] for name in measured.state_dict()})
    grid.check_kept()
    weight, bias = (each.double() for each in grid.final_probe(index))
    if units := provenance.get("units"):  # of numbers, which probes see standardised
        spread, middle = (torch.tensor(units[name], dtype=torch.float64) for name in ("std", "mean"))
        weight, bias = weight * spread.unsqueeze(1), bias * spread + middle
    scale = torch.stack([state["stream.mean"], state["stream.std"]]).double()
    mean, std = coordinates.by_layer(scale)[probes[index].layer]
    chosen = coordinates.subset(index).clone()  # not with the storage of the whole order
    basis = coordinates.basis(index)
    if basis is None and not provenance["classes"] and provenance["standardise"]:
        basis = torch.eye(len(mean)), torch.zeros(len(mean))  # there is no weight that could be scaled
    if basis is None:
        weight = weight / std[chosen]
        found = {"indices": chosen, "weight": weight, "bias": bias - weight @ mean[chosen]}
    else:
        matrix, centre = (each.double() for each in basis)
        found = {"weight": weight, "bias": bias, "mean": mean + std * centre}
        found["basis"] = matrix[:, chosen] / std.unsqueeze(1)
    quantiser = coordinates.quantiser(index)
    if quantiser is not None:
        low, step = quantiser.low.double(), quantiser.step.double()
        raw = (std[chosen], mean[chosen]) if basis is None else (1.0, 0.0)
        found |= {"low": low * raw[0] + raw[1], "step": step * raw[0]}
    found = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    return {name: value.contiguous() for name, value in found.items() if value.numel()}  # a search has no weights


def _program(backbone: FrozenBackbone, tensors: dict[str, Tensor]) -> torch.export.ExportedProgram | None:
    """Return the kept coordinates as a program, for batches of any size; None, and say so, where that cannot be."""
    images = torch.zeros(2, *backbone.preprocessing["input_size"])
    backbone.network.to(memory_format=torch.contiguous_format)  # how programs store weights
    module, batch = KeptCoordinates(backbone, tensors).eval(), torch.export.Dim("batch")
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # what torch.export raises for an architecture that it cannot follow is its own affair
        print(f"There is no backbone.pt2: {backbone.name} cannot be exported ({one_line(error)}).")
        return None
