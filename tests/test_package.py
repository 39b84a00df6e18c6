"""The wheel: the command that it installs, far from the checkout."""

import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
COMMAND = """
import sys
from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="diffused-redundancy")
asked = sys.argv[1:]
for words in (["--version"], ["--help"], asked):
    sys.argv[1:] = words
    command.load()()
"""  # what an installer writes, for three command lines in one process


def test_an_installed_command_does_what_train_py_does(start, tmp_path):
    source, site, script, elsewhere = (tmp_path / name for name in ("source", "site", "bin", "elsewhere"))
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "data", "runs", "wandb", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shipped = {file.name for file in (ROOT / "configs").iterdir() if file.suffix in (".yaml", ".safetensors")}
    assert {file.name for file in (site / "lightning_modules" / "configs").iterdir()} == shipped

    script.mkdir()
    elsewhere.mkdir()
    (script / "diffused-redundancy").write_text(COMMAND)
    (elsewhere / "my_solvers.py").write_text("from lightning_modules.probes import SGD\n\nclass Mine(SGD): pass\n")
    asked = ("fit", "--config=quickstart.yaml", "--config=debug.yaml", "--model.solver=my_solvers.Mine", "--name=far")
    asked += ("--pictures=png",)
    command = {"program": script / "diffused-redundancy", "has": "libraries"}
    done = start(*asked, cwd=elsewhere, **command, PYTHONPATH=str(site))[0].wait()
    assert done.returncode == 0, done.stderr
    version, usage = done.stdout.splitlines()[:2]
    assert version == f"diffused-redundancy {wheel.name.split('-')[1]}"
    assert usage == "usage: diffused-redundancy VERB ..."
    assert "own code  my_solvers.Mine" in done.stderr
    assert (elsewhere / "runs" / "far" / "report.html").is_file()
