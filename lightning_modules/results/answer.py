"""The plain answer: how many neurons to keep, and what that costs."""

from typing import TYPE_CHECKING, Any

from lightning_modules.subsets.selections import FULL

if TYPE_CHECKING:
    from lightning_modules.results.results import Results

ANSWERED = 0.9  # the share that the plain answer is about; the paper's


def answer(results: "Results", layer: str, delta: float) -> dict[str, Any]:
    """Say how many neurons of a layer to keep for a share `delta` of the full layer's metric, and what that costs.

    The fraction is chosen on validation, by the threshold rule over all selections; the loss is told on test.
    """
    headline, rows, val = results.headline, results.rows, results.curve("val")
    rows, val = rows[(rows["layer"] == layer) & (rows["split"] == "test")], val[val["layer"] == layer]
    width = int(rows["width"].iloc[0])
    enough = val.loc[(val["selection"] != FULL) & (val["ratio"] >= delta)].sort_values("neurons", kind="stable")
    wish = f"To keep {100 * delta:g} % of the {headline.label}"
    if enough.empty or enough["neurons"].iloc[0] == width:
        return {"text": f"{wish}: keep all {width:,} neurons; no smaller measured subset is enough.", "neurons": width}
    best = enough.iloc[0]
    full = rows.loc[rows["selection"] == FULL, headline.name].mean()
    kept = rows.loc[(rows["selection"] == best["selection"]) & (rows["fraction"] == best["fraction"]), headline.name]
    lost = headline.scale * (full - kept)
    digits, unit = headline.digits, f" {headline.unit}" if headline.unit else ""
    spread = f" ± {lost.std(ddof=0):.{digits}f}" if len(lost) > 1 else ""
    bytes_kept = 100 * best["neurons"] / width
    text = (
        f"{wish}: keep {best['neurons']:,} of {width:,} neurons ({best['selection']}), lose {lost.mean():.{digits}f}"
        f"{spread}{' points' if headline.unit == '%' else unit} ({headline.words(kept.mean())} instead of "
        f"{headline.words(full)}{unit}), store {bytes_kept:.3g} % of the bytes."
    )
    return {
        "text": text,
        "selection": best["selection"],
        "fraction": float(best["fraction"]),
        "neurons": int(best["neurons"]),
        "points_lost_mean": float(lost.mean()),
        "points_lost_std": float(lost.std(ddof=0)) if len(lost) > 1 else None,
        "bytes_kept_percent": float(bytes_kept),
    }
