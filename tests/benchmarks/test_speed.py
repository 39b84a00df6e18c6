"""The benchmarks still run: the quickest of them here, all of them with --quick in the project's workflow."""

import json
import sys

from tests.benchmarks import speed


def test_a_benchmark_runs_and_leaves_its_figures(tmp_path, monkeypatch):
    words = ("ridge", "--quick", "--repeats", "1", "--output", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["speed.py", *words])
    speed.main()
    figures = json.loads((tmp_path / "speed.json").read_text())["figures"]
    assert [len(figure["values"]) for figure in figures] == [1, 1]
    assert all(value > 0 for figure in figures for value in figure["values"])
