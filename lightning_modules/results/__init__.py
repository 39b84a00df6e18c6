"""What a run found: tables of what was measured, and curve, redundancy and answer that follow from them."""

from lightning_modules.results.results import Results
from lightning_modules.results.tables import Column

__all__ = ["Column", "Results"]
