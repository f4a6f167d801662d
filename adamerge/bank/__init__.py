"""Weights at rest: reading checkpoints safely and holding θ₀ and τ (floor 1)."""

from adamerge.bank.checkpoints import hash_tensors, read_checkpoint
from adamerge.bank.keys import block_of, select_keys
from adamerge.bank.parameter_bank import ParameterBank

__all__ = ["ParameterBank", "block_of", "hash_tensors", "read_checkpoint", "select_keys"]
