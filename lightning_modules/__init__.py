"""The frozen backbone, the bank of probes on its neurons, and what is measured from them."""

from lightning_modules.backbones.frozen import FrozenBackbone
from lightning_modules.pretraining import Pretraining
from lightning_modules.redundancy_probe import RedundancyProbe

__version__ = "0.1.0"
__all__ = ["FrozenBackbone", "Pretraining", "RedundancyProbe"]
