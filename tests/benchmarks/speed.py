"""Where the project stands against one pass of the backbone, and against what people would use instead.

    python -m tests.benchmarks.speed --images DIR --weights FILE        # everything; DIR holds <class>/<image>
    python -m tests.benchmarks.speed curve startup --quick              # some of it, on generated images

Every figure is the median of several rounds; in each round both sides run on the same machine, one after the other.
What bounds the figures that miss their target, and what else was tried, stands in the README beside this file.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import train
from datamodules.images import FileImages
from datamodules.loading import ImageBatches, Request
from datamodules.outputs import MultiLabel
from datamodules.transforms import evaluation, normalise
from lightning_modules import FrozenBackbone
from lightning_modules.cli.main import keep_freed_memory
from lightning_modules.cli.run import CLI
from lightning_modules.features.cache import BATCH
from lightning_modules.features.moments import Moments
from lightning_modules.measures.neurons import removals
from lightning_modules.probes.bank import ProbeBank
from lightning_modules.probes.ridge import ridge_probes
from lightning_modules.subsets.bases import Ordering, discriminants
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import PAPER_FRACTIONS, Plan
from lightning_modules.subsets.selections import Layer, order
from tests.benchmarks.benchmark import (
    ROOT,
    Figure,
    child,
    exponents,
    machine,
    processor,
    quiet,
    ratio,
    table,
    taking_turns,
    timed,
    write,
)

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
        clock = "--trainer.callbacks+=tests.benchmarks.speed.Epoch"
        flags = ("--trainer.max_epochs", "1", clock, "--trainer.num_sanity_val_steps", "0")
        cli, _ = bench.fit(root, "--model.features", "off", "--model.fractions", "0.2", "--model.seeds", "1", *flags)
        # By its name, as this file may be here under two.
        return next(each.seconds for each in cli.trainer.callbacks if type(each).__name__ == "Epoch")

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


def probes(bench: Bench) -> list[Figure]:
    """Measure the probe phase with 71 probes and with (almost) one, and its steps above the bare matrix products."""
    root = bench.task(*size(bench))
    cli, _ = bench.features(root)
    bank: ProbeBank = cli.model.grid.banks[0]
    steps = len(cli.datamodule.train_dataloader()) * 100
    two = ("--model.fractions", "0.0005", "--model.seeds", "1")
    single = Step(1280, seeds=1, fractions=(0.0005,), device=bench.device)
    many = Step(1280, seeds=5, device=bench.device)

    def products() -> float:
        columns = [torch.randn(len(s.probes), max(s.sizes), 256, device=bench.device) for s in bank.stacks]
        logits = [torch.randn(*s.probes.shape, s.classes, 256, device=bench.device) for s in bank.stacks]
        flat = bank.weight.detach().to(bench.device)

        def run() -> None:
            for stack, inputs, gradient in zip(bank.stacks, columns, logits, strict=True):
                for block in stack.blocks:
                    weights = stack.view(flat, block).flatten(1, 2)
                    seen, rows = gradient[:, block.probe :].flatten(1, 2), inputs[:, block.start : block.stop]
                    torch.bmm(weights, rows)
                    torch.bmm(seen, rows.transpose(1, 2))

        run()
        return timed(lambda: [run() for _ in range(100)]) / 100

    sides = taking_turns(
        bench.repeats,
        probes_71=lambda: probe_phase(bench, root)[1],
        probes_1=lambda: probe_phase(bench, root, *two)[1],
        step_71=lambda: many.seconds(100),
        step_1=lambda: single.seconds(100),
        products=products,
    )
    lightning = [1e3 * (phase / steps - p) for phase, p in zip(sides["probes_71"], sides["products"], strict=True)]
    plain = [1e3 * (step - p) for step, p in zip(sides["step_71"], sides["products"], strict=True)]
    note = "of 1: a probe on one neuron beside that of the full layer, which is always there"
    return [
        Figure("probe phase, 71 probes over 1", ratio(sides, "probes_71", "probes_1"), "<= 2", sides, note),
        Figure("a step alone, 71 probes over 1", ratio(sides, "step_71", "step_1"), "", sides, "no loop"),
        Figure("ms a step above its matrix products, fit", lightning, "", sides, "validation and loop included"),
        Figure("ms a step above its matrix products, step alone", plain, "", sides, ""),
    ]


class Step:
    """Training steps of a bank on random features, without a loop around them."""

    def __init__(self, width, seeds, fractions=PAPER_FRACTIONS, device="cpu", classes=10, batch=256):
        plan = Plan("random", list(fractions), seeds).probes({"layer": width})
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(batch, width, generator=generator).to(device)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.coordinates = Coordinates(plan, {"layer": width}).to(device)
        self.bank = ProbeBank(plan, classes).to(device)
        self.optimizer = torch.optim.SGD(self.bank.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def step(self):
        self.optimizer.zero_grad()
        logits = self.bank(self.coordinates(self.inputs))
        summed = F.cross_entropy(logits, self.labels.expand(len(logits), -1), reduction="sum")
        (summed / len(self.labels)).backward()
        self.optimizer.step()

    def seconds(self, steps):
        self.step()
        return timed(lambda: [self.step() for _ in range(steps)]) / steps


def rivals(bench: Bench) -> list[Figure]:
    """Measure 71 fits of scikit-learn and 71 trainings of nn.Linear on the same features against the probe phases.

    Scikit-learn fits one probe a core, each with one thread: where its two kinds of threads share the cores, they wait
    for each other. With its own tolerance it ends above the optimum, so that `Logistic` is compared with fits that end
    as near to it as its own.
    """
    from joblib import Parallel, delayed
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    root = bench.task(*size(bench))
    epochs = "10" if bench.quick else "100"
    cli, features = bench.features(root)
    plan, coordinates = cli.model.probes, cli.model.coordinates
    columns = [coordinates.subset(index) for index in range(len(plan))]
    solvers = {
        "sgd": (),
        "logistic": ("--model.solver", "Logistic", "--model.solver.penalty", "1"),
        "logistic, 7 penalties": ("--model.solver", "Logistic"),
        "ridge": ("--model.solver", "Ridge"),
        "knn": ("--model.solver", "KNN"),
    }
    tolerances = {"scikit-learn": 1e-4, "converged scikit-learn": 1e-5}
    accuracies: dict[str, list[float]] = {name: [] for name in (*solvers, *tolerances, "nn.Linear")}
    objectives: dict[str, Tensor] = {}

    def objective(probes: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        x, y = features["train"]
        sums = []
        for subset, (weight, bias) in zip(columns, probes, strict=True):
            logits = x[:, subset].double() @ weight.double().t() + bias
            sums.append(F.cross_entropy(logits, y, reduction="sum") + weight.double().square().sum() / 2)
        return torch.stack(sums)

    def ours(solver: str) -> float:
        flags = solvers[solver]
        only_accuracy = ("--model.measures", "[]")  # as on the other side
        cli, seconds = probe_phase(bench, root, "--trainer.max_epochs", epochs, *only_accuracy, *flags)
        rows = cli.model.results().tables["results"]
        accuracies[solver].append(rows.loc[rows["split"] == "test", "accuracy"].mean())
        if solver == "logistic":
            objectives["logistic"] = objective(cli.model.grid.final_probe(index) for index in range(len(plan)))
        return seconds

    def scikit(name: str) -> float:
        (x, y), (x_test, y_test) = (tuple(each.numpy() for each in features[split]) for split in ("train", "test"))
        if name == "converged scikit-learn":  # below a loss of some 1e-3, float32 loses what is still to be gained
            x, x_test = x.astype(np.float64), x_test.astype(np.float64)
        probes = [LogisticRegression(tol=tolerances[name], max_iter=10_000) for _ in columns]
        subsets, fits = [each.numpy() for each in columns], list[LogisticRegression]()
        with threadpool_limits(1), Parallel(n_jobs=torch.get_num_threads()) as pool:
            pool(delayed(probe.fit)(x[::20], y[::20]) for probe in probes)  # its processes are there before
            tasks = (delayed(probe.fit)(x[:, subset], y) for probe, subset in zip(probes, subsets, strict=True))
            seconds = timed(lambda: fits.extend(pool(tasks)))
        scores = [probe.score(x_test[:, subset], y_test) for probe, subset in zip(fits, subsets, strict=True)]
        accuracies[name].append(float(np.mean(scores)))
        found = ((probe.coef_, probe.intercept_) for probe in fits)
        objectives[name] = objective((torch.tensor(weight), torch.tensor(bias)) for weight, bias in found)
        return seconds

    def linear() -> float:
        return timed(lambda: accuracies["nn.Linear"].append(one_at_a_time(bench, features, columns, int(epochs))))

    def loaded() -> float:
        tenth = int(epochs) // 10
        return 10 * timed(lambda: one_at_a_time(bench, features, columns, tenth, loaded=True))

    sides = taking_turns(
        bench.repeats,
        **{solver: functools.partial(ours, solver) for solver in solvers},
        nn_linear=linear,
        loaded=loaded,
        **{name: functools.partial(scikit, name) for name in tolerances},
    )
    said = ", ".join(f"{name} {100 * np.median(each):.2f} %" for name, each in accuracies.items())
    figures, targets = [], {"sgd": ">= 20", "logistic": ">= 50", "logistic, 7 penalties": ""}
    targets |= {"ridge": ">= 25", "knn": ">= 25"}
    for solver in solvers:
        rival = "converged scikit-learn" if solver == "logistic" else "scikit-learn"
        lower = [100 * (b - a) for a, b in zip(accuracies[solver], accuracies[rival], strict=True)]
        seconds = f"{np.median(sides[rival]):.1f} s over {np.median(sides[solver]):.1f} s"
        figures += [
            Figure(f"71 fits of {rival} over {solver}", ratio(sides, rival, solver), targets[solver], sides, seconds),
            Figure(
                f"points by which {rival} is better than {solver}",
                lower,
                "" if solver == "knn" else "<= 0.3",
                {},
                f"mean of 71: {said}",
            ),
        ]
    for name in ("logistic", "scikit-learn"):
        excess = objectives[name] / objectives["converged scikit-learn"] - 1
        at_most = f"of 71 at penalty 1, on average {float(excess.mean()):.2g}"
        what = f"largest excess of the objective of {name} over that of converged scikit-learn"
        figures.append(Figure(what, [float(excess.max())], "<= 1e-4" if name == "logistic" else "", {}, at_most))
    figures += [
        Figure("logistic, 7 penalties, over sgd", ratio(sides, "logistic, 7 penalties", "sgd"), "<= 1", sides),
    ]
    for side, note in {
        "loaded": "batches from a DataLoader; a tenth of the epochs measured, scaled",
        "nn_linear": "features in memory, gathered once, indexed by a permutation",
    }.items():
        figures.append(Figure("71 trainings of nn.Linear over sgd", ratio(sides, side, "sgd"), ">= 10", sides, note))
    return figures


def one_at_a_time(bench, features, columns, epochs, loaded=False):
    """Train a plain nn.Linear on every subset as the bank does; return the mean test accuracy of their best epochs."""
    (x, y), (x_val, y_val), (x_test, y_test) = (
        tuple(each.to(bench.device) for each in features[split]) for split in ("train", "val", "test")
    )
    reached = []
    for number, subset in enumerate(columns):
        torch.manual_seed(number)
        seen, seen_val, seen_test = (each[:, subset.to(bench.device)] for each in (x, x_val, x_test))
        probe = nn.Linear(len(subset), int(y.max()) + 1).to(bench.device)
        optimizer = torch.optim.SGD(probe.parameters(), 0.1, 0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.1)
        best, kept = -1.0, None
        loader = DataLoader(TensorDataset(seen, y), 256, shuffle=True)
        for _ in range(epochs):
            for inputs, labels in loader if loaded else ((seen[i], y[i]) for i in torch.randperm(len(y)).split(256)):
                optimizer.zero_grad()
                F.cross_entropy(probe(inputs), labels).backward()
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                accuracy = (probe(seen_val).argmax(1) == y_val).double().mean().item()
                if accuracy > best:
                    best, kept = accuracy, (probe(seen_test).argmax(1) == y_test).double().mean().item()
        reached.append(kept)
    return float(np.mean(reached))


def moments(width, classes, images, seed, device="cpu"):
    """Return the sums of random features."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    sums = Moments(width, classes, device=device)
    sums.update(torch.randn(images, width, generator=generator) + labels.unsqueeze(1) / classes, labels)
    sums.count.item()  # makes the products
    return sums


def ridge(bench: Bench) -> list[Figure]:
    """Measure the 71 closed-form probes of one penalty from sums already taken, against solving each on its own."""
    width, classes = (512, 20) if bench.quick else (2048, 100)
    train_sums, val_sums = (moments(width, classes, 2 * width, seed, bench.device) for seed in (0, 1))
    orderings = [Ordering(o.order, o.sizes) for o in plan_orderings(width, bench.device)]

    def alone() -> None:
        scatter, cross = train_sums.scatter, train_sums.cross
        penalty = 1e-2 * scatter.diagonal().mean()
        for ordering in orderings:
            for neurons in ordering.sizes:
                subset = ordering.order[:neurons]
                system = scatter[subset][:, subset] + penalty * torch.eye(neurons, device=bench.device).double()
                torch.linalg.solve(system, cross[subset])

    sides = taking_turns(
        bench.repeats,
        nested=lambda: timed(lambda: ridge_probes(train_sums, val_sums, orderings, [1e-2])),
        one_by_one=lambda: timed(alone),
    )
    note = f"D = {width}, C = {classes}; choosing by validation error included"
    return [
        Figure("seconds of a ridge curve, a penalty", sides["nested"], "<= 2", sides, note),
        Figure("71 solutions one by one over the ridge curve", ratio(sides, "one_by_one", "nested"), "", sides, note),
    ]


def neurons(bench: Bench) -> list[Figure]:
    """Measure what ranks all neurons of a layer, and what tells the worth of each, from sums already taken."""
    width, classes = (256, 20) if bench.quick else (2048, 100)
    train_sums, val_sums = (moments(width, classes, 2 * width, seed, bench.device) for seed in (0, 1))
    layer, searches = Layer(width, train_sums), ("greedy", "backward", "column_subset")
    orders = {name: functools.partial(timed, functools.partial(order, name, layer, 0)) for name in searches}
    sides = taking_turns(
        bench.repeats,
        **orders,
        discriminant=lambda: timed(lambda: discriminants(train_sums)),
        worth=lambda: timed(lambda: removals(train_sums, val_sums, val_sums, list(range(5)))),
    )
    note = f"D = {width}, C = {classes}; worth with 5 subset seeds"
    return [Figure(f"seconds of {name}, all neurons", sides[name], "<= 10", sides, note) for name in sides]


def labels(bench: Bench) -> list[Figure]:
    """Measure the average precision of 71 probes for several labels, and what each image adds to it."""
    from sklearn.metrics import average_precision_score

    count, images = (3, 200) if bench.quick else (20, 5000)
    generator = torch.Generator().manual_seed(0)
    wanted = (torch.rand(images, count, generator=generator) < 0.2).float()
    outputs = torch.randn(71, count, images, generator=generator) + wanted.t()
    target = MultiLabel(list(map(str, range(count))))
    sides = taking_turns(
        bench.repeats,
        ours=lambda: timed(lambda: [target.judge(each.unsqueeze(0), wanted) for each in outputs]),
        scikit_learn=lambda: timed(lambda: [average_precision_score(wanted, each.t()) for each in outputs]),
    )
    note = f"{count} labels, {images:,} images; scikit-learn's is without what each image adds"
    name = "average precision of 71 probes, scikit-learn over ours"
    return [Figure(name, ratio(sides, "scikit_learn", "ours"), "", sides, note)]


def plan_orderings(width, device):
    """Return the paper's subsets as orderings."""
    plan = Plan("random", list(PAPER_FRACTIONS), list(range(1, 6))).probes({"layer": width})
    coordinates = Coordinates(plan, {"layer": width}).to(device)
    return [coordinates.ordering(group) for group in coordinates.groups]


def growth(bench: Bench) -> list[Figure]:
    """Measure with which power time grows in probes, images and width."""
    figures = []

    def grow(what: str, target: str, sizes: list[int], run: Callable[[int], float]) -> None:
        run(sizes[0])
        sides = taking_turns(bench.repeats, **{str(each): functools.partial(run, each) for each in sizes})
        note = ", ".join(f"{name}: {np.median(each):.3g} s" for name, each in sides.items())
        figures.append(Figure(f"power of {what}", exponents(sides, list(map(float, sizes))), target, sides, note))

    def step_of(width: int) -> float:
        return Step(width, 5, device=bench.device).seconds(20)

    def extract(per_class: int) -> float:
        return bench.extract(bench.task(per_class, 10)).model.stream.extractor.seconds

    def solve(width: int) -> float:
        sums = moments(width, 10, 2 * width, 0, bench.device)
        orderings = plan_orderings(width, bench.device)
        return timed(lambda: ridge_probes(sums, sums, orderings, [1e-2]))

    def sum_up(width: int) -> float:
        return timed(lambda: moments(width, 10, 2048, 0, bench.device))

    def components(width: int) -> float:
        scatter = moments(width, 10, 2 * width, 0, bench.device).scatter
        return timed(lambda: torch.linalg.eigh(scatter))

    widths = [512, 1024] if bench.quick else [512, 1024, 2048, 4096]
    seeds = {71: 5, 141: 10, 281: 20}
    step = "a step in probes (71, 141, 281)"
    grow(step, "<= 1.1", [*seeds], lambda n: Step(1280, seeds[n], device=bench.device).seconds(20))
    grow("a step in width", "<= 1.1", widths, step_of)
    grow("extraction in images per class", "<= 1.1", [20, 40], extract)
    grow("sums of products in width", "<= 2.1", widths, sum_up)
    grow("a ridge curve in width", "<= 3.1", widths, solve)
    grow("principal components in width", "<= 3.1", widths[:3], components)
    return figures


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
    first = ("--trainer.callbacks+=tests.benchmarks.speed.FirstBatch", "--trainer.logger", "false")

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


TASKS = {"CIFAR-10": (60_000, 45_000, 10), "CIFAR-100": (60_000, 45_000, 100)}
TASKS |= {"flowers": (8_189, 1_020, 102), "pets": (7_349, 3_312, 37)}
"""The paper's tasks: images to extract, images to train on, classes."""


def cost(images: int, training: int, classes: int, rate: float, arithmetic: float, overhead: float) -> str:
    """Return what one curve of 71 probes on D = 2048 costs on one GPU, as a row of a table.

    Args:
        images: Images to extract.
        training: Images per epoch.
        classes: C.
        rate: Images a second through the backbone.
        arithmetic: Operations a second of float32 products.
        overhead: Seconds of a step that is too small to fill the GPU.
    """
    plan = Plan("random", list(PAPER_FRACTIONS), list(range(1, 6))).probes({"layer": 2048})
    weights = sum((probe.neurons + 1) * classes for probe in plan)
    steps = 100 * -(-training // 256)
    step = max(overhead, 4 * weights * 256 / arithmetic)  # a product and a sum per weight, forward and backward
    seconds = images / rate
    gigabytes = 16 * weights / 1e9  # float32: weights, gradient, momentum, best
    logits = 4 * 4 * len(plan) * classes * 256 / 1e9
    return (
        f"{images:,} | {weights / 1e6:.1f} M | {seconds:,.0f} s | {steps:,} x {1e3 * step:.1f} ms "
        f"= {steps * step:,.0f} s | {gigabytes + logits:.2f} GB | {images * 2048 * 4 / 1e9:.2f} GB"
    )


def costs() -> str:
    """Return the arithmetic of the paper as a whole, and of a curve on ImageNet-1k, on one GPU that nobody measured."""
    rate, arithmetic, overhead = 2500.0, 1e13, 2e-3
    lines = [
        f"Assumed, not measured: a ResNet-50 in mixed precision at {rate:,.0f} images a second (the order of",
        f"published rates of one A100), {arithmetic / 1e12:.0f} TFLOP/s of float32 products (half of its peak) and "
        f"{1e3 * overhead:.0f} ms a step for launches and the loop.",
        "",
        "| curve of 71 probes | images | weights | extraction | probes | GPU: bank, logits | features |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {name} | {cost(*counts, rate, arithmetic, overhead)} |" for name, counts in TASKS.items()),
        f"| ImageNet-1k | {cost(1_281_167 + 50_000, 1_281_167, 1000, rate, arithmetic, overhead)} |",
        "",
    ]
    steps = sum(100 * -(-training // 256) for _, training, _ in TASKS.values())
    images = sum(images for images, *_ in TASKS.values())
    seconds = 6 * (images / rate + steps * overhead)
    lines.append(
        f"The paper: 6 backbones x ({images:,} images / {rate:,.0f} a second + {steps:,} steps x "
        f"{1e3 * overhead:.0f} ms) = {seconds / 60:,.0f} minutes for 6 x 4 x 71 probes; its own procedure extracts "
        f"6 x 71 x 100 x {sum(training for _, training, _ in TASKS.values()):,} training images, "
        f"{6 * 7100 * sum(training for _, training, _ in TASKS.values()) / rate / 86400:,.0f} days at the same rate."
    )
    return "\n".join(lines)


PARTS = (startup, memory, probes, rivals, ridge, neurons, labels, growth, curve, extraction, photographs, precision)
MEASUREMENTS = {each.__name__: each for each in PARTS}
"""Memory comes early: the peak of a child is at least what its parent held when it started it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(MEASUREMENTS)}; all if none is named.")
    parser.add_argument(
        "--images", type=Path, help="A folder <class>/<image> of 300 images a class or more; noise if none."
    )
    parser.add_argument("--weights", default="random", help="Of a MobileNetV2 in timm's names; random if none.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true", help="The Trainer's.")
    parser.add_argument("--repeats", type=int, default=3, help="Rounds.")
    parser.add_argument("--quick", action="store_true", help="Little of everything, to see whether it runs.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(MEASUREMENTS):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    keep_freed_memory()  # as the command line does
    weights = str(Path(asked.weights).resolve()) if asked.weights != "random" else asked.weights
    figures: list[Figure] = []
    settings = {"machine": machine(asked.device), "precision": asked.precision, "quick": asked.quick}
    settings |= {"images": "given" if asked.images else "noise", "weights": Path(weights).name}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked.images, weights, asked.device, asked.precision, asked.repeats, asked.quick)
        for name in (each for each in MEASUREMENTS if each in (asked.names or MEASUREMENTS)):
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            figures += MEASUREMENTS[name](bench)
            write(figures, settings, asked.output)
            print(table(figures[-1:]), file=sys.stderr, flush=True)
    print("\n".join(f"{key}: {value}" for key, value in settings.items()), table(figures), costs(), sep="\n\n")


if __name__ == "__main__":
    main()
