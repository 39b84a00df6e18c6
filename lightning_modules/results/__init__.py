"""What the tables of a run say: curves, redundancy, class losses and the plain answer."""
