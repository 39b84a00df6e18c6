"""The LightningModule of the project: a frozen backbone, looked through once, and a bank of masked linear probes."""

import copy
import itertools
import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

from lightning_modules import checks
from lightning_modules.backbones import weights
from lightning_modules.backbones.frozen import FrozenBackbone, GivenVectors
from lightning_modules.checkpoints import check_belonging
from lightning_modules.features import moments as statistics
from lightning_modules.features.cache import BATCH, FeatureCache, FeatureRows
from lightning_modules.features.moments import Moments
from lightning_modules.measures.accuracy import ProbeScores, losses
from lightning_modules.measures.measurement import Measured, Measurement, neighbour_rows
from lightning_modules.probes.bank import ProbeBank, parameters_of
from lightning_modules.probes.ridge import ridge_probes
from lightning_modules.results import tables
from lightning_modules.subsets import plan as subsets
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.selections import FULL, Layer

PAPER_FRACTIONS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.9)
LAYER_COLUMNS = ["layer", "width", "split", "images", "participation_ratio", "effective_rank"]
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class RedundancyProbe(LightningModule):
    """Trains a linear probe on every subset of a frozen representation, all on the same batches.

    The full layer is always probed beside the subsets, as the reference of every ratio. Where `learning_rate` or
    `weight_decay` is a list, every probe is trained with every combination and keeps the best on validation.

    Args:
        backbone: The frozen pre-trained network, see `FrozenBackbone`; null where the task holds vectors.
        num_classes: C; taken from the task.
        width: D of the task's vectors; taken from the task.
        fractions: Fractions of the layer's neurons to probe, each in (0, 1].
        seeds: Subset seeds; a number n means 0 to n - 1.
        selection: Rules that pick subsets: `random`; `first`; by the training images `pca`, `pca_least`, `variance` and
            `fisher`; `random_projection`, `orthogonal_projection` and, for reproduction, `positive_projection`.
        full_seeds: Initialisation seeds of the full layer's probe; a number n means 0 to n - 1.
        solver: `sgd`, which trains softmax probes; or `ridge`, least squares in closed form.
        penalty: Of ridge, over the mean diagonal of the full layer's centred X'X; of a list every probe takes the one
            with the smallest squared error on validation.
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
        similarity: Whether to measure the linear CKA of every subset with its layer, and the layers' participation
            ratio and effective rank; costs 2 n D^2 operations for n images and D^2 numbers of memory.
        ensembles: Whether to measure what the subsets of a fraction say together, beside one probe with as many
            neurons.
        neighbours: How many nearest neighbours of test images among training images to look for in every subset; 0 for
            none. Costs 2 n m D operations for n test and m training images for every seed of every selection.
        cache_dir: Where features are kept; null is `feature_cache` under `trainer.default_root_dir`.

    Raises:
        MisconfigurationException: If an argument cannot be, or the bank does not fit into memory.
    """

    def __init__(
        self,
        backbone: FrozenBackbone | None,
        num_classes: int,
        width: int | None = None,
        fractions: float | list[float] = list(PAPER_FRACTIONS),  # noqa: B006 (never changed)
        seeds: int | list[int] = 5,
        selection: str | list[str] = "random",
        full_seeds: int | list[int] = 1,
        solver: Literal["sgd", "ridge"] = "sgd",
        penalty: float | list[float] = list(PENALTIES),  # noqa: B006 (never changed)
        features: Literal["clean", "off", False] | int = "clean",
        keep: Literal["best", "last"] = "best",
        learning_rate: float | list[float] = 0.1,
        momentum: float = 0.9,
        weight_decay: float | list[float] = 1e-4,
        step_size: int = 20,
        gamma: float = 0.1,
        standardise: bool = False,
        similarity: bool = True,
        ensembles: bool = False,
        neighbours: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if backbone is None and width is None:
            raise MisconfigurationException("model.backbone is null, but the task holds images; name a backbone.")
        if backbone is not None and width is not None:
            raise MisconfigurationException("The task holds vectors, which no backbone takes; set model.backbone null.")
        self.backbone: Any = GivenVectors(width or 0) if backbone is None else backbone
        self.widths: dict[str, int] = self.backbone.widths
        self.selections, fractions = _list(selection), _list(fractions)
        seeds, full_seeds = _seeds(seeds, "seeds"), _seeds(full_seeds, "full_seeds")
        subsets.check(self.selections, fractions, seeds, full_seeds)
        if features is False:  # how YAML reads a bare off
            features = "off"
        if isinstance(features, int) and features < 1:
            raise MisconfigurationException(
                f"model.features is {features}; it must be clean, off or a number of augmented views from 1."
            )
        if backbone is None and features != "clean":
            raise MisconfigurationException(f"model.features is {features}, but vectors have no views; leave it clean.")
        self.features = features
        self.keep = keep
        self.solver = solver
        self.penalties = _list(penalty)
        self.candidates = list(itertools.product(_list(learning_rate), _list(weight_decay)))
        checks.optimisation(self.candidates, momentum, step_size, gamma)
        checks.penalties(self.penalties)
        if solver == "ridge":
            self.candidates = [(math.nan, math.nan)]
        self.momentum, self.step_size, self.gamma = momentum, step_size, gamma
        self.standardise = standardise
        self.similarity = similarity
        self.neighbours = neighbours
        if neighbours < 0 or (neighbours and features != "clean"):
            raise MisconfigurationException(
                f"model.neighbours is {neighbours} with model.features {features}; it must be 0 or more, and "
                f"neighbours are looked for among clean features."
            )
        self.cache_dir = cache_dir

        self.probes = subsets.plan(self.selections, fractions, seeds, full_seeds, self.widths, ensembles)
        checks.memory(
            parameters_of(self.probes, num_classes),
            len(self.candidates),
            len(self.probes),
            num_classes,
            self.widths if similarity or solver == "ridge" else {},
        )
        bank = ProbeBank(self.probes, num_classes)
        self.coordinates = Coordinates(self.probes, self.widths)
        self.banks = nn.ModuleList(copy.deepcopy(bank) for _ in self.candidates)
        self.kept = nn.ModuleList(copy.deepcopy(bank).requires_grad_(False) for _ in self.candidates)
        shape = (len(self.candidates), len(self.probes))
        self.register_buffer("kept_accuracy", torch.full(shape, -1.0, dtype=torch.float64))
        self.register_buffer("kept_epoch", torch.full(shape, -1))
        self.register_buffer("kept_penalty", torch.full((len(self.probes),), math.nan, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(sum(self.widths.values())))
        self.register_buffer("std", torch.ones(sum(self.widths.values())))
        self.scores = ProbeScores(math.prod(shape), num_classes)
        self.ensembles = subsets.ensembles(self.probes, fractions) if ensembles else []
        self.measurement = Measurement(
            self.probes, self.coordinates, num_classes, solver == "ridge", similarity, self.ensembles
        )
        self.num_classes = num_classes
        self.train_losses: list[Tensor] = []
        self.epoch_loss = torch.zeros(shape, dtype=torch.float64)  # no buffer: DDP would give all processes the first's
        self.measured: dict[str, Measured] = {}
        self.neighbour_rows: list[dict[str, Any]] = []
        self.predictions: Tensor | None = None
        self.strict_loading = False  # a checkpoint never holds the backbone; `on_load_checkpoint` checks the rest
        self.look_seconds = 0.0
        self._represented: dict[str, Any] = {}
        self._identity: dict[str, Any] | None = None
        self._digests: dict[str, str] = {}
        # What processes need not tell each other: they build the same, and a frozen backbone stays so. Without this
        # DDP sends all of it at the start, and every buffer before each step.
        still = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = still + [name for name, _ in self.named_buffers()]

    banks: Any  # nn.ModuleList of ProbeBank, one for each candidate
    kept: Any  # nn.ModuleList of ProbeBank
    kept_accuracy: Tensor
    kept_epoch: Tensor
    kept_penalty: Tensor
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
        candidates = [self.candidates[candidate] for candidate, _ in self._chosen()]
        return tables.results(
            self.probes,
            self.widths,
            {split: measured.scores for split, measured in self.measured.items()},
            {
                "task": self._task.label,
                "backbone": self.backbone.label,
                "solver": self.solver,
                "augmentation": "none" if self.features == "clean" else self._task.augmentation,
                "features": self.features,
            },
            {
                "epoch": self._of_chosen(self.kept_epoch).tolist(),
                "learning_rate": [rate for rate, _ in candidates],
                "weight_decay": [decay for _, decay in candidates],
                "penalty": self.kept_penalty.tolist(),
            },
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return all that was measured, by the name of its file: `results`, `classes` and what was asked for beside."""
        scores = {split: measured.scores for split, measured in self.measured.items()}
        layers = [{"split": split} | row for split, measured in self.measured.items() for row in measured.layers]
        found = {
            "results": self.results(),
            "classes": tables.classes(self.probes, self._task.classes, scores),
            "layers": pd.DataFrame(layers, columns=LAYER_COLUMNS),
            "neighbours": pd.DataFrame(self.neighbour_rows),
        }
        if self.ensembles:
            found["ensembles"] = tables.ensembles(
                self.probes,
                self.ensembles,
                self.widths,
                {split: measured.ensembles for split, measured in self.measured.items()},
                found["results"],
            )
        return {name: table for name, table in found.items() if len(table)}

    def prediction_table(self) -> pd.DataFrame:
        """Return one row per test image: its name, its label, and the class each probe gives it."""
        assert self.predictions is not None
        return tables.predictions(
            self.probes, self._task.images["test"], self._task.classes, self.predictions, len(self.widths) > 1
        )

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
        checks.trainer(self.trainer)
        if self.trainer.state.fn == "fit" and self.solver == "sgd":
            checks.schedule(self.trainer, -(-len(self._task.images["train"]) // self._task.batch_size))
        if self.trainer.ckpt_path:  # Lightning loads it after the look, which would have been for nothing
            self._check_belonging(weights.read_torch(Path(self.trainer.ckpt_path), "checkpoint"))
        wanted = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        if isinstance(self.backbone, GivenVectors):  # the task serves them
            self._represented |= {split: self._task.representations(split)[0] for split in wanted[stage]}
        if self.features == "off" or isinstance(self.backbone, GivenVectors):
            return
        started = time.perf_counter()
        self.backbone.to(self.trainer.strategy.root_device)
        for split in wanted[stage]:
            if split in self._represented:
                continue
            views: list[int | None] = [None]
            if split == "train" and self.features != "clean":
                views = list(range(int(self.features)))
            rows = [self._look(split, view) for view in views]
            self._task.represent(split, rows)
            self._represented[split] = rows[0]
        self.look_seconds += time.perf_counter() - started

    def _look(self, split: str, view: int | None) -> FeatureRows:
        """Return the representations of a split: its clean view, or the augmented one of that number."""
        task, trainer = self._task, self.trainer
        images = task.images[split]
        clean = "clean view, squashed whole" if task.whole_image else "clean view"
        fingerprint = {
            "backbone": self.identity,
            "split": split,
            "view": clean if view is None else f"{task.augmentation} view {view} of seed {task.seed}",
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
        device = self.trainer.strategy.root_device
        # On a CPU larger batches are no faster, and take memory in proportion.
        parts = images.split(BATCH) if device.type == "cpu" else [images]
        with self.trainer.precision_plugin.forward_context():
            representations = torch.cat([self.backbone(part.to(device, non_blocking=True)) for part in parts])
        if not representations.isfinite().all():
            bad = indices[int((~representations.isfinite().all(1)).nonzero()[0])]
            layer = self._layer_of(~representations.isfinite().all(0))
            raise MisconfigurationException(
                f"Layer {layer!r} of {self.backbone.label} is not finite for "
                f"{self._task.images[split].name(int(bad))} of {split}; check the weights and trainer.precision."
            )
        return representations

    def _inputs(self, inputs: Tensor, indices: Tensor, split: str) -> Tensor:
        """Return what the probes see of images or representations, shape (B, sum of widths)."""
        images = inputs.ndim == 4
        representations = self._represent(inputs, indices, split) if images else inputs.to(self.device)
        return (representations - self.mean) / self.std if self.standardise else representations

    def _seen(self, loader: Any, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the probes see of a loader's batches, with labels."""
        for batch in loader:
            yield self._inputs(batch.inputs, batch.indices, split), batch.labels.to(self.device)

    def _clean_train(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' share of what the probes see of the clean view of train, with labels."""
        if self.features == "clean":
            yield from self._train_view(0)
            return
        loader = self._task.clean_loader("train")
        with tqdm(
            loader, desc="Looking at train, clean", unit="batch", disable=not self.trainer.is_global_zero
        ) as seen:
            yield from self._seen(seen, "train")

    def _train_view(self, view: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' share of what the probes train on in the epoch of that number, with labels."""
        loader = self._task.train_dataloader()
        loader.sampler.set_epoch(view)
        yield from self._seen(loader, "train")

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
        """Take from one look at train what must be known before the first step; with ridge, that is all."""
        if not self.trainer.ckpt_path:
            self._learn_coordinates()
        if self.solver == "ridge":
            self._solve()
            self.trainer.fit_loop.max_epochs = 0  # there is nothing left to train
        else:
            self._warn_past_edge()

    def _learn_coordinates(self) -> None:
        """Fill in what depends on the clean view of train: mean and spread, orders, and bases."""
        if self.standardise:
            moments = self._sum_moments(self._clean_train(), products=False)
            self.mean.copy_(torch.cat([each.mean for each in moments.values()]))
            std = torch.cat([each.variance for each in moments.values()]).sqrt()
            self.std.copy_(std.masked_fill(std == 0, 1.0))
        if self.coordinates.informed:
            moments = self._sum_moments(self._clean_train())
            self.coordinates.look({name: Layer(self.widths[name], each) for name, each in moments.items()})

    def _sum_moments(self, batches: Iterator[tuple[Tensor, Tensor]], products: bool = True) -> dict[str, Moments]:
        """Return the moments of each layer, of this and all other processes, as the probes see it."""
        moments = {
            layer: Moments(width, self.num_classes, outer=products, device=self.device)
            for layer, width in self.widths.items()
        }
        for inputs, labels in batches:
            for layer, part in self.coordinates.by_layer(inputs).items():
                moments[layer].update(part, labels)
        for each in moments.values():
            each.reduce(self._sum)
        return moments

    def _layer_of(self, columns: Tensor) -> str:
        """Return the first layer with a true column, shape (sum of widths,)."""
        parts = self.coordinates.by_layer(columns.unsqueeze(0))
        return next(layer for layer, part in parts.items() if part.any())

    def _solve(self) -> None:
        """Set every probe in closed form, from sums over train and validation."""
        views = self.features if isinstance(self.features, int) else 1
        batches = itertools.chain.from_iterable(self._train_view(view) for view in range(views))
        train = self._sum_moments(batches)
        val = self._sum_moments(self._seen(self._task.val_dataloader(), "val"))
        for layer in self.widths:
            nests = self.coordinates.of(layer)
            solved = ridge_probes(
                train[layer], val[layer], [self.coordinates.ordering(nest) for nest in nests], self.penalties
            )
            for nest, probes in zip(nests, solved, strict=True):
                centre = self.coordinates.centre(nest)
                for index, probe in zip(nest.probes, probes, strict=True):
                    # Ridge knows nothing of where a basis has its origin.
                    bias = probe.bias + probe.weight @ centre[: probe.weight.shape[1]]
                    for bank in (self.banks[0], self.kept[0]):
                        bank.set_probe(index, probe.weight, bias)
                    self.kept_penalty[index] = probe.penalty
        self.kept_epoch.zero_()

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
        coordinates = self.coordinates(self._inputs(batch.inputs, batch.indices, "train"))
        summed = torch.stack([losses(bank(coordinates), batch.labels) for bank in self.banks])
        self.epoch_loss += summed.detach()
        # Gradients are averaged over processes; each weighs as much as its share of the batch.
        return summed.sum() * (self.trainer.world_size / batch.total)

    def on_train_epoch_end(self) -> None:
        """Note each probe's training loss, and keep the last weights where those are wanted."""
        loss = self._sum(self.epoch_loss) / len(self._task.images["train"])
        self.train_losses.append(loss.cpu())
        self._log("train", "loss", self._of_chosen(loss))
        if self.keep == "last":
            self._keep(torch.ones_like(self.kept_epoch, dtype=torch.bool))

    def _keep(self, which: Tensor) -> None:
        for bank, kept, chosen in zip(self.banks, self.kept, which, strict=True):
            kept.copy_probes(bank, chosen)
        self.kept_epoch.masked_fill_(which, self.current_epoch)

    def _warn_past_edge(self) -> None:
        """Say which probes take steps longer than 2 (1 + momentum) / curvature, past which descent can be unstable."""
        sample: list[Tensor] = []
        for inputs, _ in self._train_view(0):
            sample.append(self.coordinates.spaces(inputs).t())
            if sum(map(len, sample)) >= 4096:
                break
        curvature = statistics.largest_curvature(torch.cat(sample), self.coordinates.masks())
        steps, edge = max(rate for rate, _ in self.candidates) * curvature, 2 * (1 + self.momentum)
        if (steps > edge).any():
            rank_zero_info(
                f"Learning rate x curvature can reach {steps.max():.3g}, past the edge of stability at {edge:.3g}, for "
                f"{self._say(steps > edge)}; model.standardise or a lower model.learning_rate trains them further."
            )

    # ----------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the validation images: with the weights in training during a fit, else with those kept."""
        self._score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the test images, with the weights kept."""
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Keep each probe's weights where its validation accuracy is the best so far; after a fit, measure them."""
        if self.trainer.state.fn != "fit":
            self._measure("val")
            return
        accuracy = self.scores.compute()["accuracy"].view_as(self.kept_accuracy)
        self.scores.reset()
        if self.trainer.sanity_checking:
            return
        better = accuracy > self.kept_accuracy if self.keep == "best" else torch.ones_like(accuracy).bool()
        self.kept_accuracy.copy_(torch.where(better, accuracy, self.kept_accuracy))
        if self.keep == "best":
            self._keep(better)
        self._log("val", "accuracy", self._of_chosen(accuracy))

    def on_test_epoch_end(self) -> None:
        """Measure the weights that were kept."""
        self._measure("test")
        if self.neighbours and "train" in self._represented:
            self._find_neighbours()

    def on_predict_start(self) -> None:
        """Make room for one class per probe and image."""
        shape = (len(self.probes), len(self._task.images["test"]))
        self.predictions = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Note the class each probe gives each test image."""
        assert self.predictions is not None
        inputs = self._inputs(batch.inputs, batch.indices, "test")
        self.predictions[:, batch.indices] = self._kept_logits(inputs).argmax(1)

    def on_predict_end(self) -> None:
        """Put the shares of all processes together: each has zeros where the others have classes."""
        assert self.predictions is not None
        self.predictions = self._sum(self.predictions)

    def _kept_logits(self, inputs: Tensor) -> Tensor:
        """Return the logits of each probe's kept weights, of the chosen candidate, shape (P, C, B)."""
        coordinates = self.coordinates(inputs)
        return self._of_chosen(torch.stack([bank(coordinates) for bank in self.kept]))

    def _score(self, batch: Any, split: str) -> None:
        inputs = self._inputs(batch.inputs, batch.indices, split)
        if self.trainer.state.fn == "fit":
            coordinates = self.coordinates(inputs)
            self.scores.update(torch.cat([bank(coordinates) for bank in self.banks]), batch.labels)
            return
        self.measurement.update(inputs, self._kept_logits(inputs), batch.labels)

    def _measure(self, split: str) -> None:
        """Take what was measured of a split."""
        self.measured[split] = self.measurement.compute(self.device, self._sum)
        for metric in ("accuracy", "cka"):
            if metric in self.measured[split].scores:
                self._log(split, metric, self.measured[split].scores[metric])

    def _find_neighbours(self) -> None:
        """Look for the test images' nearest training images, this process for its share."""
        places = {split: torch.arange(len(self._task.images[split])) for split in ("test", "train")}
        places["test"] = places["test"][self.trainer.global_rank :: self.trainer.world_size]
        queries, gallery = (
            self._inputs(self._represented[split][indices], indices, split) for split, indices in places.items()
        )
        self.neighbour_rows = neighbour_rows(
            self.coordinates, self.probes, queries, gallery, self.neighbours, self._sum
        )

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
            "indices": [self.coordinates.subset(index) for index in range(len(self.probes))],
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
            "task": self._task.label,
            "classes": list(self._task.classes),
            "backbone": self.backbone.label,
            "layer": ", ".join(self.widths),
            "weights": self.identity["weights"],
            "preprocessing": json.dumps(self.identity["preprocessing"]),
            "selection": self.selections,
            "fractions": sorted({probe.fraction for probe in self.probes if probe.selection != FULL}),
            "seeds": sorted({probe.seed for probe in self.probes if probe.selection != FULL}),
            "probes": [list(probe) for probe in self.probes],
            "solver": self.solver,
            "learning_rate and weight_decay": [list(candidate) for candidate in self.candidates]
            if self.solver == "sgd"
            else [],
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
        """Log means over seeds as `<split>/<metric>/<selection>/<fraction>`, from values of shape (P,)."""
        grouped: dict[str, list[float]] = {}
        for probe, value in zip(self.probes, values.tolist(), strict=True):
            layer = f"{probe.layer}/" if len(self.widths) > 1 else ""
            grouped.setdefault(f"{split}/{metric}/{layer}{probe.selection}/{probe.fraction:g}", []).append(value)
        means = {name: sum(group) / len(group) for name, group in grouped.items()}
        if self.trainer.state.fn != "fit":
            self.log_dict(means, rank_zero_only=True)
            return
        # Twice in every epoch, log_dict would take a tenth of the training's time to handle single numbers.
        self.trainer.callback_metrics.update({name: torch.tensor(mean) for name, mean in means.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **means}, self.global_step)
            logger.save()

    def _say(self, which: Tensor) -> str:
        """Name probes by selection and fraction, with how many seeds of each; many of a selection by their range."""
        said: dict[str, dict[float, int]] = {}
        for probe, chosen in zip(self.probes, which.tolist(), strict=True):
            if chosen:
                layer = f"{probe.layer} " if len(self.widths) > 1 else ""
                fractions = said.setdefault(f"{layer}{probe.selection}", {})
                fractions[probe.fraction] = fractions.get(probe.fraction, 0) + 1
        parts = []
        for name, fractions in said.items():
            groups = {f" {fraction:g}": count for fraction, count in fractions.items()}
            if len(groups) > 3:
                groups = {f" {min(fractions):g} to {max(fractions):g}": sum(fractions.values())}
            elif name.endswith(FULL):
                groups = {"": fractions[1.0]}
            parts += [f"{name}{group}" + (f" (x{count})" if count > 1 else "") for group, count in groups.items()]
        return ", ".join(parts)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _seeds(value: int | list[int], name: str) -> list[int]:
    if value == [] or (isinstance(value, int) and not 1 <= value <= 100_000):  # more would only run out of memory later
        raise MisconfigurationException(
            f"model.{name} is {value}; give a number of seeds from 1 to 100,000, or a list of seeds."
        )
    return list(range(value)) if isinstance(value, int) else value
