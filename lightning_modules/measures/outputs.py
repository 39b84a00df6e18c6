"""The metrics of several labels and of numbers, from all of a split's outputs: mean average precision and R^2."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from lightning_modules.measures.accuracy import ByClass
from lightning_modules.measures.measure import Batch, Context
from lightning_modules.results.tables import PER_IMAGE, Column


class _OutputsMetric(ByClass):
    """What the target judges of each output of every probe, its mean, and the mean loss.

    Gives the table `classes` where there are several outputs: the metric by probe and output. Costs 4 bytes for each
    output, probe and image while a split is evaluated.
    """

    needs_labels = True
    batches: list[tuple[Tensor, Tensor, Tensor]]
    loss: Tensor

    def setup(self, context: Context) -> None:
        """Add the sums of the losses."""
        super().setup(context)
        zeros = torch.zeros(len(context.probes), dtype=torch.float64, device=context.device)
        self.add_state("loss", zeros, dist_reduce_fx="sum")

    def reset(self) -> None:
        """Forget the outputs."""
        super().reset()
        self.batches = []

    def update(self, batch: Batch) -> None:
        """Note a batch."""
        self.loss += self.context.solver.loss(self.context.target, batch.logits, batch.labels).double()
        self.batches.append((batch.logits, batch.labels, batch.indices))

    def compute(self) -> Mapping[str, Tensor | pd.DataFrame]:
        """Return the columns, the table, and what each image adds to each probe's metric, shape (P, n)."""
        logits, labels, indices = zip(*self.batches, strict=True)
        target, probes, places = self.context.target, self.context.probes, torch.cat(indices)
        images = int(self.context.reduce(torch.tensor(len(places), device=self.loss.device)))

        def everywhere(mine: Tensor) -> Tensor:
            """Return rows of all processes in the order of the split: each has zeros where others have images."""
            return self.context.reduce(mine.new_zeros(images, mine.shape[1]).index_copy_(0, places, mine))

        wanted, of_output, of_image = everywhere(torch.cat(labels)), [], []
        for probe in range(len(probes)):
            found = everywhere(torch.cat([batch[probe].t() for batch in logits]))
            (added,) = target.judge(found.t().unsqueeze(0), wanted)  # (C, n)
            of_output.append(added.mean(1))
            of_image.append(added.nanmean(0))
        by_output = torch.stack(of_output)
        computed: dict[str, Tensor | pd.DataFrame] = {
            "images": torch.full((len(probes),), images),
            target.metric: by_output.nanmean(1),
            "loss": self.loss / images,
            PER_IMAGE: torch.stack(of_image).float(),
        }
        if target.outputs > 1:
            keys = ["layer", "selection", "bits", "fraction", "seed"]
            rows = pd.DataFrame(list(probes))[keys].loc[lambda rows: rows.index.repeat(target.outputs)]
            counts = target.occurrences(wanted).repeat(len(probes)).cpu().numpy()
            rows = rows.assign(split=self.split, **{"class": target.names * len(probes), "images": counts})
            computed[self.table] = rows.assign(**{target.metric: by_output.flatten().cpu().numpy()})
        return computed


class MeanAveragePrecision(_OutputsMetric):
    """Mean over labels of the average precision, as scikit-learn has it; labels that no image has do not count."""

    columns = (
        Column("mean_average_precision", "mean average precision", "%", digits=1, logged=True),
        *map(Column, ("images", "loss")),
    )


class R2(_OutputsMetric):
    """R^2, one minus the squared error over that of the split's mean; the mean over numbers."""

    columns = (Column("r2", "R²", logged=True), *map(Column, ("images", "loss")))
