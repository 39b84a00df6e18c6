"""The fits that benchmarks measure: on given images or on noise, the paper's 71 probes of a MobileNetV2."""

import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

import train
from lightning_modules.cli.run import CLI
from lightning_modules.subsets.plan import PAPER_FRACTIONS
from tests.benchmarks.benchmark import quiet

BACKBONE = (
    *("--model.backbone.name", "mobilenetv2_100", "--model.backbone.kwargs", "{pad_type: same}"),
    *("--model.backbone.pretrained_cfg_overlay", "{mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"),
)
FRACTIONS = ("--model.fractions", str(list(PAPER_FRACTIONS)))
BASE = ("fit", "--config", "image_folder.yaml", "--trainer.logger", "false", "--overwrite", "true", "--name", "speed")


class FirstBatch(Callback):
    """Ends the process when the first batch is there."""

    def on_train_batch_start(self, *_):
        os._exit(0)


class Epoch(Callback):
    """Takes the time of an epoch, from its start to the validation at its end."""

    def on_train_epoch_start(self, *_):
        self.started = time.perf_counter()

    def on_validation_start(self, *_):
        self.seconds = time.perf_counter() - self.started


class Bench(NamedTuple):
    """What all measurements share."""

    folder: Path
    """Where runs may write."""
    images: Path | None
    weights: str
    device: str
    precision: str
    repeats: int
    quick: bool

    def task(self, train_images: int, test_images: int) -> Path:
        """Return a folder of so many training and test images per class, linked from those given, or made of noise."""
        root = self.folder / f"images_{train_images}_{test_images}"
        if root.exists():
            return root
        source = self.images or self._noise(train_images + test_images)
        for folder in sorted(path for path in source.iterdir() if path.is_dir()):
            files = sorted(folder.iterdir())[: train_images + test_images]
            if len(files) < train_images + test_images:
                raise SystemExit(f"{folder} holds {len(files)} images; {train_images + test_images} are needed.")
            for number, file in enumerate(files):
                link = root / ("train" if number < train_images else "test") / folder.name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
        return root

    def _noise(self, per_class: int) -> Path:
        generator = np.random.default_rng(0)
        for name, number in itertools.product(range(10), range(per_class)):
            file = self.folder / "noise" / f"class{name}" / f"{number:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        return self.folder / "noise"

    def arguments(self, root: Path, *further: str) -> list[str]:
        """Return the command line of a fit in these measurements, the paper's 71 probes unless told otherwise."""
        accelerator = "gpu" if self.device == "cuda" else "cpu"
        solver = () if "--model.solver" in further else ("--model.solver.weight_decay", "5e-4")
        return [
            *(*BASE, *BACKBONE, *FRACTIONS, "--model.backbone.weights", self.weights, "--data.root", str(root)),
            *(*solver, "--trainer.precision", self.precision),
            *("--trainer.accelerator", accelerator, "--trainer.devices", "1"),
            *("--trainer.default_root_dir", str(self.folder / "runs"), *further),
        ]

    def fit(self, root: Path, *further: str) -> tuple[CLI, float]:
        """Fit in this process; return what it leaves, and its seconds from the end of start-up to the last file."""
        with quiet():
            cli = CLI(self.arguments(root, *further), train.TASKS)
        return cli, time.perf_counter() - cli.started

    def extract(self, root: Path, *further: str) -> CLI:
        """Extract all features of a task anew in this process; return what that leaves."""
        with quiet():
            return CLI(["extract", *self.arguments(root, *further, *self.fresh())[1:]], train.TASKS)

    def fresh(self) -> tuple[str, str]:
        """Return the flag that names an empty feature cache."""
        return "--model.cache_dir", tempfile.mkdtemp(dir=self.folder)

    def features(self, root: Path) -> tuple[CLI, dict[str, tuple[Tensor, Tensor]]]:
        """Return a short fit on features that are kept from now on, and the features and labels of each split."""
        cli, _ = self.fit(root, "--trainer.max_epochs", "1", *self.kept())
        splits = ("train", "val", "test")
        rows = {split: cli.datamodule.features(split)[0] for split in splits}
        return cli, {
            split: (rows[split][torch.arange(len(rows[split]))], cli.datamodule.images[split].labels)
            for split in splits
        }

    def kept(self) -> tuple[str, str]:
        """Return the flag that names the feature cache that measurements share."""
        return "--model.cache_dir", str(self.folder / "kept")


def probe_phase(bench: Bench, root: Path, *further: str) -> tuple[CLI, float]:
    """Fit on cached features; return what it leaves, and the seconds of training and evaluation, without the report."""
    cli, _ = bench.fit(root, *bench.kept(), *further)
    spent = json.loads((cli.folder.path / "summary.json").read_text())["seconds"]
    return cli, spent["fit"] - spent["extraction"] + spent["evaluation"]


def size(bench: Bench) -> tuple[int, int]:
    """Return how many training and test images per class."""
    return (20, 10) if bench.quick else (200, 100)
