"""The verb `invert`: pictures that match images on some of a backbone's neurons, their numbers, and a page of them."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from lightning_modules import inversion
from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.cli.errors import Classes
from lightning_modules.cli.parser import parse_apart
from lightning_modules.cli.run import CLI, as_list
from lightning_modules.files import atomic, remove_unfinished, writing
from lightning_modules.inversion import Choice, Regulariser
from lightning_modules.progress import Progress
from lightning_modules.subsets import plan

ADVICE = "name another folder with --output"


class Picture(NamedTuple):
    """One picture that is to be found."""

    image: str  # the name of the image that it is to match
    choice: Choice
    fraction: float
    seed: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.image}_{self.choice}_{self.fraction:g}_{self.seed}.png"


class Inversion:
    """Find pictures that match images on some neurons of a layer; all other options are those of fit, as of its task.

    Gradient descent in pixels, from noise or another image. Leaves the pictures, a grid of them for each fraction,
    `inversion.csv` with distances and cosines on the neurons that were to be matched and on all others, and
    `inversion.html`. Pictures that are there are kept, and an interrupted command goes on. On one device.

    Args:
        run: Folder of the run whose backbone and layer are inverted; null takes those of --config or --model.backbone.
        output: Folder to write to; null is inversion/ in that of the run.
        images: How many test images of the task, a random sample that is always the same; or one image file or several.
        fractions: Fractions of neurons to match.
        seeds: Subset seeds, which also draw the noise; a number n means 0 to n - 1.
        choice: Which neurons: random (those of the selection random), or the least_active or most_active of an image,
            by magnitude; one or a list.
        start: What to start from: noise, or an image file.
        steps: Gradient steps; as many as in the paper.
        step_size: Length of a step, of pixels in [0, 1] over all pixels and channels; as in the paper.
        regulariser: What is minimised beside the distance: none; total_variation of the pixels; or others_apart, the
            paper's, which keeps the other neurons away from those of the image.
        weight: Of the regulariser.
    """

    def __init__(
        self,
        run: str | None = None,
        output: Path | None = None,
        images: int | str | list[str] = 4,
        fractions: float | list[float] = [0.05, 0.2, 0.5, 1.0],  # noqa: B006 (never changed)
        seeds: int | list[int] = 1,
        choice: Choice | list[Choice] = "random",
        start: str = "noise",
        steps: int = 5000,
        step_size: float = 1.0,
        regulariser: Regulariser = "none",
        weight: float = 1.0,
    ) -> None:
        if run is not None and not (Path(run).expanduser() / "config.yaml").is_file():
            raise MisconfigurationException(f"{run} is no folder of a run: it holds no config.yaml.")
        self.run = None if run is None else Path(run).expanduser()
        self.output = output
        self.images: int | list[str] = [images] if isinstance(images, str) else images
        self.fractions, self.choices = as_list(fractions), as_list(choice)
        self.seeds = plan.seed_list(seeds, "--seeds")
        self.start = start
        self.steps = steps
        self.descent: dict[str, Any] = {"step_size": step_size, "regulariser": regulariser, "weight": weight}
        for name, value in (("images", self.images), ("steps", steps)):
            if value == [] or (isinstance(value, int) and value < 1):
                raise MisconfigurationException(f"--{name} is {value}; it must be at least 1.")
        for name, number, right in (("step_size", step_size, step_size > 0), ("weight", weight, weight >= 0)):
            if not right:
                least = "above 0" if name == "step_size" else "0 or more"
                raise MisconfigurationException(f"--{name} is {number:g}; it must be {least}.")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise MisconfigurationException(f"--fractions has {fraction:g}; a fraction must be in (0, 1].")
        for name, values in (("fractions", self.fractions), ("choice", self.choices)):
            if not values:
                raise MisconfigurationException(f"--{name} is empty; give at least one.")

    def invert(self, backbone: Any, task: Any, trainer: Trainer, folder: Path) -> None:
        """Find the pictures that are missing in a folder, and write what all of them say."""
        from lightning_modules.reporting.inversions import report  # draws, which takes long to import

        _check(backbone, trainer)
        task.trainer = trainer
        device, folder = trainer.strategy.root_device, (self.output or folder / "inversion").expanduser()
        backbone.to(device)
        mean, std = (
            torch.tensor(backbone.preprocessing[each], device=device).view(-1, 1, 1) for each in ("mean", "std")
        )

        def pixels(images: Tensor) -> Tensor:
            return (images.to(device) * std + mean).clamp(0, 1)

        def represent(images: Tensor) -> Tensor:
            return backbone((images - mean) / std)

        names, images = self._images(task)
        originals = dict(zip(names, pixels(images), strict=True))
        if self.start == "noise":
            size = backbone.preprocessing["input_size"]
            generators = {seed: torch.Generator().manual_seed(seed) for seed in self.seeds}
            starts = {seed: torch.rand(size, generator=each).to(device) for seed, each in generators.items()}
        else:
            starts = dict.fromkeys(self.seeds, pixels(task.preprocessed([self.start]))[0])
        wanted = {name: represent(image[None])[0] for name, image in originals.items()}
        pictures = [
            Picture(image, choice, fraction, seed)
            for image, choice, fraction in itertools.product(names, self.choices, self.fractions)
            for seed in (self.seeds if choice == "random" or self.start == "noise" else self.seeds[:1])
        ]
        width = len(wanted[names[0]])

        def tensors(some: Sequence[Picture]) -> tuple[Tensor, Tensor, Tensor]:
            aims = [wanted[each.image] for each in some]
            sizes = [plan.neurons(each.fraction, width) for each in some]
            chosen = [
                inversion.choose(each.choice, aim, size, each.seed)
                for each, aim, size in zip(some, aims, sizes, strict=True)
            ]
            return torch.stack(aims), torch.stack(chosen), torch.stack([starts[each.seed] for each in some])

        with writing(folder, ADVICE):
            files = folder / "pictures"
            files.mkdir(parents=True, exist_ok=True)
            remove_unfinished(files)
            other = {} if self.start == "noise" else {"to start from": starts[self.seeds[0]]}
            self._check_settings(backbone, folder / "settings.json", originals | other)
            together = 8 if device.type == "cpu" else 64
            # The same pictures together however often it is interrupted, as the last digits may depend on that.
            batches = [pictures[i : i + together] for i in range(0, len(pictures), together)]
            left = [batch for batch in batches if not all((files / each.file).is_file() for each in batch)]
            todo = self.steps * sum(map(len, left))
            with Progress(todo, "Inverting", "step") as progress:
                for batch in left:
                    step = partial(progress.update, len(batch))
                    found = inversion.invert(represent, *tensors(batch), self.steps, **self.descent, after_step=step)
                    for each, picture in zip(batch, found, strict=True):
                        if not (files / each.file).is_file():
                            _save(picture, files / each.file)
            for name, original in originals.items():
                _save(original, files / f"{name}.png")
            tables = []
            for batch in batches:
                aims, chosen, begun = tensors(batch)
                stored = torch.stack([_load(files / each.file).to(device) for each in batch])
                table = pd.DataFrame(batch).assign(layer=backbone.layers[0], neurons=chosen.sum(1).cpu(), width=width)
                for prefix, seen in (("", stored), ("start_", begun)):
                    for name, values in inversion.agreement(represent(seen), aims, chosen).items():
                        table[prefix + name] = values.cpu().numpy()
                tables.append(table.assign(picture=[f"pictures/{each.file}" for each in batch]))
            print(report(folder, pd.concat(tables, ignore_index=True), backbone.describe()))

    def _images(self, task: Any) -> tuple[list[str], Tensor]:
        """Return the names of the images to match, and the images, normalised."""
        if not isinstance(self.images, int):
            names = [f"{place}-{Path(file).stem}" for place, file in enumerate(self.images)]
            return names, task.preprocessed(self.images)
        task.prepare_data()
        task.setup("fit")
        there = len(task.images["test"])
        if self.images > there:
            raise MisconfigurationException(f"--images is {self.images}; the test split of {task.name} has {there}.")
        sample = torch.randperm(there, generator=torch.Generator().manual_seed(0))[: self.images].tolist()
        (batch,) = task.extraction_loader("test", [sample], None, len(sample))
        return [f"test{index}" for index in sample], batch.inputs

    def _check_settings(self, backbone: FrozenBackbone, file: Path, images: dict[str, Tensor]) -> None:
        """Write what the pictures of a folder depend on; refuse a folder where that is something else."""
        provenance = {key: str(value) for key, value in backbone.provenance().items()}
        settings = {**provenance, "start": self.start, "steps": self.steps, **self.descent}
        settings |= {
            f"image {name}": hashlib.sha256(_bytes(image).tobytes()).hexdigest() for name, image in images.items()
        }
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name in [name for name in settings if name in known and settings[name] != known[name]][:1]:
            here, there = (str(each)[:60] for each in (settings[name], known[name]))
            raise MisconfigurationException(
                f"{file.parent} holds pictures whose {name} is {there}, not {here}; {ADVICE}."
            )
        with atomic(file) as unfinished:
            unfinished.write_text(json.dumps(known | settings, indent=2) + "\n", encoding="utf-8")


class InvertedRun(CLI):
    """A run that is not done: its backbone is inverted instead."""

    def __init__(self, words: Sequence[str], tasks: Classes, asked: Inversion) -> None:
        self.asked = asked
        super().__init__(["fit", *words], tasks)

    def fit(self, **_: Any) -> None:
        """Invert the backbone; LightningCLI calls this in place of Trainer.fit."""
        folder = self.asked.run or self.folder.path
        with torch.no_grad():
            self.asked.invert(getattr(self.model, "backbone", None), self.datamodule, self.trainer, folder)


def invert(args: Sequence[str], tasks: Classes) -> None:
    """Find the pictures that are asked for by words after the verb."""
    asked, further = parse_apart(Inversion, "invert", args)
    config = [] if asked.run is None else [f"--config={asked.run / 'config.yaml'}"]
    InvertedRun([*config, "--trainer.devices=1", *further], tasks, asked)


def _check(backbone: Any, trainer: Trainer) -> None:
    """Refuse what cannot be inverted."""
    if not isinstance(backbone, FrozenBackbone):
        raise MisconfigurationException(
            "There is no model.backbone to invert, as where a task holds vectors; name a --run or --config with one."
        )
    if len(backbone.layers) > 1:
        raise MisconfigurationException(
            f"model.backbone.layer is {backbone.layers}; pictures match one, so name it with --model.backbone.layer."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(f"There are {trainer.world_size} processes; invert takes one device.")
    backbone.check_differentiable()


def _bytes(pixels: Tensor) -> np.ndarray:
    """Return pixels in [0, 1], shape (C, H, W), as uint8, (H, W, C), or (H, W) of one channel."""
    return (255 * pixels).round().byte().cpu().permute(1, 2, 0).numpy().squeeze()


def _save(pixels: Tensor, path: Path) -> None:
    with atomic(path) as file:
        Image.fromarray(_bytes(pixels)).save(file)


def _load(path: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path)))
    return (pixels if pixels.ndim == 3 else pixels.unsqueeze(2)).permute(2, 0, 1).float() / 255
