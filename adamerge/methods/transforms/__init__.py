"""Transforms of task vectors: bank → bank, one file each."""

from adamerge.methods.transforms.ties import Ties

__all__ = ["Ties"]
