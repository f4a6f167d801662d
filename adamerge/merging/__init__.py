"""From λ to weights: partition, coefficients, merge, and the model that is called with the result (floor 2)."""

from adamerge.merging.coefficients import Coefficients
from adamerge.merging.constraints import CONSTRAINTS
from adamerge.merging.merge import contract, merge
from adamerge.merging.merged_model import MergedModel
from adamerge.merging.partition import Partition

__all__ = ["CONSTRAINTS", "Coefficients", "MergedModel", "Partition", "contract", "merge"]
