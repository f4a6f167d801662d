"""Merging methods: transforms, static merges and learners (floor 4)."""

from adamerge.methods.learned.learner import Learner
from adamerge.methods.protocol import Context, StaticMethod, Statistic, Transform

__all__ = ["Context", "Learner", "StaticMethod", "Statistic", "Transform"]
