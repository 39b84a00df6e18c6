"""What is counted of every probe, exactly: right answers, losses, and what probes say together."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each probe's cross-entropy summed over the batch, shape (P,), from logits (P, C, B) and labels (B,)."""
    return F.cross_entropy(logits, labels.expand(len(logits), -1), reduction="none").sum(1)


def squared_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each probe's squared error to one-hot labels, summed over the batch, shape (P,); arguments as above."""
    return (logits - F.one_hot(labels, logits.shape[1]).t()).square().sum((1, 2))


class ProbeScores(Metric):
    """Exact counts for every probe: right answers by class, images by class, and the summed loss.

    Args:
        probes: Number of probes.
        classes: Number of classes.
        references: For each probe the place of the full layer's probe that it is paired with, shape (P,); None where
            no pairs are wanted.
        squared: Whether the loss is the squared error to one-hot labels, summed over classes, and not cross-entropy.
    """

    full_state_update = False
    correct: Tensor
    images: Tensor
    loss: Tensor
    gained: Tensor
    lost: Tensor

    def __init__(self, probes: int, classes: int, references: Tensor | None = None, squared: bool = False) -> None:
        super().__init__()
        self.references = references
        self.squared = squared
        self.add_state("correct", torch.zeros(probes, classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(probes, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("gained", "lost") if references is not None else ():
            self.add_state(name, torch.zeros(probes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits of shape (P, C, B), labels of shape (B,)."""
        hits = logits.max(1).indices == labels  # as argmax, and six times as fast over classes that lie apart
        self.correct.index_add_(1, labels, hits.long())
        self.images.index_add_(0, labels, torch.ones_like(labels))
        self.loss += (squared_errors if self.squared else losses)(logits, labels).double()
        if self.references is not None:
            reference = hits[self.references.to(hits.device)]
            self.gained += (hits & ~reference).sum(1)
            self.lost += (reference & ~hits).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Return what was counted.

        Returns:
            `accuracy` and mean `loss`, shape (P,), float64; `correct`, shape (P, C), and `images`, shape (C,); and of
            pairs, shape (P,): images that the probe gets right and its reference does not (`gained`), and the reverse
            (`lost`).
        """
        total = self.images.sum()
        scores = {
            "accuracy": self.correct.sum(1).double() / total,
            "loss": self.loss / total,
            "correct": self.correct.clone(),
            "images": self.images.clone(),
        }
        if self.references is not None:
            scores |= {"gained": self.gained.clone(), "lost": self.lost.clone()}
        return scores


class EnsembleScores(Metric):
    """Exact counts of what several probes say together, by averaged probabilities and by majority vote.

    Args:
        ensembles: Places of the members of each.
        probabilities: Whether logits are scores of a softmax; else they are averaged as they are, as those of least
            squares are estimates of probabilities already.
    """

    full_state_update = False
    RULES = ("mean_probability", "majority_vote")
    correct: Tensor
    images: Tensor

    def __init__(self, ensembles: Sequence[Sequence[int]], probabilities: bool) -> None:
        super().__init__()
        self.ensembles = ensembles
        self.probabilities = probabilities
        self.add_state("correct", torch.zeros(len(ensembles), 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits of shape (P, C, B), labels of shape (B,). A tied vote goes to the higher average."""
        self.images += len(labels)
        for place, members in enumerate(self.ensembles):
            of_members = logits[list(members)]
            mean = (of_members.softmax(1) if self.probabilities else of_members).mean(0)
            votes = F.one_hot(of_members.argmax(1), logits.shape[1]).sum(0).t()  # (C, B)
            leading = mean.masked_fill(votes < votes.amax(0), -torch.inf)
            self.correct[place, 0] += (mean.argmax(0) == labels).sum()
            self.correct[place, 1] += (leading.argmax(0) == labels).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `correct`, shape (ensembles, rules), and `images`."""
        return {"correct": self.correct.clone(), "images": self.images.clone()}
