"""The benchmarks still run: the quickest of them here, all of them with --quick in the project's workflow."""

import json
import subprocess
import sys

from conftest import ROOT


def test_a_benchmark_runs_and_leaves_its_figures(tmp_path):
    command = (sys.executable, "-m", "tests.benchmarks.speed", "ridge", "--quick", "--repeats", "1")
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "speed.json").read_text())["figures"]
    assert [len(figure["values"]) for figure in figures] == [1, 1]
    assert all(value > 0 for figure in figures for value in figure["values"])
