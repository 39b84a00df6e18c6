"""Product quantisation beside subsets: what FAISS, NumPy and scikit-learn find of the same vectors."""

import sys

import faiss
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge as Reference

from datamodules import Embeddings
from lightning_modules import RedundancyProbe
from lightning_modules.measures import Accuracy, ProductQuantisation
from lightning_modules.probes import Ridge, Search
from lightning_modules.reporting import figures


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    digits, file = load_digits(), tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(file, features=digits.data.astype(np.float32), labels=digits.target)
    return str(file)


def measured(task, **arguments):
    """Return the results of a run, and the vectors and labels of train, val and test."""
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    model = RedundancyProbe(None, **arguments)
    trainer.fit(model, datamodule=task)
    for evaluate in (trainer.validate, trainer.test):
        evaluate(model, datamodule=task, verbose=False)
    splits = (task.images[split] for split in ("train", "val", "test"))
    return model.results(), [(each[torch.arange(len(each))].numpy(), each.labels.numpy()) for each in splits]


def decoder(train, size):
    quantiser = faiss.ProductQuantizer(train.shape[1], size, 8)
    quantiser.cp.min_points_per_centroid = 1
    quantiser.train(train)
    return lambda vectors: quantiser.decode(quantiser.compute_codes(vectors)).astype(float)


def test_a_ridge_probe_judges_what_is_stored_and_the_picture_of_bytes_has_it(file):
    measures = [Accuracy(), ProductQuantisation([4, 16])]
    results, ((train, labels), (val, of_val), (test, of_test)) = measured(
        Embeddings(file), fractions=0.5, solver=Ridge(), bits=[32, 4], seeds=2, measures=measures
    )
    table = results.tables["product_quantisation"]
    assert table[["layer", "bytes", "split"]].values.tolist() == [["none", 4, "test"], ["none", 16, "test"]]
    for size, accuracy in zip(table["bytes"], table["accuracy"], strict=True):
        stored = decoder(train, size)
        probes = [
            Reference(alpha=penalty * stored(train).var(0).mean() * len(train)).fit(stored(train), np.eye(10)[labels])
            for penalty in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10)
        ]
        best = min(probes, key=lambda probe: np.square(probe.predict(stored(val)) - np.eye(10)[of_val]).sum())
        assert accuracy == pytest.approx((best.predict(stored(test)).argmax(1) == of_test).mean(), abs=1e-9)
    picture = figures.stores(results, "test")["bytes"].figure
    lines = {line.get_label(): line.get_xydata().tolist() for line in picture.axes[0].lines}
    assert lines["product quantisation"] == table[["bytes", "accuracy"]].mul([1, 100]).values.tolist()


@pytest.mark.parametrize("quantised", ["both", "stored"])
def test_what_is_stored_is_searched(file, quantised):
    task = Embeddings(file, target="retrieval")
    results, ((train, labels), _, (test, of_test)) = measured(
        task, fractions=0.5, seeds=1, solver=Search(quantised=quantised), measures=ProductQuantisation(8)
    )
    stored = decoder(train, 8)
    queries, documents = stored(test) if quantised == "both" else test.astype(float), stored(train)
    alike = queries @ documents.T / np.linalg.norm(documents, axis=1)
    alike = (alike / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    found = labels[np.argsort(-alike, axis=1, kind="stable")[:, :10]] == of_test[:, None]
    gains = 1 / np.log2(np.arange(10) + 2)  # every class has more than 10 images
    ((ndcg,),) = results.tables["product_quantisation"][["ndcg@10"]].to_numpy()
    assert ndcg == pytest.approx((found * gains).sum(1).mean() / gains.sum(), abs=1e-9)


def test_what_cannot_be_done_is_refused_before_anything_is_extracted(file, tmp_path, monkeypatch):
    with pytest.raises(MisconfigurationException, match=r"bytes has 7, .* the 64 neurons of none; give one of 1, 2, 4"):
        measured(Embeddings(file), solver=Ridge(), measures=ProductQuantisation(7))
    np.savez(tmp_path / "few.npz", features=np.random.default_rng(0).normal(size=(90, 8)), labels=np.arange(90) % 3)
    with pytest.raises(MisconfigurationException, match=r"fits 256 centroids, but train has 54; leave it out"):
        measured(Embeddings(str(tmp_path / "few.npz")), solver=Ridge(), measures=ProductQuantisation(8))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MisconfigurationException, match=r"ProductQuantisation needs faiss, which is not installed"):
        measured(Embeddings(file), solver=Ridge(), measures=ProductQuantisation(8))
