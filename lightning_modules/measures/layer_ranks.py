"""How many directions a layer uses: participation ratio and effective rank."""

from collections.abc import Mapping

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

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Moments] = {}

    def reset(self) -> None:
        """Start the sums anew."""
        super().reset()
        self.sums = {}

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        for layer, part in self.context.coordinates.by_layer(batch.inputs).items():
            self.moments(layer).update(part, batch.labels)

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Sum over processes and return the table of layers."""
        rows = []
        for layer, width in self.context.coordinates.widths.items():
            moments = self.moments(layer)
            moments.reduce(self.context.reduce)
            rows.append(
                {
                    "layer": layer,
                    "width": width,
                    "split": self.split,
                    "images": int(moments.count),
                    "participation_ratio": participation_ratio(moments),
                    "effective_rank": effective_rank(moments),
                }
            )
        return {"layers": pd.DataFrame(rows)}

    def moments(self, layer: str) -> Moments:
        """Return a layer's sums, begun where they are not."""
        if layer not in self.sums:
            self.sums[layer] = self.begin(layer)
        return self.sums[layer]

    def begin(self, layer: str) -> Moments:
        """Return empty sums of a layer."""
        width, classes = self.context.coordinates.widths[layer], len(self.context.target.classes)
        return Moments(width, classes, device=self.context.device)


def participation_ratio(moments: Moments) -> float:
    """Return how many directions share the variance evenly: tr(C)^2 / |C|_F^2 of the covariance C; 1 to D."""
    scatter = moments.scatter
    return float(scatter.trace().square() / scatter.square().sum())


def effective_rank(moments: Moments) -> float:
    """Return RankMe (Garrido et al., ICML 2023): the exponential of the entropy of the normalised singular values.

    As published of the representations as they are, not centred; without the published 1e-7 beside every singular
    value, which would add 0.2 % for a thousand neurons that have none. Singular values that float32 cannot tell from
    zero count as zero.
    """
    mean, count = moments.mean, moments.count
    eigenvalues = torch.linalg.eigvalsh(moments.scatter + count * mean.outer(mean)).flip(0)[: int(count)]
    eigenvalues = eigenvalues[eigenvalues > rounding(moments.width) * eigenvalues[0]]
    shares = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return float(torch.special.entr(shares).sum().exp())
