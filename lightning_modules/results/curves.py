"""What a run's tables say about a representation: pure functions from tables and counts to numbers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.subsets import plan as subsets
from lightning_modules.subsets.selections import FULL

RULES = ("threshold", "nearest", "interpolated")
MEASURED = (
    *("mean_class_accuracy", "gini", "coefficient_of_variation", "largest_gap", "cka", "cka_debiased"),
    *("difference", "difference_low", "difference_high"),
)
"""What a curve has beside accuracy, where it was measured."""
RESAMPLES = 2000
"""Bootstrap samples behind an interval."""
FEWEST_SEEDS = 3
"""Subset seeds below which there is no interval."""
NORMAL_95 = 1.959963984540054
"""The standard normal's quantile at 97.5 %."""


def complete(results: pd.DataFrame) -> pd.DataFrame:
    """Return rows as in `results.csv` in which every layer has a `full` one and nothing needed later is absent.

    Tables of older runs may lack `layer` and `seed`; where a layer has no `full` row its fraction 1.0 counts as it.

    Raises:
        MisconfigurationException: If a layer has neither.
    """
    rows = results if "layer" in results else results.assign(layer="penultimate")
    if "seed" not in rows:
        rows = rows.assign(seed=rows.groupby(["layer", "selection", "fraction", "split"]).cumcount())
    for layer in rows["layer"].unique():
        of_layer = rows[rows["layer"] == layer]
        if (of_layer["selection"] == FULL).any():
            continue
        entire = of_layer[of_layer["fraction"] == 1.0]
        if entire.empty:
            raise MisconfigurationException(
                f"There is no reference for {layer}: its results have neither a {FULL} row nor fraction 1."
            )
        entire = entire[entire["selection"] == entire["selection"].iloc[0]]
        rows = pd.concat([rows, entire.assign(selection=FULL)], ignore_index=True)
    return rows


def curve(results: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return accuracy, and whatever else was measured, against fraction.

    Args:
        results: Rows as in `results.csv`.
        split: `val` or `test`.

    Returns:
        One row per layer, selection and fraction; layers in their order, in each the full layer first, fractions
        ascending: `layer`, `selection`, `fraction`, `neurons`, `mean` and `std` of the accuracy over seeds
        (population, as in the paper's tables; missing for a single seed), `seeds`, `ratio`, the mean over the full
        layer's mean (missing if that is never right), and for each of `MEASURED` that is there its mean, and its
        spread as `<name>_std`. `difference` is to the full layer on the same images, and the mean of the limits of
        `paired_difference` holds at least 95 % for the mean, as no mean varies more than its terms on average.
    """
    rows = complete(results)
    rows = rows[rows["split"] == split]
    if {"gained", "lost", "images"} <= set(rows):
        limits = paired_difference(rows["gained"].to_numpy(), rows["lost"].to_numpy(), rows["images"].to_numpy())
        rows = rows.assign(**limits)
    groups = rows.groupby(["layer", "selection", "fraction"], sort=False)
    table = groups["accuracy"].agg(mean="mean", std=_spread, seeds="size")
    if "neurons" in rows:
        table.insert(0, "neurons", groups["neurons"].first())
    table = table.reset_index()
    full = table[table["selection"] == FULL].set_index("layer")["mean"]
    table["ratio"] = table["mean"] / table["layer"].map(full).replace(0, np.nan)
    for name in MEASURED:
        if name in rows and rows[name].notna().any():
            table[name] = groups[name].mean().to_numpy()
            table[f"{name}_std"] = groups[name].agg(_spread).to_numpy()
    places = {"layer": list(table["layer"]), "selection": [FULL, *table["selection"]]}
    order = {
        column: {name: place for place, name in enumerate(dict.fromkeys(names))} for column, names in places.items()
    }
    return table.sort_values(
        ["layer", "selection", "fraction"], key=lambda c: c.map(order[c.name]) if c.name in order else c
    )


def _spread(values: pd.Series) -> float:
    """Return the population's standard deviation; missing for a single value."""
    return values.std(ddof=0) if len(values) > 1 else np.nan


def sufficient_fraction(fractions: Sequence[float], ratios: Sequence[float], delta: float, rule: str) -> float:
    """Return the fraction that is enough to keep `delta` of the full layer's accuracy.

    Fraction 1 counts as measured, at ratio 1 where it was not: the full layer always is enough.

    Args:
        fractions: Measured fractions.
        ratios: Mean accuracy at each, over the full layer's; a missing one keeps nothing.
        delta: What is to be kept, for example 0.9.
        rule: `threshold`, the smallest measured fraction that reaches delta (Nanda et al., 2023, definition 1);
            `nearest`, the measured one whose ratio lies nearest to delta, which may be below (their table 1; ties go
            to the smaller); `interpolated`, where the line between measured points first reaches delta.
    """
    return float(_sufficient(np.array(fractions, float), np.array(ratios, float), delta, rule))


def _sufficient(grid: np.ndarray, kept: np.ndarray, delta: float, rule: str) -> np.ndarray:
    """Return sufficient fractions, shape (...), of several curves over the same fractions.

    Args:
        grid: Fractions, shape (F,).
        kept: Ratios, shape (..., F).
        delta: As for `sufficient_fraction`.
        rule: As for `sufficient_fraction`.
    """
    if rule not in RULES:
        raise ValueError(f"The rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    if 1.0 not in grid:
        grid, kept = np.append(grid, 1.0), np.concatenate([kept, np.ones((*kept.shape[:-1], 1))], axis=-1)
    order = grid.argsort()
    grid, kept = grid[order], kept[..., order]
    kept = np.nan_to_num(kept.round(12), nan=-np.inf)  # what differs by rounding alone is a tie
    if rule == "nearest":
        return grid[np.abs(kept - delta).round(12).argmin(-1)]
    reached = kept >= delta
    first = reached.argmax(-1)
    enough = grid[first]
    if rule == "interpolated":
        before = np.maximum(first - 1, 0)
        low = np.take_along_axis(kept, before[..., None], -1)[..., 0]
        high = np.take_along_axis(kept, first[..., None], -1)[..., 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (delta - low) / (high - low)
            crossed = grid[before] + share * (enough - grid[before])
        enough = np.where((first > 0) & np.isfinite(low) & reached.any(-1), crossed, enough)
    return np.where(reached.any(-1), enough, 1.0)


def diffused_redundancy(fractions: Sequence[float], ratios: Sequence[float], delta: float, rule: str) -> float:
    """Return DR(delta), one minus the fraction that is enough; arguments as for `sufficient_fraction`."""
    return 1 - sufficient_fraction(fractions, ratios, delta, rule)


def redundancy(results: pd.DataFrame, split: str, deltas: Sequence[float]) -> pd.DataFrame:
    """Return DR(delta) by every rule, with an interval over subsets and the critical mass of neurons.

    The interval is the 95 % percentile bootstrap over subset seeds. A resampled seed brings its accuracies at all
    fractions, as its subsets nest; the full layer, which has no subset, stays as it is.

    Args:
        results: Rows as in `results.csv`.
        split: `val` or `test`.
        deltas: Shares of the full layer's accuracy.

    Returns:
        One row per layer, selection, rule and delta: `layer`, `selection`, `rule`, `delta`, `fraction` (that is
        enough), `neurons` (the critical mass: as many as that fraction is; missing without `width`), `redundancy`,
        and `low` and `high`, missing below three seeds.
    """
    rows = complete(results)
    rows = rows[rows["split"] == split]
    table = []
    for (layer, selection), group in rows[rows["selection"] != FULL].groupby(["layer", "selection"], sort=False):
        full = rows.loc[(rows["layer"] == layer) & (rows["selection"] == FULL), "accuracy"].mean() or np.nan
        accuracies = group.pivot_table(index="seed", columns="fraction", values="accuracy")
        grid, ratios = accuracies.columns.to_numpy(float), accuracies.mean().to_numpy() / full
        whole = accuracies.dropna().to_numpy()  # seeds that were measured at all fractions
        resampled = None
        if len(whole) >= FEWEST_SEEDS:
            picks = np.random.default_rng(0).integers(len(whole), size=(RESAMPLES, len(whole)))
            times = np.apply_along_axis(np.bincount, 1, picks, minlength=len(whole))  # how often each seed is drawn
            resampled = times @ whole / len(whole) / full
        for rule in RULES:
            for delta in deltas:
                enough = float(_sufficient(grid, ratios, delta, rule))
                low = high = np.nan
                if resampled is not None:
                    drawn = 1 - _sufficient(grid, resampled, delta, rule)
                    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")  # a value that was drawn
                mass = subsets.neurons(enough, int(group["width"].iloc[0])) if "width" in group else np.nan
                table.append([layer, selection, rule, delta, enough, mass, 1 - enough, low, high])
    columns = ["layer", "selection", "rule", "delta", "fraction", "neurons", "redundancy", "low", "high"]
    return pd.DataFrame(table, columns=columns)


def class_inequality(correct: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return how unequal accuracy is over classes, by three measures; 0 is equal.

    Classes without images do not count. Where no class is ever right all are equal.

    Args:
        correct: Right answers by class, shape (..., C).
        images: Images by class, shape (C,).

    Returns:
        `gini`, the Gini coefficient: the mean absolute difference between two classes over twice the mean;
        `coefficient_of_variation`, the population's standard deviation over the mean; and `largest_gap`, the best
        class less the worst; each of shape (...).
    """
    seen = np.asarray(images) > 0
    accuracy = np.sort(np.asarray(correct, dtype=np.float64)[..., seen] / np.asarray(images, dtype=np.float64)[seen])
    classes = accuracy.shape[-1]
    mean = accuracy.mean(-1)
    divisor = np.where(mean > 0, mean, 1.0)  # where the mean is 0 so is what it divides
    # Of sorted values, the i-th of C is the larger in i pairs and the smaller in C - 1 - i.
    differences = (accuracy * (2 * np.arange(classes) - classes + 1)).sum(-1)
    return {
        "gini": differences / (classes**2 * divisor),
        "coefficient_of_variation": accuracy.std(-1) / divisor,
        "largest_gap": accuracy[..., -1] - accuracy[..., 0],
    }


def class_losses(classes: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return what each class loses at each fraction, those that lose most first.

    Args:
        classes: Rows as in `classes.csv`.
        split: `val` or `test`.

    Returns:
        One row per layer, selection, fraction and class with images: `layer`, `selection`, `fraction`, `class`,
        `images`, `accuracy` (mean over seeds), `full_accuracy`, and `lost`, the difference. Within a selection,
        classes are ordered by `lost` averaged over its fractions, descending, and fractions ascend.
    """
    rows = classes if "layer" in classes else classes.assign(layer="penultimate")
    rows = rows[(rows["split"] == split) & (rows["images"] > 0)]
    keys = ["layer", "selection", "fraction", "class"]
    means = rows.assign(accuracy=rows["correct"] / rows["images"]).groupby(keys, sort=False)
    table = means.agg(images=("images", "first"), accuracy=("accuracy", "mean")).reset_index()
    full = table[table["selection"] == FULL].set_index(["layer", "class"])["accuracy"].rename("full_accuracy")
    table = table[table["selection"] != FULL].join(full, on=["layer", "class"])
    table["lost"] = table["full_accuracy"] - table["accuracy"]
    average = table.groupby(["layer", "selection", "class"], sort=False)["lost"].transform("mean")
    place = table.groupby(["layer", "selection"], sort=False).ngroup()
    order = pd.DataFrame({"place": place, "lost": -average.round(12), "class": table["class"].astype(str)})
    order["fraction"] = table["fraction"]
    return table.loc[order.sort_values(["place", "lost", "class", "fraction"]).index].reset_index(drop=True)


def paired_difference(gained: np.ndarray, lost: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the difference in accuracy to the full layer on the same images, with its 95 % interval.

    The interval is that of Agresti and Min (2005): Wald's, after half an image was added to each of the four cells
    (both right, gained, lost, both wrong), so that it has a width where no image changed sides.

    Args:
        gained: Images that the probe has right and the full layer wrong.
        lost: The reverse.
        images: All images.

    Returns:
        `difference`, (gained - lost) / images, and its limits `difference_low` and `difference_high`.
    """
    gained, lost, images = (np.asarray(counts, dtype=np.float64) for counts in (gained, lost, images))
    centre = (gained - lost) / (images + 2)
    error = np.sqrt((gained + lost + 1) / (images + 2) - centre**2) / np.sqrt(images + 2)
    return {
        "difference": (gained - lost) / images,
        "difference_low": np.maximum(centre - NORMAL_95 * error, -1),
        "difference_high": np.minimum(centre + NORMAL_95 * error, 1),
    }


def frontier(redundancies: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Return the places of those that no other beats in both redundancy and accuracy, redundancy ascending.

    The redundancy-performance Pareto frontier (Nanda et al., 2023).
    """
    best, chosen = -np.inf, []
    for place in sorted(range(len(redundancies)), key=lambda i: (-redundancies[i], -accuracies[i])):
        if accuracies[place] > best:
            best = accuracies[place]
            chosen.append(place)
    return chosen[::-1]


def group_means(results: pd.DataFrame, delta: float, rule: str) -> pd.DataFrame:
    """Return what a backbone reaches on the average task of each group; every task counts the same.

    Args:
        results: Rows as in `results.csv` of one backbone on several tasks, and the column `group`.
        delta: As for `sufficient_fraction`.
        rule: As for `sufficient_fraction`.

    Returns:
        One row per group in the order of the rows, and `all`, for each layer and selection: `group`, `layer`,
        `selection`, `tasks`, `redundancy`, `full_accuracy` and, for each fraction, `accuracy_<fraction>`; on the test
        split, means over tasks of means over seeds. Missing where it was not measured on every one of the tasks.
    """
    rows = []
    for (group, _), of_task in results.groupby(["group", "task"], sort=False):
        means = curve(of_task, "test")
        full = means[means["selection"] == FULL].set_index("layer")["mean"]
        found = redundancy(of_task, "test", [delta])
        for cell in found[found["rule"] == rule].to_dict("records"):
            keys = {"layer": cell["layer"], "selection": cell["selection"]}
            of_cell = means[(means["layer"] == cell["layer"]) & (means["selection"] == cell["selection"])]
            accuracies = {f"accuracy_{row.fraction:g}": row.mean for row in of_cell[["fraction", "mean"]].itertuples()}
            numbers = {"redundancy": cell["redundancy"], "full_accuracy": full[cell["layer"]], **accuracies}
            rows += [{"group": name, **keys, "tasks": 1, **numbers} for name in (group, "all")]
    table = pd.DataFrame(rows)
    table = pd.concat([table[table["group"] != "all"], table[table["group"] == "all"]])
    groups = table.groupby(["group", "layer", "selection"], sort=False)
    averages = groups.agg(lambda column: column.mean(skipna=False)).assign(tasks=groups["tasks"].sum())
    return averages.reset_index()
