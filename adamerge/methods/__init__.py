"""Merging methods: transforms, static merges and learners (floor 4)."""

from adamerge.methods.learned.learner import Learner
from adamerge.methods.protocol import StaticMethod, Transform

__all__ = ["Learner", "StaticMethod", "Transform"]
