"""The documentation: its commands parse as written, its links lead somewhere, its Python examples compile and run."""

import argparse
import functools
import importlib
import itertools
import re
import shlex
import sys

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from torch.distributed.run import get_args_parser

from datamodules import HuggingFaceImages
from lightning_modules import measures
from lightning_modules.features.moments import Moments
from lightning_modules.subsets import selections

FUNCTIONS = {"compare": "lightning_modules.reporting.compare", "export": "lightning_modules.export"}
"""Verbs that are functions of the same name, and the modules these are in."""
FOLDERS = ("", "configs/", "datamodules/", "lightning_modules/", "tests/", "tests/benchmarks/")
PAGES = [page for folder in FOLDERS if (page := ROOT / f"{folder}README.md").is_file()]
PAGES += sorted((ROOT / ".github" / "docs").glob("*.md"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODULES = ROOT / "lightning_modules" / "README.md"
SETTINGS = ("extract", "fit", "validate", "test", "predict")
"""Verbs whose options are the keys of a configuration."""


def blocks(page, language):
    """Return the fenced blocks of a page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text):
    """Return the commands of a shell script as lists of words; what the shell would fill in is a 1."""
    text = re.sub(r"\$\([^)]*\)|\$\w+", "1", text.replace("\\\n", " "))
    lines = [shlex.split(line, comments=True) for line in text.replace("&&", "\n").splitlines()]
    return [line for line in lines if line]


def documented():
    """Yield all commands of the pages, also in tables, and of the comments of configurations, each once."""
    found = [command for page in PAGES for block in blocks(page, "sh") for command in commands(block)]
    inline = [line for page in PAGES for line in re.findall(r"\| `(python train\.py .*?)`", page.read_text())]
    found += [command for line in inline for command in commands(line)]
    for config in CONFIGS:
        shown = re.findall(r"^# {2,}((?:python|wandb) .*)", config.read_text(), re.MULTILINE)
        found += [command for line in shown for command in commands(line)]
    return list(dict.fromkeys(map(tuple, found)))


DOCUMENTED = documented()
OURS = [words for words in DOCUMENTED if "train.py" in words]


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Write what a command names and a user would have: a finished run's configuration, classes of one's own."""
    examples = [block for page in PAGES for block in blocks(page, "python")]

    def write(words):
        monkeypatch.syspath_prepend(tmp_path)
        for word in words:
            if re.fullmatch(r"runs/[^*]+/config\.yaml", word):
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).write_text((ROOT / "configs" / "quickstart.yaml").read_text())
            for module, name in re.findall(r"\b(my_\w+)\.(\w+)", word):
                monkeypatch.delitem(sys.modules, module, raising=False)  # of another test
                (example,) = (block for block in examples if f"class {name}(" in block)
                (tmp_path / f"{module}.py").write_text(example)

    return write


PARSED = set()
"""What has parsed: pages repeat commands, with other launchers, too."""


def parses(cli, words):
    """Assert that a command parses; nothing that it asks for is made."""
    if tuple(words) not in PARSED:
        status, out, err = cli(*words, "--print_config")
        assert status == 0, err
        assert "class_path" in out
        PARSED.add(tuple(words))


def test_commands_are_found():
    verbs = {words[words.index("train.py") + 1] for words in OURS}
    assert verbs >= {"fit", "test", "sweep", "invert", "compare", "export"}
    assert len(OURS) > 50
    named = {word for words in OURS for word in words}
    assert [config.name for config in CONFIGS if config.name not in named] == ["sweep_wandb.yaml"]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_parses_as_written(cli, made_up, monkeypatch, words):
    place = words.index("train.py")
    launcher, (verb, *options) = words[:place], words[place + 1 :]
    if "torchrun" in launcher:
        launched = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert (launched.training_script, *launched.training_script_args) == words[place:]
    else:
        assert launcher in (("python",), (".venv/bin/python",))
    made_up(options)
    if verb in SETTINGS:
        parses(cli, (verb, *options))
    elif verb == "invert":
        run = next((word for word in options if re.fullmatch(r"runs/\w+", word)), None)
        made_up([f"{run}/config.yaml"] if run else [])
        parses(cli, (verb, *options))
    elif verb == "sweep":
        monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        runs, sweep = [], importlib.import_module("lightning_modules.cli.sweep")
        monkeypatch.setattr(sweep, "SweptRun", lambda planned, *_: runs.append(planned.arguments))
        monkeypatch.setattr(sweep.Sweep, "compare", lambda self, runs: len(runs))
        status, _, err = cli(verb, *options)
        assert status == 0, err
        parses(cli, runs[0])
    else:
        called, module = [], importlib.import_module(FUNCTIONS[verb])
        function = functools.wraps(getattr(module, verb))(lambda **given: called.append(given))
        monkeypatch.setattr(module, verb, function)
        status, _, err = cli(verb, *options)
        assert status == 0, err
        assert len(called) == 1


def recipes():
    """Return the table of the paper's recipes: experiment, epochs, epochs between two drops, batch and flags."""
    table = (ROOT / ".github" / "docs" / "paper.md").read_text().partition("| experiment |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe[0][:40])
def test_the_flags_of_a_recipe_of_the_paper_are_what_its_row_says(cli, recipe):
    _, *numbers, flags = recipe
    command = ("fit", "--config", "cifar10_curve.yaml", "--config", "paper_recipe.yaml", *shlex.split(flags.strip("`")))
    status, out, err = cli(*command, "--print_config")
    assert status == 0, err
    config = yaml.safe_load(out)
    model, data = (config[part]["init_args"] for part in ("model", "data"))
    found = config["trainer"]["max_epochs"], model["solver"]["init_args"]["step_size"], data["batch_size"]
    for said, value in zip(numbers, found, strict=True):
        assert value in map(int, re.findall(r"\d+", said.replace(",", "")))


@pytest.mark.parametrize("words", [words for words in DOCUMENTED if "train.py" not in words], ids=" ".join)
def test_another_command_names_what_is_there(monkeypatch, words):
    program = words[:3]
    if program[:2] == ("python", "-m") and program[2].startswith("tests.benchmarks."):
        benchmark = importlib.import_module(program[2])
        parse = argparse.ArgumentParser.parse_args
        asked = []

        def stop(parser, *_):
            asked.append(parse(parser, words[3:]))
            raise KeyboardInterrupt

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main()
        assert set(getattr(asked[0], "names", ())) <= set(getattr(benchmark, "MEASUREMENTS", ()))
    elif program[1:] == ("-m", "pytest"):
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif program[0] == "wandb":
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
    else:
        assert " ".join(program).startswith(("python3 -m venv", ".venv/bin/pip install"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert section in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_every_picture_is_shown():
    shown = " ".join(page.read_text() for page in PAGES)
    assert [picture.name for picture in (ROOT / ".github").glob("*.png") if picture.name not in shown] == []


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 160


def test_what_is_offered_is_named():
    assert [file.name for file in CONFIGS if f"`{file.name}`" not in (ROOT / "configs" / "README.md").read_text()] == []
    kinds = [kind for kind in vars(measures).values() if isinstance(kind, type) and issubclass(kind, measures.Measure)]
    offered = [*selections.OFFERED, *(kind.__name__ for kind in kinds if kind is not measures.Measure)]
    assert [name for name in offered if f"| `{name}` |" not in MODULES.read_text()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_compile(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_example_from_python_runs(monkeypatch, tmp_path, capsys):
    (example,) = (block for block in blocks(MODULES, "python") if "trainer.fit" in block)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    results = names["results"].tables["results"]
    assert results.groupby("split").size().to_dict() == {"val": 3 * 3 + 1, "test": 3 * 3 + 1}
    assert results.query("selection == 'full' and split == 'test'")["accuracy"].item() > 0.5
    assert "To keep 90 % of the accuracy" in capsys.readouterr().out


def test_the_examples_of_a_measure_and_a_solver_run(cli, made_up, tmp_path):
    own = ("--model.solver", "my_solvers.AdamW", "--model.solver.learning_rate", "[0.001,0.01]")
    own += ("--model.measures", "my_measures.Margin")
    made_up(own)
    quiet = ("--trainer.enable_progress_bar", "false", "--pictures", "svg")
    status, _, err = cli("fit", "--config", "quickstart.yaml", "--config", "debug.yaml", *own, *quiet)
    assert status == 0, err
    results = pd.read_csv(tmp_path / "runs" / "debug" / "results.csv")
    assert results["solver"].unique().tolist() == ["adamw"]
    assert set(results["learning_rate"]) <= {0.001, 0.01}
    assert results["margin"].notna().all()
    assert "margin of the right class" in (tmp_path / "runs" / "debug" / "curve.svg").read_text()


def test_the_examples_of_tables_beside_images_are_read_as_their_commands_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = ROOT / ".github" / "docs" / "targets.md"
    classes = ["airplane", "cat", "dog", "truck"]
    for place, (name, split) in enumerate(itertools.product(("cifar10", "flowers12"), ("train", "test"))):
        for shade, folder in enumerate(classes):
            (tmp_path / name / split / folder).mkdir(parents=True)
            for image in range(10):
                colour = 60 * shade, 20 * image, 50 * place
                Image.new("RGB", (32, 32), colour).save(tmp_path / name / split / folder / f"{image}.jpg")
    tasks = []
    shown = (words for words in OURS if words[-1] in ("mosaics", "colours"))
    for script, words in zip(blocks(page, "python"), shown, strict=True):
        exec(script, {})
        given = {option: words[words.index(f"--data.{option}") + 1] for option in ("name", "target", "label_column")}
        columns = [each for each in given["label_column"].strip("[]").split(",") if each in (*classes, "red", "green")]
        tasks.append(HuggingFaceImages(given["name"], label_column=columns, target=given["target"], root="copy"))
        tasks[-1].setup()
    mosaics, colours = (task.images["test"] for task in tasks)
    assert len(mosaics) == 10
    for index in range(10):
        seen = {round(mosaics[index].getpixel((x, y))[0] / 60) for x in (8, 40) for y in (8, 40)}
        assert mosaics.labels[index].nonzero().flatten().tolist() == sorted(seen)
    for index in range(40):
        assert colours.labels[index].tolist() == pytest.approx(colours[index].getpixel((8, 8))[:2], abs=0.1)


def test_the_example_of_a_selection_orders_neurons():
    names = vars(selections) | {"SELECTIONS": dict(selections.SELECTIONS)}
    for example in blocks(MODULES, "python"):
        if "mean_activation" in example:
            exec(example, names)
    moments = Moments(3, 2)
    moments.update(torch.tensor([[0.0, 5.0, 1.0], [1.0, 3.0, 2.0]]), torch.tensor([0, 1]))
    layer = selections.Layer(3, moments)
    assert names["SELECTIONS"]["mean_activation"].order(layer, 0).tolist() == [1, 2, 0]
    assert names["SELECTIONS"]["mean_activation"].fitted


def test_the_example_of_a_network_blurs_where_the_authors_do(made_up):
    made_up(["my_networks.BlurredResNet50"])
    module = importlib.import_module("my_networks")
    with torch.device("meta"):
        names = module.BlurredResNet50().state_dict()
    blurred = [f"layer{stage}.0.{conv}" for stage in (2, 3, 4) for conv in ("conv2", "downsample.0")]
    assert sorted(name for name in names if name.endswith("blur_filter")) == [f"{each}.blur_filter" for each in blurred]
    assert {"conv1.weight", *(f"{each}.conv.weight" for each in blurred)} <= names.keys()
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 1, 2, 2] = 16
    conv = torch.nn.Conv2d(2, 2, 1, groups=2, bias=False)
    conv.weight.data.fill_(1)
    rows = module.Blurred(conv)(maps)[0, 1].tolist()
    assert rows[1:4] == [[0, 1, 2, 1, 0], [0, 2, 4, 2, 0], [0, 1, 2, 1, 0]]
    seen = []
    with torch.device("meta"):
        fixed = module.FixedWidthResNet50(width=8)
        fixed.fc.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
        fixed(torch.zeros(2, 3, 64, 64))
    assert seen == [(2, 8)]


def test_the_example_of_an_objective_is_a_loss(made_up, tmp_path):
    made_up(["my_objectives.ConfidencePenalty"])
    objective = importlib.import_module("my_objectives").ConfidencePenalty(weight=0.2)
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    loss = objective(lambda images: logits, None, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(2 * 0.8 * torch.tensor(2.0).log().item())
