"""What several tests share: the real command line, one real run, and the data beside the checkout where it is there.

What takes long to import is imported where it is used: a third process of pytest, which only hands tests out, reads
this file too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tarfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import prefork
import pytest
import yaml
from filelock import FileLock
from hub import Hub
from PIL import Image

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# One thread in each of the tests' two processes, and in those that they start: more would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session):
    """Fork what `start` asks before any test has run, in the processes that run tests."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", 0):
        with contextlib.redirect_stderr(io.StringIO()):  # what Lightning logs is read from `caplog`
            session.config.servers = prefork.servers()


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """No test talks to W&B's servers, whatever account the machine has."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def cli(monkeypatch, tmp_path, capfd, caplog):
    """Run the command line in this process, in an empty folder; return its exit status and what it printed."""
    import train

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


class Done(NamedTuple):
    """How a process ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """A train.py that runs; it can be killed, and waited for once."""

    def __init__(self, pid, ask, out, err):
        self.pid, self._ask, self._out, self._err = pid, ask, out, err

    def kill(self):
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self):
        return Done(self._ask({"wait": self.pid}), self._out.read_text(), self._err.read_text())


@pytest.fixture(scope="session")
def start(pytestconfig, tmp_path_factory):
    """Start train.py as one or several processes of their own that have imported everything already.

    Or another `program`, where this project is not to be found, that has imported the `libraries` or `torch` alone.
    """
    from torch.distributed import TCPStore

    folder = tmp_path_factory.mktemp("output")
    count = 0
    stores = []

    def run(*args, cwd, processes=1, nodes=1, torchrun=0, program=None, has="project", **variables):
        nonlocal count
        if processes > 1:  # where torchrun's processes meet, as long as it lives
            stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        started = []
        for rank in range(processes):
            count += 1
            environment = {"NETRC": str(Path(cwd) / "no-netrc"), **variables}
            if processes > 1:  # what torchrun sets
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port)}
                environment |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
                node, local_rank = divmod(rank, here := processes // nodes)
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}
                environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(here)}
            out, err = folder / f"{count}.out", folder / f"{count}.err"
            command = {"args": args, "cwd": str(cwd), "environment": environment, "out": str(out), "err": str(err)}
            command |= {"torchrun": torchrun, "program": program and str(program)}
            ask = pytestconfig.servers[has]
            started.append(Process(ask(command), ask, out, err))
        return started

    return run


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make what several tests read once for all of pytest's processes; return its folder."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def made(name, make):
        with FileLock(folder / f"{name}.lock"):
            if not (folder / name / "made").exists():
                (folder / name).mkdir()
                make(folder / name)
                (folder / name / "made").touch()
        return folder / name

    return made


@pytest.fixture(scope="session")
def short(once):
    """The words of a short fit of the quickstart that draws and logs nothing, from one file: flags take longer."""

    def write(folder):
        settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
        settings["trainer"] |= {"max_epochs": 3, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        settings["model"] |= {"fractions": [0.1, 0.5], "seeds": 2, "measures": []}
        (folder / "short.yaml").write_text(yaml.safe_dump(settings | {"pictures": []}))

    return "fit", "--config", str(once("short", write) / "short.yaml")


@pytest.fixture(scope="session")
def quickstart(once, start):
    """A run of the shipped quickstart in a process of its own, from another working directory, and how it ended."""

    def fit(folder):
        done = start("fit", "--config", "quickstart.yaml", cwd=folder)[0].wait()
        assert done.returncode == 0, done.stderr
        (folder / "done.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

    folder = once("quickstart", fit)
    return folder / "runs" / "quickstart", Done(*json.loads((folder / "done.json").read_text()))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Let a server of this process be the Hub, with a cache of its own; its `files` are those of every repository."""
    from huggingface_hub import HfFileSystem

    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)  # the sixth at once would wait for a second
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name, value in {
            "huggingface_hub.constants.HF_HUB_OFFLINE": False,
            "huggingface_hub.constants.ENDPOINT": endpoint,
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "huggingface_hub.constants.HF_HUB_CACHE": str(tmp_path / "hub"),
            "datasets.config.HF_ENDPOINT": endpoint,
            "datasets.config.HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(name, value)
        monkeypatch.setattr(Hub, "files", {})
        monkeypatch.setattr(Hub, "asked", [])
        monkeypatch.setattr(Hub, "sent", [])
        HfFileSystem.clear_instance_cache()  # of the server before
        yield Hub
        server.shutdown()


@pytest.fixture
def image_folder(tmp_path):
    """Forty photograph-sized noise images in two classes."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for index in range(20):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / "train" / name / f"{index}.png")
    return tmp_path / "pets"


@pytest.fixture
def papers(tmp_path):
    """A folder of 200 documents, which are noise around as many as there are queries: 60, of which each has three."""
    random = np.random.default_rng(0)
    queries = random.normal(size=(60, 20)).astype(np.float32)
    documents = np.concatenate([np.repeat(queries, 3, 0), random.normal(size=(20, 20))]).astype(np.float32)
    documents += 1.5 * random.normal(size=documents.shape).astype(np.float32)
    folder = tmp_path / "papers"
    (folder / "qrels").mkdir(parents=True)
    for part, values in (("corpus", documents), ("queries", queries)):
        np.savez(folder / f"{part}.npz", ids=np.arange(len(values)), vectors=values)
    lines = [f"{query}\t{3 * query + place}\t{place + 1}" for query in range(60) for place in range(3)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return folder


class Features(NamedTuple):
    """Representations of real images, float32, and their labels."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: int


@pytest.fixture(scope="session")
def real_features(once):
    """What a MobileNetV2 pre-trained on ImageNet makes of 240 + 120 photographs of 12 flowers."""
    weights = SHARED / "weights" / "mobilenetv2_100.imagenet1k.safetensors"
    if not weights.exists():
        pytest.skip("The shared weights are not beside this checkout.")
    import torch

    from lightning_modules.backbones.build import PretrainedCfgOverlay
    from lightning_modules.backbones.frozen import FrozenBackbone

    def extract(folder):
        backbone = FrozenBackbone(
            "mobilenetv2_100",
            weights=str(weights),
            kwargs={"pad_type": "same"},
            pretrained_cfg_overlay=PretrainedCfgOverlay(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        )
        train, test = (represented(backbone, split, each) for split, each in (("train", 20), ("test", 10)))
        torch.save([*train, *test], folder / "features.pt")

    return Features(*torch.load(once("features", extract) / "features.pt"), classes=12)


def represented(backbone, split, each):
    """Return the representations of the first images of each class of flowers, and their labels."""
    import torch

    with tarfile.open(SHARED / "data" / f"flowers12_{split}.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[0] for name in names})
        chosen = [name for label in classes for name in [n for n in names if n.startswith(f"{label}/")][:each]]
        images = [np.asarray(Image.open(tar.extractfile(name)).convert("RGB")) for name in chosen]
    inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)  # of the network's size
    with backbone.inference():
        features = torch.cat([backbone(batch) for batch in inputs.split(32)])
    return features, torch.tensor([classes.index(name.split("/")[0]) for name in chosen])
