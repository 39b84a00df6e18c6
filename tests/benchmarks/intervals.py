"""How often intervals of redundancy hold the truth, and answers keep what they promise: a simulation of known truth.

    python -m tests.benchmarks.intervals [--quick]

An image is right where a normal variable is above zero. It is the sum of what the fraction of neurons gives, of what
the subset does, of how easy the image is, and of chance, so that a curve's truth is the normal distribution function.
Subsets nest, and images are easy or hard at all fractions and for the full layer. Every trial draws subsets and images
anew. Two tables go to standard output: the share of trials whose 95 % interval holds the truth; and of the trials in
which an answer says that a subset is certain to keep a share, the share in which it does not, at most 5 %.
"""

import argparse
import itertools
from concurrent.futures import Future, ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import norm

from lightning_modules.results.curves import complete
from lightning_modules.results.redundancy import redundancy, sufficient_fraction
from lightning_modules.results.resampling import resample
from lightning_modules.results.results import Results

FRACTIONS = np.array([0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
TRUTH = np.array([0.25, 0.35, 0.60, 0.66, 0.70, 0.715, 0.73, 0.745])  # accuracy at each
FULL_TRUTH = 0.75
SUBSETS = np.array([0.15, 0.15, 0.09, 0.06, 0.04, 0.03, 0.02, 0.01])  # spread of the normal variable over subsets
IMAGES = 0.8  # share of its variance that is the image's own
DELTAS = (0.8, 0.9, 0.95)
RULES = ("threshold", "interpolated")


def trial(random: np.random.Generator, seeds: int, images: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Return which images each probe has right, shape (P, images), and the probes."""
    easy = random.standard_normal(images) * np.sqrt(IMAGES)
    chance = np.sqrt(1 - IMAGES)
    rows = [("net", "full", 1.0, 0)]
    right = [norm.ppf(FULL_TRUTH) + easy + chance * random.standard_normal(images) > 0]
    for seed in range(seeds):
        # Of what is good or bad about a subset, two thirds are shared by neighbouring sizes.
        steps = random.standard_normal(len(FRACTIONS))
        good = np.convolve(steps, [0.8, 0.6])[: len(FRACTIONS)]
        good[0] = steps[0]
        for fraction, truth, spread, offset in zip(FRACTIONS, TRUTH, SUBSETS, SUBSETS * good, strict=True):
            noise = np.sqrt(1 - IMAGES - spread**2) * random.standard_normal(images)
            right.append(norm.ppf(truth) + offset + easy + noise > 0)
            rows.append(("net", "random", fraction, seed))
    return np.stack(right), pd.DataFrame(rows, columns=["layer", "selection", "fraction", "seed"]).assign(bits=32)


def coverage(seeds: int, images: int, trials: int) -> dict[tuple[str, float], float]:
    """Return the share of trials whose interval holds the true redundancy, by rule and delta."""
    held = dict.fromkeys(itertools.product(RULES, DELTAS), 0)
    for number in range(trials):
        right, probes = trial(np.random.default_rng([seeds, images, number]), seeds, images)
        rows = complete(probes.assign(split="test", accuracy=right.mean(1)))
        found = redundancy(rows, "test", DELTAS, "accuracy", resample(right, probes)).set_index(["rule", "delta"])
        for rule, delta in held:
            true = 1 - sufficient_fraction(FRACTIONS, TRUTH / FULL_TRUTH, delta, rule)
            low, high = found.loc[(rule, delta), ["low", "high"]]
            held[rule, delta] += low - 1e-9 <= true <= high + 1e-9
    return {key: count / trials for key, count in held.items()}


def broken_promises(seeds: int, validation: int, test: int, trials: int) -> dict[float, float]:
    """Return the share of trials whose answer calls a subset certain to keep delta that does not, by delta."""
    broken = dict.fromkeys(DELTAS, 0)
    target = SimpleNamespace(metric="accuracy", label="accuracy", unit="%", chance=None, items="images")
    truths = dict(zip(FRACTIONS, TRUTH, strict=True))
    for number in range(trials):
        right, probes = trial(np.random.default_rng([seeds, validation, number]), seeds, validation + test)
        per_image = {"val": right[:, :validation], "test": right[:, validation:]}
        probes["neurons"] = (1000 * probes["fraction"]).astype(int)
        tables = [
            probes.assign(split=split, accuracy=bits.mean(1), images=bits.shape[1], task="task", backbone="net")
            for split, bits in per_image.items()
        ]
        answers = Results({"results": pd.concat(tables, ignore_index=True)}, [], target, per_image).answers("net")
        for delta in DELTAS:
            if answers[delta]["certain"]:
                broken[delta] += truths[answers[delta]["fraction"]] < delta * FULL_TRUTH - 1e-9
    return {delta: count / trials for delta, count in broken.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few trials, to see that it runs")
    parser.add_argument("--trials", type=int, default=1000)
    arguments = parser.parse_args()
    trials = 3 if arguments.quick else arguments.trials
    with ProcessPoolExecutor() as pool:
        intervals = {
            sizes: pool.submit(coverage, *sizes, trials) for sizes in itertools.product((3, 5, 10), (10_000, 1000, 240))
        }
        promises = {
            sizes: pool.submit(broken_promises, *sizes, 400, trials)
            for sizes in itertools.product((3, 5, 10), (1000, 160))
        }
        columns = [f"{rule}, {delta:g}" for rule, delta in itertools.product(RULES, DELTAS)]
        show(["seeds", "images", *columns], intervals)
        show(["seeds", "validation images", *(f"{delta:g}" for delta in DELTAS)], promises)


def show(heading: list[str], found: dict[tuple[int, int], "Future"]) -> None:
    """Print a table of shares in percent, by seeds and images."""
    print(f"\n| {' | '.join(heading)} |\n|{' --- |' * len(heading)}")
    for (seeds, images), shares in sorted(found.items()):
        print(f"| {seeds} | {images:,} | {' | '.join(f'{100 * share:.1f}' for share in shares.result().values())} |")


if __name__ == "__main__":
    main()
