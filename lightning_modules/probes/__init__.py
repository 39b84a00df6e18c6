"""Linear probes, and the solvers that find them."""
