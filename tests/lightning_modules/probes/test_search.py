"""Search from end to end: what a run finds, says and leaves, and what it does not go with."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from datamodules import Embeddings, Retrieval
from lightning_modules import RedundancyProbe
from lightning_modules.measures import Inequality
from lightning_modules.probes import SGD, Ridge, Search
from lightning_modules.results.results import Results

METRICS = ["ndcg@10", "recall@10", "recall@100", "map@100", "mrr@10"]
CRANFIELD = {
    "random": "0.0629 0.1975 0.3259 0.4220 0.4866 0.5040",
    "first": "0.0561 0.1851 0.3319 0.4079 0.4842 0.4994",
    "pca": "0.1745 0.3355 0.4097 0.4577 0.4923 0.4927",
    "pca_uncentred": "0.1951 0.3556 0.4305 0.4786 0.5049 0.5058",
}
"""nDCG@10 on 7, 19, 38, 76, 192 and 307 of 384 neurons over all queries, as pytrec_eval measured it."""


def on_cranfield(*by, **arguments):
    """Return the metrics of a search over all 225 queries, by these columns."""
    folder = SHARED / "data" / "cranfield_minilm"
    if not folder.is_dir():
        pytest.skip("The shared data are not beside this checkout.")
    model = RedundancyProbe(None, **arguments)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, datamodule=Retrieval(str(folder)))
    for evaluate in (trainer.validate, trainer.test):
        evaluate(model, datamodule=trainer.datamodule, verbose=False)
    rows = model.results().tables["results"]
    return rows[METRICS].mul(rows["images"], axis=0).groupby([rows[name] for name in by]).sum() / 225


def test_cranfield_has_the_published_figures():
    sizes = [7, 19, 38, 76, 192, 307]
    means = on_cranfield("selection", "neurons", "seed", neurons=sizes, selection=list(CRANFIELD))
    full = means.loc["full"].iloc[0]
    assert full[["ndcg@10", "recall@10", "recall@100", "map@100"]].round(4).tolist() == [0.5062, 0.4567, 0.7883, 0.4191]
    by_seed = means["ndcg@10"].round(4)  # and so are the means over seeds of the published table
    for selection, figures in CRANFIELD.items():
        assert by_seed[selection].groupby("neurons").mean().map("{:.4f}".format).tolist() == figures.split()


def test_cranfield_in_few_bits_has_what_numpy_finds_with_the_query_in_full_and_without():
    for quantised, figures in (("stored", [0.4845, 0.4996, 0.5058]), ("both", [0.4535, 0.5016, 0.5070])):
        solver = Search(quantised=quantised)
        means = on_cranfield("bits", neurons=384, selection="first", bits=[4, 2, 1], solver=solver)["ndcg@10"]
        assert means[[1, 2, 4]].round(4).tolist() == pytest.approx(figures, abs=1e-9)


RUN = ("fit", "--config", "retrieval_beir.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
RUN += ("--model.fractions=[0.2,0.5]", "--model.seeds=3", "--trainer.accelerator=cpu", "--data.root=papers")


def test_a_run_tells_of_queries_and_what_it_leaves_can_be_used(cli, papers):
    status, out, err = cli(*RUN, "--name=found")
    assert status == 0, err
    assert "Search (similarity cosine, quantised both)" in err
    assert "papers, none: test nDCG@10 on 30 queries" in out
    assert "To keep 90 % of the nDCG@10" in out
    assert "30 validation queries" in out
    run = papers.parent / "runs" / "found"
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
    status, out, err = cli("compare", "runs/*", "--pictures=[]")
    assert status == 0, err
    assert "found" in pd.read_csv(papers.parent / "compare" / "results.csv")["run"][0]

    vectors = torch.from_numpy(np.load(papers / "corpus.npz")["vectors"])
    for selection in ("random", "pca_uncentred"):
        which = ("--selection", selection, "--fraction", "0.5", "--seed", "1" if selection == "random" else "0")
        status, _, err = cli("export", "--run", "runs/found", *which, "--output", selection)
        assert status == 0, err
        card = json.loads((papers.parent / selection / "card.json").read_text())
        its = (rows["selection"] == selection) & (rows["fraction"] == 0.5) & (rows["seed"] == int(which[-1]))
        assert card["ndcg@10"] == rows[its].set_index("split")["ndcg@10"].to_dict()
        subset, told = load_file(papers.parent / selection / "subset.safetensors"), {}
        exec(card["use"][0], {"features": vectors, "subset": subset, "torch": torch}, told)
        assert told["kept"].shape == (200, 10)
        torch.testing.assert_close(told["kept"].norm(dim=1), torch.ones(200))
        if selection == "random":
            assert (
                subset["indices"].tolist()
                == torch.randperm(20, generator=torch.Generator().manual_seed(1))[:10].tolist()
            )


def test_what_a_search_does_not_go_with_is_refused(papers, tmp_path):
    documents = Retrieval(str(papers))
    documents.setup()
    for model, said in (
        ({"solver": Ridge()}, "model.solver is Ridge, but the task has relevant documents, which takes no solver"),
        ({"solver": SGD(momentum=0.5)}, "model.solver is SGD, but the task has relevant documents"),
        ({"selection": "fisher"}, "model.selection has 'fisher', which needs classes"),
        ({"measures": [Inequality()]}, "model.measures lists Inequality, which needs classes"),
    ):
        with pytest.raises(MisconfigurationException, match=said):
            RedundancyProbe(None, **model).describe(documents)
    np.savez(tmp_path / "vectors.npz", features=np.eye(20, dtype=np.float32), labels=np.arange(20) % 2)
    classes = Embeddings(str(tmp_path / "vectors.npz"))
    classes.setup()
    with pytest.raises(MisconfigurationException, match=r"is Search, but the task has 2 classes, which takes SGD, Log"):
        RedundancyProbe(None, solver=Search()).describe(classes)
    with pytest.raises(MisconfigurationException, match=r"similarity is 'angle'; it must be one of cosine, dot, l2"):
        Search("angle")
    with pytest.raises(MisconfigurationException, match=r"quantised is 'queries'; it must be one of both, stored"):
        Search(quantised="queries")
