"""Learners of coefficients, one file each."""

from adamerge.methods.learned.adamerging import AdaMerging

__all__ = ["AdaMerging"]
