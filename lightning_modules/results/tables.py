"""The tables a run leaves, from what was counted of its probes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from lightning_modules.measures.accuracy import EnsembleScores
from lightning_modules.results import curves as measures
from lightning_modules.subsets.plan import Probe, held_together
from lightning_modules.subsets.selections import FULL

Evaluated = dict[str, dict[str, Tensor]]
"""By split, what `ProbeScores` computed of the P probes, and `cka` and `cka_debiased`, shape (P,)."""


def results(
    probes: Sequence[Probe],
    widths: dict[str, int],
    evaluated: Evaluated,
    of_run: dict[str, Any],
    of_probes: dict[str, Sequence[Any]],
) -> pd.DataFrame:
    """Return one row per probe and split, with the columns of `results.csv`.

    Args:
        probes: The P probes.
        widths: D of each layer.
        evaluated: What was counted.
        of_run: What all rows share, with `task` and `backbone`.
        of_probes: Further columns, with P values each.
    """
    head = {name: of_run[name] for name in ("task", "backbone")}
    tables = []
    for split, scores in evaluated.items():
        correct, images = scores["correct"].cpu().numpy(), scores["images"].cpu().numpy()
        inequality = measures.class_inequality(correct, images)
        with np.errstate(invalid="ignore"):
            by_class = correct / images
        columns = {
            **head,
            "layer": [probe.layer for probe in probes],
            "selection": [probe.selection for probe in probes],
            "fraction": [probe.fraction for probe in probes],
            "neurons": [probe.neurons for probe in probes],
            "width": [widths[probe.layer] for probe in probes],
            "seed": [probe.seed for probe in probes],
            "split": split,
            "images": int(images.sum()),
            "accuracy": scores["accuracy"].cpu().numpy(),
            "loss": scores["loss"].cpu().numpy(),
            **{name: value for name, value in of_run.items() if name not in head},
            **of_probes,
            "mean_class_accuracy": by_class[:, images > 0].mean(1),
            **inequality,
        }
        for name in ("cka", "cka_debiased", "gained", "lost"):
            if name in scores:
                columns[name] = scores[name].cpu().numpy()
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def classes(probes: Sequence[Probe], names: Sequence[str], evaluated: Evaluated) -> pd.DataFrame:
    """Return one row per probe, split and class, with the columns of `classes.csv`."""
    count = len(names)
    tables = [
        pd.DataFrame(
            {
                **{
                    key: np.repeat([getattr(probe, key) for probe in probes], count)
                    for key in ("layer", "selection", "fraction", "seed")
                },
                "split": split,
                "class": list(names) * len(probes),
                "images": np.tile(scores["images"].cpu().numpy(), len(probes)),
                "correct": scores["correct"].cpu().numpy().ravel(),
            }
        )
        for split, scores in evaluated.items()
    ]
    return pd.concat(tables, ignore_index=True)


def ensembles(
    probes: Sequence[Probe],
    members: Sequence[Sequence[int]],
    widths: dict[str, int],
    counted: dict[str, dict[str, Tensor]],
    results: pd.DataFrame,
) -> pd.DataFrame:
    """Return one row per ensemble, rule and split, beside probes with as many neurons, for `ensembles.csv`.

    Args:
        probes: The P probes.
        members: Places of the members of each ensemble.
        widths: D of each layer.
        counted: By split, what `EnsembleScores` computed.
        results: Rows as in `results.csv`.
    """
    rows = []
    for split, scores in counted.items():
        for place, places in enumerate(members):
            probe = probes[places[0]]
            seeds = [probes[member].seed for member in places]
            neurons = held_together(probe.selection, probe.neurons, seeds, widths[probe.layer])
            of_layer = results[(results["split"] == split) & (results["layer"] == probe.layer)]
            alike = of_layer[(of_layer["selection"] == probe.selection) & (of_layer["neurons"] == neurons)]
            single = of_layer[of_layer["selection"] == FULL] if alike.empty else alike
            for rule, correct in zip(EnsembleScores.RULES, scores["correct"][place].tolist(), strict=True):
                rows.append(
                    {
                        "layer": probe.layer,
                        "selection": probe.selection,
                        "fraction": probe.fraction,
                        "members": len(places),
                        "neurons": neurons,
                        "rule": rule,
                        "split": split,
                        "images": int(scores["images"]),
                        "accuracy": correct / int(scores["images"]),
                        "single_fraction": single["fraction"].iloc[0],
                        "single_neurons": single["neurons"].iloc[0],
                        "single_accuracy": single["accuracy"].mean(),
                    }
                )
    return pd.DataFrame(rows)


def predictions(
    probes: Sequence[Probe], images: Any, classes: Sequence[str], predicted: Tensor, several_layers: bool
) -> pd.DataFrame:
    """Return one row per test image: its name, its label, and the class each probe gives it.

    A probe's column is named `<selection>/<fraction>/<seed>`, after its layer where there are several.

    Args:
        probes: The P probes.
        images: The n test images.
        classes: Class names.
        predicted: Class indices, shape (P, n).
        several_layers: Whether columns name the layer.
    """
    names = np.array(classes)
    columns = {
        "image": [images.name(index) for index in range(len(images))],
        "label": names[images.labels.numpy()],
    }
    for probe, row in zip(probes, predicted, strict=True):
        layer = f"{probe.layer}/" if several_layers else ""
        columns[f"{layer}{probe.selection}/{probe.fraction:g}/{probe.seed}"] = names[row.cpu().numpy()]
    return pd.DataFrame(columns)
