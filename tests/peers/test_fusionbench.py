"""Our static merges against FusionBench's, tensor by tensor, in float64 and float32; an opt-in test.

FusionBench has an environment of its own, in the repository's root:

    uv venv .peer && uv pip install --python .peer/bin/python fusion-bench==0.2.33
    uv run pytest tests/peers --peer-python=.peer/bin/python

Where the two differ on purpose, the option that gives the peer's form is set; where there is none, the difference is
asserted, and the method's ``Differs:`` line has its cause.
"""

import pytest
import torch
from peers.comparison import (
    CONVOLUTION,
    MATRIX,
    SHAPES,
    Models,
    Pair,
    Peer,
    PeerError,
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

from adamerge.methods import Context
from adamerge.methods.transforms import Dare

pytestmark = pytest.mark.peer

HF = {"huggingface": True}  # queries, keys and values apart, the projection transposed
SPLIT = "split_in_proj=true"
LINEAR = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CLASS, PROJECTION, POSITIONS = "visual.class_embedding", "visual.proj", "visual.positional_embedding"
TIES = {"threshold": 20, "remove_keys": []}
DARE = {"sparsity_ratio": 0.4, "only_on_linear_weights": False, "rescale": True}
SAME = {
    "average": Pair("average", [], "simple_average", {}),
    "weighted_average": Pair(
        "weighted_average",
        ["weights=[1,2,0.5]"],
        "weighted_average",
        {"normalize": True, "weights": [1, 2, 0.5], "verbose": False},
    ),
    "task_arithmetic": Pair("task_arithmetic", ["scaling=0.3"], "task_arithmetic", {"scaling_factor": 0.3}),
    **{
        f"ties, {how}": Pair(
            "ties", [f"aggregation={how}", "scaling=0.4"], "ties", {"scaling_factor": 0.4, "merge_func": how, **TIES}
        )
        for how in ("sum", "mean", "max")
    },
    "dare_task_arithmetic": Pair(
        "dare_task_arithmetic", ["transform.drop=0.4"], "dare_task_arithmetic", {"scaling_factor": 0.3, **DARE}
    ),
    "dare_task_arithmetic, not rescaled, one mask": Pair(
        "dare_task_arithmetic",
        ["transform.drop=0.4", "transform.rescale=false", "transform.masks=shared"],
        "dare_task_arithmetic",
        {"scaling_factor": 0.3, **DARE, "rescale": False},
    ),
    "dare_task_arithmetic, matrices": Pair(
        "dare_task_arithmetic",
        ["transform.drop=0.4", "transform.matrices_only=true"],
        "dare_task_arithmetic",
        {"scaling_factor": 0.3, **DARE, "only_on_linear_weights": True, **HF},
        but={POSITIONS},
    ),
    "dare_ties": Pair(
        "dare_ties",
        ["transform.drop=0.4"],
        "dare_ties",
        {"scaling_factor": 0.5, "merge_func": "sum", **DARE, **TIES},
    ),
    "magmax": Pair("magmax", [], "magmax", {"scaling_factor": 0.5}),
    "tsv_merge": Pair("tsv_merge", ["scaling=0.8"], "tsv_merge", {"alpha": 0.8}),
    "tsv_merge, split": Pair("tsv_merge", [SPLIT], "tsv_merge", HF),
    "tsv_merge, a matrix excluded": Pair(
        "tsv_merge", [f"exclude=[{PROJECTION}]"], "tsv_merge", {"exclude_keys": [PROJECTION]}
    ),
    "iso_c": Pair("iso_c", ["scaling=1.5"], "iso_c", {"scaling_factor": 1.5}),
    "iso_c, split": Pair("iso_c", [SPLIT], "iso_c", {"scaling_factor": 1.0, **HF}),
    "iso_cts": Pair("iso_cts", [], "iso_cts", {"scaling_factor": 1.0, "common_space_fraction": 0.8}),
    "iso_cts, half, split": Pair(
        "iso_cts",
        ["common_fraction=0.5", "scaling=1.5", SPLIT],
        "iso_cts",
        {"scaling_factor": 1.5, "common_space_fraction": 0.5, **HF},
        but={PROJECTION},
    ),
    "wudi": Pair("wudi", ["steps=400"], "wudi", {"iter_num": 400}),
    "wudi, split": Pair("wudi", [SPLIT], "wudi", {"iter_num": 300, **HF}, but={PROJECTION}),
    "doge": Pair("doge", [], "doge", {"subspace": 6, "K": 30, "lamda": 0.07, **HF}),
}
REGMEAN = Pair(
    "regmean",
    ["ridge=0", "non_diagonal=0.9"],
    "regmean",
    {
        "num_regmean_examples": 1,
        "exclude_param_names_regex": [],
        "weight_transpose": True,
        "reduce_non_diagonal_ratio": 0.9,
        **HF,
    },
)
FISHER = Pair(
    "fisher_merging",
    ["floor_unit=absolute", "floor_rule=add"],
    "fisher_merging",
    {
        "num_fisher_examples": 1,
        "exclude_param_names_regex": [],
        "normalize_fisher_weight": True,
        "minimal_fisher_weight": 1e-6,
    },
)
OPCM = Pair(
    "opcm", ["shuffle=false", SPLIT], "opcm", {"alpha": 0.5, "shuffle_order": False, "save_on_every_step": False, **HF}
)


def grams(models: Models) -> State:
    """XᵀX / N of inputs X that differ by task, by key of linear weights, (K, n, n)."""
    generator = torch.Generator().manual_seed(0)
    widths = {key: tensor.shape[1] for key, tensor in models.pretrained.items() if key.endswith(LINEAR)}
    found = {}
    for key, width in (widths | {PROJECTION: len(models.pretrained[PROJECTION])}).items():
        inputs = torch.randn(len(models.experts), 200, width, generator=generator, dtype=torch.float64) + 0.3
        found[key] = inputs.mT @ inputs / 200
    return found


def by_task(statistics: State) -> list[State]:
    return [{key: of_key[task] for key, of_key in statistics.items()} for task in range(3)]


def test_the_library_is_the_one_compared_with(fusionbench: Peer) -> None:
    assert fusionbench.version == "0.2.33"


@pytest.mark.parametrize("case", SAME)
def test_agrees(case: str, fusionbench: Peer) -> None:
    assert_agree(SAME[case], fusionbench, make_models())


def test_dare_leaves_their_positional_embedding_alone(fusionbench: Peer) -> None:
    """It is a matrix, but not a linear layer's."""
    models, pair, linear = make_models(), SAME["dare_task_arithmetic, matrices"], SAME["task_arithmetic"]
    dare = ours(pair.ours, pair.options).transform
    assert isinstance(dare, Dare)
    merged = fusionbench.merge(pair.theirs, models, pair.their_options, mask=masks(dare, models))
    whole = fusionbench.merge(linear.theirs, models, linear.their_options)
    torch.testing.assert_close(merged[POSITIONS], whole[POSITIONS])


@pytest.mark.parametrize("case", ["iso_cts, half, split", "wudi, split"])
def test_their_projection_is_ours_transposed(case: str, fusionbench: Peer) -> None:
    """To these methods rows and columns are not alike."""
    models, pair = make_models(), SAME[case]
    pretrained, *experts = (
        state | {PROJECTION: state[PROJECTION].mT.contiguous()} for state in (models.pretrained, *models.experts)
    )
    found = ours(pair.ours, pair.options)(bank_of(Models(pretrained, experts)))
    expected = fusionbench.merge(pair.theirs, models, pair.their_options)
    torch.testing.assert_close(found[PROJECTION].mT, expected[PROJECTION], rtol=0, atol=1e-9)


def test_regmean_agrees_on_the_same_inputs(fusionbench: Peer) -> None:
    models = make_models()
    of_tasks = grams(models)
    assert_agree(REGMEAN, fusionbench, models, of_tasks, gram=by_task(of_tasks))


def test_fisher_merging_agrees_on_the_same_information(fusionbench: Peer) -> None:
    models = make_models()
    squares = {key: torch.stack([expert[key] for expert in make_models(4).experts[:3]]).square() for key in SHAPES}
    assert_agree(FISHER, fusionbench, models, squares, fisher=by_task(squares))


def test_slerp_agrees_but_where_a_tensor_is_zero(fusionbench: Peer) -> None:
    """They take it for one at a right angle."""
    models, share = make_models(2), 0.3
    models = with_first_at(models, MATRIX, torch.zeros_like(models.pretrained[MATRIX]))
    options = ["of=weights", "granularity=tensor", f"weights=[{1 - share},{share}]"]
    assert_agree(Pair("slerp", options, "slerp", {"t": share}, but={MATRIX}), fusionbench, models)
    expected = fusionbench.merge("slerp", models, {"t": share})[MATRIX]
    angle = torch.tensor(torch.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(expected, (share * angle).sin() * models.experts[1][MATRIX])


def test_model_stock_agrees_but_where_the_mean_angle_is_obtuse(fusionbench: Peer) -> None:
    """They leave [0, 1] there; we keep θ₀. (They also add 1e-8 to products of lengths, hence large changes.)"""
    models = make_models(change=0.1)
    method = ours("model_stock", ["average=angle"])
    kept = {key for key, tensor in method(bank_of(models)).items() if torch.equal(tensor, models.pretrained[key])}
    assert 0 < len(kept) < len(models.pretrained) // 2
    assert_agree(Pair("model_stock", ["average=angle"], "model_stock", {}, but=kept), fusionbench, models)


def test_opcm_agrees_where_the_class_embedding_is_shared(fusionbench: Peer) -> None:
    """They do not merge it, as a parameter of no leaf module."""
    assert_agree(OPCM, fusionbench, sharing_class_embedding(make_models()))


def test_opcm_has_another_norm_as_they_leave_the_class_embedding_at_the_first_expert(fusionbench: Peer) -> None:
    models = make_models()
    assert_opcm_agrees_up_to_a_factor(fusionbench, models, but=CLASS)
    expected = changes(fusionbench.merge(OPCM.theirs, models, OPCM.their_options), models)[CLASS]
    ratio = expected / changes(models.experts[0], models)[CLASS]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_opcm_has_another_norm_as_they_remove_a_diagonal_where_singular_values_are_zero(fusionbench: Peer) -> None:
    models = sharing_class_embedding(of_rank_one_at_matrix())
    assert_opcm_agrees_up_to_a_factor(fusionbench, models, but=MATRIX)


def test_opcm_takes_no_block_where_all_of_it_is_dominant(fusionbench: Peer) -> None:
    """Where no share is above α: what ours makes of α = 0."""
    options = OPCM.their_options | {"alpha": 1.001}  # so that 1, rounded, is below
    assert_agree(
        Pair("opcm", [*OPCM.options, "dominant_share=0"], "opcm", options),
        fusionbench,
        sharing_class_embedding(make_models()),
    )


def sharing_class_embedding(models: Models) -> Models:
    return Models(models.pretrained, [expert | {CLASS: models.pretrained[CLASS]} for expert in models.experts])


def assert_opcm_agrees_up_to_a_factor(peer: Peer, models: Models, but: str) -> None:
    """Where one tensor has another norm, so have all together, which ends up in a factor of every other."""
    found = changes(ours(OPCM.ours, OPCM.options)(bank_of(models)), models)
    expected = changes(peer.merge(OPCM.theirs, models, OPCM.their_options), models)
    factor = expected[CONVOLUTION].norm() / found[CONVOLUTION].norm()
    scaled = {key: models.pretrained[key] + factor * change for key, change in found.items()}
    whole = {key: models.pretrained[key] + change for key, change in expected.items()}
    relative = differences(scaled, whole, models.pretrained)
    assert {key for key, value in relative.items() if not value <= 1e-5} == {but}
    assert abs(factor - 1) > 1e-4


@pytest.mark.parametrize("case", ["tsv_merge", "iso_c", "iso_cts"])
def test_singular_vectors_of_zero_count_for_them(case: str, fusionbench: Peer) -> None:
    """Those of a matrix that has not full rank are LAPACK's choice; we leave them out."""
    assert_agree(SAME[case]._replace(but={MATRIX}), fusionbench, of_rank_one_at_matrix())


def of_rank_one_at_matrix() -> Models:
    models = make_models()
    for expert in models.experts:
        change = expert[MATRIX] - models.pretrained[MATRIX]
        expert[MATRIX] = models.pretrained[MATRIX] + torch.outer(change[:, 0], change[0]) * 100
    return models


@pytest.mark.parametrize("case", ["wudi", "doge"])
def test_they_divide_by_the_norm_of_a_matrix_that_an_expert_left_alone(case: str, fusionbench: Peer) -> None:
    models = make_models()
    models = with_first_at(models, MATRIX, models.pretrained[MATRIX])
    assert_agree(SAME[case]._replace(but={MATRIX}), fusionbench, models)
    expected = fusionbench.merge(SAME[case].theirs, models, SAME[case].their_options)
    assert expected[MATRIX].isnan().any()
    assert ours(SAME[case].ours, SAME[case].options)(bank_of(models))[MATRIX].isfinite().all()


def test_regmean_fails_where_an_input_never_occurs(fusionbench: Peer) -> None:
    """They invert; ours takes the mean there."""
    models = make_models()
    of_tasks = grams(models)
    of_tasks[MATRIX][:, 3] = of_tasks[MATRIX][:, :, 3] = 0
    with pytest.raises(PeerError, match="singular"):
        fusionbench.merge(REGMEAN.theirs, models, REGMEAN.their_options, gram=by_task(of_tasks))
    found = ours(REGMEAN.ours, REGMEAN.options)(bank_of(models), Context(statistics=of_tasks))
    mean = torch.stack([expert[MATRIX] for expert in models.experts]).mean(0)
    torch.testing.assert_close(found[MATRIX][:, 3], mean[:, 3])


def test_iso_cts_fails_where_the_tasks_directions_are_rounded_up(fusionbench: Peer) -> None:
    """All of them together are more than there are."""
    with pytest.raises(PeerError, match="size"):
        fusionbench.merge("iso_cts", make_models(), {"scaling_factor": 1.0, "common_space_fraction": 0.0})
