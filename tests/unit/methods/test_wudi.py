"""WUDI against the published loss, a second implementation in numpy, and a matrix worked by hand."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import wudi as reference
from torch import Tensor
from unit.methods.banks import bank_of, random, vector_of

from adamerge.errors import ConfigError
from adamerge.methods.static import WudiMerging
from adamerge.methods.static.wudi import Interference

WORKED = torch.tensor(reference.TASK_VECTORS)


def wudi(**options: object) -> WudiMerging:
    options = {"solver": "adam", "lr": 0.01, "steps": 5, "ridge": 0.0, "exclude": (), "split_in_proj": False, **options}
    return WudiMerging(scaling=1, grid=(), transform=None, **options)


def merged(task_vectors: Tensor, **options: object) -> Tensor:
    return vector_of(wudi(**options), bank_of({"weight": task_vectors}))["weight"]


def arrays(task_vectors: Tensor) -> list[np.ndarray]:
    return [matrix.double().numpy() for matrix in task_vectors]


def published_loss(vector: Tensor, task_vectors: Tensor) -> Tensor:
    """As the original code has it: products of batches of matrices, normed, over the squared norms."""
    products = (vector[None] - task_vectors) @ task_vectors.transpose(1, 2)
    return (products.square() / task_vectors.square().sum((1, 2))[:, None, None]).sum()


def interference(task_vectors: Tensor) -> Interference:
    return Interference(task_vectors.sum(0), [(matrix, matrix / matrix.norm()) for matrix in task_vectors])


def test_worked_matrix() -> None:
    for dtype in (torch.float32, torch.float64):
        found = merged(WORKED.to(dtype), solver="closed")
        torch.testing.assert_close(found, torch.tensor(reference.MINIMUM, dtype=dtype), rtol=0, atol=1e-6)
        found = merged(WORKED.to(dtype), solver="closed", ridge=reference.RIDGE)
        torch.testing.assert_close(found, torch.tensor(reference.WITH_RIDGE, dtype=dtype))
    # Adam's first step is the learning rate against the gradient's sign; both are positive.
    torch.testing.assert_close(merged(WORKED, steps=1, lr=0.25), torch.tensor([[2.75, 0.75]]))
    start = np.array(reference.TASK_VECTORS).sum(0)
    np.testing.assert_allclose(
        reference.gradient(start, *[np.array(reference.TASK_VECTORS)] * 3), reference.GRADIENT, rtol=1e-12
    )
    np.testing.assert_allclose(reference.wudi_minimum(np.array(reference.TASK_VECTORS)), reference.MINIMUM, atol=1e-12)


@pytest.mark.parametrize(
    "shape", [(2, 7, 5), (3, 5, 9), (4, 3, 30), (1, 6, 6), (3, 1, 4), (2, 4, 1), (2, 1, 1)], ids=str
)
def test_gradient_of_the_published_loss_equals_the_gram_form(shape: tuple[int, int, int]) -> None:
    task_vectors = random(*shape).double()
    moved = random(*shape[1:], seed=1).double()
    vector = (task_vectors.sum(0) + moved).requires_grad_()
    published_loss(vector, task_vectors).backward()
    loss = interference(task_vectors)
    torch.testing.assert_close(2 * (loss.constant + moved @ loss.gram), vector.grad, rtol=1e-12, atol=1e-12)
    vectors = arrays(task_vectors)
    np.testing.assert_allclose(
        reference.gradient(vector.detach().numpy(), vectors, vectors, vectors), vector.grad, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 5, 9), (1, 6, 6), (3, 1, 4), (3, 3, 20)], ids=str)
def test_against_the_second_implementation(shape: tuple[int, int, int]) -> None:
    task_vectors = random(*shape)
    expected = reference.wudi(arrays(task_vectors), 0.01, 5)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        np.testing.assert_allclose(merged(task_vectors.to(dtype)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("shape", "few"), [((3, 3, 20), True), ((4, 3, 20), False), ((1, 10, 20), False)], ids=str)
def test_rows_stand_for_their_gram_matrix_where_they_are_less_than_half_as_many_as_columns(
    shape: tuple[int, int, int], few: bool
) -> None:
    loss = interference(random(*shape).double())
    assert (loss.rows is not None) == few
    if loss.rows is not None:
        assert len(loss.rows) == shape[0] * shape[1]
        torch.testing.assert_close(loss.rows.mT @ loss.rows, loss.gram, rtol=0, atol=1e-12)


def test_of_the_size_of_real_task_vectors() -> None:
    """Entries of 1e-4 and 300 steps of 1e-5, which is far; Adam takes gradients of any size for equal."""
    task_vectors = 1e-4 * random(3, 6, 4)
    expected = reference.wudi(arrays(task_vectors), 1e-5, 300)
    np.testing.assert_allclose(merged(task_vectors, lr=1e-5, steps=300), expected, rtol=0, atol=1e-7)
    assert np.abs(expected - task_vectors.sum(0).numpy()).max() > 1e-4


# In 4 x 3, K = 2 the τ span all inputs; in 5 x 20 they do not, and what lies outside of them stays.
@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 5, 20)], ids=str)
def test_the_closed_form_is_the_stationary_point(shape: tuple[int, int, int]) -> None:
    task_vectors = random(*shape).double()
    vector = merged(task_vectors, solver="closed").requires_grad_()
    value = published_loss(vector, task_vectors)
    value.backward()
    assert vector.grad is not None
    assert vector.grad.abs().max() < 1e-11
    assert value < published_loss(task_vectors.sum(0), task_vectors)
    np.testing.assert_allclose(vector.detach(), reference.wudi_minimum(arrays(task_vectors)), rtol=0, atol=1e-11)
    # B A⁺, the form that SPECS gives: Στ has nothing outside of the rows of the τ.
    loss = interference(task_vectors)
    weighted = sum(matrix @ matrix.mT @ matrix / matrix.square().sum() for matrix in task_vectors)
    torch.testing.assert_close(vector.detach(), weighted @ torch.linalg.pinv(loss.gram), rtol=0, atol=1e-10)
    found = merged(task_vectors.float(), solver="closed")
    torch.testing.assert_close(found.double(), vector.detach(), rtol=0, atol=1e-4)


def test_a_ridge_holds_the_minimum_at_the_sum() -> None:
    task_vectors = random(3, 5, 20).double()
    start = task_vectors.sum(0)
    vector = merged(task_vectors, solver="closed", ridge=0.1).requires_grad_()
    (published_loss(vector, task_vectors) + 0.1 * (vector - start).square().sum()).backward()
    assert vector.grad is not None
    assert vector.grad.abs().max() < 1e-11
    far = [(merged(task_vectors, solver="closed", ridge=ridge) - start).norm() for ridge in (0, 0.01, 1, 100, 1e9)]
    assert all(more > less for more, less in pairwise(far))
    assert far[-1] < 1e-7


def test_adam_goes_to_the_closed_form_and_stops_on_the_way() -> None:
    task_vectors = random(2, 4, 3).double()
    losses = [
        float(published_loss(merged(task_vectors, lr=0.003, steps=steps), task_vectors)) for steps in (0, 30, 300, 3000)
    ]
    least = float(published_loss(merged(task_vectors, solver="closed"), task_vectors))
    assert losses[0] > 1.1 * losses[1] > 1.2 * losses[2] > 1.2 * least
    assert abs(losses[3] - least) < 1e-6
    torch.testing.assert_close(merged(task_vectors, steps=0), task_vectors.sum(0))


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_one_task_gives_its_vector_and_equal_tasks_do_in_the_minimum(solver: str) -> None:
    task_vectors = random(1, 6, 4)
    assert torch.equal(merged(task_vectors, solver=solver, steps=300), task_vectors[0])
    expected = merged(task_vectors.repeat(3, 1, 1), solver="closed")
    torch.testing.assert_close(expected, task_vectors[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_tasks_that_look_at_different_inputs_are_summed(solver: str) -> None:
    task_vectors = random(2, 5, 6)
    task_vectors[0, :, 3:] = 0
    task_vectors[1, :, :3] = 0
    assert torch.equal(merged(task_vectors, solver=solver), task_vectors.sum(0))


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_a_task_that_left_the_matrix_alone_takes_no_part(solver: str) -> None:
    task_vectors = random(2, 5, 6)
    padded = torch.cat([task_vectors, torch.zeros(2, 5, 6)])
    torch.testing.assert_close(merged(padded, solver=solver), merged(task_vectors, solver=solver), rtol=0, atol=1e-7)
    assert not merged(torch.zeros(3, 5, 6), solver=solver).any()


def test_experts_of_low_rank_do_not_blow_up_the_closed_form() -> None:
    """Fourteen of the twenty directions hold nothing but rounding."""
    task_vectors = random(3, 30, 2).double() @ random(3, 2, 20, seed=1).double()
    found = merged(task_vectors.float(), solver="closed")
    assert found.norm() < 2 * task_vectors.sum(0).norm()
    np.testing.assert_allclose(found, reference.wudi_minimum(arrays(task_vectors)), rtol=0, atol=1e-3)


@given(order=st.permutations(range(3)), columns=st.permutations(range(5)), solver=st.sampled_from(["adam", "closed"]))
def test_orders_of_tasks_and_of_inputs_do_not_matter(order: list[int], columns: list[int], solver: str) -> None:
    task_vectors = random(3, 4, 5).double()
    found = merged(task_vectors[order][:, :, columns], solver=solver)
    torch.testing.assert_close(found, merged(task_vectors, solver=solver)[:, columns], rtol=0, atol=1e-11)


def test_other_tensors_take_the_mean_and_options_say_which_are_matrices() -> None:
    task_vectors: Mapping[str, Tensor] = {
        "attn.in_proj_weight": random(2, 9, 3),
        "proj": random(2, 4, 4),
        "bias": random(2, 4),
        "conv": random(2, 3, 2, 2, 2),
        "scale": random(2),
    }
    bank = bank_of(task_vectors)
    found = vector_of(wudi(exclude=["pro?"]), bank)
    for key in ("proj", "bias", "conv", "scale"):
        torch.testing.assert_close(found[key], task_vectors[key].mean(0))
    split = vector_of(wudi(exclude=["pro?"], split_in_proj=True), bank)["attn.in_proj_weight"]
    thirds = [merged(part) for part in task_vectors["attn.in_proj_weight"].split(3, dim=1)]
    torch.testing.assert_close(split, torch.cat(thirds))
    assert (split - found["attn.in_proj_weight"]).abs().max() > 1e-4


def test_every_option_says_something() -> None:
    task_vectors = random(3, 6, 4)
    options = [{}, {"lr": 0.02}, {"steps": 6}, {"solver": "closed"}, {"solver": "closed", "ridge": 0.1}]
    found = [merged(task_vectors, **option) for option in options]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:index]), index


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"solver": "sgd"}, "unknown solver 'sgd'. Choose adam or closed"),
        ({"lr": 0.0}, "lr is above 0, found 0"),
        ({"steps": -1}, "steps is a count, 0 or more; found -1"),
        ({"ridge": -0.1}, "ridge is 0 or more, found -0.1"),
        ({"ridge": float("nan")}, "found nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            wudi(**options)
    with pytest.raises(ConfigError, match="'text\\*' of exclude matches none"):
        merged(WORKED, exclude=["text*"])
