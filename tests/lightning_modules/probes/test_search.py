"""Search from end to end: what a run finds, says and leaves, on one process and on two, and what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from datamodules import Retrieval
from lightning_modules import RedundancyProbe
from lightning_modules.results.results import Results

METRICS = ["ndcg@10", "recall@10", "recall@100", "map@100", "mrr@10"]
CRANFIELD = {
    "random": "0.0629 0.1975 0.3259 0.4220 0.4866 0.5040",
    "first": "0.0561 0.1851 0.3319 0.4079 0.4842 0.4994",
    "pca": "0.1745 0.3355 0.4097 0.4577 0.4923 0.4927",
    "pca_uncentred": "0.1951 0.3556 0.4305 0.4786 0.5049 0.5058",
}
"""nDCG@10 on 7, 19, 38, 76, 192 and 307 of 384 neurons over all queries, as pytrec_eval measured it."""


def test_cranfield_has_the_published_figures():
    folder = SHARED / "data" / "cranfield_minilm"
    if not folder.is_dir():
        pytest.skip("The shared data are not beside this checkout.")
    model = RedundancyProbe(None, neurons=[7, 19, 38, 76, 192, 307], selection=list(CRANFIELD))
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, datamodule=Retrieval(str(folder)))
    for evaluate in (trainer.validate, trainer.test):
        evaluate(model, datamodule=trainer.datamodule, verbose=False)
    rows = model.results().tables["results"]
    sums = rows[METRICS].mul(rows["images"], axis=0).groupby([rows["selection"], rows["neurons"], rows["seed"]]).sum()
    means = sums / 225
    full = means.loc["full"].iloc[0]
    assert full[["ndcg@10", "recall@10", "recall@100", "map@100"]].round(4).tolist() == [0.5062, 0.4567, 0.7883, 0.4191]
    by_seed = means["ndcg@10"].round(4)  # and so are the means over seeds of the published table
    for selection, figures in CRANFIELD.items():
        assert by_seed[selection].groupby("neurons").mean().map("{:.4f}".format).tolist() == figures.split()


@pytest.fixture
def made_up(tmp_path):
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


RUN = ("fit", "--config", "retrieval_beir.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
RUN += ("--model.fractions=[0.2,0.5]", "--model.seeds=3", "--trainer.accelerator=cpu", "--data.root=papers")
RUN += ("--data.batch_size=7",)


def test_a_run_tells_of_queries_and_what_it_leaves_can_be_used(cli, made_up):
    status, out, err = cli(*RUN, "--name=found")
    assert status == 0, err
    assert "Search (similarity cosine)" in err
    assert "papers, none: test nDCG@10 on 30 queries" in out
    assert "To keep 90 % of the nDCG@10" in out
    assert "30 validation queries" in out
    run = made_up.parent / "runs" / "found"
    rows, page = pd.read_csv(run / "results.csv"), (run / "report.html").read_text()
    assert set(rows["images"]) == {30}
    assert set(rows["solver"]) == {"search"}
    assert "tested on 30 queries" in page
    assert "recall@100" in page
    read = Results.read(run)
    for split in ("val", "test"):
        of_split = rows[rows["split"] == split]
        np.testing.assert_allclose(read.per_image[split].mean(1), of_split["ndcg@10"], atol=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert read.curve("test")["ratio_low"].notna().sum() == 6
    assert summary["layers"][0]["diffused_redundancy_interval"]["random"]["threshold"]["0.9"] is not None

    again = ("--config", "runs/found/config.yaml")
    status, out, err = cli("test", *again)
    assert status == 0, err
    tested = pd.read_csv(run / "test.csv")
    pd.testing.assert_frame_equal(tested, rows[rows["split"] == "test"].reset_index(drop=True))
    status, _, err = cli("predict", *again)
    assert status == 2
    assert err.endswith("error: Nothing is predicted of relevant documents; take fit, validate or test.\n")
    status, out, err = cli("compare", "runs/*")
    assert status == 0, err
    assert "found" in pd.read_csv(made_up.parent / "compare" / "results.csv")["run"][0]

    vectors = torch.from_numpy(np.load(made_up / "corpus.npz")["vectors"])
    for selection in ("random", "pca_uncentred"):
        which = ("--selection", selection, "--fraction", "0.5", "--seed", "1" if selection == "random" else "0")
        status, _, err = cli("export", "--run", "runs/found", *which, "--output", selection)
        assert status == 0, err
        card = json.loads((made_up.parent / selection / "card.json").read_text())
        its = (rows["selection"] == selection) & (rows["fraction"] == 0.5) & (rows["seed"] == int(which[-1]))
        assert card["ndcg@10"] == rows[its].set_index("split")["ndcg@10"].to_dict()
        subset, told = load_file(made_up.parent / selection / "subset.safetensors"), {}
        for line in card["use"]:
            exec(line.partition(", of documents")[0], {"features": vectors, "subset": subset, "torch": torch}, told)
        assert told["kept"].shape == (200, 10)
        torch.testing.assert_close(told["kept"].norm(dim=1), torch.ones(200))
        if selection == "random":
            assert (
                subset["indices"].tolist()
                == torch.randperm(20, generator=torch.Generator().manual_seed(1))[:10].tolist()
            )


def test_two_processes_find_what_one_finds(start, made_up):
    for name, processes in (("one", 1), ("two", 2)):
        started = start(
            *RUN, f"--name={name}", "--model.selection=[random,pca]", cwd=made_up.parent, processes=processes
        )
        for done in [each.wait() for each in started]:
            assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(made_up.parent / "runs" / name / "results.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=1e-12)


def test_a_search_needs_no_solver_to_be_named(cli, made_up):
    status, _, err = cli(*RUN, "--model.solver=SGD", "--model.selection=first")
    assert status == 0, err
    assert "Search (similarity cosine)" in err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model.solver=Ridge"], "model.solver is Ridge, but the task has relevant documents, which takes no solver"),
        (
            ["--model.solver=SGD", "--model.solver.momentum=0.5"],
            "model.solver is SGD, but the task has relevant documents",
        ),
        (["--model.selection=fisher"], "model.selection has 'fisher', which needs classes"),
        (["--model.measures=[CKA,Inequality]"], "model.measures lists Inequality, which needs classes"),
        (["--model.refit=true"], "The solver search cannot refit; leave model.refit false."),
        (["--model.solver.similarity=angle"], "similarity is angle"),
        (["--data=Digits", "--model.backbone=null"], "model.backbone is null, but the task holds images"),
    ],
)
def test_what_a_search_does_not_go_with_is_refused(cli, made_up, changes, said):
    status, out, err = cli(*RUN, *changes)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert not (made_up.parent / "runs").exists() or not list((made_up.parent / "runs").glob("*/results.csv"))


def test_classes_are_not_searched(tmp_path, cli):
    np.savez(tmp_path / "vectors.npz", features=np.eye(20, dtype=np.float32), labels=np.arange(20) % 2)
    status, _, err = cli("fit", "--config", "embeddings.yaml", "--data.features=vectors.npz", "--model.solver=Search")
    assert status == 2
    assert "model.solver is Search, but the task has 2 classes, which takes SGD, Logistic or Ridge" in err
