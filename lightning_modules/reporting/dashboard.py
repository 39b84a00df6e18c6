"""What a run shows on W&B: its configuration, accuracies while it trains, and at its end all that was measured."""

import contextlib
import json
import netrc
import os
import sys
import tempfile
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

from lightning_modules.files import one_line
from lightning_modules.results.results import Results
from lightning_modules.results.tables import by_series
from lightning_modules.subsets.selections import FULL

FRACTION = "curve/fraction"  # the x axis of the curves


def wandb_logger(name: str, folder: Path, resumed: bool = False, groups: dict[str, str] | None = None) -> WandbLogger:
    """Return the W&B logger of a run; without credentials or server it works offline, and says how to sync.

    W&B's files go to `wandb/` in the run's folder; a resumed run continues what was logged there last. Runs are grouped
    by the values of `groups`, the task and the backbone.
    """
    _find_room(folder.resolve() / "wandb")
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE")
    if mode is None and rank_zero_only.rank == 0 and (absent := _absent()):  # type: ignore[attr-defined]
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

    A MisconfigurationException is raised if W&B does not take the run.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(settings)
        except Exception as error:  # W&B raises errors of several families, in its own words
            if not isinstance(logger, WandbLogger):
                raise
            raise MisconfigurationException(
                f"W&B does not take the run ({one_line(error)}); `wandb login`, set WANDB_MODE=offline, or "
                f"say --trainer.logger false."
            ) from error
        if isinstance(logger, WandbLogger) and getattr(logger.experiment, "url", None):
            rank_zero_info(f"W&B: {logger.experiment.url}")


def log_report(loggers: Sequence[Logger], folder: Path, results: Results) -> None:
    """Show the end of a run on W&B: what was measured over the fraction, and from its folder what `report` wrote."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        run, summary = logger.experiment, json.loads((folder / "summary.json").read_text(encoding="utf-8"))
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
            for key in ("answer", f"full_{results.headline.name}", "diffused_redundancy"):
                run.summary[f"{prefix}{key}"] = layer[key]


def _points(results: Results) -> dict[float, dict[str, float]]:
    """Return what to plot at each fraction: `curve/<split>/<measure>/<selection>`, with layers before the selection.

    Every selection's curve ends in the full layer.
    """
    metric, keys = results.headline.name, ["layer", "selection", "fraction", "split"]
    lines = []
    for split in ("val", "test"):
        curve = by_series(results.curve(split)).assign(split=split).drop(columns=["bits", "neurons", "bytes", "seeds"])
        curve = curve.rename(columns={"mean": metric, "std": f"{metric}_std"})
        subsets, full = curve[curve["selection"] != FULL], curve[curve["selection"] == FULL]
        full = full.drop(columns=["selection", *(name for name in full if name.endswith("_std"))])
        ends = subsets[["layer", "selection"]].drop_duplicates().merge(full, on="layer")
        lines += pd.concat([subsets, ends]).drop_duplicates(keys).set_index(keys).items()
    for measure in results.measures:
        if measure.table in results.tables:
            lines += measure.lines(results.tables[measure.table]).items()
    points: dict[float, dict[str, float]] = {}
    for name, line in lines:
        for (layer, selection, fraction, split), value in line.dropna().items():
            series = f"{layer}/{selection}" if len(results.layers) > 1 else selection
            points.setdefault(fraction, {})[f"curve/{split}/{name}/{series}"] = value
    return points


def finish() -> None:
    """End the W&B run of this process, if there is one, so that another may follow."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _find_room(folder: Path) -> None:
    """Let W&B keep in a run's folder what it would keep at home, where that cannot be written."""
    from wandb import env

    for variable, at_home in ((env.DATA_DIR, Path(env.get_data_dir())), (env.CACHE_DIR, env.get_cache_dir())):
        try:
            at_home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=at_home):
                pass
        except OSError:
            os.environ[variable] = str(folder)


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
    except urllib.error.HTTPError:
        pass  # that is an answer
    except (OSError, ValueError):
        return f"{server} cannot be reached"
    return None
