"""The LightningModule of the project: a frozen backbone, and a linear probe on every subset of its neurons."""

import warnings
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_modules import checkpoints, checks
from lightning_modules.backbones.frozen import FrozenBackbone, GivenVectors
from lightning_modules.features.extractor import Extractor, FeatureStream
from lightning_modules.measures.measure import Batch, Context, Measure
from lightning_modules.measures.suite import Suite
from lightning_modules.probes import SGD, Solver
from lightning_modules.probes.grid import Grid
from lightning_modules.probes.search import suited
from lightning_modules.reporting.metrics import log
from lightning_modules.results.results import Results
from lightning_modules.results.tables import Predictions, assemble
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import PAPER_FRACTIONS, Plan, Probe, mean_by_fraction


class RedundancyProbe(LightningModule):
    """Finds a linear probe on every subset of a frozen representation, all on the same batches, and measures them.

    The full layer is always probed beside the subsets, as the reference of every ratio.

    Args:
        backbone: The frozen pre-trained network, see `FrozenBackbone`; null where the task holds vectors.
        fractions: Fractions of the layer's neurons to probe, each in (0, 1].
        neurons: Subset sizes as numbers of neurons, one or a list, in place of `fractions`; null takes `fractions`.
        seeds: Subset seeds; a number n means 0 to n - 1.
        selection: Rules that pick subsets, one or a list; see `subsets/selections.py`.
        bits: In how many bits each number is stored, one or a list of 32 (as it is), 8, 4, 2 and 1.
        full_seeds: Initialisation seeds of the full layer's probe; a number n means 0 to n - 1.
        solver: How probes are found: `SGD`, which null is too, `Logistic`, `Ridge`, `KNN`, `Search`, or your own.
        features: What the probes train on: `clean`, one view without augmentation; a number of augmented views, each
            extracted once and cycled over epochs; or `off`, augmented afresh in every epoch, a pass of the backbone.
        refit: Whether every probe is found again on train and validation together, with what validation chose, before
            it is tested; standardisation, bases and rankings stay those of train.
        standardise: Whether to subtract each neuron's mean and divide by its standard deviation over train.
        measures: What is measured beside the target's own metric, one or a list of classes with their arguments; null
            is CKA (with the ranks of the layers) and Inequality, or none for `Search`.
        cache_dir: Where features are kept; null is `feature_cache` under `trainer.default_root_dir`.

    Raises:
        MisconfigurationException: If an argument is out of range.
    """

    def __init__(
        self,
        backbone: FrozenBackbone | None,
        fractions: float | list[float] = list(PAPER_FRACTIONS),  # noqa: B006 (never changed)
        neurons: int | list[int] | None = None,
        seeds: int | list[int] = 5,
        selection: str | list[str] = "random",
        bits: int | list[int] = 32,
        full_seeds: int | list[int] = 1,
        solver: Solver | None = None,
        features: Literal["clean", "off", False] | int = "clean",
        refit: bool = False,
        standardise: bool = False,
        measures: Measure | list[Measure] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.plan = Plan(selection, fractions, seeds, full_seeds, neurons, bits)
        self.features = "off" if features is False else features  # how YAML reads a bare off
        self.solver = SGD() if solver is None else solver
        checks.views(self.features, backbone is None, refit, self.solver.linear)
        self.backbone: Any = GivenVectors() if backbone is None else backbone
        self.refit = refit
        self.standardise = standardise
        self.measures = Suite(measures, self.features == "clean")
        self.cache_dir = cache_dir
        self.probes: list[Probe] = []
        self.train_losses: list[Tensor] = []
        self.measured: dict[str, list[Any]] = {}
        self.strict_loading = False  # a checkpoint never holds the backbone; `on_load_checkpoint` checks the rest

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the backbone wants of an image (timm's data configuration); empty for vectors."""
        return self.backbone.preprocessing

    @property
    def label(self) -> str:
        """What a run of this model is called by default, after its task."""
        return f"{self.backbone.label}_{'-'.join(self.plan.selections)}"

    @property
    def task(self) -> Any:
        """The data module; any with the methods of `datamodules.Task`."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def target(self) -> Any:
        """What is predicted or found, see `datamodules.targets.Target`."""
        return self.task.target

    @property
    def widths(self) -> dict[str, int]:
        """D of each layer."""
        return self.backbone.widths

    def describe(self, task: Any) -> dict[str, str]:
        """Return what a run with this task will do, part by part; callable once the task is loaded."""
        self._plan(task)
        views = {"clean": "clean view, extracted once", "off": "augmented afresh in every epoch"}
        return {
            "backbone": self.backbone.describe(),
            "features": views.get(str(self.features), f"{self.features} augmented views")
            + ", images squashed whole to the input size" * (task.view == "squash"),
            "probes": f"{len(self.probes):,}: {self.plan.describe()}{', standardised' * self.standardise}",
            "solver": f"{self.solver.describe()}{', then refit on train and validation' * self.refit}",
            "measures": ", ".join(type(measure).__name__ for measure in self.measures),
        }

    def _plan(self, task: Any) -> None:
        """Plan the probes, once the task says what it holds; refuse a backbone and a task that do not fit."""
        if self.probes:
            return
        checks.task(task, not isinstance(self.backbone, GivenVectors), self.features, self.measures)
        if task.vectors:
            self.backbone.widths = {"none": task.width}
        self.solver = suited(self.solver, task.target)
        checks.selections(self.plan.selections, task.target)
        self.measures.put_first(task.target)
        self.probes = self.plan.probes(self.widths, any(measure.needs_comparison_probes for measure in self.measures))

    def setup(self, stage: str) -> None:
        """Build the bank for the task as loaded, and let the task have its features extracted."""
        warnings.filterwarnings("ignore", message=".*overridden `on_after_batch_transfer`.*")  # as is meant
        checks.trainer(self.trainer)
        self._plan(self.task)
        if self.trainer.state.fn == "fit" and self.solver.trains:
            checks.schedule(self.trainer, -(-len(self.task.images["train"]) // self.task.batch_size), self.refit)
            checks.monitors(self.trainer, ("train/loss", f"val/{self.target.metric}"), self.probes)
        if not hasattr(self, "grid"):
            self._build()
        if self.features != "off" and not self.task.vectors:
            self.task.extract = self.stream.extractor.extract

    def _build(self) -> None:
        candidates, outputs = self.solver.candidates(), self.target.outputs * self.solver.linear
        self.coordinates = Coordinates(self.probes, self.widths)
        checks.memory(self, outputs, len(candidates))
        self.grid = Grid(self.probes, outputs, candidates, self.refit)
        self.scores = self.target.scores(len(candidates) * len(self.probes))
        extractor = Extractor(self.backbone, self.task, self.trainer, self.cache_dir, self.features)
        self.stream = FeatureStream(extractor, self.standardise)
        context = Context(
            probes=self.probes,
            fractions=[each for layer, width in self.widths.items() for each in self.plan.asked(layer, width)],
            coordinates=self.coordinates,
            target=self.target,
            solver=self.solver,
            device=self.trainer.strategy.root_device,
            reduce=self.stream.reduce,
            features=self.stream.everything,
            moments=self.stream.moments,
            stream=self.stream,
            logits=self.grid.final_logits,
        )
        self.measures.setup(context)
        # Processes build the same: without this DDP would send all of it at the start, and buffers before each step.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in self.named_buffers()]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn a batch of images or features into what the probes see, so that every step has (B, sum of widths)."""
        in_training, validating = self.trainer.training, self.trainer.validating or self.trainer.sanity_checking
        return self.stream(batch, "train" if in_training else "val" if validating else "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the solver's optimiser over the probes alone, if it trains."""
        return self.solver.optimizer(self.grid)

    def on_fit_start(self) -> None:
        """Extract features, fit standardisation, bases and rankings to train, and let the solver prepare or solve."""
        for split in ("train", "val", "test"):
            self.task.features(split)
        if not self.train_losses:  # otherwise the checkpoint brought them
            self.stream.fit_standardisation()
            if self.coordinates.fitted:
                self.coordinates.fit(self.stream.clean_moments())
        self.solver.prepare(self)
        if not self.solver.trains:
            self.trainer.should_stop = True  # the probes are found: no epoch follows
            if self.refit:
                self.solver.refit(self)

    def on_train_epoch_start(self) -> None:
        """Start the sums of the training losses; no buffer, as DDP would give all processes those of the first."""
        self.epoch_loss = torch.zeros_like(self.grid.kept_score)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of all probes' losses; a sum, so that no probe feels another."""
        summed = self.losses(self.grid, batch)
        self.epoch_loss += summed.detach()
        # Gradients are averaged over processes; each weighs as much as its share of the batch.
        return summed.sum() * (self.trainer.world_size / batch.total)

    def losses(self, grid: Grid, batch: Any) -> Tensor:
        """Return the loss over a batch of every candidate and probe of a grid in training, summed, shape (K, P)."""
        coordinates = self.coordinates(batch.inputs)
        return torch.stack([self.solver.loss(self.target, bank(coordinates), batch.labels) for bank in grid.banks])

    def on_train_epoch_end(self) -> None:
        """Note each probe's training loss, and let the solver keep weights; after the last epoch, let it refit."""
        loss = self.stream.reduce(self.epoch_loss) / len(self.task.images["train"])
        self.train_losses.append(loss.cpu())
        self._log("train", "loss", self.grid.of_chosen(loss))
        self.solver.after_epoch(self.grid, self.current_epoch)
        self.grid.is_refitted.fill_(False)  # of a run that is lengthened
        if self.refit and self.current_epoch + 1 == self.trainer.max_epochs:  # before the last checkpoint is written
            self.solver.refit(self)

    def on_fit_end(self) -> None:
        """Refuse to go on with probes that were never validated, and so never kept, or not refitted."""
        self.grid.check_kept()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score the weights in training during a fit; otherwise measure those that validation chose."""
        if self.trainer.state.fn != "fit":
            return self._measure(batch, "val")
        self.scores.update(self.grid.logits(self.coordinates(batch.inputs)), batch.labels)

    on_validation_model_train: Any = LightningModule.train  # where Lightning would set all modules of the backbone

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the weights that the run ends with."""
        self._measure(batch, "test")

    def _measure(self, batch: Any, split: str) -> None:
        found = self.solver.logits(self, batch.inputs, split)
        self.measures.update(split, Batch(batch.inputs, found, batch.labels, batch.indices))

    def on_validation_epoch_end(self) -> None:
        """Let the solver keep weights by their validation scores; outside a fit, take what was measured."""
        if self.trainer.state.fn != "fit":
            return self._finish_measures("val")
        scores = self.scores.compute().view_as(self.grid.kept_score)
        self.scores.reset()
        if not self.trainer.sanity_checking:
            self.solver.after_validation(self.grid, scores, self.current_epoch)
            self._log("val", self.target.metric, self.grid.of_chosen(scores))

    def on_test_epoch_end(self) -> None:
        """Take what was measured."""
        self._finish_measures("test")

    def _finish_measures(self, split: str) -> None:
        self.measured[split] = self.measures.compute(split)
        for name, values in self.measures.logged(self.measured[split]):
            self._log(split, name, values)

    def results(self) -> Results:
        """Return all that was measured of the splits that were evaluated."""
        chosen = self.grid.of_chosen(self.grid.hyperparameters).T.tolist()
        facts = {
            "task": self.task.label,
            "backbone": self.backbone.label,
            "solver": self.solver.name,
            "augmentation": "none" if self.features == "clean" else self.task.augmentation,
            "view": "none" if self.task.vectors else self.task.view,
            "features": self.features,
            "epoch": self.grid.of_chosen(self.grid.kept_epoch).tolist(),
            **{column.name: values for column, values in zip(self.solver.columns, chosen, strict=True)},
        }
        tables, per_image = assemble(self.probes, self.widths, self.measured, self.target.metric, facts)
        return Results(tables, list(self.measures), self.target, per_image)

    def on_predict_start(self) -> None:
        """Start to collect decisions."""
        self.predictions = Predictions(self.probes, self.task.images["test"], self.target, self.device)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Note what each probe decides for each test image."""
        self.predictions.update(self.solver.logits(self, batch.inputs, "test"), batch.indices)

    def on_predict_end(self) -> None:
        """Join the decisions of all processes."""
        self.predictions.reduce(self.stream.reduce)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the backbone out, and note the probes, their neurons and what they depend on."""
        checkpoints.save_probes(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse probes of another backbone, task or plan, and to resume a training that began otherwise."""
        self.train_losses = checkpoints.load_probes(self, checkpoint)

    def _log(self, split: str, metric: str, values: Tensor) -> None:
        """Log means over seeds, from values of shape (P,)."""
        log(self, mean_by_fraction(self.probes, values.tolist(), f"{split}/{metric}"))
