"""What W&B is given, read back from the files that its offline mode writes."""

import http.server
import json
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from wandb.proto import wandb_internal_pb2

from lightning_modules.reporting.dashboard import wandb_logger


@pytest.fixture(scope="module")
def to_wandb(short):
    """The words of a short fit that logs to W&B."""
    return *short, "--trainer.logger=true"


class Logged:
    """A W&B run read back: its file is a LevelDB log (blocks of 32 KiB, records in pieces) of protocol buffers."""

    def __init__(self, folder: Path):
        (self.folder,) = folder.glob("wandb/offline-run-*")
        (file,) = self.folder.glob("*.wandb")
        self.history, self.config, self.axes, self.summary = [], {}, {}, {}
        deadline = time.monotonic() + 30  # W&B's own process may still be writing when the run has ended
        while not (records := self._records(file.read_bytes())) or not records[-1].HasField("exit"):
            assert time.monotonic() < deadline, f"{file} does not end"
            time.sleep(0.1)
        for record in records:
            for item in record.config.update:
                self.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            for item in record.summary.update:
                self.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.metric.step_metric:
                self.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            if record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                self.history.append({name: json.loads(value) for name, value in values.items()})
            if record.HasField("run"):
                self.name, self.group = record.run.display_name, record.run.run_group

    @staticmethod
    def _records(data):
        place, pieces, records = 7, b"", []
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            if place + 7 + length > len(data):
                break
            pieces += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last piece
                record = wandb_internal_pb2.Record()
                record.ParseFromString(pieces)
                pieces = b""
                records.append(record)
        return records

    def table(self, name):
        content = json.loads((self.folder / "files" / self.last(f"{name}/path")).read_text())
        return pd.DataFrame(content["data"], columns=content["columns"])

    def last(self, name):
        return [row[name] for row in self.history if name in row][-1]


@pytest.fixture(scope="module")
def logged(quickstart):
    return Logged(quickstart[0])


@pytest.fixture
def results(quickstart):
    return pd.read_csv(quickstart[0] / "results.csv")


def test_accuracy_per_fraction_is_logged_under_the_contracts_names(logged, results):
    means = results.groupby(["split", "selection", "fraction"])["accuracy"].mean()
    assert len(means) == 2 * 10
    for (split, selection, fraction), mean in means.items():
        assert logged.last(f"{split}/accuracy/{selection}/{fraction:g}") == pytest.approx(mean, abs=1e-6)
    epochs = yaml.safe_load((logged.folder.parents[1] / "config.yaml").read_text())["trainer"]["max_epochs"]
    for name in ("val/accuracy/random/0.1", "train/loss/random/0.1"):
        assert sum(name in row and row["epoch"] < epochs for row in logged.history) == epochs


def test_the_configuration_is_logged_whole_with_what_to_group_by(quickstart, logged):
    written = yaml.safe_load((quickstart[0] / "config.yaml").read_text())
    assert {key: logged.config[key] for key in written} == written
    assert logged.config["task"] == "digits"
    assert logged.config["backbone"] == "resnet26-digits_0to4"
    assert logged.group == "digits, resnet26-digits_0to4"
    assert logged.name == quickstart[0].name


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_curve_is_a_chart_over_the_fraction_that_ends_in_the_full_layer(logged, results, split):
    name = f"curve/{split}/accuracy/random"
    assert logged.axes[name] == logged.axes[f"curve/{split}/accuracy_std/random"] == "curve/fraction"
    curve = {row["curve/fraction"]: row for row in logged.history if name in row}
    assert list(curve) == sorted(curve)
    rows = results[results["split"] == split]
    measured = rows[rows["selection"] == "random"].groupby("fraction")["accuracy"]
    assert list(curve) == [*measured.groups, 1.0]
    for fraction, values in measured:
        assert curve[fraction][name] == pytest.approx(np.mean(values), abs=1e-12)
        assert curve[fraction][f"curve/{split}/accuracy_std/random"] == pytest.approx(np.std(values), abs=1e-12)
    assert curve[1.0][name] == rows[rows["selection"] == "full"]["accuracy"].mean()


def test_tables_pictures_the_report_and_the_answer_are_logged(quickstart, logged, results):
    pd.testing.assert_frame_equal(logged.table("probes"), results, check_dtype=False)
    classes = pd.read_csv(quickstart[0] / "classes.csv")
    losses = logged.table("classes").set_index(["fraction", "class"])
    rows = classes.query("split == 'test' and fraction == 0.1 and `class` == 5")
    assert losses.loc[(0.1, "5"), "accuracy"] == pytest.approx((rows["correct"] / rows["images"]).mean())
    redundancies = logged.table("redundancy").query("rule == 'threshold' and delta == 0.9")
    assert (redundancies["low"] <= redundancies["redundancy"]).all()
    for name in ("curve", "classes"):
        picture = logged.folder / "files" / logged.last(f"pictures/{name}/path")
        assert picture.read_bytes() == (quickstart[0] / f"{name}.png").read_bytes()
    page = logged.folder / "files" / logged.last("report/path")
    assert page.read_text() == (quickstart[0] / "report.html").read_text()
    (layer,) = json.loads((quickstart[0] / "summary.json").read_text())["layers"]
    assert logged.summary["answer"] == layer["answer"]
    assert logged.summary["full_accuracy"] == layer["full_accuracy"]


def test_runs_in_one_process_do_not_collide_nor_with_one_that_failed(cli, to_wandb, tmp_path):
    status, _, err = cli(*to_wandb, "--name=failed", "--trainer.gradient_clip_val=1")
    assert status == 2, err
    for name, digits in (("one", "[0,1]"), ("two", "[2,3,4]")):
        status, _, err = cli(*to_wandb, f"--name={name}", f"--data.digits={digits}")
        assert status == 0, err
    for name, digits in (("one", [0, 1]), ("two", [2, 3, 4])):
        logged = Logged(tmp_path / "runs" / name)
        assert logged.name == name
        assert logged.config["data"]["init_args"]["digits"] == digits
        mean = pd.read_csv(tmp_path / "runs" / name / "results.csv").query("split == 'test' and fraction == 0.5")
        assert logged.last("test/accuracy/random/0.5") == pytest.approx(mean["accuracy"].mean(), abs=1e-6)
        assert sum("test/accuracy/random/0.5" in row for row in logged.history) == 1
    assert "test/accuracy/random/0.5" not in Logged(tmp_path / "runs" / "failed").summary


def test_without_credentials_it_logs_offline_and_says_how_to_sync(quickstart):
    folder, done = quickstart
    (line,) = [line for line in done.stderr.splitlines() if "wandb sync" in line]
    assert line.startswith("No W&B credentials: logging offline; `wandb sync ")
    pattern = line.split("`")[1].removeprefix("wandb sync ")
    assert list(folder.parents[1].glob(pattern))


def test_with_an_unreachable_server_or_home_it_logs_offline_and_says_so(start, to_wandb, tmp_path):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {'0' * 40}\n")  # as wandb writes it
    account = {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    (tmp_path / "file").touch()  # nor can anything be written at home
    done = start(*to_wandb, "--name=alone", cwd=tmp_path, HOME=str(tmp_path / "file"), **account)[0].wait()
    assert done.returncode == 0, done.stderr
    assert "http://127.0.0.1:9 cannot be reached: logging offline; `wandb sync" in done.stderr
    assert "No W&B credentials" not in done.stderr
    logged = Logged(tmp_path / "runs" / "alone")
    assert logged.name == "alone"
    written = pd.read_csv(tmp_path / "runs" / "alone" / "results.csv")
    pd.testing.assert_frame_equal(logged.table("probes"), written, check_dtype=False)


def test_a_server_that_refuses_the_key_ends_in_one_line_before_long_work(start, to_wandb, tmp_path):
    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b'{"errors": [{"message": "user is not logged in", "path": ["viewer"]}]}'
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        account = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
        done = start(*to_wandb, "--name=refused", cwd=tmp_path, **account)[0].wait()
        server.shutdown()
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: W&B does not take the run (")
    assert "user is not logged in" in last
    assert "--trainer.logger false" in last
    assert not (tmp_path / "runs" / "feature_cache").exists()


def test_the_logger_can_be_switched_off(cli, short, tmp_path):
    status, _, err = cli(*short, "--name=silent")
    assert status == 0, err
    assert "W&B" not in err
    assert not list(tmp_path.rglob("wandb"))


def test_another_logger_gets_the_configuration_too(cli, short, tmp_path):
    logger = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: logs}}"
    status, _, err = cli(*short, "--name=csv", logger)
    assert status == 0, err
    (parameters,) = tmp_path.glob("logs/**/hparams.yaml")
    assert yaml.safe_load(parameters.read_text())["model"]["init_args"]["fractions"] == [0.1, 0.5]
    (metrics,) = tmp_path.glob("logs/**/metrics.csv")
    assert "test/accuracy/random/0.5" in pd.read_csv(metrics).columns


@pytest.mark.parametrize(("resumed", "version"), [(True, "abcd1234"), (False, None)])
def test_a_resumed_run_continues_what_it_logged_online(tmp_path, resumed, version):
    (tmp_path / "wandb" / "run-20260101_000000-zzzz0000").mkdir(parents=True)
    (tmp_path / "wandb" / "run-20260102_000000-abcd1234").mkdir()
    assert wandb_logger("run", tmp_path, resumed).version == version


def test_layers_ensembles_and_neighbours_are_charts_and_tables_too(cli, to_wandb, tmp_path):
    status, _, err = cli(
        *(*to_wandb, "--name=all", "--model.backbone.layer=[layer3.0,penultimate]", "--model.solver=Ridge"),
        "--model.measures=[CKA, Inequality, {class_path: Neighbours, init_args: {neighbours: 5}}, Ensembles]",
        "--pictures=png",
    )
    assert status == 0, err
    logged = Logged(tmp_path / "runs" / "all")
    summary = json.loads((tmp_path / "runs" / "all" / "summary.json").read_text())
    for layer in summary["layers"]:
        assert logged.summary[f"{layer['layer']}/answer"] == layer["answer"]
    results = pd.read_csv(tmp_path / "runs" / "all" / "results.csv").query("split == 'test'")
    for layer in ("layer3.0", "penultimate"):
        rows = results[(results["layer"] == layer) & (results["selection"] == "random")].groupby("fraction")
        for measure in ("accuracy", "cka", "cka_debiased", "gini", "coefficient_of_variation"):
            name = f"curve/test/{measure}/{layer}/random"
            points = {row["curve/fraction"]: row[name] for row in logged.history if name in row}
            expected = rows[measure].mean().to_dict()
            assert {fraction: points[fraction] for fraction in expected} == pytest.approx(expected)
            assert logged.axes[name] == "curve/fraction", sorted(logged.axes)[:3]
        neighbours = f"curve/test/neighbours kept/{layer}/random"
        assert any(0 < row[neighbours] <= 1 for row in logged.history if neighbours in row)
        ensemble = f"curve/test/ensemble of 2, majority_vote/{layer}/random"
        assert any(ensemble in row for row in logged.history)
    for name in ("layers", "ensembles", "neighbours"):
        written = pd.read_csv(tmp_path / "runs" / "all" / f"{name}.csv")
        pd.testing.assert_frame_equal(logged.table(name), written, check_dtype=False)
        if name == "ensembles":  # beside a probe of its own, with as many neurons
            assert (written["single_neurons"] == written["neurons"]).all()
        if name == "neighbours":  # of all test images, among all training images
            assert written[["queries", "gallery", "neighbours"]].drop_duplicates().values.tolist() == [[179, 538, 5]]
    assert sum(name.startswith("pictures/") and name.endswith("/path") for row in logged.history for name in row) == 7


MY_MEASURES = """
import torch

from lightning_modules.measures import Column, Measure


class Confidence(Measure):
    columns = (Column("confidence", "mean confidence", "%", digits=1, logged=True, drawn=True),)

    def setup(self, context):
        super().setup(context)
        self.add_state("total", torch.zeros(len(context.probes), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, batch):
        self.total += self.context.solver.probabilities(batch.logits).amax(1).sum(1)
        self.images += len(batch.labels)

    def compute(self):
        return {"confidence": self.total / self.images}
"""


def test_a_measure_of_ones_own_is_in_the_results_the_report_and_on_wandb(cli, to_wandb, tmp_path, monkeypatch):
    (tmp_path / "confidence.py").write_text(MY_MEASURES)
    monkeypatch.syspath_prepend(tmp_path)
    status, _, err = cli(*to_wandb, "--name=own", "--model.measures=[confidence.Confidence]", "--pictures=svg")
    assert status == 0, err
    folder = tmp_path / "runs" / "own"
    results = pd.read_csv(folder / "results.csv")
    assert results["confidence"].between(0.2, 1).all()
    assert "cka" not in results
    means = results.groupby(["split", "selection", "fraction"])["confidence"].mean()
    page, curve = (folder / "report.html").read_text(), (folder / "curve.svg").read_text()
    assert "<th>mean confidence (%)</th>" in page
    assert f"<td>{100 * means['test', 'random', 0.1]:.1f} ± " in page
    assert "<!-- mean confidence (%) -->" in curve
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["layers"][0]["curve"][0]["confidence"] == pytest.approx(means["test", "random", 0.1])
    logged = Logged(folder)
    for (split, selection, fraction), mean in means.items():
        assert logged.last(f"{split}/confidence/{selection}/{fraction:g}") == pytest.approx(mean, abs=1e-6)
    points = [row for row in logged.history if "curve/test/confidence/random" in row]
    assert [row["curve/fraction"] for row in points] == [0.1, 0.5, 1.0]
    assert points[0]["curve/test/confidence/random"] == pytest.approx(means["test", "random", 0.1])
