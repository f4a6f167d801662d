"""Fixtures of the unit tests."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from unit import zoo as toys

from adamerge.bank import ParameterBank

# The same examples every time, and no failure because the machine is busy.
settings.register_profile("unit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")


@pytest.fixture
def zoo() -> toys.Zoo:
    """Three tasks in float32, 20 steps of images."""
    return toys.make_zoo(steps=20)


@pytest.fixture
def zoo64() -> toys.Zoo:
    """The same in float64."""
    return toys.make_zoo(torch.float64, steps=20)


@pytest.fixture
def zoo_of() -> Callable[..., toys.Zoo]:
    return toys.make_zoo


@pytest.fixture
def make_bank() -> Callable[..., ParameterBank]:
    return toys.make_bank
