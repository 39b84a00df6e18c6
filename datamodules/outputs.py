"""Targets whose labels are a matrix, one column for each output of a probe: several labels at once, and numbers."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.images import Labelled
from datamodules.targets import Predicted

WORST = -1e300  # score of a probe whose outputs are no numbers any more


class Outputs(Predicted):
    """A target with labels of shape (n, C), a column for each of the outputs that `names` names.

    The headline metric is the mean of what each output reaches by itself.
    """

    dtype: ClassVar[torch.dtype]  # of the labels
    doubt: ClassVar[float]  # loss of an output of which nothing is known

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.outputs = len(self.names)
        self.guess = self.outputs * self.doubt

    @abstractmethod
    def judge(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return what each image adds to each output's metric, shape (P, C, n), float64.

        The mean over images is the metric, and the mean with other weights is, to first order, the metric of images
        weighted so: it is the metric plus its influence function (Hampel, 1974). Not a number for an output whose
        metric is not defined on these labels.

        Args:
            outputs: Of the probes, shape (P, C, n).
            labels: Shape (n, C).
        """

    @abstractmethod
    def occurrences(self, labels: Tensor) -> Tensor:
        """Return how many images each output is judged by, int64, shape (C,), from labels of shape (n, C)."""

    def strata(self, labels: Tensor) -> Tensor:
        """Return that all images are alike, as there are no classes to stratify by, shape (n,)."""
        return torch.zeros(len(labels), dtype=torch.int64)

    def scores(self, probes: int) -> Metric:
        """Return the metric that scores so many probes, from all of their outputs."""
        return Scores(self)

    def provenance(self) -> dict[str, Any]:
        """Return the names of the outputs."""
        return {"classes": self.names}

    def _refuse(self, images: Labelled, split: str, task: str, wrong: Tensor, right: str) -> None:
        """Name the first label where `wrong`, shape (n, C), is true."""
        if wrong.any():
            index, column = wrong.nonzero()[0].tolist()
            raise MisconfigurationException(
                f"{self.names[column]!r} of {images.name(index)} in {split} of {task} is "
                f"{images.labels[index, column].item():g}; {right}."
            )


class MultiLabel(Outputs):
    """Any number of labels for each image, a matrix of 0 and 1; the loss is binary cross-entropy, summed over labels.

    The metric is the mean average precision over the labels that occur in a split.
    """

    metric = "mean_average_precision"
    measure = "MeanAveragePrecision"
    label = "mean average precision"
    unit = "%"
    parts = "labels"
    solvers = ("SGD", "Logistic", "Ridge")
    curvature = 0.25
    doubt = math.log(2)  # of a label that is as likely as not
    dtype = torch.float32
    chance = None

    def check(self, images: Labelled, split: str, task: str) -> None:
        """Refuse what is neither 0 nor 1; say which labels no probe can learn, or do not count in a split."""
        self._refuse(
            images,
            split,
            task,
            (images.labels != 0) & (images.labels != 1),
            "with data.target multilabel it must be 0 or 1. Indices of classes are for data.target classes, other "
            "numbers for regression",
        )
        positive = images.labels.sum(0)
        without, said = positive == 0, f"1 for no image of {split}"
        if split == "train":
            without, said = without | (positive == len(images)), "the same for all of train"
        if without.all():
            raise MisconfigurationException(f"All {self.outputs} labels of {task} are {said}; leave those out.")
        if without.any():
            named = [self.names[column] for column in without.nonzero()[:, 0]]
            so = "so that no probe can learn them" if split == "train" else "and do not count there"
            rank_zero_info(
                f"{len(named)} of {self.outputs} labels of {task} are {said}, {so}: {', '.join(named[:5])}"
                f"{', ...' if len(named) > 5 else ''}."
            )

    def fit(self, labels: Tensor) -> None:
        """Take the chance level from train: of guesses, the average precision is the share of images with a label."""
        self.chance = float(labels.mean(0)[labels.any(0)].double().mean())

    def occurrences(self, labels: Tensor) -> Tensor:
        """Return how many images have each label, shape (C,)."""
        return labels.long().sum(0)

    def matrix(self, labels: Tensor) -> Tensor:
        """Return 1 for a label and -1 for none, shape (B, C), float64."""
        return 2 * labels.double() - 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each probe's binary cross-entropy, summed over the batch and labels, shape (P,)."""
        wanted = labels.t().to(logits.dtype).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum((1, 2))

    def bends(self, logits: Tensor) -> Tensor:
        """Return the second derivative of the loss by each logit, shape (..., C, B)."""
        shares = logits.sigmoid()
        return shares * (1 - shares)

    def judge(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return each label's average precision, as scikit-learn has it, plus each image's influence, (P, C, n).

        Images of equal scores are found together. Where no image has a label it is not a number.
        """
        order = outputs.argsort(dim=-1, descending=True)
        scores, wanted = outputs.gather(-1, order), labels.t().double().expand_as(outputs).gather(-1, order)
        places = torch.arange(scores.shape[-1], device=scores.device)
        new = torch.ones_like(scores, dtype=torch.bool)
        new[..., 1:] = scores[..., 1:] != scores[..., :-1]
        last = new.roll(-1, -1)
        last[..., -1] = True
        begins = torch.where(new, places, 0).cummax(-1).values  # of the images with the same score
        ends = torch.where(last, places, len(places)).flip(-1).cummin(-1).values.flip(-1)
        found, positive = wanted.cumsum(-1).gather(-1, ends), wanted.sum(-1, keepdim=True)
        seen = (ends + 1).double()
        precision = found / seen
        average = (wanted * precision).sum(-1, keepdim=True) / positive

        def from_here(values: Tensor) -> Tensor:
            """Return sums over an image, those of its score and all that come later."""
            before = F.pad(values.cumsum(-1), (1, -1))
            return values.sum(-1, keepdim=True) - before.gather(-1, begins)

        # What one more image like this changes: itself, and the precision at all that are found with it or later.
        change = wanted * (precision - average) + wanted * from_here(wanted / seen)
        change -= from_here(wanted * found / seen.square())
        influence = torch.empty_like(change).scatter_(-1, order, change * (len(places) / positive))
        return average + influence

    def decide(self, logits: Tensor) -> Tensor:
        """Return the labels that are more likely than not, as 0 and 1, shape (P, B, C)."""
        return (logits > 0).long().transpose(1, 2)

    def name(self, decisions: Tensor) -> np.ndarray:
        """Return the names of the labels of each image, with semicolons between, from 0 and 1 of shape (..., C)."""
        rows = decisions.cpu().flatten(0, -2) > 0
        words = [";".join(name for name, there in zip(self.names, row, strict=True) if there) for row in rows.tolist()]
        return np.array(words, dtype=object).reshape(decisions.shape[:-1])

    def describe(self) -> str:
        """Return the number of labels."""
        return f"{self.outputs:,} label{'s' * (self.outputs > 1)}"


class Regression(Outputs):
    """One number or several for each image; the loss is the squared error of the numbers, standardised by train.

    The metric is R^2, the mean over numbers.
    """

    metric = "r2"
    measure = "R2"
    label = "R²"
    unit = ""
    parts = "numbers"
    solvers = ("SGD", "Ridge")
    curvature = 2.0
    quadratic = True
    doubt = 1.0  # where the mean of train is told
    dtype = torch.float64
    chance = 0.0
    mean: Tensor
    std: Tensor

    def check(self, images: Labelled, split: str, task: str) -> None:
        """Refuse what is not finite, and a number that is the same for all images of a split."""
        self._refuse(images, split, task, ~images.labels.isfinite(), "it must be a finite number")
        constant = (images.labels == images.labels[0]).all(0).nonzero()[:, 0].tolist()
        if constant:
            raise MisconfigurationException(
                f"{self.names[constant[0]]!r} is {images.labels[0, constant[0]].item():g} for all of {split} of "
                f"{task}, so that nothing can be told of it; leave it out, or take a larger split."
            )

    def fit(self, labels: Tensor) -> None:
        """Take mean and standard deviation of each number over train."""
        self.mean, self.std = labels.mean(0), labels.std(0, correction=0)

    def occurrences(self, labels: Tensor) -> Tensor:
        """Return the number of images, shape (C,)."""
        return torch.full((self.outputs,), len(labels))

    def matrix(self, labels: Tensor) -> Tensor:
        """Return the numbers, standardised, shape (B, C), float64."""
        return (labels - self.mean.to(labels.device)) / self.std.to(labels.device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each probe's squared error of standardised numbers, summed over the batch and numbers, shape (P,)."""
        return self.squared_error(logits, labels)

    def bends(self, logits: Tensor) -> Tensor:
        """Return the second derivative of the loss by each output, which is always 2."""
        return torch.full_like(logits, self.curvature)

    def judge(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return R^2 of each number, plus each image's influence, (P, C, n)."""
        wanted = self.matrix(labels).t()
        errors, away = (outputs - wanted).square(), (wanted - wanted.mean(1, keepdim=True)).square()
        error, spread = errors.mean(-1, keepdim=True), away.mean(-1, keepdim=True)
        return 1 - error / spread - (errors - error * away / spread) / spread

    def decide(self, logits: Tensor) -> Tensor:
        """Return the numbers in their own units, shape (P, B, C), float64."""
        return logits.transpose(1, 2).double() * self.std.to(logits.device) + self.mean.to(logits.device)

    def name(self, decisions: Tensor) -> np.ndarray:
        """Return the numbers of each image as words, with semicolons between, from numbers of shape (..., C)."""
        words = [";".join(f"{value:.7g}" for value in row) for row in decisions.cpu().flatten(0, -2).tolist()]
        return np.array(words, dtype=object).reshape(decisions.shape[:-1])

    def provenance(self) -> dict[str, Any]:
        """Return the names of the numbers, and the units that a probe's outputs are in."""
        return super().provenance() | {"units": {"mean": self.mean.tolist(), "std": self.std.tolist()}}

    def describe(self) -> str:
        """Return how many numbers there are."""
        return f"{self.outputs:,} number{'s' * (self.outputs > 1)} to predict"


class Scores(Metric):
    """The headline metric of many probes, exactly and over processes, from the outputs for all images of a split."""

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, target: Outputs) -> None:
        super().__init__()
        self.target = target
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take a batch: logits of shape (P, C, B), labels of shape (B, C)."""
        self.logits.append(logits.permute(2, 0, 1))
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the metric of every probe, shape (P,), float64; that of outputs which are no numbers is very low."""
        logits, labels = dim_zero_cat(self.logits).permute(1, 2, 0), dim_zero_cat(self.labels)
        found = [self.target.judge(each.unsqueeze(0), labels).mean(2).nanmean(1) for each in logits]
        return torch.cat(found).nan_to_num(nan=WORST, neginf=WORST)


def of_columns(kind: str, names: Mapping[str, Sequence[str]]) -> Outputs:
    """Return the target that `data.target` names, from the names of each split's columns, which must be the same."""
    for split, its in names.items():
        if list(its) != list(names["train"]):
            raise MisconfigurationException(
                f"{split} has the labels {', '.join(its)}, and train has {', '.join(names['train'])}; they must agree."
            )
    return TARGETS[kind](names["train"])


def check_columns(option: str, columns: Any, kind: str) -> None:
    """Refuse a list of columns where `data.target` takes a single one."""
    if isinstance(columns, list) and kind not in TARGETS:
        raise MisconfigurationException(
            f"data.{option} is a list, and data.target {kind} takes a single one; set data.target multilabel, where "
            f"they are 0 and 1, or regression."
        )


TARGETS: dict[str, type[Outputs]] = {"multilabel": MultiLabel, "regression": Regression}
"""By what `data.target` calls them."""
