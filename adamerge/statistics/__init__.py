"""What methods want to know about experts beside their weights, computed from images once and kept (floor 5)."""

from adamerge.statistics.fisher import Fisher
from adamerge.statistics.gather import Expert, Kept, gather
from adamerge.statistics.inputs import InputGrams
from adamerge.statistics.moments import Moments
from adamerge.statistics.scores import Scores

__all__ = ["Expert", "Fisher", "InputGrams", "Kept", "Moments", "Scores", "gather"]
