"""What methods want to know about experts beside their weights, computed from images once and kept (floor 5)."""

from adamerge.statistics.gather import Expert, gather

__all__ = ["Expert", "gather"]
