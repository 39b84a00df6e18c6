"""The processes of a run: how many whoever started them says there are, and how they come together."""

import os
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
"""Processes that run the whole command line, each on one device."""


def launched(strategy: Any, devices: Any, nodes: int) -> dict[str, Any]:
    """Return the Trainer's devices and nodes, as torchrun says them itself; refuse a name that is no strategy."""
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise MisconfigurationException(f"trainer.strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}.")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        devices, nodes = here if devices == "auto" else devices, everywhere // here
    return {"devices": devices, "num_nodes": nodes}


def check_processes(trainer: Trainer) -> None:
    """Refuse a Trainer that would wait for processes that nobody started, with a ValueError that says what to do."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    knows_its_node = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= set(os.environ)
    if isinstance(environment, LightningEnvironment) and trainer.num_nodes > 1 and not knows_its_node:
        raise ValueError("start torchrun on each node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there.")


def connect(trainer: Trainer) -> None:
    """Start the other processes of a run, where Lightning is to, and connect all, as Trainer.fit would do later."""
    if trainer.world_size > 1:
        launcher: Any = trainer.strategy.launcher  # all of `STRATEGIES` have one
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
