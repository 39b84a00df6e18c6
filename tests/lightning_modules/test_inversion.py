import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lightning_modules import inversion

ARGUMENTS = ("--images=2", "--fractions=[0.1,1]", "--seeds=2", "--choice=[random,least_active]", "--steps=5")


@pytest.mark.parametrize("regulariser", ["none", "total_variation", "others_apart"])
def test_inversion_is_that_of_plain_loops(regulariser):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6)).double()
    network.requires_grad_(False)
    images, start = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64)
    wanted = network(images)
    chosen = torch.stack([inversion.choose("random", each, 3, seed) for seed, each in enumerate(wanted)])
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == [
        sorted(torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:3].tolist()) for seed in (0, 1)
    ]
    ticks = []
    found = inversion.invert(network, wanted, chosen, start, 7, 0.1, regulariser, 0.5, lambda: ticks.append(1))
    assert len(ticks) == 7
    for image, mask, aim, result in zip(start, chosen, wanted, found, strict=True):
        aim, pixels, pull, passed = aim.numpy(), image, None, []
        for _ in range(8):
            pixels = pixels.clone().requires_grad_()
            output = network(pixels[None])[0]
            off = [
                (output - torch.from_numpy(aim))[seen].square().sum().sqrt() / np.linalg.norm(aim[seen.numpy()])
                for seen in (mask, ~mask)
            ]
            loss = off[0]
            if regulariser == "total_variation":
                rows, columns = pixels[:, 1:] - pixels[:, :-1], pixels[:, :, 1:] - pixels[:, :, :-1]
                loss = loss + 0.5 * (rows.abs().sum() / 36 + columns.abs().sum() / 36)
            elif regulariser == "others_apart":
                pull = pull or 0.5 * off[0].item() / off[1].item()
                loss = loss - pull * off[1]
            passed.append((loss.item(), pixels.detach()))
            (gradient,) = torch.autograd.grad(loss, pixels)
            pixels = (pixels.detach() - 0.1 * gradient / gradient.square().sum().sqrt()).clamp(0, 1)
        assert passed[0][0] > min(passed, key=lambda each: each[0])[0]
        np.testing.assert_allclose(result, min(passed, key=lambda each: each[0])[1], atol=1e-10)


def test_the_least_and_the_most_active_neurons_are_those_of_the_image():
    features = torch.tensor([0.3, -2.0, 0.0, 1.0])
    assert inversion.choose("least_active", features, 2, 0).tolist() == [True, False, True, False]
    assert inversion.choose("most_active", features, 2, 9).tolist() == [False, True, False, True]


@pytest.fixture
def invert(cli, tmp_path):
    """Run the verb on the shipped digits; return its files by name, and what it said."""

    def run(*arguments, output="found"):
        status, out, err = cli("invert", "--config=quickstart.yaml", f"--output={output}", *ARGUMENTS, *arguments)
        assert status == 0, err
        return {file.name: file for file in (tmp_path / output).rglob("*.*")}, out + err

    return run


def features(file):
    """What timm's network makes of a picture."""
    kwargs = {"channels": [12, 24, 48, 96], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8}
    network = timm.create_model("resnet26", num_classes=0, **kwargs).eval()
    network.load_state_dict(load_file(ROOT / "configs" / "digits_0to4.safetensors"), strict=False)
    pixels = torch.from_numpy(np.asarray(Image.open(file)) / 127.5 - 1).float().permute(2, 0, 1)
    with torch.no_grad():
        return network(pixels[None])[0].double().numpy()


def test_the_verb_leaves_pictures_and_their_numbers_and_keeps_what_is_finished(invert):
    files, said = invert()
    rows = pd.read_csv(files["inversion.csv"])
    assert len(rows) == 2 * 2 * 2 * 2
    originals = {name: features(files[f"{name}.png"]) for name in set(rows["image"])}
    for row in rows.query("seed == 1").itertuples():
        wanted, found = originals[row.image], features(files[row.picture.partition("/")[2]])
        order = torch.randperm(384, generator=torch.Generator().manual_seed(1)).numpy()
        order = order if row.choice == "random" else np.argsort(np.abs(wanted), kind="stable")
        assert row.neurons == {0.1: 38, 1: 384}[row.fraction]
        for name, seen in (("matched", order[: row.neurons]), ("unmatched", order[row.neurons :])):
            a, b = found[seen], wanted[seen]
            if len(seen) == 0 or not b.any():
                assert np.isnan(getattr(row, f"{name}_distance"))
                continue
            assert getattr(row, f"{name}_distance") == pytest.approx(
                np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-4
            )
            assert getattr(row, f"{name}_cosine") == pytest.approx(
                a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4
            )
    ours = rows.query("choice == 'random'")
    assert ours["matched_distance"].mean() < 0.9 * ours["start_matched_distance"].mean()
    page = files["inversion.html"].read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "<h1>Partial inversion</h1>" in page
    assert "inversion_0.1.png" in said

    again, missing = files["test141_random_0.1_1.png"], files["test141_random_1_0.png"]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (again, missing)}
    missing.unlink()
    files["inversion.csv"].unlink()
    resumed, _ = invert()
    assert missing.read_bytes() == before[missing][0]
    assert again.stat().st_mtime_ns == before[again][1]
    pd.testing.assert_frame_equal(pd.read_csv(resumed["inversion.csv"]), rows)


MISTAKES = {
    "no run": (["--run=runs/none"], "runs/none is no folder of a run: it holds no config.yaml."),
    "no steps": (["--steps=0"], "--steps is 0; it must be at least 1."),
    "no images": (["--images=0"], "--images is 0; it must be at least 1."),
    "standing still": (["--step_size=0"], "--step_size is 0; it must be above 0."),
    "fraction beyond all": (["--fractions=1.5"], "--fractions has 1.5; a fraction must be in (0, 1]."),
    "no seeds": (["--seeds=0"], "--seeds is 0; give a number of seeds"),
    "choice that there is not": (["--choice=best"], "choice is best; it must be"),
    "more images than there are": (["--images=999"], "--images is 999; the test split of digits has 179."),
    "file that is not there": (["--images=none.png"], "none.png is not a readable image ([Errno 2] No such file"),
    "several layers": (["--model.backbone.layer=[layer3,layer4]"], "['layer3', 'layer4']; pictures match one"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(cli, arguments, said):
    status, _, err = cli("invert", "--config=quickstart.yaml", "--steps=1", *arguments)
    assert status == 2
    assert said in err.splitlines()[-1]


def test_vectors_and_pictures_of_other_settings_are_refused(cli, invert, tmp_path):
    np.save(tmp_path / "vectors.npy", np.eye(4))
    np.save(tmp_path / "labels.npy", np.arange(4) % 2)
    vectors = ("--config=embeddings.yaml", "--data.features=vectors.npy", "--data.labels=labels.npy")
    status, _, err = cli("invert", *vectors)
    assert status == 2
    assert "There is no model.backbone to invert" in err.splitlines()[-1]
    invert("--images=1", "--fractions=1", "--seeds=1", "--steps=1")
    status, _, err = cli("invert", "--config=quickstart.yaml", "--output=found", "--steps=2")
    assert status == 2
    assert "holds pictures whose steps is 1, not 2; name another folder with --output." in err.splitlines()[-1]
