"""Linear probes, and the solvers that find them; `model.solver` takes any that is exported here by name."""

from lightning_modules.probes.knn import KNN
from lightning_modules.probes.logistic import Logistic
from lightning_modules.probes.ridge import Ridge
from lightning_modules.probes.search import Search
from lightning_modules.probes.sgd import SGD
from lightning_modules.probes.solver import Solver

__all__ = ["KNN", "SGD", "Logistic", "Ridge", "Search", "Solver"]
