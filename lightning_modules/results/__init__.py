"""What a run found: tables of what was measured, and curve, redundancy and answer that follow from them."""
