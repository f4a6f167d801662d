"""What a learner minimises (floor 3, torch alone): an objective maps a task's outputs to losses (B,)."""

from adamerge.objectives.alignment import Alignment
from adamerge.objectives.cross_entropy import CrossEntropy
from adamerge.objectives.entropy import Entropy, softmax_entropy
from adamerge.objectives.fixmatch import FixMatch, trusted_classes
from adamerge.objectives.protocol import Objective, Outputs, Target

__all__ = [
    "Alignment",
    "CrossEntropy",
    "Entropy",
    "FixMatch",
    "Objective",
    "Outputs",
    "Target",
    "softmax_entropy",
    "trusted_classes",
]
