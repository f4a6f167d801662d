"""Merges without learning, one file each."""

from adamerge.methods.static.average import Average
from adamerge.methods.static.individual import Individual
from adamerge.methods.static.pretrained import Pretrained
from adamerge.methods.static.task_arithmetic import TaskArithmetic
from adamerge.methods.static.ties import TiesMerging

__all__ = ["Average", "Individual", "Pretrained", "TaskArithmetic", "TiesMerging"]
