import base64
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pandas as pd
import pytest
from made_up import ACCURACY, CURVE, full_run, per_image, tables

from lightning_modules.measures import CKA, Accuracy, Ensembles, Inequality, Neighbours, Neurons
from lightning_modules.reporting import figures
from lightning_modules.reporting.report import report
from lightning_modules.results.results import Results

MEASURES = [Accuracy(), CKA(), Inequality(), Neighbours(), Ensembles(), Neurons()]
PICTURES = ("curve", "redundancy", "layers", "classes", "inequality", "neighbours", "ensembles", "neurons")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    return folder, report(folder, made_up_results(), ["mind the <gap> & more"], {"fit": 1.0})


def made_up_results():
    found = full_run()
    return Results(found, MEASURES, ACCURACY, per_image(found))


class Page(HTMLParser):
    """The text, the tables' rows, and whatever a page refers to."""

    def __init__(self, content):
        super().__init__()
        self.text, self.rows, self.tags, self.sources, self.cell = "", [], set(), [], False
        self.inside, self.around_tables = [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "table":
            self.around_tables.append(self.inside[-1])
        if tag == "div":
            self.inside.append(dict(attributes).get("class"))
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell = False
        if tag == "div":
            self.inside.pop()

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
    assert [base64.b64decode(each) for each in pictures] == [(folder / f"{name}.svg").read_bytes() for name in PICTURES]
    assert "name: <script>alert(1)</script>" in page.text
    assert "mind the <gap> & more" in page.text
    summary = json.loads((folder / "summary.json").read_text())
    for layer in summary["layers"]:
        assert f"Layer {layer['layer']}: {layer['answer']}" in page.text


def test_a_table_wider_than_the_page_scrolls(written):
    content = (written[0] / "report.html").read_text()
    places = Page(content).around_tables
    assert len(places) > 3
    for place in set(places):
        (style,) = re.findall(rf"^\.{place} {{(.*)}}$", content, re.MULTILINE)
        assert "overflow-x: auto;" in style


def test_the_pages_tables_have_the_runs_numbers(written):
    rows = Page((written[0] / "report.html").read_text()).rows
    (row,) = [row for row in rows if row[:4] == ["penultimate", "random", "0.1", "10"] and "±" in row[4]]
    # 500, 560 and 590 of 1,000, of which 40 of class b are taken away; 900 - 40 for the full layer.
    assert row[4] == "51.0 ± 3.7"
    assert re.fullmatch(r"59\.3 \[[1-5]\d\.\d, [6-9]\d\.\d\]", row[5])
    assert re.fullmatch(r"-35\.0 \[-[4-9]\d\.\d, -[0-3]?\d\.\d\]", row[6])
    assert row[7:9] == ["0.100 ± 0.000", "0.090 ± 0.000"]
    (row,) = [row for row in rows if row[:3] == ["layer<3>", "random", "90 %"]]
    assert re.fullmatch(r"0\.5 \[0(\.\d)?, 0\.[89]\], 50 neurons", row[3])
    assert ["penultimate", "100", "1000", "12.5"] in rows


def test_every_picture_is_there_in_both_formats_and_the_same_each_time(written, tmp_path):
    folder, printed = written
    report(tmp_path, made_up_results(), [], {})
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        ElementTree.parse(folder / f"{name}.svg")
        for ending in ("png", "svg"):
            assert str(folder / f"{name}.{ending}") in printed
            assert (tmp_path / f"{name}.{ending}").read_bytes() == (folder / f"{name}.{ending}").read_bytes()
    redundancies = pd.read_csv(folder / "redundancy.csv")
    assert redundancies["delta"].unique().tolist() == [each / 100 for each in range(70, 100)]
    assert redundancies[["low", "high"]].notna().all(axis=None)
    for name in ("results", "classes", "layers", "ensembles", "neighbours"):
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), full_run()[name].reset_index(drop=True))


def test_pictures_have_the_formats_asked_for_and_nothing_stays_of_a_run_that_is_replaced(tmp_path):
    tmp_path.joinpath("notes.csv").write_text("what else a user keeps there")
    results = Results(tables(CURVE, CURVE), [Accuracy()], ACCURACY)
    others = {"results.csv", "classes.csv", "redundancy.csv", "summary.json", "report.html", "notes.csv"}
    for formats, shown in ((["pdf", "png"], 3), ("pdf", 0), ([], 0)):
        report(tmp_path, results, [], {}, formats)
        endings = [formats] if isinstance(formats, str) else formats
        pictures = {f"{name}.{ending}" for name in ("curve", "redundancy", "classes") for ending in endings}
        assert {file.name for file in tmp_path.iterdir()} == others | pictures
        content = [(tmp_path / name).read_bytes() for name in sorted(pictures)]
        assert [each[:4] for each in content] == [
            {"pdf": b"%PDF", "png": b"\x89PNG"}[each[-3:]] for each in sorted(pictures)
        ]
        assert (tmp_path / "report.html").read_text().count('src="data:image/png;base64,') == shown


def test_where_bits_differ_bytes_are_drawn_and_shown(written, tmp_path):
    assert not (written[0] / "bytes.png").exists()
    assert "bytes" not in Page((written[0] / "report.html").read_text()).rows[0]
    measured = CURVE | {"random_4bit": {0.5: [0.84, 0.86, 0.85], 1.0: [0.87, 0.87, 0.87]}, "first_1bit": {1.0: [0.8]}}
    found = tables(measured, measured)
    results = Results(found, [Accuracy()], ACCURACY, per_image(found))
    text = report(tmp_path, results, [], {}, "png")
    line = next(line for line in text.splitlines() if line.startswith("random_4bit") and line.split()[1] == "0.5")
    assert line.split()[2:5] == ["50", "25", "85.0"]
    assert (tmp_path / "bytes.png").exists()
    rows = {tuple(row[:4]): row for row in Page((tmp_path / "report.html").read_text()).rows}
    assert ("random_4bit", "0.5", "50", "25") in rows
    (picture,) = figures.stores(results, "test").values()
    random, first = picture.figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in random.get_lines()}
    assert drawn["4 bits a number"] == [[25, pytest.approx(85)], [50, pytest.approx(87)]]
    assert drawn["32 bits a number"][-1] == [400, pytest.approx(90)]
    # 40 bytes of 10 neurons, and 80 of 20, reach less than 25 of 50 in 4 bits.
    assert [at for at, _ in drawn["Pareto frontier"]] == [25, 50, 200, 400]
    frontier = next(line for line in first.get_lines() if line.get_label() == "Pareto frontier")
    assert frontier.get_xdata().tolist() == [13, 400]


def test_text_and_pictures_call_the_metric_what_the_target_calls_it(tmp_path):
    found = {"results": tables(CURVE, CURVE)["results"].rename(columns={"accuracy": "map"})}
    target = SimpleNamespace(metric="map", label="mean average precision", unit="", chance=0.05, items="images")
    printed = report(tmp_path, Results(found, [], target), [], {}, "svg")
    assert "net: test mean average precision on 1,000 images" in printed
    assert re.search(r"^random +0\.2 +20 +0\.820 ± 0\.024 +91\.1 %", printed, re.MULTILINE)
    assert "To keep 90 % of the mean average precision, by the means on 1,000 validation images: keep 20 of" in printed
    assert "20 % of the bytes. On 1,000 test images that keeps 91.1 %: 0.820 instead of 0.900." in printed
    page = Page((tmp_path / "report.html").read_text())
    assert "Mean average precision by fraction" in page.text
    assert ["random", "0.2", "20", "0.820 ± 0.024", "91.1", "-0.080"] in page.rows
    assert "<!-- test mean average precision -->" in (tmp_path / "curve.svg").read_text()
    for place in (printed, page.text, *(file.read_text() for file in tmp_path.glob("*.svg"))):
        assert "accuracy" not in place
    assert json.loads((tmp_path / "summary.json").read_text())["layers"][0]["full_map"] == 0.9
    assert Results.read(tmp_path).headline.heading == "mean average precision"
