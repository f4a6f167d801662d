"""adamerge: learn merging coefficients for CLIP experts at test time, without labels and without retraining.

>>> import adamerge
>>> outcome = adamerge.run("method=adamerging_layerwise", "suite=mini")  # the command line's options, as strings
>>> print(outcome.results.markdown())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adamerge.bank import ParameterBank
    from adamerge.cli.job import Outcome
    from adamerge.cli.run import run
    from adamerge.errors import AdamergeError
    from adamerge.merging import Coefficients, MergedModel, Partition, merge

__version__ = "0.1.0"

_HOMES = {
    "AdamergeError": "errors",
    "Coefficients": "merging",
    "MergedModel": "merging",
    "Outcome": "cli.job",
    "ParameterBank": "bank",
    "Partition": "merging",
    "merge": "merging",
    "run": "cli.run",
}
__all__ = ["AdamergeError", "Coefficients", "MergedModel", "Outcome", "ParameterBank", "Partition", "merge", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adamerge' has no attribute '{name}'")
    return getattr(import_module(f"adamerge.{_HOMES[name]}"), name)
