"""Documents, queries and judgements: every layout gives the same task, and what does not fit is named."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from replicas import refusal, sizes

from datamodules import Retrieval

RANDOM = np.random.default_rng(0)
DOCUMENTS = RANDOM.normal(size=(40, 8)).astype(np.float32)
QUERIES = RANDOM.normal(size=(10, 8)).astype(np.float32)
NAMES = {"corpus": [f"doc{row}" for row in range(40)], "queries": [str(row) for row in range(10)]}
JUDGED = [(query, f"doc{(3 * query + place) % 40}", place) for query in range(9) for place in range(1, 4)]


def write(folder, judgements=None, **vectors):
    """Write a set; of judgements a list by the name of their file."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for part, values in ({"corpus": DOCUMENTS, "queries": QUERIES} | vectors).items():
        np.save(folder / f"{part}.npy", values)
        lines = (json.dumps({"_id": name, "text": "a word"}) for name in NAMES[part])
        (folder / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for split, rows in ({"test": JUDGED} if judgements is None else judgements).items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def set_up(folder, **arguments):
    task = Retrieval(str(folder), **arguments)
    task.setup()
    return task


def judgements(task, split):
    """Return what a task says was judged, by id: the query's row, the document, the grade."""
    documents, grades, _ = task.target.judged[split]
    rows = task.images[split].rows.tolist()
    cells = [(rows[i], int(documents[i, j]), int(grades[i, j])) for i, j in (documents >= 0).nonzero().tolist()]
    return [(row, f"doc{document}", grade) for row, document, grade in cells]


def by_vector(task, split):
    """Return what was judged of each query, by its vector, as vectors and grades."""
    found, corpus = {}, task.features("train")[0]
    queries = task.features(split)[0][torch.arange(len(task.images[split]))]
    for query, names, grades, _ in zip(queries, *task.target.judged[split], strict=True):
        documents = corpus[names[names >= 0]].tolist()
        found[tuple(query.tolist())] = sorted(zip(map(tuple, documents), grades[names >= 0].tolist(), strict=True))
    return found


def test_the_corpus_is_train_and_a_seeded_half_of_the_judged_queries_each_validates_and_tests(tmp_path, caplog):
    task = set_up(write(tmp_path / "mine"))
    assert (task.name, task.width, task.vectors) == ("mine", 8, True)
    assert sizes(task) == (40, 4, 5)
    assert "1 of 10 queries have no judgements in test.tsv" in caplog.text
    assert "40 train (documents of corpus.npy), 4 val (half of the queries of test.tsv)" in task.describe()
    assert torch.equal(task.features("train")[0][torch.arange(40)], torch.from_numpy(DOCUMENTS))
    val, test = (set(task.images[split].rows.tolist()) for split in ("val", "test"))
    assert val | test == set(range(9))
    assert not val & test
    for split in ("val", "test"):
        batches = list(getattr(task, f"{split}_dataloader")())
        rows = task.images[split].rows
        assert torch.equal(torch.cat([batch.inputs for batch in batches]), torch.from_numpy(QUERIES)[rows])
        assert judgements(task, split) == [row for row in JUDGED if row[0] in rows.tolist()]
    assert set(set_up(tmp_path / "mine", seed=1).images["val"].rows.tolist()) != val


def test_the_document_of_a_querys_own_id_is_barred_where_that_is_asked_for(tmp_path):
    folder = write(tmp_path)
    edit("corpus.jsonl", '"doc5"', '"3"')(folder)
    edit("qrels/test.tsv", "doc5", "3")(folder)
    for same_ids, place in ((True, -1), (False, 5)):
        task = set_up(folder, same_ids=same_ids)
        for split in ("val", "test"):
            barred = zip(task.images[split].rows.tolist(), task.target.judged[split].barred.tolist(), strict=True)
            assert dict(barred) == {row: place if row == 3 else -1 for row in task.images[split].rows.tolist()}


def test_ties_go_by_the_bytes_of_the_ids(tmp_path):
    ties = set_up(write(tmp_path)).target.ties.tolist()
    assert [NAMES["corpus"][place] for place in np.argsort(ties)] == sorted(NAMES["corpus"])


@pytest.mark.parametrize(
    ("splits", "val", "test"),
    [
        (("train", "dev", "test"), "dev", "test"),
        (("train", "test"), "train", "test"),
        (("dev", "train"), "train", "dev"),
    ],
)
def test_of_several_files_of_judgements_the_last_is_tested_and_the_one_before_validates(tmp_path, splits, val, test):
    parts = {split: JUDGED[6 * place : 6 * place + 6] for place, split in enumerate(splits)}
    task = set_up(write(tmp_path, parts))
    assert judgements(task, "val") == parts[val]
    assert judgements(task, "test") == parts[test]


@pytest.mark.parametrize("ending", [".parquet", ".npz", ".csv", ".jsonl", ".h5", "parts"])
def test_ids_beside_the_vectors_may_come_in_any_order(tmp_path, ending):
    task = set_up(write(tmp_path / "rows"))
    folder = write(tmp_path / "columns")
    for part, values in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        order = RANDOM.permutation(len(values))
        names = np.array(NAMES[part])[order]
        for left in folder.glob(f"{part}.*"):
            left.unlink()
        if ending == ".npz":
            np.savez(folder / f"{part}.npz", ids=names, embeddings=values[order])
        elif ending == ".jsonl":
            lines = (json.dumps({"_id": n, "embedding": v.tolist()}) for n, v in zip(names, values[order], strict=True))
            (folder / f"{part}.jsonl").write_text("\n".join(lines))
        elif ending == ".h5":
            with h5py.File(folder / f"{part}.h5", "w") as content:
                content["embeddings"], content["ids"] = values[order], [name.encode() for name in names.tolist()]
        elif ending == "parts":
            (folder / part).mkdir()
            for place, rows in enumerate(np.array_split(order, 12 if len(order) > 12 else 3)):
                table = pd.DataFrame({"id": np.array(NAMES[part])[rows], "vector": list(values[rows])})
                table.to_parquet(folder / part / f"part_{place}.parquet")
        elif ending == ".csv":
            pd.DataFrame(values[order]).add_prefix("dim_").assign(_id=names).to_csv(folder / f"{part}.csv", index=False)
        else:
            pd.DataFrame({"docid": names, "vector": list(values[order])}).to_parquet(folder / f"{part}.parquet")
    other = set_up(folder)
    for split in ("val", "test"):
        mine, theirs = (by_vector(each, split) for each in (task, other))
        assert mine == theirs
        assert len(mine) == {"val": 4, "test": 5}[split]


# What does not fit


def test_the_folder_may_lie_on_the_hub(papers, hub, tmp_path):
    files = [path for path in papers.rglob("*") if path.is_file()]
    hub.files |= {str(path.relative_to(papers)): path.read_bytes() for path in files}
    here, there = Retrieval(root=str(papers)), Retrieval(root="lab/birds")
    there.prepare_data()
    for task in (here, there):
        task.setup()
    assert there.name == "birds"
    for split in ("train", "val", "test"):
        (mine,), (theirs,) = (task.features(split) for task in (here, there))
        rows = torch.arange(len(mine))
        assert torch.equal(mine[rows], theirs[rows])
    message = refusal(Retrieval(root="lab/nowhere").prepare_data)
    assert "data.root is lab/nowhere, which is no folder and cannot be had from the Hub" in message


def changed(**changes):
    """Return vectors of which some differ, by row: a value for all of it."""
    parts = {"corpus": DOCUMENTS.copy(), "queries": QUERIES.copy()}
    for part, (row, value) in changes.items():
        parts[part][row] = value
    return parts


def edit(name, old, new):
    """Return what replaces text of a file of the set."""
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


def remove(name):
    return lambda folder: (folder / name).unlink()


REFUSED = {
    "no vectors": (remove("corpus.npy"), "holds no vectors corpus.* (.npy, "),
    "two files of vectors": (
        lambda folder: (folder / "corpus.csv").write_text("0.5,1\n"),
        "holds corpus.csv and corpus.npy; it must hold one such file",
    ),
    "no ids": (remove("queries.jsonl"), "queries.npy holds no ids; list them as `_id` in"),
    "fewer ids": (edit("corpus.jsonl", '{"_id": "doc3", "text": "a word"}\n', ""), "has 39 ids", "has 40 vectors"),
    "an id twice": (edit("corpus.jsonl", '"doc3"', '"doc7"'), "has the id 'doc7' in rows 3 and 7"),
    "no JSON": (edit("corpus.jsonl", '{"_id": "doc3"', "doc3"), "Line 4 of", "is no JSON"),
    "JSON without an id": (edit("queries.jsonl", '"_id": "3"', '"id": "3"'), "Line 4 of", "has no `_id`"),
    "no judgements": (remove("qrels/test.tsv"), "qrels holds no judgements; put test.tsv there"),
    "judgements of no split": (
        lambda folder: (folder / "qrels" / "mine.tsv").touch(),
        "mine.tsv is of no split",
        "train.tsv, dev.tsv or test.tsv",
    ),
    "an empty file of judgements": (lambda folder: write(folder, {"test": []}), "test.tsv holds no judgements"),
    "a single query": (lambda folder: write(folder, {"test": JUDGED[:3]}), "judges one query; give at least two"),
    "a grade that is none": (edit("qrels/test.tsv", "doc1\t1", "doc1\t0.5"), "Line 2 of", "a whole number"),
    "other columns": (edit("qrels/test.tsv", "0\tdoc1", "0\t0\tdoc1"), "Line 2 of", "query-id, corpus-id"),
    "judged twice": (edit("qrels/test.tsv", "0\tdoc2\t2", "0\tdoc1\t2"), "'doc1' for query '0' twice", "(line 3)"),
    "unknown documents": (
        lambda folder: write(folder, {"test": [*JUDGED, (1, "x", 1), (2, "x", 1), (2, "y", 1)]}),
        "names 2 document ids without a vector, 'x' first.",
    ),
    "unknown queries": (
        lambda folder: write(folder, {"test": [*JUDGED, ("q", "doc1", 1)]}),
        "names 1 query ids without a vector, 'q' first.",
    ),
    "another set's judgements": (
        lambda folder: write(folder, {"test": [("q", "x", 1)]}),
        "'q' first; no line has a query and a document that are known",
    ),
    "a query in both": (
        lambda folder: write(folder, {"dev": JUDGED[:6], "test": JUDGED[3:]}),
        "Query '1' is judged in both",
    ),
    "other widths": (lambda folder: write(folder, queries=QUERIES[:, :7]), "of 7 values", "have 8"),
    "zeros": (
        lambda folder: write(folder, **changed(corpus=(3, 0))),
        "Vector 'doc3' of",
        "(row 3, from 0) is all zeros",
    ),
    "not a number": (lambda folder: write(folder, **changed(queries=(2, np.nan))), "holds nan in row 2, column 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(tmp_path, name):
    change, *said = REFUSED[name]
    change(write(tmp_path))
    line = refusal(lambda: set_up(tmp_path))
    assert [part for part in said if part not in line] == [], line


def test_a_folder_must_be_given():
    assert refusal(Retrieval) == "Give data.root, the folder of corpus.*, queries.* and qrels/test.tsv."


def test_queries_without_a_relevant_document_are_told(tmp_path, caplog):
    set_up(write(tmp_path, {"dev": JUDGED[:6], "test": [("4", "doc1", 0), *JUDGED[6:12]]}))
    assert "1 of the 3 queries in test of" in caplog.text
    assert "test of" in caplog.text
    assert "one of its 3 queries is 0.33 of the nDCG@10" in caplog.text
