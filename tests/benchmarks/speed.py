"""Where the project stands against one pass of the backbone, and against what people would use instead.

    python -m tests.benchmarks.speed --images DIR --weights FILE        # everything; DIR holds <class>/<image>
    python -m tests.benchmarks.speed curve startup --quick              # some of it, on generated images

Every figure is the median of several rounds; in each round both sides run on the same machine, one after the other.
What bounds the figures that miss their target, and what else was tried, stands in the README beside this file.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from lightning_modules.cli.main import keep_freed_memory
from lightning_modules.subsets.plan import PAPER_FRACTIONS, Plan
from tests.benchmarks.backbones import curve, extraction, memory, photographs, precision, startup
from tests.benchmarks.benchmark import Figure, machine, table, write
from tests.benchmarks.fits import Bench
from tests.benchmarks.probes import growth, labels, neurons, probes, ridge, rivals

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
