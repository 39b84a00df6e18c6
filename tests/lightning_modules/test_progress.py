"""How far long work is, where nobody watches."""

import logging

import pytest

from lightning_modules import progress


@pytest.mark.parametrize(
    ("total", "seconds", "told"),
    [
        (50, 1.0, []),  # over within a minute
        (100, 30.0, range(10, 101, 10)),  # a tenth of it takes longer than a minute
        (10, 40.0, range(2, 11, 2)),  # a minute is longer than a tenth of it
        (None, 40.0, range(2, 11, 2)),
    ],
)
def test_lines_are_few_and_far_between(monkeypatch, caplog, total, seconds, told):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with progress.Progress(total, "Extracting train", "image") as bar:
        for _ in range(total or 10):
            now[0] += seconds
            bar.update()
    ends = [f"{int(done * seconds) // 60:02}:{int(done * seconds) % 60:02}" for done in told]
    of = f" of {total}" if total else ""
    said = [f"Extracting train: {done}{of} images after {end}." for done, end in zip(told, ends, strict=True)]
    assert caplog.messages == said


def test_a_loop_gives_what_there_is_and_other_processes_say_nothing(monkeypatch, caplog):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    caplog.set_level(logging.INFO)
    assert list(progress.Progress(3, "Extracting", "batch", iterable="abc")) == ["a", "b", "c"]
    assert len(caplog.messages) == 3
    list(progress.Progress(3, "Extracting", "batch", shown=False, iterable="abc"))
    assert len(caplog.messages) == 3
