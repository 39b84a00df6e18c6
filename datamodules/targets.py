"""What a task asks for: how labels are checked and encoded, what a probe's outputs mean, and how they are scored."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from datamodules.images import Labelled


class Target(ABC):
    """What is to be predicted, or found, of every image or vector."""

    classes: Sequence[str] = ()  # names of the classes, where there are any
    outputs: int  # of a probe, C; 0 where nothing is predicted
    chance: float | None  # expected metric of guessing, where it is known
    metric: ClassVar[str]  # name of the headline metric: a column of `results.csv` and a part of logged metrics' keys
    measure: ClassVar[str | type]  # name of the measure that counts it
    label: ClassVar[str]  # what the metric is called in text and pictures
    unit: ClassVar[str]  # unit that the metric is shown in; for "%" a share is shown times 100
    items: ClassVar[str] = "images"  # what validation and test hold, in text and pictures
    parts: ClassVar[str] = "classes"  # what the metric is also told of, one by one, in text and pictures
    solvers: ClassVar[Sequence[str]]  # those of this project's that find its probes

    @abstractmethod
    def check(self, images: Labelled, split: str, task: str) -> None:
        """Refuse labels of a split that cannot be.

        A MisconfigurationException is raised if a label is not of this target; the message names image, split and task.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return the target in two words, as `5 classes`."""

    def strata(self, labels: Tensor) -> Tensor:
        """Return what splits are stratified by, whole numbers of shape (n,)."""
        return labels

    def fit(self, labels: Tensor) -> None:  # noqa: B027 (most need not)
        """Take what must be known of the labels of train, once they are checked."""

    def matrix(self, labels: Tensor) -> Tensor:
        """Return what least squares regresses on, shape (B, C), float64, from labels of shape (B, ...)."""
        return labels.new_zeros(len(labels), 0, dtype=torch.float64)

    def scores(self, probes: int) -> Metric | None:
        """Return what scores so many probes while they are trained; None where nothing is predicted."""
        return None

    def provenance(self) -> dict[str, Any]:
        """Return what probes share with others of the target, in plain types: what their outputs stand for, ..."""
        return {"classes": list(self.classes)}


class Predicted(Target):
    """A target that the outputs of a probe predict."""

    solvers: ClassVar[Sequence[str]] = ("SGD", "Logistic", "Ridge", "KNN")
    curvature: ClassVar[float]  # what the second derivatives of the loss by the logits never exceed
    quadratic: ClassVar[bool] = False  # whether they always are that
    guess: float  # training loss of an image of which nothing is known

    @abstractmethod
    def matrix(self, labels: Tensor) -> Tensor:
        """Return what least squares regresses on, shape (B, C), float64, from labels of shape (B, ...)."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each probe's training loss summed over the batch, shape (P,), from logits of shape (P, C, B)."""

    @abstractmethod
    def bends(self, logits: Tensor) -> Tensor:
        """Return the second derivative of the loss by each logit, shape (..., C, B)."""

    def squared_error(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each probe's squared error to `matrix(labels)`, summed over the batch and outputs, shape (P,)."""
        return (logits - self.matrix(labels).t().to(logits.dtype)).square().sum((1, 2))

    @abstractmethod
    def scores(self, probes: int) -> Metric:
        """Return a metric that scores so many probes exactly, from logits (P, C, B) and labels, as float64 (P,)."""

    @abstractmethod
    def decide(self, logits: Tensor) -> Tensor:
        """Return each probe's decision for each image, shape (P, B, ...), from logits of shape (P, C, B)."""

    @abstractmethod
    def name(self, decisions: Tensor) -> np.ndarray:
        """Return what decisions or labels are called, strings in an array with a value for each image."""


class Multiclass(Predicted):
    """One class of several for each image; labels are indices of `classes`, the names; the loss is cross-entropy."""

    metric = "accuracy"
    measure = "Accuracy"
    label = "accuracy"
    unit = "%"
    curvature = 0.5  # where two classes share the probability (Böhning, 1992)

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.outputs = len(self.classes)
        self.chance = 1 / max(1, self.outputs)
        self.guess = math.log(max(1, self.outputs))

    def check(self, images: Labelled, split: str, task: str) -> None:
        """Refuse fewer than two classes, labels that are no classes, and a train split of one class.

        Classes without a training image are named, as no probe can learn them; of validation and test it is said where
        a single image decides about a point of accuracy or more, or about all of a class.
        """
        if self.outputs < 2:
            raise MisconfigurationException(
                f"{task} has {self.outputs} classes ({', '.join(self.classes) or 'none'}); a task needs at least two."
            )
        wrong = ((images.labels < 0) | (images.labels >= self.outputs)).nonzero()
        if len(wrong):
            index = int(wrong[0])
            raise MisconfigurationException(
                f"The label of {images.name(index)} in {split} of {task} is {int(images.labels[index])}; it must be a "
                f"class index from 0 to {self.outputs - 1}."
            )
        counts = images.labels.bincount(minlength=self.outputs)
        single = int((counts <= 1).sum())
        if split != "train" and (single or len(images) < 100):
            rank_zero_info(
                f"{split} of {task} is small: one of its {len(images):,} images is {100 / len(images):.2g} % of the "
                f"accuracy"
                + f", and {single:,} of {self.outputs:,} classes have at most one image" * bool(single)
                + "."
            )
        absent = [self.classes[i] for i in (counts == 0).nonzero()[:, 0]] if split == "train" else []
        if len(absent) == self.outputs - 1:
            raise MisconfigurationException(
                f"All of train of {task} is of class {self.classes[int(images.labels[0])]!r}; a probe needs at least "
                f"two classes."
            )
        if absent:
            rank_zero_info(
                f"{len(absent)} of {self.outputs} classes of {task} are not in train, so that no probe can learn them: "
                f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}."
            )

    def matrix(self, labels: Tensor) -> Tensor:
        """Return one-hot labels, shape (B, C), float64."""
        return F.one_hot(labels, self.outputs).double()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each probe's cross-entropy summed over the batch, shape (P,), from logits (P, C, B), labels (B,)."""
        return F.cross_entropy(logits, labels.expand(len(logits), -1), reduction="none").sum(1)

    def bends(self, logits: Tensor) -> Tensor:
        """Return p (1 - p) of the probability p of each class, shape (..., C, B)."""
        shares = logits.softmax(-2)
        return shares * (1 - shares)

    def scores(self, probes: int) -> Metric:
        """Return the metric that counts the accuracy of so many probes."""
        return RightAnswers(probes)

    def decide(self, logits: Tensor) -> Tensor:
        """Return the class with the largest logit, shape (P, B), from logits of shape (P, C, B)."""
        return logits.max(1).indices  # as argmax, and six times as fast over classes that lie apart in memory

    def name(self, decisions: Tensor) -> np.ndarray:
        """Return class names in an array of the same shape."""
        return np.array(self.classes)[torch.as_tensor(decisions).cpu().numpy()]

    def describe(self) -> str:
        """Return the number of classes."""
        return f"{self.outputs:,} classes"


class RightAnswers(Metric):
    """Counts the right answers of many probes, exactly and over processes."""

    right: Tensor
    images: Tensor

    def __init__(self, probes: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(probes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits of shape (P, C, B), labels of shape (B,)."""
        self.right += (logits.max(1).indices == labels).sum(1)
        self.images += len(labels)

    def compute(self) -> Tensor:
        """Return the accuracy of every probe, shape (P,), float64."""
        return self.right.double() / self.images


class Sought(Target):
    """What is to be found in the train split, the gallery, for each query of validation and test.

    Nothing is predicted, so a probe has no outputs.
    """

    outputs = 0
    chance = None
    metric = "ndcg@10"
    measure = "Ranking"
    label = "nDCG@10"
    unit = ""
    items = "queries"
    solvers = ("Search",)
    ties: Tensor
    """Places of the m members of the gallery in an order of which, of equally similar ones, the last goes first."""

    @abstractmethod
    def barred(self, split: str, queries: Tensor) -> Tensor:
        """Return the place in the gallery that each query must not find, -1 for none, shape (n,)."""

    @abstractmethod
    def relevance(self, split: str, queries: Tensor, found: Tensor) -> "Judged":
        """Return how relevant members of the gallery, shape (n, depth), are to n queries, by places; -1 is not."""


class Judged(NamedTuple):
    """How relevant is what was found for n queries, and what there was to be found."""

    gains: Tensor  # 0 or more, relevant from 1 on, shape (n, depth)
    ideal: Tensor  # the largest there are, descending, at least 10 if there are so many, shape (n, J)
    relevant: Tensor  # how many are relevant, shape (n,)


class Judgements(NamedTuple):
    """What was judged of the documents for each of the n queries of a split, at most J for one."""

    documents: Tensor  # places in the corpus, -1 where a query has fewer, shape (n, J), int64
    grades: Tensor  # how relevant they are, from 1 on relevant at all, shape (n, J), int64
    barred: Tensor  # places of documents that are left out of the rankings, -1 for none, shape (n,), int64


class Relevance(Sought):
    """The documents that were judged to be relevant to a query.

    Args:
        identifiers: Ids of the documents, by their places in the corpus.
        judged: The judgements of each split, `val` and `test`.
    """

    def __init__(self, identifiers: Sequence[str], judged: Mapping[str, Judgements]) -> None:
        order = sorted(range(len(identifiers)), key=lambda place: identifiers[place].encode())
        self.ties = torch.tensor(order).argsort()  # by their ids as bytes, as trec_eval has it
        self.judged = judged

    def check(self, images: Labelled, split: str, task: str) -> None:
        """Say how many queries have no relevant document, and where a single query decides about much."""
        if split == "train":
            return
        without = int((self.judged[split].grades < 1).all(1).sum())
        if without:
            rank_zero_info(
                f"{without:,} of the {len(images):,} queries in {split} of {task} have no document that is relevant "
                f"(a score of 1 or more); they count as 0, as in trec_eval."
            )
        if len(images) < 100:
            rank_zero_info(
                f"{split} of {task} is small: one of its {len(images):,} queries is {1 / len(images):.2g} of the "
                f"{self.label}."
            )

    def barred(self, split: str, queries: Tensor) -> Tensor:
        """Return the document that each query must not find, -1 for none, shape (n,)."""
        return self.judged[split].barred.to(queries.device)[queries]

    def relevance(self, split: str, queries: Tensor, found: Tensor) -> Judged:
        """Return what was judged of documents, shape (n, depth)."""
        documents, grades = (each.to(found.device)[queries] for each in self.judged[split][:2])
        grades = grades.clamp(min=0)
        gains = torch.where(found.unsqueeze(2) == documents.unsqueeze(1), grades.unsqueeze(1), 0).sum(2)
        return Judged(gains, grades.sort(descending=True).values, (grades > 0).sum(1))

    def describe(self) -> str:
        """Return what is to be found."""
        return "relevant documents"


class SameClass(Sought):
    """The images of train that are of a query's class; of equally similar ones the first goes first.

    Args:
        labels: Class indices of each split.
    """

    def __init__(self, labels: Mapping[str, Tensor]) -> None:
        self.labels = labels
        self.ties = torch.arange(len(labels["train"]) - 1, -1, -1)
        self.counts = labels["train"].bincount(minlength=1 + max(int(each.max()) for each in labels.values()))

    def check(self, images: Labelled, split: str, task: str) -> None:
        """Do nothing, as the labels are those of classes that were checked."""

    def barred(self, split: str, queries: Tensor) -> Tensor:
        """Return that no image is barred, as queries are none of train."""
        return torch.full_like(queries, -1)

    def relevance(self, split: str, queries: Tensor, found: Tensor) -> Judged:
        """Return 1 for each image of the query's class."""
        wanted = self.labels[split].to(found.device)[queries]
        gains = (self.labels["train"].to(found.device)[found] == wanted.unsqueeze(1)) & (found >= 0)
        relevant = self.counts.to(found.device)[wanted]
        return Judged(gains.long(), (torch.arange(10, device=found.device) < relevant.unsqueeze(1)).long(), relevant)

    def describe(self) -> str:
        """Return what is to be found."""
        return "images of the same class"
