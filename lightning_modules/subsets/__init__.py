"""Which coordinates a probe sees: bases, selections, and the plan of a run."""
