"""Learners of coefficients, one file each."""

from adamerge.methods.learned.adamerge import AdaMerge
from adamerge.methods.learned.adamerging import AdaMerging
from adamerge.methods.learned.atlas import Atlas
from adamerge.methods.learned.atlas_negation import AtlasNegation
from adamerge.methods.learned.concrete import Concrete
from adamerge.methods.learned.expert_merging import ExpertMerging
from adamerge.methods.learned.frank_wolfe import FrankWolfe
from adamerge.methods.learned.self_positioning import SelfPositioning

__all__ = [
    "AdaMerge",
    "AdaMerging",
    "Atlas",
    "AtlasNegation",
    "Concrete",
    "ExpertMerging",
    "FrankWolfe",
    "SelfPositioning",
]
