"""Ensembles: what the probes of several subsets say together, beside one probe on as many neurons."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.measures.measure import Batch, Context, Measure, Picture
from lightning_modules.results.results import Results
from lightning_modules.results.tables import by_series
from lightning_modules.subsets import plan
from lightning_modules.subsets.selections import FULL

RULES = ("mean_probability", "mean_logit", "majority_vote")
COLUMNS = ["layer", "selection", "bits", "fraction", "members", "neurons", "rule", "split", "images", "accuracy"]
COLUMNS += ["single_fraction", "single_neurons", "single_accuracy"]


class Ensembles(Measure):
    """Accuracy of a fraction's subsets together: the table `ensembles`.

    By averaged probabilities, by averaged logits as in the paper, and by majority vote, in which a tie goes to the
    higher average probability. Costs a further probe for each fraction and seed of a seeded selection: on
    as many neurons as the subsets of all seeds hold together, to compare with.
    """

    table = "ensembles"
    needs_comparison_probes = True
    needs_classes = True
    correct: Tensor
    single: Tensor
    images: Tensor

    def setup(self, context: Context) -> None:
        """Add the counts: right answers by ensemble and rule, of every single probe, and images."""
        super().setup(context)
        self.members = plan.ensembles(context.probes, context.fractions)
        counts = torch.zeros(len(self.members), len(RULES), dtype=torch.int64, device=context.device)
        self.add_state("correct", counts, dist_reduce_fx="sum")
        self.add_state("single", counts.new_zeros(len(context.probes)), dist_reduce_fx="sum")
        self.add_state("images", counts.new_zeros(()), dist_reduce_fx="sum")

    def update(self, batch: Batch) -> None:
        """Count a batch."""
        self.images += len(batch.labels)
        self.single += (batch.predicted == batch.labels).sum(1)
        for index, members in enumerate(self.members):
            mean = self.context.solver.probabilities(batch.logits[members]).mean(0)
            votes = one_hot(batch.predicted[members], len(mean)).sum(0).t()  # (C, B)
            leading = mean.masked_fill(votes < votes.amax(0), -torch.inf)
            logits = batch.logits[members].mean(0)
            for place, decisive in enumerate((mean, logits, leading)):
                self.correct[index, place] += (decisive.argmax(0) == batch.labels).sum()

    def compute(self) -> Mapping[str, pd.DataFrame]:
        """Return the table; the single probe beside an ensemble is the full layer's where none has as many neurons."""
        images, rows = int(self.images), []
        single = pd.DataFrame(list(self.context.probes)).assign(accuracy=self.single.cpu().numpy() / images)
        for members, correct in zip(self.members, self.correct.tolist(), strict=True):
            probe = self.context.probes[members[0]]
            seeds = [self.context.probes[member].seed for member in members]
            width = self.context.coordinates.widths[probe.layer]
            neurons = plan.held_together(probe.selection, probe.neurons, seeds, width)
            of_layer = single[single["layer"] == probe.layer]
            alike = of_layer[(of_layer["neurons"] == neurons) & (of_layer["bits"] == probe.bits)]
            alike = alike[alike["selection"] == probe.selection]
            beside = of_layer[of_layer["selection"] == FULL] if alike.empty else alike
            of_single = (beside["fraction"].iloc[0], beside["neurons"].iloc[0], beside["accuracy"].mean())
            for rule, count in zip(RULES, correct, strict=True):
                subsets = (probe.layer, probe.selection, probe.bits, probe.fraction, len(members), neurons)
                rows.append([*subsets, rule, self.split, images, count / images, *of_single])
        return {"ensembles": pd.DataFrame(rows, columns=COLUMNS)} if rows else {}

    def lines(self, rows: pd.DataFrame) -> dict[str, pd.Series]:
        """Return the accuracy by rule."""
        keys = ["layer", "selection", "fraction", "split"]
        return {
            f"ensemble of {members}, {rule}": group.set_index(keys)["accuracy"]
            for (members, rule), group in by_series(rows).groupby(["members", "rule"], sort=False)
        }

    def pictures(self, results: Results, split: str) -> dict[str, Picture]:
        """Draw accuracy against the neurons used: ensembles by rule, beside single probes with as many."""
        from lightning_modules.reporting import figures

        rows = results.table(self.table, split)
        if rows.empty:
            return {}
        series = rows["members"].astype(str) + " probes, " + rows["rule"].str.replace("_", " ")
        groups = by_series(rows).assign(series=series).groupby(["layer", "selection"], sort=False)
        figure, panels = figures.panels(len(groups), results.title)
        styles = figures.styles(["single", *series])
        for axes, ((layer, selection), group) in zip(panels, groups, strict=True):
            single = group.drop_duplicates("single_neurons").sort_values("single_neurons")
            figures.line(axes, single, styles["single"], "one probe", "single_accuracy", x="single_neurons", scale=100)
            for name, points in group.sort_values("neurons").groupby("series", sort=False):
                figures.line(axes, points, styles[name], name, "accuracy", x="neurons", scale=100)
            figures.logarithmic_axis(axes, [*group["neurons"], *group["single_neurons"]], "neurons together")
            figures.value_axis(axes, f"{split} accuracy (%)", f"{layer}, {selection}")
        figures.legend(figure, panels)
        caption = "Several subsets' probes together, beside one probe that sees as many neurons."
        return {"ensembles": Picture(figure, caption)}
