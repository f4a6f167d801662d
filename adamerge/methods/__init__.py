"""Merging methods: transforms, static merges and learners (floor 4)."""

from adamerge.methods.protocol import LearnedMethod, StaticMethod, Transform

__all__ = ["LearnedMethod", "StaticMethod", "Transform"]
