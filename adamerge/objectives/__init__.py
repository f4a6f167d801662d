"""What a learner minimises (floor 3, torch alone): an objective maps a task's logits (B, C) to losses (B,)."""

from adamerge.objectives.entropy import Entropy, softmax_entropy

__all__ = ["Entropy", "softmax_entropy"]
