"""Transforms of task vectors: bank → bank, one file each."""

from adamerge.methods.transforms.breadcrumbs import Breadcrumbs
from adamerge.methods.transforms.consensus import Consensus
from adamerge.methods.transforms.dare import Dare
from adamerge.methods.transforms.lines import Lines
from adamerge.methods.transforms.low_rank import LowRank
from adamerge.methods.transforms.magmax import MagMax
from adamerge.methods.transforms.magnitude import Magnitude
from adamerge.methods.transforms.ota import Ota
from adamerge.methods.transforms.pcb import Pcb
from adamerge.methods.transforms.tall_masks import TallMasks
from adamerge.methods.transforms.ties import Ties

__all__ = [
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "Lines",
    "LowRank",
    "MagMax",
    "Magnitude",
    "Ota",
    "Pcb",
    "TallMasks",
    "Ties",
]
