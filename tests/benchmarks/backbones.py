"""Whole fits, their extraction, memory and start-up, against a bare backbone, or the imports alone."""

import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.images import FileImages
from datamodules.loading import ImageBatches, Request
from datamodules.transforms import evaluation, normalise
from lightning_modules import FrozenBackbone
from lightning_modules.cli.run import CLI
from lightning_modules.features.cache import BATCH
from tests.benchmarks.benchmark import ROOT, Figure, child, processor, ratio, taking_turns, timed
from tests.benchmarks.fits import Bench, Epoch, size

PLAIN = """
import sys, time, torch
from lightning_modules import FrozenBackbone
images, weights, precision, layout = sys.argv[1:]
network = FrozenBackbone("mobilenetv2_100", weights, {"pad_type": "same"}).network
batches = torch.load(images, weights_only=True)
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
    network = network.to(memory_format=getattr(torch, layout))
    batches = [batch.contiguous(memory_format=getattr(torch, layout)) for batch in batches]
    network(batches[0])
    started = time.perf_counter()
    for batch in batches:
        network(batch)
    print("seconds", time.perf_counter() - started)
"""
"""The bare backbone as anyone would run it, in a process of its own whose memory PyTorch and the system manage."""


class Bare:
    """Passes of a run's backbone as it was loaded, over all of its images in the batches that extraction makes."""

    def __init__(self, bench: Bench, cli: CLI) -> None:
        self.bench = bench
        self.network, task = cli.model.backbone.to(bench.device).network, cli.datamodule
        self.batches: list[Tensor] = []
        for split in ("train", "val", "test"):
            n = len(task.images[split])
            parts = [range(n)[i : i + BATCH] for i in range(0, n, BATCH)]
            loader = task.extraction_loader(split, parts, None, BATCH)
            self.batches += [batch.inputs.to(bench.device) for batch in loader]
        self._run("channels_last", 2)
        self.layout = min(("channels_last", "contiguous_format"), key=lambda layout: self._run(layout, 4))

    def seconds(self) -> float:
        """Return how long they take, in the faster of the two layouts of images."""
        return self._run(self.layout)

    def _run(self, layout: str, count: int | None = None) -> float:
        network = self.network.to(memory_format=getattr(torch, layout))
        images = [batch.contiguous(memory_format=getattr(torch, layout)) for batch in self.batches[:count]]
        mixed = torch.autocast(self.bench.device, torch.bfloat16, enabled=self.bench.precision == "bf16-mixed")
        with torch.inference_mode(), mixed:
            return timed(lambda: [network(batch) for batch in images])


def curve(bench: Bench) -> list[Figure]:
    """Measure whole fits and their extraction against the bare backbone, and against the paper's 7,100 epochs."""
    root = bench.task(*size(bench))
    epochs = "10" if bench.quick else "100"
    bare = Bare(bench, bench.features(root)[0])
    extractions = []

    def plain() -> float:
        arguments = (str(bench.folder / "images.pt"), bench.weights, bench.precision, bare.layout)
        child("-c", PLAIN, *arguments, cwd=bench.folder)
        return float((bench.folder / "child.log").read_text().split("seconds")[-1])

    def whole() -> float:
        cli, seconds = bench.fit(root, "--trainer.max_epochs", epochs, *bench.fresh())
        extractions.append(cli.model.stream.extractor.seconds)
        return seconds

    def paper_epoch() -> float:
        clock = "--trainer.callbacks+=tests.benchmarks.fits.Epoch"
        flags = ("--trainer.max_epochs", "1", clock, "--trainer.num_sanity_val_steps", "0")
        cli, _ = bench.fit(root, "--model.features", "off", "--model.fractions", "0.2", "--model.seeds", "1", *flags)
        return next(each.seconds for each in cli.trainer.callbacks if isinstance(each, Epoch))

    measured = {"bare": bare.seconds, "fit": whole, "paper_epoch": paper_epoch}
    if bench.device == "cpu":
        torch.save(bare.batches, bench.folder / "images.pt")
        measured["plain"] = plain
    sides = taking_turns(bench.repeats, **measured)
    sides["extraction"] = extractions
    named = f"MobileNetV2, {sum(map(len, bare.batches)):,} images, {bare.layout}"
    paper = [7100 * epoch / fit for epoch, fit in zip(sides["paper_epoch"], sides["fit"], strict=True)]
    figures = []
    for side, what in {"plain": "as PyTorch runs it", "bare": "that keeps freed memory too"}.items():
        if side in sides:
            over = f"the bare backbone {what}" if bench.device == "cpu" else "the bare backbone"
            rate = f"rate of extraction over that of {over}"
            figures += [
                Figure(f"whole curve (71 probes) over {over}", ratio(sides, "fit", side), "<= 1.2", sides, named),
                Figure(rate, ratio(sides, side, "extraction"), ">= 1.15", sides, named),
            ]
    return [*figures, Figure("paper's 7,100 epochs over the whole curve", paper, ">= 2000", sides, "an epoch, scaled")]


def extraction(bench: Bench) -> list[Figure]:
    """Measure the extraction of few images with larger backbones against passes of those as they were loaded."""
    root = bench.task(*((3, 1) if bench.quick else (24, 8)))
    figures = []
    for name, called in {"resnet50": "ResNet-50", "vit_small_patch16_224": "ViT-S/16"}.items():
        flags = ("--model.backbone.name", name, "--model.backbone.weights", "random", "--model.backbone.kwargs", "{}")
        bare = Bare(bench, bench.extract(root, *flags))

        def extract(*flags: str) -> float:
            return bench.extract(root, *flags).model.stream.extractor.seconds

        sides = taking_turns(bench.repeats, bare=bare.seconds, extraction=functools.partial(extract, *flags))
        note = f"{called}, {sum(map(len, bare.batches))} images, {bare.layout}, random weights"
        what = "rate of extraction over that of the bare backbone that keeps freed memory too"
        figures.append(Figure(what, ratio(sides, "bare", "extraction"), ">= 0.97", sides, note))
    return figures


def photographs(bench: Bench) -> list[Figure]:
    """Measure what photographs take of one core before the backbone, part by part, beside a pass of the backbone."""
    count = BATCH if bench.quick else 4 * BATCH
    files = sorted((bench.task(20, 10) / "train").rglob("*.*"))[:count]
    photos = [Image.open(file).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC) for file in files]
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.jpg", quality=90)
    images = FileImages(folder, [f"{number}.jpg" for number in range(count)], torch.zeros(count, dtype=torch.int64))
    backbone = FrozenBackbone("mobilenetv2_100", bench.weights, {"pad_type": "same"}).to(bench.device)
    transform = evaluation(backbone.preprocessing)
    loaded = ImageBatches(images, transform, backbone.preprocessing, seed=0, random=False)
    requests = [Request(list(range(i, i + BATCH)), BATCH, 0) for i in range(0, count, BATCH)]
    inputs = [loaded[request].inputs.to(bench.device) for request in requests]
    pixels = [torch.stack([transform(photo).permute(1, 2, 0) for photo in photos[:BATCH]])] * len(requests)
    clock = processor if bench.device == "cpu" else timed

    def milliseconds(of: Iterable[Any], run: Callable[[Any], object], clock: Callable = processor) -> float:
        return 1e3 * clock(lambda: [run(each) for each in of]) / count

    with backbone.inference():
        sides = taking_turns(
            bench.repeats,
            loaded=lambda: milliseconds(requests, loaded.__getitem__),
            decode=lambda: milliseconds(range(count), images.__getitem__),
            resize=lambda: milliseconds(photos, transform),
            normalise=lambda: milliseconds(pixels, lambda each: normalise(each, backbone.preprocessing)),
            backbone=lambda: milliseconds(inputs, backbone, clock),
        )
    each = {name: float(np.median(values)) for name, values in sides.items()}
    rest = each["loaded"] - each["decode"] - each["resize"] - each["normalise"]
    size = sum(file.stat().st_size for file in folder.iterdir()) / count / 1e3
    parts = ", ".join(f"{name} {each[name]:.2f}" for name in ("decode", "resize", "normalise"))
    note = f"{count} JPEGs of 500 x 375, {size:.0f} kB each: {parts}, rest {rest:.2f}"
    own = f"MobileNetV2, {each['backbone']:.1f} ms, batch norms and activations folded"
    return [
        Figure("ms of one core that a photograph takes before the backbone", sides["loaded"], "", sides, note),
        Figure("photographs before the backbone over its own pass", ratio(sides, "loaded", "backbone"), "", sides, own),
    ]


BARE = """
import sys, torch, train
from lightning_modules import FrozenBackbone
backbone = FrozenBackbone("mobilenetv2_100", sys.argv[1], {"pad_type": "same"})
for _ in range(4):
    backbone(torch.randn(32, 3, 224, 224))
"""


def memory(bench: Bench) -> list[Figure]:
    """Measure the peak resident memory of fits over that of a process that only runs the backbone, in MB."""
    small, large = bench.task(40, 10), bench.task(80, 10)  # more to train on than the 256 of a batch
    script = str(ROOT / "train.py")

    def peak(root: Path, *further: str) -> float:
        flags = ("--trainer.max_epochs", "2", *further)
        return child(script, *bench.arguments(root, *flags), cwd=bench.folder)[1]

    off = ("--model.features", "off")
    sides = taking_turns(
        bench.repeats,
        bare=lambda: child("-c", BARE, bench.weights, cwd=bench.folder)[1],
        cached=lambda: peak(large, *bench.fresh()),
        uncached=lambda: peak(small, *off),
        uncached_twice=lambda: peak(large, *off),
    )
    more = [a - b for a, b in zip(sides["cached"], sides["bare"], strict=True)]
    features = 900 * 1280 * 4 / 1e6
    note = f"features {features:.1f} MB; the bare backbone {np.median(sides['bare']):,.0f} MB"
    twice = ratio(sides, "uncached_twice", "uncached")
    return [
        Figure("MB of a cached fit above the bare backbone", more, f"<= {1000 + features:.0f}", sides, note),
        Figure("memory of an uncached fit, images x 1.8", twice, "<= 1.05", sides, "500 and 900 images"),
    ]


def precision(bench: Bench) -> list[Figure]:
    """Measure how far a backbone in bfloat16 moves accuracies, of ridge, in which nothing is left to chance."""
    train_images, test_images = size(bench)
    if bench.images and not bench.quick:  # all that there are
        fewest = min(len(list(folder.iterdir())) for folder in bench.images.iterdir() if folder.is_dir())
        train_images, test_images = fewest - fewest // 2, fewest // 2
    root = bench.task(train_images, test_images)
    accuracies, sides = [], {}
    for name in ("32-true", "bf16-mixed"):
        flags = ("--model.solver", "Ridge", "--trainer.precision", name)
        cli, _ = bench.fit(root, *flags, *bench.fresh())
        rows = cli.model.results().tables["results"]
        accuracies.append(rows.loc[rows["split"] == "test", "accuracy"].mean())
        sides[name] = [cli.model.stream.extractor.seconds]
    counted = f"{len(cli.datamodule.images['test']):,} test images"
    note = f"{counted}, ridge: {100 * accuracies[0]:.2f} % and {100 * accuracies[1]:.2f} %"
    moved = [100 * abs(accuracies[1] - accuracies[0])]
    return [
        Figure("points that bfloat16 moves the mean test accuracy of 71 probes", moved, "<= 0.2", {}, note),
        Figure(
            "rate of the extraction in bfloat16 over that in float32", ratio(sides, "32-true", "bf16-mixed"), "", sides
        ),
    ]


def startup(bench: Bench) -> list[Figure]:
    """Measure the time to the help and to the first batch of the quickstart, against that of its imports alone."""
    script = str(ROOT / "train.py")
    first = ("--trainer.callbacks+=tests.benchmarks.fits.FirstBatch", "--trainer.logger", "false")

    def until_first_batch() -> float:
        cwd = Path(tempfile.mkdtemp(dir=bench.folder))
        return child(script, "fit", "--config", "quickstart.yaml", *first, cwd=cwd)[0]

    libraries = "import lightning.pytorch, timm, torchvision, torchmetrics, jsonargparse, pandas"
    sides = taking_turns(
        bench.repeats,
        imports=lambda: child("-c", libraries, cwd=bench.folder)[0],
        help=lambda: child(script, "--help", cwd=bench.folder)[0],
        first_batch=until_first_batch,
    )
    note = f"importing its libraries alone {np.median(sides['imports']):.1f} s"
    return [
        Figure("seconds of --help", sides["help"], "<= 8", sides, note),
        Figure("seconds of fit until the first batch", sides["first_batch"], "<= 12", sides, f"quickstart; {note}"),
    ]
