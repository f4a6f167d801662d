"""The command line: the only place that knows Hydra, W&B and printing (floor 7)."""

from adamerge.cli.main import main

__all__ = ["main"]
