"""What a user's mistake is answered with, through the real command line: one line that names it, and nothing lost."""

import pytest
from conftest import launch

QUICK = ("fit", "--config", "quickstart.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
SHORT = (*QUICK, "--trainer.max_epochs=3", "--model.fractions=[0.1,0.5]", "--model.seeds=2")


MISTAKES = {
    "fraction 0": (["--model.fractions=0"], "model.fractions has 0"),
    "negative fraction": (["--model.fractions=[0.1,-0.2]"], "model.fractions has -0.2"),
    "fraction above 1": (["--model.fractions=1.5"], "model.fractions has 1.5"),
    "fraction twice": (["--model.fractions=[0.1,0.1]"], "model.fractions lists 0.1 twice"),
    "no fraction": (["--model.fractions=[]"], "model.fractions is empty"),
    "no seed": (["--model.seeds=[]"], "model.seeds is []"),
    "zero seeds": (["--model.seeds=0"], "model.seeds is 0; give a number of seeds from 1"),
    "seed that is no integer": (["--model.seeds=[a]"], "seeds"),
    "unknown selection": (["--model.selection=randm"], "'randm'; it must be one of first, random"),
    "unknown timm name": (["--model.backbone.name=resnet27"], "did you mean"),
    "unknown timm tag": (["--model.backbone.name=resnet18.nope"], "timm has no weights 'resnet18.nope'"),
    "unknown layer": (["--model.backbone.layer=layr4"], "has no layer 'layr4'; near it are layer4"),
    "unknown task": (["--data=Digit"], "--data is 'Digit'; it must be one of CIFAR10, CIFAR100, Digits"),
    "unknown model": (["--model=Probe"], "--model is 'Probe'; it must be one of"),
    "unknown configuration": (["--config=quikstart.yaml"], "'quikstart.yaml'"),
    "missing weights": (["--model.backbone.weights=nowhere.safetensors"], "no file of weights 'nowhere.safetensors'"),
    "foreign weights": (["--model.backbone.kwargs={}"], "does not hold the weights of this backbone"),
    "batch size 0": (["--data.batch_size=0"], "data.batch_size is 0"),
    "unknown key": (["--model.fraction=0.1"], "fraction"),
    "no views": (["--model.features=0"], "model.features is 0"),
    "unknown augmentation": (["--data.augmentation=papr"], "data.augmentation is 'papr'"),
    "learning rate 0": (["--model.learning_rate=0"], "model.learning_rate is 0"),
    "output below a file": (["--trainer.default_root_dir=file/runs"], "The run cannot be written to file/runs"),
    "cache below a file": (["--model.cache_dir=file/features"], "Features cannot be written to file/features"),
    "folder without images": (["--data=ImageFolder", "--data.root=nowhere"], "nowhere has no folder train/"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(cli, tmp_path, mistake):
    (tmp_path / "file").write_text("not a folder")
    arguments, said = MISTAKES[mistake]
    status, out, err = cli(*SHORT, *arguments)
    assert status == 2
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in err
    assert err.splitlines()[-1] == errors[0]
    assert not list(tmp_path.rglob("results.csv"))


def test_a_corrupt_image_is_named_by_path_from_a_worker_process(cli, image_folder):
    broken = image_folder / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    status, _, err = cli(*SHORT, "--data=ImageFolder", f"--data.root={image_folder}", "--data.num_workers=1")
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: {broken} is not a readable image")
    assert "Traceback" not in err


def test_a_mistake_in_a_process_of_its_own_is_one_line_and_nothing_else(tmp_path):
    done = launch(*SHORT, "--model.fractions=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: model.fractions has 0; a fraction must be in (0, 1].\n"
