"""Merges without learning, one file each."""

from adamerge.methods.static.average import Average
from adamerge.methods.static.delta_guided_fusion import DeltaGuidedFusion
from adamerge.methods.static.doge import Doge
from adamerge.methods.static.fisher import FisherMerging
from adamerge.methods.static.individual import Individual
from adamerge.methods.static.iso import IsoC, IsoCTS
from adamerge.methods.static.lines import LinesMerging
from adamerge.methods.static.model_stock import ModelStock
from adamerge.methods.static.mwa import MetricsWeightedAverage
from adamerge.methods.static.opcm import ContinualOpcm, Opcm
from adamerge.methods.static.opt_merge import OptMerge
from adamerge.methods.static.pretrained import Pretrained
from adamerge.methods.static.r_tsvm import ReweightedTsvMerging
from adamerge.methods.static.regmean import RegMean
from adamerge.methods.static.slerp import SlerpMerging
from adamerge.methods.static.task_arithmetic import TaskArithmetic
from adamerge.methods.static.task_negation import TaskNegation
from adamerge.methods.static.ties import TiesMerging
from adamerge.methods.static.tsv import TsvMerging
from adamerge.methods.static.weighted_average import WeightedAverage
from adamerge.methods.static.widen import Widen
from adamerge.methods.static.wudi import WudiMerging

__all__ = [
    "Average",
    "ContinualOpcm",
    "DeltaGuidedFusion",
    "Doge",
    "FisherMerging",
    "Individual",
    "IsoC",
    "IsoCTS",
    "LinesMerging",
    "MetricsWeightedAverage",
    "ModelStock",
    "Opcm",
    "OptMerge",
    "Pretrained",
    "RegMean",
    "ReweightedTsvMerging",
    "SlerpMerging",
    "TaskArithmetic",
    "TaskNegation",
    "TiesMerging",
    "TsvMerging",
    "WeightedAverage",
    "Widen",
    "WudiMerging",
]
