"""What can be measured of a run's probes: each measure is a class of its own, with its columns, table and picture."""

from lightning_modules.measures.accuracy import Accuracy
from lightning_modules.measures.cka import CKA
from lightning_modules.measures.ensembles import Ensembles
from lightning_modules.measures.inequality import Inequality
from lightning_modules.measures.layer_ranks import LayerRanks
from lightning_modules.measures.measure import Batch, Column, Context, Measure, Picture
from lightning_modules.measures.neighbours import Neighbours
from lightning_modules.measures.neurons import Neurons
from lightning_modules.measures.outputs import R2, MeanAveragePrecision
from lightning_modules.measures.product_quantisation import ProductQuantisation
from lightning_modules.measures.ranking import Ranking
from lightning_modules.measures.robustness import Robustness

__all__ = ["CKA", "R2", "Accuracy", "Batch", "Column", "Context", "Ensembles", "Inequality", "LayerRanks"]
__all__ += ["MeanAveragePrecision", "Measure", "Neighbours", "Neurons", "Picture", "ProductQuantisation"]
__all__ += ["Ranking", "Robustness"]
