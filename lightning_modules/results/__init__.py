"""What a run found: tables of what was measured, and curve, redundancy and answer that follow from them."""

from lightning_modules.results.results import Headline, Results

__all__ = ["Headline", "Results"]
