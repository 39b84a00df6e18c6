"""Search: documents and queries as vectors, and judgements of which documents are relevant, in BEIR's layout."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.base import SPLITS, Task
from datamodules.embeddings import SPLIT_OF, Vectors, finite
from datamodules.formats import READERS, Matrix, downloaded, is_on_hub, open_arrays
from datamodules.images import reading
from datamodules.readers import Wanted, read_labels, read_vectors
from datamodules.targets import Judgements, Relevance

IDS = Wanted("ids", "data.id_key", ("_id", "id", "ids", "doc_id", "docid", "corpus-id", "query_id", "qid", "query-id"))
FORMATS = tuple(ending for ending in READERS if ending != ".jsonl")  # of vectors; JSON lines hold ids and texts
Grades = dict[int, dict[int, int]]  # by the places of query and document


class Retrieval(Task):
    """Vectors of documents and queries in BEIR's layout, with judgements; the model runs without a backbone.

    `root` holds vectors in `corpus.*` and `queries.*`, of any format that `Embeddings` reads, or as parts in folders
    `corpus` and `queries`; their ids, as an array or column beside the vectors, or as `_id` in `corpus.jsonl` and
    `queries.jsonl`, a line for each vector in their order; and `qrels/<split>.tsv` with the columns `query-id`,
    `corpus-id` and `score` (from 1 on relevant). The corpus is the train split: what bases and rankings are fitted to,
    and what is searched. Of several qrels the last of train, dev and test is tested and the one before it validates; of
    a single one, a seeded half of the queries each.

    Args:
        root: Folder of the files, or the name of a data set of the Hugging Face Hub that has them; it names the task.
        feature_key: Name of the vectors in files of several arrays, see `Embeddings`.
        id_key: Name of the ids there. Null takes an array of a usual name (`_id`, `id`, `docid`), or the JSON lines.
        same_ids: Whether a query may find the document of its own id; false leaves it out, as BEIR's evaluation does.
        **kwargs: See `Task`.

    Raises:
        MisconfigurationException: If a file is not there, or there are several in its place.
    """

    vectors: ClassVar = True

    def __init__(
        self,
        root: str | None = None,
        feature_key: str | None = None,
        id_key: str | None = None,
        same_ids: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("target", "classes") != "classes":
            raise MisconfigurationException(
                "data.target is for images of classes; Retrieval has judgements, leave it out."
            )
        if root is None:
            raise MisconfigurationException("Give data.root, the folder of corpus.*, queries.* and qrels/test.tsv.")
        super().__init__(root, augmentation="none", view="weights", num_workers=0, protocol="full", **kwargs)
        self.feature_key, self.id_key, self.same_ids = feature_key, id_key, same_ids
        self.name = self.root.resolve().name
        self.folder = self.root
        if not is_on_hub(self.root):
            self._find()

    def prepare_data(self) -> None:
        """Download a data set of the Hub, as far as it is not there yet."""
        self._find()

    def _find(self) -> None:
        """Look for the files."""
        self.folder = downloaded(self.root, "qrels/*.tsv")
        self.files = {part: self._vector_file(part) for part in ("corpus", "queries")}
        self.qrels = self._qrels()

    def load(self) -> dict[str, Vectors]:
        """Return the documents as train, and the judged queries as val and test.

        A MisconfigurationException is raised if files are damaged or do not fit together; the message names the row,
        the line or the id.
        """
        self._find()  # in every process
        corpus, queries = (self._read(part) for part in ("corpus", "queries"))
        self.width, width = corpus.matrix.shape[1], queries.matrix.shape[1]
        if width != self.width:
            raise MisconfigurationException(
                f"{queries.file} holds vectors of {width} values, those of {corpus.file} have {self.width}."
            )
        places = [{name: place for place, name in enumerate(part.names)} for part in (queries, corpus)]
        grades = {split: _grades(file, *places) for split, file in self.qrels.items()}
        self.origins = {split: f"queries of {file.name}" for split, file in self.qrels.items()}
        if self.qrels["val"] == self.qrels["test"]:
            grades = self._halved(grades["test"], queries.names)
        twice = grades["val"].keys() & grades["test"].keys()
        if twice:
            raise MisconfigurationException(
                f"Query {queries.names[min(twice)]!r} is judged in both {self.qrels['val']} and {self.qrels['test']}; "
                f"leave it in one, as what chooses must not be tested."
            )
        left = len(queries.names) - len(grades["val"]) - len(grades["test"])
        if left:
            files = " or ".join(sorted({file.name for file in self.qrels.values()}))
            rank_zero_info(
                f"{left:,} of {len(queries.names):,} queries have no judgements in {files}; they are left out."
            )
        own = [-1 if self.same_ids else places[1].get(name, -1) for name in queries.names]
        self.target = Relevance(corpus.names, {split: _padded(each, own) for split, each in grades.items()})
        self.origins["train"] = f"documents of {corpus.file.name}"
        parts = {"train": (corpus, torch.arange(len(corpus.names)))}
        parts |= {split: (queries, torch.tensor(list(each))) for split, each in grades.items()}
        return {split: _checked(part, rows) for split, (part, rows) in parts.items()}

    def features(self, split: str) -> Sequence[Vectors]:
        """Return the vectors of a split, which its loader yields."""
        return [cast(Vectors, self.images[split])]

    def _vector_file(self, part: str) -> Path:
        """Return the file of the vectors of the corpus or the queries."""
        found = [path for path in sorted(self.folder.glob(f"{part}.*")) if path.suffix in FORMATS]
        found += [folder for folder in [self.folder / part] if folder.is_dir()]
        if not found and _has_vectors(self.folder / f"{part}.jsonl"):
            found = [self.folder / f"{part}.jsonl"]
        if len(found) != 1:
            names = " and ".join(path.name for path in found) or f"no vectors {part}.* ({', '.join(FORMATS)})"
            raise MisconfigurationException(f"{self.folder} holds {names}; it must hold one such file.")
        return found[0]

    def _qrels(self) -> dict[str, Path]:
        """Return the files of judgements that validate and test, which may be the same."""
        found: dict[str, Path] = {}
        for path in sorted((self.folder / "qrels").glob("*.tsv")):
            split = SPLIT_OF.get(path.stem.lower())
            if split is None or split in found:
                raise MisconfigurationException(
                    f"{path} is of no split, or of one that has a file; it must be train.tsv, dev.tsv or test.tsv."
                )
            found[split] = path
        if not found:
            raise MisconfigurationException(f"{self.folder / 'qrels'} holds no judgements; put test.tsv there.")
        files = [found[split] for split in SPLITS if split in found]
        return {"val": files[-2:][0], "test": files[-1]}

    def _read(self, part: str) -> "_Part":
        """Return the vectors of the corpus or the queries with their ids."""
        file, listed = self.files[part], self.folder / f"{part}.jsonl"
        _, matrix = read_vectors(file, self.feature_key)
        if self.id_key or any(name.lower() in IDS.usual for name in open_arrays(file).names):
            source, names = file, list(map(str, read_labels(file, self.id_key, IDS, len(matrix), file).tolist()))
        elif listed.is_file():
            source, names = listed, _listed(listed)
        else:
            raise MisconfigurationException(
                f"{file} holds no ids; list them as `_id` in {listed}, or name a column of them with data.id_key."
            )
        if len(names) != len(matrix):
            raise MisconfigurationException(
                f"{source} has {len(names):,} ids, {file} has {len(matrix):,} vectors; give one for each, in order."
            )
        seen: dict[str, int] = {}
        for row, name in enumerate(names):
            if seen.setdefault(name, row) != row:
                raise MisconfigurationException(
                    f"{source} has the id {name!r} in rows {seen[name]} and {row} (from 0); each must have its own."
                )
        return _Part(file, matrix, names)

    def _halved(self, grades: Grades, names: Sequence[str]) -> dict[str, Grades]:
        """Return a seeded half of the judged queries each for val and test, the same in whatever order they come."""
        file = self.qrels["test"]
        self.origins = dict.fromkeys(self.qrels, f"half of the queries of {file.name}")
        if len(grades) < 2:
            raise MisconfigurationException(f"{file} judges one query; give at least two, to choose and to test.")
        order = torch.randperm(len(grades), generator=torch.Generator().manual_seed(self.seed))
        by_name = sorted(grades, key=names.__getitem__)
        halves = ({by_name[place] for place in half.tolist()} for half in order.tensor_split([len(grades) // 2]))
        return {
            split: {query: its for query, its in grades.items() if query in half}
            for split, half in zip(("val", "test"), halves, strict=True)
        }


class _Part(NamedTuple):
    """The corpus or the queries."""

    file: Path
    matrix: Matrix  # shape (n, D)
    names: list[str]  # ids of the n rows


def _has_vectors(file: Path) -> bool:
    """Return whether the first of some JSON lines has a list, which may be a vector; false of what is no such file."""
    if not file.is_file():
        return False
    with reading(file, "is no file of JSON lines"), file.open(encoding="utf-8") as lines:
        return any(isinstance(value, list) for value in json.loads(next(lines, "{}")).values())


def _listed(file: Path) -> list[str]:
    """Return the `_id` of each line of a file of JSON lines."""
    names = []
    with reading(file), file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            with reading(f"Line {number} of {file}", "is no JSON"):
                found = json.loads(line)
            if not isinstance(found, dict) or not isinstance(found.get("_id"), str | int):
                raise MisconfigurationException(f"Line {number} of {file} has no `_id`; every line needs one.")
            names.append(str(found["_id"]))
    return names


def _grades(file: Path, queries: Mapping[str, int], documents: Mapping[str, int]) -> Grades:
    """Return what a file judges, from the places of queries and documents by their ids."""
    grades: Grades = {}
    unknown: dict[str, dict[str, None]] = {"query": {}, "document": {}}
    with reading(file), file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            cells = line.rstrip("\r\n").split("\t")
            is_number = re.fullmatch(r"-?\d+", cells[-1])
            if number == 1 and not is_number:
                continue  # names of the columns
            if len(cells) != 3 or not is_number:
                raise MisconfigurationException(
                    f"Line {number} of {file} is {line.rstrip()!r:.60}; it must be query-id, corpus-id and a whole "
                    f"number, between tabs."
                )
            query, document, score = cells
            for what, name, known in (("query", query, queries), ("document", document, documents)):
                if name not in known:
                    unknown[what][name] = None
            if query in queries and document in documents:
                of_query = grades.setdefault(queries[query], {})
                if of_query.setdefault(documents[document], int(score)) != int(score):
                    raise MisconfigurationException(
                        f"{file} judges document {document!r} for query {query!r} twice, the second time as {score} "
                        f"(line {number}); leave one."
                    )
    for what, names in unknown.items():
        if names:
            none = "" if grades else "; no line has a query and a document that are known"
            raise MisconfigurationException(
                f"{file} names {len(names):,} {what} ids without a vector, {next(iter(names))!r} first{none}."
            )
    if not grades:
        raise MisconfigurationException(f"{file} holds no judgements; it needs a line for each.")
    return dict(sorted(grades.items()))


def _padded(grades: Grades, barred: Sequence[int]) -> Judgements:
    """Return judgements by query as matrices, with the document that each query must not find, by its place."""
    shape = len(grades), max(map(len, grades.values()))
    documents, scores = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    for row, of_query in enumerate(grades.values()):
        documents[row, : len(of_query)] = torch.tensor(list(of_query))
        scores[row, : len(of_query)] = torch.tensor(list(of_query.values()))
    return Judgements(documents, scores, torch.tensor([barred[query] for query in grades]))


def _checked(part: _Part, rows: Tensor) -> Vectors:
    """Return the vectors at `rows`; refuse one that is not finite, or all zeros, which has no direction."""
    for some, vectors in finite(part.file, part.matrix, rows):
        empty = (vectors == 0).all(1).nonzero()
        if len(empty):
            row = int(some[empty[0, 0]])
            raise MisconfigurationException(
                f"Vector {part.names[row]!r} of {part.file} (row {row}, from 0) is all zeros, which has no "
                f"direction; leave it out."
            )
    return Vectors(part.matrix, rows, torch.zeros(len(rows), dtype=torch.int64))
