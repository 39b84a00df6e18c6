"""What a run shows on W&B: its configuration, accuracies while it trains, and at its end all that was measured."""

import contextlib
import json
import math
import netrc
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_modules.results.results import Results
from lightning_modules.subsets.selections import FULL

FRACTION = "curve/fraction"
"""The x axis of the curves."""


def wandb_logger(name: str, folder: Path, resumed: bool = False, groups: dict[str, str] | None = None) -> WandbLogger:
    """Return the W&B logger of a run; without credentials or server it works offline, and says how to sync.

    Args:
        name: The run's name.
        folder: The run's folder; W&B's files go to `wandb/` below it.
        resumed: Whether the run goes on from a checkpoint; it then continues what the folder logged last.
        groups: What runs are grouped by, the task and the backbone.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE")
    if mode is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        absent = _absent()
        if absent:
            mode = "offline"
            rank_zero_info(f"{absent}: logging offline; `wandb sync {folder}/wandb/offline-run-*` uploads it.")
    logged = sorted(folder.glob("wandb/run-*-*")) if resumed else []
    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "diffused-redundancy"),
        name=name,
        save_dir=folder.resolve(),  # W&B's own process may be at home elsewhere
        id=logged[-1].name.rpartition("-")[2] if logged else None,
        mode=mode,
        group=", ".join(groups.values()) if groups else None,
    )


def log_configuration(loggers: Sequence[Logger], settings: dict[str, Any]) -> None:
    """Give a run's configuration to its loggers; this starts the W&B run.

    Args:
        loggers: The Trainer's.
        settings: As in `config.yaml`, and what runs can be grouped by.

    Raises:
        MisconfigurationException: If W&B does not take the run.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(settings)
        except Exception as error:  # W&B raises errors of several families, in its own words
            if not isinstance(logger, WandbLogger):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise MisconfigurationException(
                f"W&B does not take the run ({reason}); `wandb login`, set WANDB_MODE=offline, or "
                f"say --trainer.logger false."
            ) from error
        if isinstance(logger, WandbLogger) and getattr(logger.experiment, "url", None):
            rank_zero_info(f"W&B: {logger.experiment.url}")


def log_report(loggers: Sequence[Logger], folder: Path, results: Results) -> None:
    """Show the end of a run on W&B: everything measured over the fraction, tables, pictures, the report, the answer.

    Args:
        loggers: The Trainer's.
        folder: The run's folder, with the report in it.
        results: The run's.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        run, summary = logger.experiment, json.loads((folder / "summary.json").read_text())
        points = _points(results)
        run.define_metric(FRACTION, hidden=True)
        for name in sorted({name for point in points.values() for name in point}):
            run.define_metric(name, step_metric=FRACTION)
        for fraction, point in sorted(points.items()):
            run.log({FRACTION: fraction, **point})
        tables = {"probes" if name == "results" else name: rows for name, rows in results.tables.items()}
        tables |= {"redundancy": results.redundancy("test")}
        if "classes" in tables:  # by probe, there may be too many
            tables["classes"] = results.class_losses("test")
        logged: dict[str, Any] = {name: wandb.Table(dataframe=rows) for name, rows in tables.items()}
        drawn = [folder / name for name in summary["files"] if name.endswith(".png")]
        logged |= {f"pictures/{file.stem}": wandb.Image(str(file)) for file in drawn}
        run.log(logged | {"report": wandb.Html(str(folder / "report.html"), inject=False)})
        for layer in summary["layers"]:
            prefix = f"{layer['layer']}/" if len(summary["layers"]) > 1 else ""
            keys = ("answer", f"full_{results.headline.name}", "diffused_redundancy")
            run.summary.update({f"{prefix}{key}": layer[key] for key in keys})


def _points(results: Results) -> dict[float, dict[str, float]]:
    """Return what to plot at each fraction: `curve/<split>/<measure>/<selection>`, with layers before the selection.

    Every selection's curve ends in the full layer.
    """
    several = len(results.layers) > 1
    points: dict[float, dict[str, float]] = {}

    def plot(split: str, measure: str, layer: str, selection: str, fraction: float, value: float) -> None:
        series = f"{layer}/{selection}" if several else selection
        if math.isfinite(value):
            points.setdefault(fraction, {}).setdefault(f"curve/{split}/{measure}/{series}", value)

    metric = results.headline.name
    for split in ("val", "test"):
        curve = results.curve(split).rename(columns={"mean": metric, "std": f"{metric}_std"})
        values = [name for name in curve if name not in ("layer", "selection", "fraction", "neurons", "seeds")]
        full = {row["layer"]: row for row in curve[curve["selection"] == FULL].to_dict("records")}
        rows = curve[curve["selection"] != FULL].to_dict("records")
        for row in sorted(rows, key=lambda row: -row["fraction"]):
            for name in values:
                plot(split, name, row["layer"], row["selection"], row["fraction"], row[name])
                if not name.endswith("_std"):
                    plot(split, name, row["layer"], row["selection"], 1.0, full[row["layer"]][name])
    for measure in results.measures:
        if measure.table in results.tables:
            for name, line in measure.lines(results.tables[measure.table]).items():
                for (layer, selection, fraction, split), value in line.items():
                    plot(split, name, layer, selection, fraction, value)
    return points


def finish() -> None:
    """End the W&B run of this process, if there is one, so that another may follow."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _absent() -> str | None:
    """Say what W&B would need to log online and does not have, or None; it would itself ask, or wait for minutes."""
    import wandb

    settings = wandb.setup().settings
    server, known = settings.base_url, bool(settings.api_key or settings.identity_token_file)
    with contextlib.suppress(OSError, netrc.NetrcParseError):  # `wandb login` writes this file
        logins = netrc.netrc(os.environ.get("NETRC"))
        known = known or any(logins.authenticators(host) for host in (urlsplit(server).netloc, "api.wandb.ai"))
    if not known:
        return "No W&B credentials"
    try:
        urllib.request.urlopen(server, timeout=5)
    except urllib.error.HTTPError:  # that is an answer
        return None
    except (OSError, ValueError):
        return f"{server} cannot be reached"
    return None
