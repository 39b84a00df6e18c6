"""The features of a run as its probes see them: standardised, batch by batch with labels, or summed up in moments."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_modules.features.extractor import Extractor
from lightning_modules.features.moments import Moments


class FeatureStream(nn.Module):
    """Turns batches of images or features into what the probes see, and reads whole splits so.

    Args:
        extractor: Makes features of images.
        standardise: Whether neurons are centred and scaled by their statistics over train.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, extractor: Extractor, standardise: bool) -> None:
        super().__init__()
        self.extractor = extractor
        self.task = extractor.task
        self.trainer = extractor.trainer
        self.features = extractor.features
        self.widths: dict[str, int] = extractor.backbone.widths
        self.standardise = standardise
        self.register_buffer("mean", torch.zeros(sum(self.widths.values())))
        self.register_buffer("std", torch.ones(sum(self.widths.values())))

    def forward(self, batch: Any, split: str) -> Any:
        """Return a batch of images or features of a split with inputs as the probes see them, (B, sum of widths)."""
        inputs = batch.inputs
        if inputs.ndim == 4:
            inputs = self.extractor.represent(inputs, batch.indices, split)
        return batch._replace(inputs=self._standardised(inputs), labels=batch.labels.to(self.mean.device))

    def batches(self, split: str, view: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' share of a split, shape (B, sum of widths), with labels.

        Args:
            split: `train`, as in the epoch of number `view`, or `val`.
            view: Epoch of train; there are as many different ones as views.
        """
        loader = self.task.train_dataloader() if split == "train" else self.task.val_dataloader()
        loader.sampler.set_epoch(view)
        return self._labelled(loader, split)

    def everything(self, split: str) -> Tensor | None:
        """Return all features of the clean view of a split, shape (n, sum of widths); None where they are not kept."""
        views = self.task.features(split) if self.features == "clean" else None
        return None if views is None else self._standardised(views[0][torch.arange(len(views[0]))])

    def moments(self, split: str) -> dict[str, Moments]:
        """Return the moments of each layer over a split (all views of train), summed over processes."""
        views = self.features if isinstance(self.features, int) and split == "train" else 1
        return self._sum(itertools.chain.from_iterable(self.batches(split, view) for view in range(views)))

    def clean_moments(self, products: bool = True) -> dict[str, Moments]:
        """Return the moments of each layer over the clean view of train, with or without the products X'X."""
        if self.features == "clean":
            return self._sum(self.batches("train"), products)
        loader = self.task.clean_loader("train")
        with tqdm(loader, "Extracting train, clean", unit="batch", disable=not self.trainer.is_global_zero) as progress:
            return self._sum(self._labelled(progress, "train"), products)

    def fit_standardisation(self) -> None:
        """Take mean and standard deviation of every neuron from the clean view of train, where they are wanted."""
        if self.standardise:
            moments = self.clean_moments(products=False).values()
            self.mean.copy_(torch.cat([each.mean for each in moments]))
            std = torch.cat([each.variance for each in moments]).sqrt()
            self.std.copy_(std.masked_fill(std == 0, 1.0))

    def _standardised(self, features: Tensor) -> Tensor:
        features = features.to(self.mean.device)
        return (features - self.mean) / self.std if self.standardise else features

    def _labelled(self, loader: Iterable[Any], split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            seen = self(batch, split)
            yield seen.inputs, seen.labels

    def _sum(self, batches: Iterable[tuple[Tensor, Tensor]], products: bool = True) -> dict[str, Moments]:
        outputs, device = self.task.target.outputs, self.mean.device
        moments = {
            layer: Moments(width, outputs, outer=products, device=device) for layer, width in self.widths.items()
        }
        for inputs, labels in batches:
            parts = inputs.split(list(self.widths.values()), dim=1)
            for each, part in zip(moments.values(), parts, strict=True):
                each.update(part, labels)
        for each in moments.values():
            each.reduce(self.reduce)
        return moments

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")
