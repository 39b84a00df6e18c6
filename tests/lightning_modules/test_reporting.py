import base64
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from lightning_modules.reporting import report
from lightning_modules.results.curves import class_inequality

FULL = {"full": {1.0: [0.9]}}


def tables(val, test):
    """Results and class counts of a made-up run of 100 neurons, from accuracies by selection, fraction and seed."""
    results, classes = [], []
    for split, measured in (("val", val), ("test", test)):
        for selection, by_fraction in (FULL | measured).items():
            for fraction, accuracies in by_fraction.items():
                for seed, accuracy in enumerate(accuracies):
                    row = {"selection": selection, "fraction": fraction, "seed": seed, "split": split}
                    results.append(
                        {"task": "made-up", "backbone": "net", "layer": "penultimate"}
                        | row
                        | {"neurons": int(100 * fraction), "width": 100, "images": 1000, "accuracy": accuracy}
                    )
                    classes += [row | {"class": c, "images": 500, "correct": int(500 * accuracy)} for c in "ab"]
    return pd.DataFrame(results), pd.DataFrame(classes)


def summary(folder, val, test):
    results, classes = tables(val, test)
    printed = report(folder, {"results": results, "classes": classes}, ["be careful"], {"fit": 1.0})
    said = json.loads((folder / "summary.json").read_text())
    assert said["answer"] in printed
    assert "Note: be careful" in printed
    return said


def test_validation_chooses_and_test_only_tells(tmp_path):
    val = {"random": {0.1: [0.70, 0.72], 0.2: [0.82, 0.84], 0.5: [0.88, 0.90]}}
    test = {"random": {0.1: [0.89, 0.89], 0.2: [0.60, 0.64], 0.5: [0.88, 0.90]}}
    answer = summary(tmp_path, val, test)["answers"]["0.9"]
    assert (answer["selection"], answer["fraction"], answer["neurons"]) == ("random", 0.2, 20)
    assert answer["points_lost_mean"] == pytest.approx(90 - 62)
    assert answer["points_lost_std"] == pytest.approx(2)
    assert answer["bytes_kept_percent"] == pytest.approx(20)


def test_where_nothing_is_enough_all_neurons_are_kept(tmp_path):
    low = {"random": {0.1: [0.2], 0.5: [0.3]}}
    said = summary(tmp_path, low, low)
    assert "keep all 100 neurons" in said["answer"]
    assert said["diffused_redundancy"]["random"]["threshold"]["0.9"] == 0


def test_the_cheapest_of_several_selections_is_the_answer(tmp_path):
    measured = {"random": {0.1: [0.5, 0.5], 0.5: [0.89, 0.89]}, "first": {0.1: [0.88], 0.5: [0.9]}}
    answer = summary(tmp_path, measured, measured)["answers"]["0.9"]
    assert (answer["selection"], answer["neurons"], answer["points_lost_std"]) == ("first", 10, None)


CURVE = {
    "random": {0.1: [0.50, 0.56, 0.59], 0.2: [0.82, 0.79, 0.85], 0.5: [0.88, 0.90, 0.86]},
    "first": {0.1: [0.4], 0.2: [0.6], 0.5: [0.7]},
}
WHOLE = ("curve", "inequality", "classes", "layers", "ensembles", "neighbours")


def whole_run():
    """All tables a run can have: two layers, two selections, similarity, inequality, ensembles and neighbours."""
    results, classes = tables(CURVE, CURVE)
    classes["correct"] -= 40 * (classes["class"] == "b")
    counts = classes["correct"].to_numpy().reshape(-1, 2)
    results = results.assign(**class_inequality(counts, np.array([500, 500])), accuracy=counts.sum(1) / 1000)
    results = results.assign(cka=results["fraction"], cka_debiased=0.9 * results["fraction"], gained=20)
    results["lost"] = results["gained"] + 860 - counts.sum(1)
    found = {
        "results": pd.concat([results.assign(layer="layer<3>"), results], ignore_index=True),
        "classes": pd.concat([classes.assign(layer="layer<3>"), classes.assign(layer="penultimate")]),
    }
    found["results"].loc[found["results"]["layer"] == "layer<3>", "accuracy"] -= 0.1
    subset = {"layer": "penultimate", "selection": "random", "fraction": 0.1, "neurons": 10, "split": "test"}
    found["layers"] = pd.DataFrame(
        [{"layer": "penultimate", "width": 100, "split": "test", "images": 1000, "participation_ratio": 12.5}]
    )
    single = {"single_fraction": 0.2, "single_neurons": 20, "single_accuracy": 0.8, "images": 1000, "accuracy": 0.7}
    rules = ("mean_probability", "majority_vote")
    found["ensembles"] = pd.DataFrame([subset | single | {"members": 2, "rule": rule} for rule in rules])
    found["neighbours"] = pd.DataFrame([subset | {"seed": seed, "neighbours": 10, "kept": 0.3} for seed in (0, 1)])
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    return folder, report(folder, whole_run(), ["mind the <gap> & more"], {"fit": 1.0})


class Page(HTMLParser):
    """The text, the tables' rows, and whatever a page refers to."""

    def __init__(self, content):
        super().__init__()
        self.text, self.rows, self.tags, self.sources, self.cell = "", [], set(), [], False
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data.strip()


def test_the_page_needs_nothing_but_itself_and_escapes_what_it_shows(written):
    folder, _ = written
    content = (folder / "report.html").read_text()
    page = Page(content)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"url\(|@import|https?:", content)
    pictures = [source.removeprefix("data:image/svg+xml;base64,") for source in page.sources]
    assert [base64.b64decode(each) for each in pictures] == [(folder / f"{name}.svg").read_bytes() for name in WHOLE]
    assert "name: <script>alert(1)</script>" in page.text
    assert "mind the <gap> & more" in page.text
    summary = json.loads((folder / "summary.json").read_text())
    for layer in (summary, *summary["further_layers"]):
        assert f"Layer {layer['layer']}: {layer['answer']}" in page.text


def test_the_pages_tables_have_the_runs_numbers(written):
    rows = Page((written[0] / "report.html").read_text()).rows
    (row,) = [row for row in rows if row[:4] == ["penultimate", "random", "0.1", "10"] and "±" in row[4]]
    # 500, 560 and 590 of 1,000, of which 40 of class b are taken away; 900 - 40 for the full layer.
    assert row[4:6] == ["51.0 ± 3.7", "59.3"]
    assert row[6].startswith("-35.0 [-3")
    assert row[7:9] == ["0.100 ± 0.000", "0.090 ± 0.000"]
    (row,) = [row for row in rows if row[:3] == ["layer<3>", "random", "90 %"]]
    assert re.fullmatch(r"0\.5 \[0\.5, 0\.8\], 50 neurons", row[3])
    assert ["penultimate", "100", "1000", "12.5"] in rows


def test_every_picture_is_there_in_both_formats_and_the_same_each_time(written, tmp_path):
    folder, printed = written
    report(tmp_path, whole_run(), [], {})
    for name in WHOLE:
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        ElementTree.parse(folder / f"{name}.svg")
        for ending in ("png", "svg"):
            assert str(folder / f"{name}.{ending}") in printed
            assert (tmp_path / f"{name}.{ending}").read_bytes() == (folder / f"{name}.{ending}").read_bytes()
    for name in ("results", "classes", "layers", "ensembles", "neighbours"):
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), whole_run()[name].reset_index(drop=True))
    # A run that measures less leaves nothing of the one it replaces.
    results, classes = tables(CURVE, CURVE)
    report(tmp_path, {"results": results, "classes": classes}, [], {})
    pictures = {f"{name}.{ending}" for name in ("curve", "classes") for ending in ("png", "svg")}
    assert {file.name for file in tmp_path.iterdir()} == pictures | {
        *("results.csv", "classes.csv", "summary.json", "report.html"),
    }


def test_the_summary_has_every_layer_with_intervals_and_critical_mass(written):
    summary = json.loads((written[0] / "summary.json").read_text())
    assert summary["layer"] == "layer<3>"
    (last,) = summary["further_layers"]
    assert last["layer"] == "penultimate"
    assert last["full_accuracy"] == pytest.approx(0.86)
    assert summary["full_accuracy"] == pytest.approx(0.76)
    low, high = last["diffused_redundancy_interval"]["random"]["threshold"]["0.9"]
    assert low <= last["diffused_redundancy"]["random"]["threshold"]["0.9"] <= high
    assert last["diffused_redundancy_interval"]["first"]["threshold"]["0.9"] is None
    assert last["critical_mass"]["random"]["threshold"]["0.9"] in (20, 50)
    assert {point["layer"] for point in last["curve"]} == {"penultimate"}
    for layer in ("layer<3>", "penultimate"):
        assert f"Layer {layer}, 100 neurons" in written[1]
