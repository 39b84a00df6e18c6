"""What a run shows on W&B: its configuration, accuracies while it trains, and at the end the curve and every probe."""

import contextlib
import json
import netrc
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_modules import measures
from lightning_modules.subsets import FULL

FRACTION = "curve/fraction"
"""The x axis of the curves."""


def wandb_logger(name: str, folder: Path, resumed: bool = False) -> WandbLogger:
    """Return the W&B logger of a run; without credentials or server it works offline, and says how to sync.

    Args:
        name: The run's name.
        folder: The run's folder; W&B's files go to `wandb/` below it.
        resumed: Whether the run goes on from a checkpoint; it then continues what the folder logged last.
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


def log_report(loggers: Sequence[Logger], folder: Path, results: pd.DataFrame) -> None:
    """Show the end of a run on W&B: curves over the fraction, the picture, a table of every probe, and the answer.

    Args:
        loggers: The Trainer's.
        folder: The run's folder, with the report in it.
        results: Rows as in `results.csv`.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        run = logger.experiment
        points = _points(results)
        run.define_metric(FRACTION, hidden=True)
        for name in sorted({name for point in points.values() for name in point}):
            run.define_metric(name, step_metric=FRACTION)
        for fraction, point in sorted(points.items()):
            run.log({FRACTION: fraction, **point})
        summary = json.loads((folder / "summary.json").read_text())
        run.log({"probes": wandb.Table(dataframe=results), "curve/picture": wandb.Image(str(folder / "curve.png"))})
        run.summary.update({key: summary[key] for key in ("answer", "full_accuracy", "diffused_redundancy")})


def _points(results: pd.DataFrame) -> dict[float, dict[str, float]]:
    """Return what to plot at each fraction; every selection's curve ends in the full layer."""
    points: dict[float, dict[str, float]] = {}
    for split in ("val", "test"):
        curve = measures.curve(results, split)
        full = curve.loc[curve["selection"] == FULL, "mean"].item()
        for row in curve.loc[curve["selection"] != FULL].itertuples():
            points.setdefault(1.0, {}).setdefault(f"curve/{split}/accuracy/{row.selection}", full)
            point = points.setdefault(row.fraction, {})
            point[f"curve/{split}/accuracy/{row.selection}"] = row.mean
            if row.seeds > 1:
                point[f"curve/{split}/std/{row.selection}"] = row.std
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
