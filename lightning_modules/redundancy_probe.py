"""The LightningModule of the project: a frozen backbone, looked through once, and a bank of masked linear probes."""

import copy
import itertools
import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import psutil
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from tqdm import tqdm

from lightning_modules import statistics, subsets, weights
from lightning_modules.backbone import FrozenBackbone
from lightning_modules.checkpoints import check_belonging
from lightning_modules.feature_cache import FeatureCache, FeatureRows
from lightning_modules.probe_bank import ProbeBank, parameters_of

PAPER_FRACTIONS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.9)


class ProbeScores(Metric):
    """Exact counts for every probe: right answers by class, images by class, and the summed loss.

    Args:
        probes: Number of probes.
        classes: Number of classes.
    """

    full_state_update = False
    correct: Tensor
    images: Tensor
    loss: Tensor

    def __init__(self, probes: int, classes: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(probes, classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(probes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits of shape (P, C, B), labels of shape (B,)."""
        hits = (logits.argmax(1) == labels).long()
        self.correct.index_add_(1, labels, hits)
        self.images.index_add_(0, labels, torch.ones_like(labels))
        self.loss += losses(logits, labels).double()

    def compute(self) -> dict[str, Tensor]:
        """Return accuracy and mean loss, shape (P,), float64; correct, shape (P, C), and images, shape (C,)."""
        total = self.images.sum()
        return {
            "accuracy": self.correct.sum(1).double() / total,
            "loss": self.loss / total,
            "correct": self.correct.clone(),
            "images": self.images.clone(),
        }


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each probe's cross-entropy summed over the batch, shape (P,), from logits (P, C, B) and labels (B,)."""
    return F.cross_entropy(logits, labels.expand(len(logits), -1), reduction="none").sum(1)


class RedundancyProbe(LightningModule):
    """Trains a linear probe on every subset of a frozen representation, all on the same batches.

    The full layer is always probed beside the subsets, as the reference of every ratio. Where `learning_rate` or
    `weight_decay` is a list, every probe is trained with every combination and keeps the best on validation.

    Args:
        backbone: The frozen pre-trained network; see `FrozenBackbone`.
        num_classes: C; taken from the task.
        fractions: Fractions of the layer's neurons to probe, each in (0, 1].
        seeds: Subset seeds; a number n means 0 to n - 1.
        selection: Rules that pick subsets: `random`, `first`.
        full_seeds: Initialisation seeds of the full layer's probe; a number n means 0 to n - 1.
        features: What the probes train on: `clean`, one view without augmentation, looked at once; a number of
            augmented views, each looked at once and cycled over epochs; or `off`, fresh augmentation in every epoch,
            with a pass of the backbone each.
        keep: Each probe's `best` epoch by its own validation accuracy (ties go to the earlier), or the `last`.
        learning_rate: Of SGD; a list is swept.
        momentum: Of SGD.
        weight_decay: Of SGD, on weights and biases; a list is swept.
        step_size: Epochs between two drops of the learning rate.
        gamma: Factor of a drop.
        standardise: Whether to subtract each neuron's mean and divide by its standard deviation over train.
        cache_dir: Where features are kept; null is `feature_cache` under `trainer.default_root_dir`.

    Raises:
        MisconfigurationException: If an argument cannot be, or the bank does not fit into memory.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        num_classes: int,
        fractions: float | list[float] = list(PAPER_FRACTIONS),  # noqa: B006 (never changed)
        seeds: int | list[int] = 5,
        selection: str | list[str] = "random",
        full_seeds: int | list[int] = 1,
        features: Literal["clean", "off", False] | int = "clean",
        keep: Literal["best", "last"] = "best",
        learning_rate: float | list[float] = 0.1,
        momentum: float = 0.9,
        weight_decay: float | list[float] = 1e-4,
        step_size: int = 20,
        gamma: float = 0.1,
        standardise: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.selections, fractions = _list(selection), _list(fractions)
        seeds, full_seeds = _seeds(seeds, "seeds"), _seeds(full_seeds, "full_seeds")
        subsets.check(self.selections, fractions, seeds, full_seeds)
        if features is False:  # how YAML reads a bare off
            features = "off"
        if isinstance(features, int) and features < 1:
            raise MisconfigurationException(
                f"model.features is {features}; it must be clean, off or a number of augmented views from 1."
            )
        self.features = features
        self.keep = keep
        self.candidates = list(itertools.product(_list(learning_rate), _list(weight_decay)))
        _check_optimisation(self.candidates, momentum, step_size, gamma)
        self.momentum, self.step_size, self.gamma = momentum, step_size, gamma
        self.standardise = standardise
        self.cache_dir = cache_dir

        self.probes = subsets.plan(self.selections, fractions, seeds, full_seeds, backbone.width)
        _check_memory(parameters_of(self.probes, num_classes), len(self.candidates), len(self.probes), num_classes)
        bank = ProbeBank(self.probes, backbone.width, num_classes)
        self.banks = nn.ModuleList(copy.deepcopy(bank) for _ in self.candidates)
        self.kept = nn.ModuleList(copy.deepcopy(bank).requires_grad_(False) for _ in self.candidates)
        shape = (len(self.candidates), len(self.probes))
        self.register_buffer("kept_accuracy", torch.full(shape, -1.0, dtype=torch.float64))
        self.register_buffer("kept_epoch", torch.full(shape, -1))
        self.register_buffer("mean", torch.zeros(backbone.width))
        self.register_buffer("std", torch.ones(backbone.width))
        self.scores = ProbeScores(math.prod(shape), num_classes)
        self.num_classes = num_classes
        self.train_losses: list[Tensor] = []
        self.epoch_loss = torch.zeros(shape, dtype=torch.float64)  # no buffer: DDP would give all processes the first's
        self.evaluated: dict[str, dict[str, Tensor]] = {}
        self.predictions: Tensor | None = None
        self.strict_loading = False  # a checkpoint never holds the backbone; `on_load_checkpoint` checks the rest
        self.look_seconds = 0.0
        self._represented: set[str] = set()
        self._identity: dict[str, Any] | None = None
        self._digests: dict[str, str] = {}
        # What processes need not tell each other: they build the same, and a frozen backbone stays so. Without this
        # DDP sends all of it at the start, and every buffer before each step.
        still = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = still + [name for name, _ in self.named_buffers()]

    kept: Any  # nn.ModuleList of ProbeBank
    kept_accuracy: Tensor
    kept_epoch: Tensor
    mean: Tensor
    std: Tensor

    # ------------------------------------------------------------------------------------------- what others ask

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the backbone wants of an image (timm's data configuration)."""
        return self.backbone.preprocessing

    @property
    def label(self) -> str:
        """What a run of this model is called by default, after its task."""
        return f"{self.backbone.label}_{'-'.join(self.selections)}"

    def results(self) -> pd.DataFrame:
        """Return one row per probe and evaluated split, with the columns of `results.csv`."""
        chosen = self._chosen()
        rows = []
        for split, scores in self.evaluated.items():
            for probe, (candidate, index) in zip(self.probes, chosen, strict=True):
                learning_rate, weight_decay = self.candidates[candidate]
                place = candidate * len(self.probes) + index
                by_class = scores["correct"][place].double() / scores["images"]
                rows.append(
                    {
                        "task": self._task.name,
                        "backbone": self.backbone.label,
                        "layer": self.backbone.layer,
                        "selection": probe.selection,
                        "fraction": probe.fraction,
                        "neurons": probe.neurons,
                        "width": self.backbone.width,
                        "seed": probe.seed,
                        "split": split,
                        "images": int(scores["images"].sum()),
                        "accuracy": scores["accuracy"][place].item(),
                        "loss": scores["loss"][place].item(),
                        "solver": "sgd",
                        "augmentation": "none" if self.features == "clean" else self._task.augmentation,
                        "features": self.features,
                        "epoch": int(self.kept_epoch[candidate, index]),
                        "learning_rate": learning_rate,
                        "weight_decay": weight_decay,
                        "mean_class_accuracy": by_class[scores["images"] > 0].mean().item(),
                    }
                )
        return pd.DataFrame(rows)

    def class_results(self) -> pd.DataFrame:
        """Return one row per probe, evaluated split and class, with the columns of `classes.csv`."""
        tables = []
        for split, scores in self.evaluated.items():
            for probe, (candidate, index) in zip(self.probes, self._chosen(), strict=True):
                tables.append(
                    pd.DataFrame(
                        {
                            "selection": probe.selection,
                            "fraction": probe.fraction,
                            "seed": probe.seed,
                            "split": split,
                            "class": list(self._task.classes),
                            "images": scores["images"].cpu().numpy(),
                            "correct": scores["correct"][candidate * len(self.probes) + index].cpu().numpy(),
                        }
                    )
                )
        return pd.concat(tables, ignore_index=True)

    def prediction_table(self) -> pd.DataFrame:
        """Return one row per test image: its name, its label, and the class each probe gives it.

        A probe's column is named `<selection>/<fraction>/<seed>`.
        """
        assert self.predictions is not None
        images, classes = self._task.images["test"], np.array(self._task.classes)
        columns = {
            "image": [images.name(index) for index in range(len(images))],
            "label": classes[images.labels.numpy()],
        }
        for probe, (candidate, index) in zip(self.probes, self._chosen(), strict=True):
            row = self.predictions[candidate * len(self.probes) + index]
            columns[f"{probe.selection}/{probe.fraction:g}/{probe.seed}"] = classes[row.cpu().numpy()]
        return pd.DataFrame(columns)

    def remarks(self) -> list[str]:
        """Name the probes whose training should not be trusted as it stands, one line per reason."""
        if not self.train_losses:
            return []
        history = self._of_chosen(torch.stack(self.train_losses, -1)).T
        last = history[-1]
        earlier = history[-1 - max(1, len(history) // 10)] if len(history) > 1 else last
        diverged = ~last.isfinite() | (last > 1.05 * math.log(self.num_classes))
        falling = ~diverged & (last < 0.99 * earlier)
        remarks = []
        if diverged.any():
            remarks.append(
                f"Training diverged for {self._say(diverged)}: the loss ends above that of a guess; "
                f"lower model.learning_rate or set model.standardise."
            )
        if falling.any():
            remarks.append(
                f"Training was not finished for {self._say(falling)}: the loss still fell by more than 1 % over the "
                f"last tenth of the epochs; raise trainer.max_epochs or model.step_size."
            )
        return remarks

    # ------------------------------------------------------------------------------------------------ one look

    def setup(self, stage: str) -> None:
        """Look at the images once, and let the task serve what was seen."""
        self._check_trainer()
        if self.trainer.ckpt_path:  # Lightning loads it after the look, which would have been for nothing
            self._check_belonging(weights.read_torch(Path(self.trainer.ckpt_path), "checkpoint"))
        if self.features == "off":
            return
        started = time.perf_counter()
        wanted = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        self.backbone.to(self.trainer.strategy.root_device)
        for split in wanted[stage]:
            if split in self._represented:
                continue
            views: list[int | None] = [None]
            if split == "train" and self.features != "clean":
                views = list(range(int(self.features)))
            self._task.represent(split, [self._look(split, view) for view in views])
            self._represented.add(split)
        self.look_seconds += time.perf_counter() - started

    def _look(self, split: str, view: int | None) -> FeatureRows:
        """Return the representations of a split: its clean view, or the augmented one of that number."""
        task, trainer = self._task, self.trainer
        images = task.images[split]
        fingerprint = {
            "backbone": self.identity,
            "split": split,
            "view": "clean view" if view is None else f"{task.augmentation} view {view} of seed {task.seed}",
            "images": self._digest(split),
            "precision": str(trainer.precision),
        }
        directory = Path(self.cache_dir or Path(trainer.default_root_dir) / "feature_cache").expanduser()
        cache = FeatureCache(directory, trainer.global_rank, trainer.world_size, trainer.strategy.barrier)

        def extract(batches: Sequence[Sequence[int]]) -> Generator[Tensor, None, None]:
            answers = task.image_batches(split, augmented=view is not None)
            requests = [task.request(batch, epoch=view or 0) for batch in batches]
            with tqdm(
                total=sum(map(len, batches)),
                desc=f"Looking at {split}" + ("" if view is None else f", view {view + 1} of {self.features}"),
                unit="image",
                disable=not trainer.is_global_zero,
            ) as progress:
                for batch in task.loader(answers, requests):
                    representations = self._represent(batch.inputs, batch.indices, split).cpu()
                    progress.update(len(batch.indices))
                    yield representations

        return cache.features(fingerprint, len(images), extract)

    def _represent(self, images: Tensor, indices: Tensor, split: str) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            representations = self.backbone(images.to(self.trainer.strategy.root_device, non_blocking=True))
        if not representations.isfinite().all():
            bad = indices[(~representations.isfinite().all(1)).nonzero()[0].item()]
            raise MisconfigurationException(
                f"Layer {self.backbone.layer!r} of {self.backbone.label} is not finite for "
                f"{self._task.images[split].name(int(bad))} of {split}; check the weights and trainer.precision."
            )
        return representations

    def _inputs(self, batch: Any, split: str) -> Tensor:
        """Return what the probes see of a batch, shape (B, D)."""
        looked = split in self._represented
        representations = batch.inputs if looked else self._represent(batch.inputs, batch.indices, split)
        return (representations - self.mean) / self.std if self.standardise else representations

    # ------------------------------------------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD over the probes alone, one parameter group per candidate, with the paper's step schedule."""
        optimizer = torch.optim.SGD(
            [
                {"params": list(bank.parameters()), "lr": rate, "weight_decay": decay}
                for bank, (rate, decay) in zip(self.banks, self.candidates, strict=True)
            ],
            momentum=self.momentum,
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.step_size, self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        """Take the statistics that need one look at what the probes will train on."""
        if self.standardise:
            mean, std = statistics.mean_and_std(self._first_view(), self._sum)
            self.mean.copy_(mean)
            self.std.copy_(std)
        self._warn_past_edge()

    def on_fit_end(self) -> None:
        """Refuse to go on with probes that were never validated, and so never kept."""
        if self.kept_epoch.min() < 0:
            raise MisconfigurationException(
                "Training ended before the first validation, so that no probe was kept; raise trainer.max_epochs, "
                "max_steps or max_time, or validate more often."
            )

    def on_train_epoch_start(self) -> None:
        """Start the sums of the training losses."""
        self.epoch_loss = torch.zeros_like(self.kept_accuracy)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of all probes' losses; a sum, so that no probe feels another."""
        inputs = self._inputs(batch, "train")
        summed = torch.stack([losses(bank(inputs), batch.labels) for bank in self.banks])
        self.epoch_loss += summed.detach()
        # Gradients are averaged over processes; each weighs as much as its share of the batch.
        return summed.sum() * (self.trainer.world_size / batch.total)

    def on_train_epoch_end(self) -> None:
        """Note each probe's training loss, and keep the last weights where those are wanted."""
        loss = self._sum(self.epoch_loss) / len(self._task.images["train"])
        self.train_losses.append(loss.cpu())
        self._log("train", "loss", loss)
        if self.keep == "last":
            self._keep(torch.ones_like(self.kept_epoch, dtype=torch.bool))

    def _keep(self, which: Tensor) -> None:
        for bank, kept, chosen in zip(self.banks, self.kept, which, strict=True):
            kept.copy_probes(bank, chosen)
        self.kept_epoch.masked_fill_(which, self.current_epoch)

    def _warn_past_edge(self) -> None:
        """Say which probes take steps longer than 2 (1 + momentum) / curvature, past which descent can be unstable."""
        sample: list[Tensor] = []
        for inputs in self._first_view():
            sample.append((inputs - self.mean) / self.std if self.standardise else inputs)
            if sum(map(len, sample)) >= 4096:
                break
        masks = torch.zeros(len(self.probes), self.backbone.width, dtype=torch.bool, device=self.device)
        for index, probe in enumerate(self.probes):
            masks[index, subsets.subset(probe, self.backbone.width).to(self.device)] = True
        curvature = statistics.largest_curvature(torch.cat(sample), masks)
        steps, edge = max(rate for rate, _ in self.candidates) * curvature, 2 * (1 + self.momentum)
        if (steps > edge).any():
            rank_zero_info(
                f"Learning rate x curvature can reach {steps.max():.3g}, past the edge of stability at {edge:.3g}, for "
                f"{self._say(steps > edge)}; model.standardise or a lower model.learning_rate trains them further."
            )

    def _first_view(self) -> Iterator[Tensor]:
        """Yield this process' share of what the probes see of train in the first epoch, not standardised."""
        for batch in self._task.train_dataloader():
            looked = "train" in self._represented
            inputs = batch.inputs if looked else self._represent(batch.inputs, batch.indices, "train")
            yield inputs.to(self.device)

    # ----------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the validation images: with the weights in training during a fit, else with those kept."""
        self._score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the test images, with the weights kept."""
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Keep each probe's weights where its validation accuracy is the best so far."""
        scores = self._finish("val")
        if self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == "fit":
            accuracy = scores["accuracy"].view_as(self.kept_accuracy)
            better = accuracy > self.kept_accuracy if self.keep == "best" else torch.ones_like(accuracy).bool()
            self.kept_accuracy.copy_(torch.where(better, accuracy, self.kept_accuracy))
            if self.keep == "best":
                self._keep(better)
        self._log("val", "accuracy", scores["accuracy"].view_as(self.kept_accuracy))

    def on_test_epoch_end(self) -> None:
        """Report the test accuracy per fraction."""
        self._log("test", "accuracy", self._finish("test")["accuracy"].view_as(self.kept_accuracy))

    def on_predict_start(self) -> None:
        """Make room for one class per probe and image."""
        shape = (len(self.candidates) * len(self.probes), len(self._task.images["test"]))
        self.predictions = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Note the class each probe gives each test image."""
        assert self.predictions is not None
        self.predictions[:, batch.indices] = self._logits(batch, "test").argmax(1)

    def on_predict_end(self) -> None:
        """Put the shares of all processes together: each has zeros where the others have classes."""
        assert self.predictions is not None
        self.predictions = self._sum(self.predictions)

    def _logits(self, batch: Any, split: str) -> Tensor:
        inputs = self._inputs(batch, split)
        return torch.cat([bank(inputs) for bank in (self.banks if self.trainer.state.fn == "fit" else self.kept)])

    def _score(self, batch: Any, split: str) -> None:
        self.scores.update(self._logits(batch, split), batch.labels)

    def _finish(self, split: str) -> dict[str, Tensor]:
        scores = self.scores.compute()
        self.scores.reset()
        if self.trainer.state.fn != "fit":
            self.evaluated[split] = scores
        return scores

    # ---------------------------------------------------------------------------------------------- checkpoints

    @property
    def identity(self) -> dict[str, Any]:
        """What the backbone's representations depend on."""
        if self._identity is None:
            self._identity = self.backbone.identity()
        return self._identity

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the backbone out, and say whose probes these are."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        checkpoint["probes"] = {
            "belonging": self._belonging(),
            "training": self._training(),
            "probes": [list(probe) for probe in self.probes],
            "indices": [subsets.subset(probe, self.backbone.width) for probe in self.probes],
            "train_losses": self.train_losses,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the history of the probes that Lightning restores.

        Raises:
            MisconfigurationException: If the checkpoint does not belong to this model; the message says where.
        """
        self._check_belonging(checkpoint)
        self.train_losses = list(checkpoint["probes"]["train_losses"])

    def _check_belonging(self, checkpoint: Any) -> None:
        """Refuse probes of another backbone, task or plan, and to go on with a training as it was not begun."""
        if not isinstance(checkpoint, dict) or "belonging" not in checkpoint.get("probes", {}):
            raise MisconfigurationException(
                f"{self.trainer.ckpt_path} holds no probes; name a checkpoint that a fit of this project left."
            )
        theirs, mine = checkpoint["probes"]["belonging"], self._belonging()
        if self.trainer.state.fn == "fit":
            theirs, mine = theirs | checkpoint["probes"]["training"], mine | self._training()
            done, wanted = len(checkpoint["probes"]["train_losses"]), self.trainer.max_epochs
            if 0 < (wanted or 0) < done:
                raise MisconfigurationException(
                    f"trainer.max_epochs is {wanted}, but {self.trainer.ckpt_path} has gone through {done}; "
                    f"give {done} or more."
                )
        check_belonging(theirs, mine)

    def _belonging(self) -> dict[str, Any]:
        """Say whose probes these are, in plain types."""
        return {
            "task": self._task.name,
            "classes": list(self._task.classes),
            "backbone": self.backbone.label,
            "layer": self.backbone.layer,
            "weights": self.identity["weights"],
            "preprocessing": json.dumps(self.identity["preprocessing"]),
            "selection": self.selections,
            "fractions": sorted({probe.fraction for probe in self.probes if probe.selection != subsets.FULL}),
            "seeds": sorted({probe.seed for probe in self.probes if probe.selection != subsets.FULL}),
            "probes": [list(probe) for probe in self.probes],
            "learning_rate and weight_decay": [list(candidate) for candidate in self.candidates],
            "standardise": self.standardise,
        }

    def _training(self) -> dict[str, Any]:
        """Say what a training rests on beside its probes, so that it goes on as it began."""
        return {
            "features": self.features,
            "keep": self.keep,
            "momentum": self.momentum,
            "step_size": self.step_size,
            "gamma": self.gamma,
            "trainer.precision": str(self.trainer.precision),
            "data.batch_size": self._task.batch_size,
            "data.seed": self._task.seed,
            "data.augmentation": self._task.augmentation,
            "training images": self._digest("train"),
        }

    def _digest(self, split: str) -> str:
        """Return what the images of a split are known by; computed once, as it may read all of them."""
        if split not in self._digests:
            self._digests[split] = self._task.images[split].digest()
        return self._digests[split]

    # -------------------------------------------------------------------------------------------------- helpers

    @property
    def _task(self) -> Any:
        """The data module; any with the methods of `datamodules.Task`."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _chosen(self) -> list[tuple[int, int]]:
        """Return each probe's candidate with the best validation accuracy (the first of equals), and its place."""
        return [(candidate, index) for index, candidate in enumerate(self.kept_accuracy.argmax(0).tolist())]

    def _of_chosen(self, values: Tensor) -> Tensor:
        """Return the values of each probe's chosen candidate, shape (P, ...), from values of shape (K, P, ...)."""
        candidates, places = zip(*self._chosen(), strict=True)
        return values[torch.tensor(candidates), torch.tensor(places)]

    def _log(self, split: str, metric: str, values: Tensor) -> None:
        """Log means over seeds as `<split>/<metric>/<selection>/<fraction>`, from values of shape (K, P)."""
        chosen = self._of_chosen(values).tolist()
        grouped: dict[str, list[float]] = {}
        for probe, value in zip(self.probes, chosen, strict=True):
            grouped.setdefault(f"{split}/{metric}/{probe.selection}/{probe.fraction:g}", []).append(value)
        self.log_dict({name: sum(group) / len(group) for name, group in grouped.items()}, rank_zero_only=True)

    def _say(self, which: Tensor) -> str:
        """Name probes by selection and fraction, with how many seeds of each."""
        said: dict[str, int] = {}
        for probe, chosen in zip(self.probes, which.tolist(), strict=True):
            if chosen:
                name = probe.selection if probe.selection == subsets.FULL else f"{probe.selection} {probe.fraction:g}"
                said[name] = said.get(name, 0) + 1
        return ", ".join(name if count == 1 else f"{name} (x{count})" for name, count in said.items())

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"trainer.strategy is {type(trainer.strategy).__name__}; probes train on a single device or with ddp."
            )
        for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "limit_train_batches"):
            limit = getattr(trainer, name)
            if isinstance(limit, int) or limit != 1:  # Lightning's 1.0 is all batches, its 1 is one
                raise MisconfigurationException(
                    f"trainer.{name} is {limit}, but every image is counted; leave it, overfit_batches and "
                    f"fast_dev_run out (debug.yaml is a short run)."
                )
        if trainer.state.fn == "fit":
            self._check_schedule()
        if self.trainer.gradient_clip_val and self.trainer.gradient_clip_algorithm != "value":
            raise MisconfigurationException(
                "trainer.gradient_clip_val clips the norm over all probes together, so that each would feel the "
                "others; leave it null."
            )
        if str(self.trainer.precision) not in ("32-true", "16-mixed", "bf16-mixed", "64-true"):
            raise MisconfigurationException(
                f"trainer.precision is {self.trainer.precision}, which would round the probes; use 32-true, 16-mixed "
                f"or bf16-mixed."
            )

    def _check_schedule(self) -> None:
        """Refuse a fit that would make no step, or keep no probe."""
        trainer = self.trainer
        every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
        if trainer.max_epochs == trainer.max_steps == -1 and not any(
            isinstance(callback, Timer | EarlyStopping)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ):
            raise MisconfigurationException(
                "trainer.max_epochs is -1, and nothing else ends the fit; give a number, max_steps or max_time."
            )
        counts = ("max_epochs", "max_steps", "accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
        for name in counts:
            value = getattr(trainer, name)
            if isinstance(value, int | float) and (value == 0 or (value < 0 and not name.startswith("max_"))):
                raise MisconfigurationException(f"trainer.{name} is {value}; it must be above 0.")
        if 0 < (trainer.max_epochs or 0) < (every or 1):
            raise MisconfigurationException(
                f"trainer.check_val_every_n_epoch is {every}, beyond the {trainer.max_epochs} epochs of "
                f"trainer.max_epochs; a probe is kept when it is validated."
            )
        steps = -(-len(self._task.images["train"]) // self._task.batch_size)
        if every and isinstance(interval, int) and interval > steps:
            raise MisconfigurationException(
                f"trainer.val_check_interval is {interval}, beyond the {steps} steps of an epoch; a probe is kept when "
                f"it is validated."
            )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _seeds(value: int | list[int], name: str) -> list[int]:
    if value == [] or (isinstance(value, int) and not 1 <= value <= 100_000):  # more would only run out of memory later
        raise MisconfigurationException(
            f"model.{name} is {value}; give a number of seeds from 1 to 100,000, or a list of seeds."
        )
    return list(range(value)) if isinstance(value, int) else value


def _check_optimisation(
    candidates: Sequence[tuple[float, float]], momentum: float, step_size: int, gamma: float
) -> None:
    if len(set(candidates)) < len(candidates):
        twice = next(candidate for candidate in candidates if candidates.count(candidate) > 1)
        raise MisconfigurationException(
            f"model.learning_rate {twice[0]:g} with model.weight_decay {twice[1]:g} is listed twice; give each once."
        )
    if not candidates:
        raise MisconfigurationException("model.learning_rate and model.weight_decay need at least one value each.")
    for name, value, holds, right in (
        *(("learning_rate", rate, rate > 0, "above 0") for rate, _ in candidates),
        *(("weight_decay", decay, decay >= 0, "0 or more") for _, decay in candidates),
        ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
        ("step_size", step_size, step_size >= 1, "at least 1"),
        ("gamma", gamma, 0 < gamma <= 1, "above 0, at most 1"),
    ):
        if not (holds and math.isfinite(value)):
            raise MisconfigurationException(f"model.{name} is {value:g}; it must be {right}.")


def _check_memory(parameters: int, candidates: int, probes: int, classes: int) -> None:
    """Refuse a bank that cannot fit: weights, gradients, momentum and kept weights, four bytes each."""
    needed = 4 * 4 * parameters * candidates
    available = psutil.virtual_memory().available
    if torch.cuda.is_available():
        available = torch.cuda.mem_get_info()[0]
    if needed > available:
        raise MisconfigurationException(
            f"The bank needs {needed / 1e9:,.1f} GB of memory ({probes} probes x {candidates} candidates, {classes} "
            f"classes: {parameters * candidates:,} weights, with gradient, momentum and best), and "
            f"{available / 1e9:,.1f} GB are free; use fewer fractions, seeds or candidates."
        )
