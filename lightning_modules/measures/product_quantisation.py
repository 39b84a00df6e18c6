"""Product quantisation by FAISS, what else a vector's bytes could be spent on: a reference for subsets in few bits."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules import measures
from lightning_modules.formats import installed
from lightning_modules.measures.measure import Batch, Context, Measure
from lightning_modules.subsets.bases import Ordering
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.selections import FULL

CENTROIDS = 256  # of a byte
SAMPLE = 2**16  # training vectors that centroids are fitted to: 256 for each, as FAISS takes at most
BLOCK = 8192  # vectors that are read at once
SHARES = (32, 16, 8, 4)  # numbers to a byte, where none are named


class ProductQuantisation(Measure):
    """The whole layer by product quantisation: so many bytes, each for as many numbers, next to each other, which
    become the nearest of 256 centroids over train: the table `product_quantisation`.

    Centroids are k-means' by FAISS, of at most 65,536 training images. What takes their place is searched, or a ridge
    probe is fitted to it and judged on it, whatever the solver. Centroids are stored once, 1,024 bytes for each neuron.

    Args:
        bytes: Bytes of a vector, one or a list; they must divide the neurons. Null is a byte for 32, 16, 8 and 4
            neurons, as far as they do.
    """

    table = "product_quantisation"
    needs_clean_features = True

    def __init__(self, bytes: int | list[int] | None = None) -> None:
        super().__init__()
        self.bytes = [bytes] if isinstance(bytes, int) else bytes

    def setup(self, context: Context) -> None:
        """Refuse what FAISS could not do later on.

        Raises:
            MisconfigurationException: If FAISS is not installed, a number of bytes does not divide the neurons, or
                there are fewer training images than centroids.
        """
        super().setup(context)
        installed("faiss", "ProductQuantisation")
        for layer, width in context.coordinates.widths.items():
            for size in self._sizes(width):
                if size < 1 or width % size:
                    divisors = ", ".join(str(each) for each in range(1, width + 1) if width % each == 0)
                    raise MisconfigurationException(
                        f"model.measures: ProductQuantisation.bytes has {size}, which does not divide the {width:,} "
                        f"neurons of {layer}; give one of {divisors}."
                    )
        count = len(context.stream.task.images["train"])
        if count < CENTROIDS:
            raise MisconfigurationException(
                f"ProductQuantisation fits {CENTROIDS} centroids, but train has {count}; leave it out."
            )

    def _sizes(self, width: int) -> list[int]:
        return [width // each for each in SHARES if width % each == 0] if self.bytes is None else self.bytes

    def reset(self) -> None:
        """Forget the split."""
        super().reset()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, batch: Batch) -> None:
        """Note this process' share of the test split."""
        if self.split == "test":
            self.seen.append((batch.inputs, batch.labels, batch.indices))

    def compute(self) -> Mapping[str, pd.DataFrame]:
        """Return the table with the test: the headline metric by layer and bytes."""
        if self.split != "test":
            return {}
        rows = []
        for layer, width in self.context.coordinates.widths.items():
            for size in self._sizes(width):
                found = {"layer": layer, "bytes": size, "split": self.split}
                rows.append(found | self._measured(layer, width, _quantiser(self.context, layer, size)))
        return {self.table: pd.DataFrame(rows)}

    def _measured(self, layer: str, width: int, quantised: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the headline metric, by its name, of a layer's vectors after `quantised`."""
        context, target = self.context, self.context.target
        full = next(each for each in context.probes if each.layer == layer and each.selection == FULL)
        kind = getattr(measures, target.measure) if isinstance(target.measure, str) else target.measure
        measure = kind()
        measure.setup(
            replace(
                context,
                probes=[full],
                coordinates=Coordinates([full], {layer: width}).to(context.device),
                features=lambda *rows: quantised(_known(context.features(*rows))),
            )
        )
        measure.to(context.device).reset()
        measure.split = self.split
        logits = _ridge(context, layer, width, quantised) if target.outputs else lambda vectors: vectors[:0]
        in_full = getattr(context.solver, "quantised", "both") == "stored"
        for inputs, labels, indices in self.seen:
            vectors = context.coordinates.by_layer(inputs)[layer] if in_full else quantised(inputs)
            measure.update(Batch(vectors, logits(vectors), labels, indices))
        name = target.metric
        return {name: float(measure.compute()[name])}  # of a single probe a number


def _known(features: Tensor | None) -> Tensor:
    assert features is not None  # as features are clean
    return features


def _quantiser(context: Context, layer: str, size: int) -> Callable[[Tensor], Tensor]:
    """Return what takes features, shape (B, sum of widths), to centroids of a layer's vectors, (B, D), of `size` bytes.

    Fitted to evenly spaced rows of train, the same in every process.
    """
    faiss = installed("faiss", "ProductQuantisation")

    def of_layer(features: Tensor) -> Tensor:
        return context.coordinates.by_layer(features)[layer].float().cpu().contiguous()

    count = len(context.stream.task.images["train"])
    blocks = (_known(context.features("train", start, start + BLOCK)) for start in range(0, count, BLOCK))
    quantiser = faiss.ProductQuantizer(context.coordinates.widths[layer], size, 8)
    quantiser.cp.min_points_per_centroid = 1  # below which it would warn for every byte
    quantiser.train(torch.cat([of_layer(block[:: -(-count // SAMPLE)]) for block in blocks]).numpy())

    def quantised(features: Tensor) -> Tensor:
        vectors = quantiser.decode(quantiser.compute_codes(of_layer(features).numpy()))
        return torch.from_numpy(vectors).to(features.device)

    return quantised


def _ridge(
    context: Context, layer: str, width: int, quantised: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return the logits, shape (1, C, B), of a ridge probe on such vectors of train, shape (B, D)."""
    from lightning_modules.probes.ridge import PENALTIES, ridge_probes

    train, val = (context.stream.moments(split, lambda each: {layer: quantised(each)}) for split in ("train", "val"))
    ordering = Ordering(torch.arange(width), [width])
    ((probe,),) = ridge_probes(train[layer], val[layer], [ordering], PENALTIES)
    return lambda vectors: (probe.weight @ vectors.double().t() + probe.bias.unsqueeze(1)).unsqueeze(0).float()
