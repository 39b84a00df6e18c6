"""How speed is measured: sides that take turns, medians with their spread, a table of ratios and the same as JSON."""

import contextlib
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Figure:
    """One measured ratio or amount, the median of several runs."""

    what: str
    values: list[float]
    """One per run."""
    target: str
    """What is to be reached, as `>= 10`, `<= 1.2` or empty."""
    sides: dict[str, list[float]]
    """What the values were computed from, in seconds or MB."""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> str:
        if not self.target:
            return ""
        relation, bound = self.target.split()[:2]
        held = self.median <= float(bound) if relation == "<=" else self.median >= float(bound)
        return "yes" if held else "NO"


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def processor(run: Callable[[], object]) -> float:
    """Return the seconds of processor time, of all threads together, that a call takes."""
    started = time.process_time()
    run()
    return time.process_time() - started


def taking_turns(repeats: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Return what each side returns in each round; in a round, sides follow each other on the same machine."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, side in sides.items():
            measured[name].append(side())
            print(f"  round {number + 1} of {repeats}: {name} {measured[name][-1]:.4g}", file=sys.stderr, flush=True)
    return measured


def ratio(sides: dict[str, list[float]], over: str, under: str) -> list[float]:
    """Return one side over another, round by round."""
    return [a / b for a, b in zip(sides[over], sides[under], strict=True)]


def exponents(sides: dict[str, list[float]], sizes: list[float]) -> list[float]:
    """Return the power with which sides grow from the first to the last of `sizes`, round by round."""
    first, *_, last = sides.values()
    return [math.log(b / a) / math.log(sizes[-1] / sizes[0]) for a, b in zip(first, last, strict=True)]


def child(*command: str, cwd: Path) -> tuple[float, float]:
    """Run a process of its own and return its wall time in seconds and its peak resident memory in MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NETRC": os.devnull}
    started = time.perf_counter()
    with (cwd / "child.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {(cwd / 'child.log').read_text()}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Throw away what is printed and logged; the progress bar is still drawn, as users have it."""
    logging.disable(logging.WARNING)
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def machine(device: str) -> str:
    """Name the machine."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def table(figures: list[Figure]) -> str:
    """Return figures as a Markdown table."""
    lines = ["| measured | median | min to max | target | met | note |", "| --- | --- | --- | --- | --- | --- |"]
    for figure in figures:
        spread = f"{min(figure.values):.3g} to {max(figure.values):.3g}"
        lines.append(
            f"| {figure.what} | {figure.median:.3g} | {spread} | {figure.target} | {figure.met} | {figure.note} |"
        )
    return "\n".join(lines)


def write(figures: list[Figure], settings: dict[str, object], output: Path) -> None:
    """Write figures and how they were measured as `speed.json` into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(figure) | {"median": figure.median, "met": figure.met} for figure in figures]
    (output / "speed.json").write_text(json.dumps(settings | {"figures": rows}, indent=2) + "\n")
