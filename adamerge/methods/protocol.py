"""What a transform of task vectors and a static merge are; a learned method is a ``methods.learned.Learner``."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform


class Transform(Protocol):
    """Bank → bank, in two phases: statistics over all task vectors first, then tensor by tensor."""

    def fit(self, bank: ParameterBank) -> ApplyTransform:
        """Gather statistics; return the map ``(key, (K, *shape)) → (K, *shape)``."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Name and options, for the record beside the coefficients."""
        ...


class StaticMethod(Protocol):
    """Merges without learning."""

    def __call__(self, bank: ParameterBank) -> dict[str, Tensor]:
        """Merged tensors by key; the bank stays as it is."""
        ...

    def candidates(self) -> Sequence[Self]:
        """The methods to choose from by mean normalised accuracy on labelled images; itself alone if all is fixed."""
        ...
