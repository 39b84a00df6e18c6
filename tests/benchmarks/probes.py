"""What is done with features: training and evaluation of probes, against what people would use instead."""

import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from datamodules.outputs import MultiLabel
from lightning_modules.features.moments import Moments
from lightning_modules.measures.neurons import removals
from lightning_modules.probes.bank import ProbeBank
from lightning_modules.probes.ridge import ridge_probes
from lightning_modules.subsets.bases import Ordering, discriminants
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import PAPER_FRACTIONS, Plan
from lightning_modules.subsets.selections import Layer, order
from tests.benchmarks.benchmark import Figure, exponents, ratio, taking_turns, timed
from tests.benchmarks.fits import Bench, probe_phase, size


def probes(bench: Bench) -> list[Figure]:
    """Measure the probe phase with 71 probes and with (almost) one, and its steps above the bare matrix products."""
    root = bench.task(*size(bench))
    cli, _ = bench.features(root)
    bank: ProbeBank = cli.model.grid.banks[0]
    steps = len(cli.datamodule.train_dataloader()) * 100
    two = ("--model.fractions", "0.0005", "--model.seeds", "1")
    single = Step(1280, seeds=1, fractions=(0.0005,), device=bench.device)
    many = Step(1280, seeds=5, device=bench.device)

    def products() -> float:
        columns = [torch.randn(len(s.probes), max(s.sizes), 256, device=bench.device) for s in bank.stacks]
        logits = [torch.randn(*s.probes.shape, s.classes, 256, device=bench.device) for s in bank.stacks]
        flat = bank.weight.detach().to(bench.device)

        def run() -> None:
            for stack, inputs, gradient in zip(bank.stacks, columns, logits, strict=True):
                for block in stack.blocks:
                    weights = stack.view(flat, block).flatten(1, 2)
                    seen, rows = gradient[:, block.probe :].flatten(1, 2), inputs[:, block.start : block.stop]
                    torch.bmm(weights, rows)
                    torch.bmm(seen, rows.transpose(1, 2))

        run()
        return timed(lambda: [run() for _ in range(100)]) / 100

    sides = taking_turns(
        bench.repeats,
        probes_71=lambda: probe_phase(bench, root)[1],
        probes_1=lambda: probe_phase(bench, root, *two)[1],
        step_71=lambda: many.seconds(100),
        step_1=lambda: single.seconds(100),
        products=products,
    )
    lightning = [1e3 * (phase / steps - p) for phase, p in zip(sides["probes_71"], sides["products"], strict=True)]
    plain = [1e3 * (step - p) for step, p in zip(sides["step_71"], sides["products"], strict=True)]
    note = "of 1: a probe on one neuron beside that of the full layer, which is always there"
    return [
        Figure("probe phase, 71 probes over 1", ratio(sides, "probes_71", "probes_1"), "<= 2", sides, note),
        Figure("a step alone, 71 probes over 1", ratio(sides, "step_71", "step_1"), "", sides, "no loop"),
        Figure("ms a step above its matrix products, fit", lightning, "", sides, "validation and loop included"),
        Figure("ms a step above its matrix products, step alone", plain, "", sides, ""),
    ]


class Step:
    """Training steps of a bank on random features, without a loop around them."""

    def __init__(self, width, seeds, fractions=PAPER_FRACTIONS, device="cpu", classes=10, batch=256):
        plan = Plan("random", list(fractions), seeds).probes({"layer": width})
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(batch, width, generator=generator).to(device)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.coordinates = Coordinates(plan, {"layer": width}).to(device)
        self.bank = ProbeBank(plan, classes).to(device)
        self.optimizer = torch.optim.SGD(self.bank.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def step(self):
        self.optimizer.zero_grad()
        logits = self.bank(self.coordinates(self.inputs))
        summed = F.cross_entropy(logits, self.labels.expand(len(logits), -1), reduction="sum")
        (summed / len(self.labels)).backward()
        self.optimizer.step()

    def seconds(self, steps):
        self.step()
        return timed(lambda: [self.step() for _ in range(steps)]) / steps


def rivals(bench: Bench) -> list[Figure]:
    """Measure 71 fits of scikit-learn and 71 trainings of nn.Linear on the same features against the probe phases.

    Scikit-learn fits one probe a core, each with one thread: where its two kinds of threads share the cores, they wait
    for each other. With its own tolerance it ends above the optimum, so that `Logistic` is compared with fits that end
    as near to it as its own.
    """
    from joblib import Parallel, delayed
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    root = bench.task(*size(bench))
    epochs = "10" if bench.quick else "100"
    cli, features = bench.features(root)
    plan, coordinates = cli.model.probes, cli.model.coordinates
    columns = [coordinates.subset(index) for index in range(len(plan))]
    solvers = {
        "sgd": (),
        "logistic": ("--model.solver", "Logistic", "--model.solver.penalty", "1"),
        "logistic, 7 penalties": ("--model.solver", "Logistic"),
        "ridge": ("--model.solver", "Ridge"),
        "knn": ("--model.solver", "KNN"),
    }
    tolerances = {"scikit-learn": 1e-4, "converged scikit-learn": 1e-5}
    accuracies: dict[str, list[float]] = {name: [] for name in (*solvers, *tolerances, "nn.Linear")}
    objectives: dict[str, Tensor] = {}

    def objective(probes: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        x, y = features["train"]
        sums = []
        for subset, (weight, bias) in zip(columns, probes, strict=True):
            logits = x[:, subset].double() @ weight.double().t() + bias
            sums.append(F.cross_entropy(logits, y, reduction="sum") + weight.double().square().sum() / 2)
        return torch.stack(sums)

    def ours(solver: str) -> float:
        flags = solvers[solver]
        only_accuracy = ("--model.measures", "[]")  # as on the other side
        cli, seconds = probe_phase(bench, root, "--trainer.max_epochs", epochs, *only_accuracy, *flags)
        rows = cli.model.results().tables["results"]
        accuracies[solver].append(rows.loc[rows["split"] == "test", "accuracy"].mean())
        if solver == "logistic":
            objectives["logistic"] = objective(cli.model.grid.final_probe(index) for index in range(len(plan)))
        return seconds

    def scikit(name: str) -> float:
        (x, y), (x_test, y_test) = (tuple(each.numpy() for each in features[split]) for split in ("train", "test"))
        if name == "converged scikit-learn":  # below a loss of some 1e-3, float32 loses what is still to be gained
            x, x_test = x.astype(np.float64), x_test.astype(np.float64)
        probes = [LogisticRegression(tol=tolerances[name], max_iter=10_000) for _ in columns]
        subsets, fits = [each.numpy() for each in columns], list[LogisticRegression]()
        with threadpool_limits(1), Parallel(n_jobs=torch.get_num_threads()) as pool:
            pool(delayed(probe.fit)(x[::20], y[::20]) for probe in probes)  # its processes are there before
            tasks = (delayed(probe.fit)(x[:, subset], y) for probe, subset in zip(probes, subsets, strict=True))
            seconds = timed(lambda: fits.extend(pool(tasks)))
        scores = [probe.score(x_test[:, subset], y_test) for probe, subset in zip(fits, subsets, strict=True)]
        accuracies[name].append(float(np.mean(scores)))
        found = ((probe.coef_, probe.intercept_) for probe in fits)
        objectives[name] = objective((torch.tensor(weight), torch.tensor(bias)) for weight, bias in found)
        return seconds

    def linear() -> float:
        return timed(lambda: accuracies["nn.Linear"].append(one_at_a_time(bench, features, columns, int(epochs))))

    def loaded() -> float:
        tenth = int(epochs) // 10
        return 10 * timed(lambda: one_at_a_time(bench, features, columns, tenth, loaded=True))

    sides = taking_turns(
        bench.repeats,
        **{solver: functools.partial(ours, solver) for solver in solvers},
        nn_linear=linear,
        loaded=loaded,
        **{name: functools.partial(scikit, name) for name in tolerances},
    )
    said = ", ".join(f"{name} {100 * np.median(each):.2f} %" for name, each in accuracies.items())
    targets = {"sgd": ">= 20", "logistic": ">= 50", "logistic, 7 penalties": "", "ridge": ">= 25", "knn": ">= 25"}
    figures = []
    for solver in solvers:
        rival = "converged scikit-learn" if solver == "logistic" else "scikit-learn"
        lower = [100 * (b - a) for a, b in zip(accuracies[solver], accuracies[rival], strict=True)]
        seconds = f"{np.median(sides[rival]):.1f} s over {np.median(sides[solver]):.1f} s"
        figures += [
            Figure(f"71 fits of {rival} over {solver}", ratio(sides, rival, solver), targets[solver], sides, seconds),
            Figure(
                f"points by which {rival} is better than {solver}",
                lower,
                "" if solver == "knn" else "<= 0.3",
                {},
                f"mean of 71: {said}",
            ),
        ]
    for name in ("logistic", "scikit-learn"):
        excess = objectives[name] / objectives["converged scikit-learn"] - 1
        at_most = f"of 71 at penalty 1, on average {float(excess.mean()):.2g}"
        what = f"largest excess of the objective of {name} over that of converged scikit-learn"
        figures.append(Figure(what, [float(excess.max())], "<= 1e-4" if name == "logistic" else "", {}, at_most))
    over_sgd = ratio(sides, "logistic, 7 penalties", "sgd")
    figures.append(Figure("logistic, 7 penalties, over sgd", over_sgd, "<= 1", sides))
    for side, note in {
        "loaded": "batches from a DataLoader; a tenth of the epochs measured, scaled",
        "nn_linear": "features in memory, gathered once, indexed by a permutation",
    }.items():
        figures.append(Figure("71 trainings of nn.Linear over sgd", ratio(sides, side, "sgd"), ">= 10", sides, note))
    return figures


def one_at_a_time(bench, features, columns, epochs, loaded=False):
    """Train a plain nn.Linear on every subset as the bank does; return the mean test accuracy of their best epochs."""
    (x, y), (x_val, y_val), (x_test, y_test) = (
        tuple(each.to(bench.device) for each in features[split]) for split in ("train", "val", "test")
    )
    reached = []
    for number, subset in enumerate(columns):
        torch.manual_seed(number)
        seen, seen_val, seen_test = (each[:, subset.to(bench.device)] for each in (x, x_val, x_test))
        probe = nn.Linear(len(subset), int(y.max()) + 1).to(bench.device)
        optimizer = torch.optim.SGD(probe.parameters(), 0.1, 0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.1)
        best, kept = -1.0, None
        loader = DataLoader(TensorDataset(seen, y), 256, shuffle=True)
        for _ in range(epochs):
            for inputs, labels in loader if loaded else ((seen[i], y[i]) for i in torch.randperm(len(y)).split(256)):
                optimizer.zero_grad()
                F.cross_entropy(probe(inputs), labels).backward()
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                accuracy = (probe(seen_val).argmax(1) == y_val).double().mean().item()
                if accuracy > best:
                    best, kept = accuracy, (probe(seen_test).argmax(1) == y_test).double().mean().item()
        reached.append(kept)
    return float(np.mean(reached))


def moments(width, classes, images, seed, device="cpu"):
    """Return the sums of random features."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    sums = Moments(width, classes, device=device)
    sums.update(torch.randn(images, width, generator=generator) + labels.unsqueeze(1) / classes, labels)
    sums.count.item()  # makes the products
    return sums


def ridge(bench: Bench) -> list[Figure]:
    """Measure the 71 closed-form probes of one penalty from sums already taken, against solving each on its own."""
    width, classes = (512, 20) if bench.quick else (2048, 100)
    train_sums, val_sums = (moments(width, classes, 2 * width, seed, bench.device) for seed in (0, 1))
    orderings = [Ordering(o.order, o.sizes) for o in plan_orderings(width, bench.device)]

    def alone() -> None:
        scatter, cross = train_sums.scatter, train_sums.cross
        penalty = 1e-2 * scatter.diagonal().mean()
        for ordering in orderings:
            for neurons in ordering.sizes:
                subset = ordering.order[:neurons]
                system = scatter[subset][:, subset] + penalty * torch.eye(neurons, device=bench.device).double()
                torch.linalg.solve(system, cross[subset])

    sides = taking_turns(
        bench.repeats,
        nested=lambda: timed(lambda: ridge_probes(train_sums, val_sums, orderings, [1e-2])),
        one_by_one=lambda: timed(alone),
    )
    note = f"D = {width}, C = {classes}; choosing by validation error included"
    return [
        Figure("seconds of a ridge curve, a penalty", sides["nested"], "<= 2", sides, note),
        Figure("71 solutions one by one over the ridge curve", ratio(sides, "one_by_one", "nested"), "", sides, note),
    ]


def neurons(bench: Bench) -> list[Figure]:
    """Measure what ranks all neurons of a layer, and what tells the worth of each, from sums already taken."""
    width, classes = (256, 20) if bench.quick else (2048, 100)
    train_sums, val_sums = (moments(width, classes, 2 * width, seed, bench.device) for seed in (0, 1))
    layer, searches = Layer(width, train_sums), ("greedy", "backward", "column_subset")
    orders = {name: functools.partial(timed, functools.partial(order, name, layer, 0)) for name in searches}
    sides = taking_turns(
        bench.repeats,
        **orders,
        discriminant=lambda: timed(lambda: discriminants(train_sums)),
        worth=lambda: timed(lambda: removals(train_sums, val_sums, val_sums, list(range(5)))),
    )
    note = f"D = {width}, C = {classes}; worth with 5 subset seeds"
    return [Figure(f"seconds of {name}, all neurons", sides[name], "<= 10", sides, note) for name in sides]


def labels(bench: Bench) -> list[Figure]:
    """Measure the average precision of 71 probes for several labels, and what each image adds to it."""
    from sklearn.metrics import average_precision_score

    count, images = (3, 200) if bench.quick else (20, 5000)
    generator = torch.Generator().manual_seed(0)
    wanted = (torch.rand(images, count, generator=generator) < 0.2).float()
    outputs = torch.randn(71, count, images, generator=generator) + wanted.t()
    target = MultiLabel(list(map(str, range(count))))
    sides = taking_turns(
        bench.repeats,
        ours=lambda: timed(lambda: [target.judge(each.unsqueeze(0), wanted) for each in outputs]),
        scikit_learn=lambda: timed(lambda: [average_precision_score(wanted, each.t()) for each in outputs]),
    )
    note = f"{count} labels, {images:,} images; scikit-learn's is without what each image adds"
    name = "average precision of 71 probes, scikit-learn over ours"
    return [Figure(name, ratio(sides, "scikit_learn", "ours"), "", sides, note)]


def plan_orderings(width, device):
    """Return the paper's subsets as orderings."""
    plan = Plan("random", list(PAPER_FRACTIONS), list(range(1, 6))).probes({"layer": width})
    coordinates = Coordinates(plan, {"layer": width}).to(device)
    return [coordinates.ordering(group) for group in coordinates.groups]


def growth(bench: Bench) -> list[Figure]:
    """Measure with which power time grows in probes, images and width."""
    figures = []

    def grow(what: str, target: str, sizes: list[int], run: Callable[[int], float]) -> None:
        run(sizes[0])
        sides = taking_turns(bench.repeats, **{str(each): functools.partial(run, each) for each in sizes})
        note = ", ".join(f"{name}: {np.median(each):.3g} s" for name, each in sides.items())
        figures.append(Figure(f"power of {what}", exponents(sides, list(map(float, sizes))), target, sides, note))

    def step_of(width: int) -> float:
        return Step(width, 5, device=bench.device).seconds(20)

    def extract(per_class: int) -> float:
        return bench.extract(bench.task(per_class, 10)).model.stream.extractor.seconds

    def solve(width: int) -> float:
        sums = moments(width, 10, 2 * width, 0, bench.device)
        orderings = plan_orderings(width, bench.device)
        return timed(lambda: ridge_probes(sums, sums, orderings, [1e-2]))

    def sum_up(width: int) -> float:
        return timed(lambda: moments(width, 10, 2048, 0, bench.device))

    def components(width: int) -> float:
        scatter = moments(width, 10, 2 * width, 0, bench.device).scatter
        return timed(lambda: torch.linalg.eigh(scatter))

    widths = [512, 1024] if bench.quick else [512, 1024, 2048, 4096]
    seeds = {71: 5, 141: 10, 281: 20}
    step = "a step in probes (71, 141, 281)"
    grow(step, "<= 1.1", [*seeds], lambda n: Step(1280, seeds[n], device=bench.device).seconds(20))
    grow("a step in width", "<= 1.1", widths, step_of)
    grow("extraction in images per class", "<= 1.1", [20, 40], extract)
    grow("sums of products in width", "<= 2.1", widths, sum_up)
    grow("a ridge curve in width", "<= 3.1", widths, solve)
    grow("principal components in width", "<= 3.1", widths[:3], components)
    return figures
