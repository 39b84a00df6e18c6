"""How many directions a layer uses: participation ratio and effective rank."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lightning_modules.features.moments import Moments, rounding
from lightning_modules.measures.measure import Batch, Measure


class LayerRanks(Measure):
    """Participation ratio and effective rank of every layer: the table `layers`. `CKA` gives it, too.

    Costs n D^2 operations for n images of D neurons in float64, a decomposition of D^3, and D^2 numbers of memory.
    """

    table = "layers"
    second_moments = True

    @cached_property
    def sums(self) -> dict[str, Any]:
        """The sums of each layer, begun when a split is measured, as a subset may only be known then."""
        return {layer: self.begin(layer, width) for layer, width in self.context.coordinates.widths.items()}

    def reset(self) -> None:
        """Start the sums anew."""
        super().reset()
        self.__dict__.pop("sums", None)

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        targets = self.context.target.matrix(batch.labels)
        for layer, part in self.context.coordinates.by_layer(batch.inputs).items():
            self.sums[layer].update(part, targets)

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Sum over processes and return the table of layers.

        Participation ratio is how many directions share the variance evenly: tr(C)^2 / |C|_F^2 of the covariance C.
        """
        rows = []
        for layer, moments in self.sums.items():
            moments.reduce(self.context.reduce)
            scatter = moments.scatter
            participation_ratio = float(scatter.trace().square() / scatter.square().sum())
            rank = effective_rank(moments, scatter)
            rows.append([layer, moments.width, self.split, int(moments.count), participation_ratio, rank])
        columns = ["layer", "width", "split", "images", "participation_ratio", "effective_rank"]
        return {"layers": pd.DataFrame(rows, columns=columns)}

    def begin(self, layer: str, width: int) -> Moments:
        """Return empty sums of a layer."""
        return Moments(width, self.context.target.outputs, device=self.context.device)


def effective_rank(moments: Moments, scatter: Tensor) -> float:
    """Return RankMe (Garrido et al., ICML 2023): the exponential of the entropy of the normalised singular values.

    As published of the representations as they are, not centred; without the published 1e-7 beside every singular
    value, which would add 0.2 % for a thousand neurons that have none. Singular values that float32 cannot tell from
    zero count as zero.
    """
    mean, count = moments.mean, moments.count
    eigenvalues = torch.linalg.eigvalsh(scatter + count * mean.outer(mean)).flip(0)[: int(count)]
    eigenvalues = eigenvalues[eigenvalues > rounding(moments.width) * eigenvalues[0]]
    shares = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return float(torch.special.entr(shares).sum().exp())
