"""The command line: how a run is configured, started, resumed and ended, and what a mistake is answered with."""
