import contextlib
import io
import multiprocessing
import platform
import resource

import pytest

import train


def faults():
    """Return the page faults of allocating and freeing maps of different sizes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (60, 20, 100, 40) * 4:
        b"x" * (megabytes * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure(results):
    before = faults()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        train.main(["--help"])
    faults()  # takes the memory that is there from here on
    results.send((before, faults()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_the_command_line_keeps_freed_memory_for_the_next_map():
    forks = multiprocessing.get_context("fork")  # the setting stays in a process of its own
    receiver, sender = forks.Pipe(duplex=False)
    process = forks.Process(target=measure, args=(sender,))
    process.start()
    assert receiver.poll(60)
    before, after = receiver.recv()
    process.join()
    assert 10 * after < before
