"""What several tests share: the real command line, one real run, and the data beside the checkout where it is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """No test talks to W&B's servers, whatever account the machine has."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def cli(monkeypatch, tmp_path, capfd, caplog):
    """Run the command line in this process, in an empty folder; return its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        try:
            train.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capfd.readouterr()
        said = "".join(f"{message}\n" for message in caplog.messages)  # pytest keeps the log from standard error
        return status, printed.out, said + printed.err

    return run


def launch(*args, cwd, launcher=(sys.executable,), wait=True):
    """Run train.py as a process of its own; return it when it is done, or at once."""
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"}
    environment |= {"NETRC": str(Path(cwd) / "no-netrc"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "train.py"), *args]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if not wait:
        return subprocess.Popen(command, cwd=cwd, env=environment, **streams)
    return subprocess.run(command, cwd=cwd, env=environment, timeout=300, check=False, **streams)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A run of the shipped quickstart as a user starts it, from another working directory."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = launch("fit", "--config", "quickstart.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "quickstart", done
