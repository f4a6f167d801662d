"""bfloat16 parameters that are stepped in float32."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from adamerge.learning.narrow import Narrow


def slope(step: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) + 0.5


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter in parameters:
            parameter.grad = slope(step, tuple(parameter.shape)).to(parameter.dtype)
        optimizer.step()


def make(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((40, 30), (5,), ())]


def test_steps_far_below_the_spacing_count_on_average() -> None:
    """At 1, bfloat16's spacing is 2⁻⁷; 100 steps of 2⁻¹² would all be lost by rounding to the nearest."""
    parameter = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = Narrow([parameter], partial(SGD, lr=2.0**-12), seed=0)
    for _ in range(100):
        parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
    # A step is rounded up by 2⁻⁷ with probability 2⁻⁵: four standard errors of the mean of 10,000 sums of 100.
    error = 4 * 2.0**-7 * (100 * 2.0**-5) ** 0.5 / 10_000**0.5
    assert abs(parameter.double().mean().item() - (1 + 100 * 2.0**-12)) < error


def test_it_is_near_adam_in_float32_where_torch_s_own_in_bfloat16_is_not() -> None:
    def distance(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
        run(optimizer, parameters, range(400))
        return (parameters[0].float() - wide[0]).abs().mean().item()

    wide, narrow, plain = make(torch.float32), make(torch.bfloat16), make(torch.bfloat16)
    for parameter in (*wide, *narrow, *plain):
        parameter.data.fill_(-1)  # where a step of 1e-3 is an eighth of the spacing
    run(Adam(wide, lr=1e-3), wide, range(400))
    found = distance(Narrow(narrow, partial(Adam, lr=1e-3), seed=0), narrow)
    assert found < 0.05  # 400 roundings of up to 2⁻⁸ make about 0.03
    assert found < 0.25 * distance(Adam(plain, lr=1e-3), plain)
    assert (wide[0] + 1).abs().mean() > 0.1


def test_parameters_and_state_stay_narrow() -> None:
    parameters = make(torch.bfloat16)
    optimizer = Narrow(parameters, partial(Adam, lr=1e-3), seed=0)
    run(optimizer, parameters, range(3))
    for parameter in parameters:
        assert parameter.dtype == torch.bfloat16
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["exp_avg"].shape == parameter.shape
        assert state["step"] == 3


def test_the_rate_of_the_group_counts() -> None:
    parameters = make(torch.bfloat16)
    optimizer = Narrow(parameters, partial(Adam, lr=1e-3), seed=0)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, parameters, range(3))
    assert not any(parameter.any() for parameter in parameters)


def test_a_parameter_without_gradient_stays() -> None:
    parameters = make(torch.bfloat16)
    optimizer = Narrow(parameters, partial(Adam, lr=1e-3), seed=0)
    run(optimizer, parameters[:1], range(3))
    assert parameters[0].any()
    assert not parameters[1].any()


def test_it_goes_on_from_its_saved_state_bit_by_bit() -> None:
    unbroken, first = make(torch.bfloat16), make(torch.bfloat16)
    run(Narrow(unbroken, partial(Adam, lr=1e-2), seed=0), unbroken, range(20))
    optimizer = Narrow(first, partial(Adam, lr=1e-2), seed=0)
    run(optimizer, first, range(8))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = Narrow(second, partial(Adam, lr=1e-2), seed=0)
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, second, range(8, 20))
    assert all(torch.equal(left, right) for left, right in zip(unbroken, second, strict=True))
