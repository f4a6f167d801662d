"""Our static merges against mergekit's, tensor by tensor, in float64 and float32; an opt-in test.

mergekit has an environment of its own, in the repository's root:

    uv venv .peer-mergekit && uv pip install --python .peer-mergekit/bin/python mergekit==0.1.5
    uv run pytest tests/peers --mergekit-python=.peer-mergekit/bin/python

Where the two differ on purpose, the option that gives the peer's form is set; where there is none, the difference is
asserted, and the method's ``Differs:`` line has its cause.
"""

from math import prod
from typing import Any

import pytest
import torch
from peers.comparison import (
    CONVOLUTION,
    MATRIX,
    SHAPES,
    Models,
    Pair,
    Peer,
    State,
    assert_agree,
    bank_of,
    changes,
    differences,
    make_models,
    masks,
    ours,
    with_first_at,
)

from adamerge.methods.transforms import Dare

pytestmark = pytest.mark.peer


def keeping_one_more(density: float, **others: Any) -> dict[str, Any]:
    """Parameters under which their trim keeps ⌊density · d⌋ + 1 of every tensor's d entries, as ours does."""
    sizes = {key: prod(shape) for key, shape in SHAPES.items()}
    return {"by_key": {key: {"density": (int(density * size) + 1.5) / size, **others} for key, size in sizes.items()}}


SAME = {
    "average": Pair("average", [], "linear", {"weight": 1.0}),
    "weighted_average": Pair("weighted_average", ["weights=[1,2,0.5]"], "linear", {"weight": [1.0, 2.0, 0.5]}),
    "task_arithmetic": Pair("task_arithmetic", ["scaling=0.3"], "task_arithmetic", {"weight": 0.3}),
    **{
        f"ties, {how}": Pair(
            "ties",
            ["density=0.3", "thresholds=tensor", f"aggregation={how}", "scaling=0.4"],
            "ties",
            keeping_one_more(0.3, weight=1.0, normalize=how == "mean", **{"lambda": 0.4}),
        )
        for how in ("sum", "mean")
    },
    "dare_task_arithmetic": Pair(
        "dare_task_arithmetic",
        ["transform.drop=0.4"],
        "dare_linear",
        {"weight": 0.3, "density": 0.6, "rescale": False, "lambda": 1 / 0.6},
    ),
    "dare_ties": Pair(
        "dare_ties",
        ["transform.drop=0.4", "transform.rescale=false", "density=1"],
        "dare_ties",
        {"weight": 0.5, "density": 0.6, "rescale": False},
    ),
    "breadcrumbs": Pair(
        "breadcrumbs",
        ["transform.drop_low=0.5", "transform.drop_high=0.125"],  # of every tensor's entries a whole number
        "breadcrumbs",
        {"weight": 0.3, "density": 0.375, "gamma": 0.125},
    ),
}


def test_the_library_is_the_one_compared_with(mergekit: Peer) -> None:
    assert mergekit.version == "0.1.5"


@pytest.mark.parametrize("case", SAME)
def test_agrees(case: str, mergekit: Peer) -> None:
    assert_agree(SAME[case], mergekit, make_models())


def test_slerp_agrees_but_where_a_tensor_is_zero(mergekit: Peer) -> None:
    """They take it for one at a right angle."""
    models, share = make_models(2), 0.3
    models = with_first_at(models, MATRIX, torch.zeros_like(models.pretrained[MATRIX]))
    options = ["of=weights", "granularity=tensor", f"weights=[{1 - share},{share}]"]
    assert_agree(Pair("slerp", options, "slerp", {"t": share}, but={MATRIX}), mergekit, models)
    expected = mergekit.merge("slerp", models, {"t": share})[MATRIX]
    angle = torch.tensor(torch.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(expected, (share * angle).sin() * models.experts[1][MATRIX])


def test_model_stock_agrees_but_where_the_mean_cosine_is_negative(mergekit: Peer) -> None:
    """They leave [0, 1] there; we keep θ₀."""
    models = make_models()
    merged = ours("model_stock", [])(bank_of(models))
    kept = {key for key, tensor in merged.items() if torch.equal(tensor, models.pretrained[key])}
    assert 0 < len(kept) < len(SHAPES) // 2
    assert_agree(Pair("model_stock", [], "model_stock", {}, but=kept), mergekit, models)


def test_model_stock_agrees_by_filter_but_for_convolutions(mergekit: Peer) -> None:
    """To them, a filter is a row of a kernel."""
    pair = Pair("model_stock", ["granularity=filter"], "model_stock", {"filter_wise": True}, but={CONVOLUTION})
    assert_agree(pair, mergekit, make_models(common=5))


def test_their_trim_keeps_one_entry_less(mergekit: Peer) -> None:
    models, density = make_models(1), 0.3
    parameters = {"weight": 1.0, "density": density}
    expected = kept(mergekit.merge("ties", models, parameters), models)
    method = ours("ties", [f"density={density}", "thresholds=tensor", "scaling=1"])
    found = kept(method(bank_of(models)), models)
    assert expected == {key: int(density * prod(shape)) for key, shape in SHAPES.items()}
    assert found == {key: count + 1 for key, count in expected.items()}


def test_they_elect_plus_where_a_coordinate_sums_to_zero(mergekit: Peer) -> None:
    """Not the majority of all coordinates, which here is minus."""
    pretrained = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
    down = {key: -tensor.abs() for key, tensor in make_models(1).experts[0].items()}
    models = with_first_at(Models(pretrained, [down, down]), MATRIX, -down[MATRIX])
    pair = Pair("ties", ["density=1", "scaling=1"], "ties", {"weight": 1.0, "normalize": False}, but={MATRIX})
    assert_agree(pair, mergekit, models)
    torch.testing.assert_close(mergekit.merge("ties", models, pair.their_options)[MATRIX], -down[MATRIX])


def test_their_rescaling_keeps_the_sum_of_magnitudes(mergekit: Peer) -> None:
    """Of every task and tensor, and not, as the paper's, in the mean over masks."""
    models, dare = make_models(1), Dare(drop=0.4, rescale=False, masks="own", matrices_only=False, seed=0)
    drawn = masks(dare, models)
    parameters = {"weight": 1.0, "density": 0.6, "rescale": True}
    expected = mergekit.merge("dare_linear", models, parameters, mask=drawn)
    whole = changes(models.experts[0], models)
    left = {key: change * drawn[0][key] for key, change in whole.items()}
    factors = {key: whole[key].abs().sum() / left[key].abs().sum() for key in left}
    found = {key: models.pretrained[key] + factors[key] * left[key] for key in left}
    assert max(differences(found, expected, models.pretrained).values()) <= 1e-5
    assert all(abs(factor * 0.6 - 1) > 1e-5 for factor in factors.values())


def test_their_breadcrumbs_round_what_they_keep(mergekit: Peer) -> None:
    """Down; ours round what they drop."""
    models, low, high = make_models(1), 0.85, 0.007
    parameters = {"weight": 1.0, "density": 1 - low - high, "gamma": high}
    expected = kept(mergekit.merge("breadcrumbs", models, parameters), models)
    method = ours("breadcrumbs", [f"transform.drop_low={low}", f"transform.drop_high={high}", "scaling=1"])
    found = kept(method(bank_of(models)), models)
    sizes = {key: prod(shape) for key, shape in SHAPES.items()}
    assert expected == {key: int((1 - low - high) * size) for key, size in sizes.items()}
    assert found == {key: size - int(low * size) - int(high * size) for key, size in sizes.items()}
    assert found != expected


def kept(merged: State, models: Models) -> dict[str, int]:
    """How many entries are not θ₀'s, by key."""
    return {key: int((change != 0).sum()) for key, change in changes(merged, models).items()}
