import math
import struct
import subprocess
import sys

import pytest
import torch

from adamerge.errors import OutputError, ShapeError
from adamerge.evaluation import figures
from adamerge.evaluation.figures import coefficients_heatmap, loss_figure, mean_coefficient_figure
from adamerge.merging import Partition

BLOCK = ("ln_1.weight", "attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight")
TASKS = ("mnist", "dtd", "cars")


def vit_keys(num_blocks: int) -> list[str]:
    """A ViT in open_clip's state-dict order, where the output projection comes before the blocks."""
    blocks = [f"visual.transformer.resblocks.{i}.{name}" for i in range(num_blocks) for name in BLOCK]
    return ["visual.class_embedding", "visual.proj", "visual.conv1.weight", *blocks, "visual.ln_post.weight"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures as drawn, kept at the moment they are saved."""
    kept = []
    save = figures.save

    def save_and_keep(figure, path):
        save(figure, path)
        kept.append(figure)

    monkeypatch.setattr(figures, "save", save_and_keep)
    return kept


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def heatmap(drawn, tmp_path, granularity, num_blocks=2, num_tasks=3, shift=0.0):
    partition = Partition.build(granularity, dict.fromkeys(vit_keys(num_blocks), (8,)))
    coefficients = torch.rand(num_tasks, partition.num_groups, generator=torch.manual_seed(0)) + shift
    coefficients_heatmap(coefficients, partition.groups, [f"task{k}" for k in range(num_tasks)], tmp_path / "λ.png")
    return coefficients, partition, drawn[-1]


def test_heatmap_puts_the_tensors_in_depth_order(drawn, tmp_path):
    coefficients, partition, figure = heatmap(drawn, tmp_path, "tensor")
    axes = figure.axes[0]
    shown = labels(axes.get_xticklabels())
    assert shown[:2] == ["class_embedding", "conv1.weight"]
    assert shown[2:6] == list(BLOCK) == shown[6:10]
    assert shown[10:] == ["proj", "ln_post.weight"]
    image = torch.tensor(axes.images[0].get_array().data)
    proj = partition.groups.index("visual.proj")
    assert torch.equal(image[:, 10], coefficients[:, proj])
    assert torch.equal(image.sort(dim=1).values, coefficients.sort(dim=1).values)
    assert labels(axes.get_yticklabels()) == ["task0", "task1", "task2"]


def test_heatmap_marks_the_blocks(drawn, tmp_path):
    axes = heatmap(drawn, tmp_path, "tensor")[2].axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5, 5.5, 9.5]
    above = axes.child_axes[0]
    assert labels(above.get_xticklabels()) == ["embed", "block 0", "block 1", "output"]


@pytest.mark.parametrize("granularity", ["tensor", "chunk(4)"])
def test_heatmap_of_many_groups_labels_blocks_only(drawn, tmp_path, granularity):
    figure = heatmap(drawn, tmp_path, granularity, num_blocks=24, num_tasks=20)[2]
    expected = ["embed", *(f"block {i}" for i in range(24)), "output"]
    assert labels(figure.axes[0].get_xticklabels()) == expected
    width, height = png_size(tmp_path / "λ.png")
    assert 1200 < width < 3000
    assert 900 < height < 1500


@pytest.mark.parametrize(("num_groups", "reduced"), [(1000, False), (1001, True)])
def test_heatmap_of_very_many_groups_shows_the_mean_over_each_tensor(drawn, tmp_path, num_groups, reduced):
    shapes = {"visual.proj": (num_groups - 11, 1), "visual.conv1.weight": (8, 1), "visual.ln_post.weight": (3, 1)}
    partition = Partition.build("row", shapes)
    assert partition.num_groups == num_groups
    coefficients = torch.rand(2, num_groups, generator=torch.manual_seed(0))
    coefficients_heatmap(coefficients, partition.groups, ["a", "b"], tmp_path / "λ.png")
    axes = drawn[0].axes[0]
    image = torch.tensor(axes.images[0].get_array().data)
    assert ("mean over each tensor's groups" in axes.get_title()) is reduced
    if not reduced:
        assert image.shape == (2, num_groups)
        return
    proj, conv, norm = coefficients.split([num_groups - 11, 8, 3], dim=1)
    torch.testing.assert_close(image, torch.stack([conv.mean(1), proj.mean(1), norm.mean(1)], dim=1))
    assert labels(axes.get_xticklabels()) == ["conv1.weight", "proj", "ln_post.weight"]


def test_tensor_means_are_of_groups_wherever_they_stand():
    names = ["b[0]", "a", "b[10]", "c[0]", "b[1]"]
    coefficients = torch.tensor([[1.0, 5.0, 2.0, 7.0, 6.0], [0.0, -1.0, 3.0, 0.5, 0.0]], requires_grad=True)
    means, tensors = figures._tensor_means(coefficients, names)
    assert tensors == ["b", "a", "c"]
    assert means.tolist() == [[3, 5, 7], [1, -1, 0.5]]


def test_heatmap_of_blocks_and_of_tasks_shows_the_numbers(drawn, tmp_path):
    coefficients, _, figure = heatmap(drawn, tmp_path, "block")
    axes = figure.axes[0]
    assert labels(axes.get_xticklabels()) == ["embed", "block 0", "block 1", "output"]
    assert labels(axes.texts) == [f"{value:.2f}" for value in coefficients.flatten().tolist()]
    figure = heatmap(drawn, tmp_path, "task")[2]
    assert labels(figure.axes[0].get_xticklabels()) == ["all tensors"]


def test_heatmap_starts_at_zero_or_is_centred_on_it(drawn, tmp_path):
    low, high = heatmap(drawn, tmp_path, "tensor")[2].axes[0].images[0].get_clim()
    assert low == 0 < high
    low, high = heatmap(drawn, tmp_path, "tensor", shift=-0.3)[2].axes[0].images[0].get_clim()
    assert low == -high < 0


def test_heatmap_of_zeros(drawn, tmp_path):
    coefficients_heatmap(torch.zeros(1, 1, requires_grad=True), ["all"], ["one"], tmp_path / "λ.png")
    assert png_size(tmp_path / "λ.png")


def test_loss_figure_leaves_out_steps_that_never_ran(drawn, tmp_path):
    losses = torch.rand(50, 3)
    losses[40:] = math.nan
    losses[10, 1] = math.inf
    loss_figure(losses, TASKS, tmp_path / "loss.png", loss_name="cross-entropy (nats)")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == list(TASKS)
    assert drawn[0].get_supxlabel() == "step"
    assert drawn[0].get_supylabel() == "cross-entropy (nats)"
    raw = panels[1].lines[0]
    assert list(raw.get_xdata()) == [step for step in range(1, 41) if step != 11]
    assert list(raw.get_ydata()) == pytest.approx([*losses[:10, 1].tolist(), *losses[11:40, 1].tolist()])


def test_running_mean():
    assert figures._running_mean([1.0, 2.0, 6.0]) == pytest.approx([1.5, 3.0, 4.0])
    constant = figures._running_mean([0.3] * 500)
    assert constant == pytest.approx([0.3] * 500)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("num_tasks", [1, 5])
def test_curves_of_few_steps_and_any_number_of_tasks(tmp_path, num_steps, num_tasks):
    names = [f"task{k}" for k in range(num_tasks)]
    loss_figure(torch.rand(num_steps, num_tasks), names, tmp_path / "loss.png")
    mean_coefficient_figure(torch.rand(num_steps, num_tasks), names, tmp_path / "mean.png")
    assert min(*png_size(tmp_path / "loss.png"), *png_size(tmp_path / "mean.png")) > 300


def test_steps_are_whole_numbers(drawn, tmp_path):
    for num_steps in (1, 2, 500):
        mean_coefficient_figure(torch.rand(num_steps, 3), TASKS, tmp_path / "mean.png")
        low, high = drawn[-1].axes[0].get_xlim()
        ticks = [tick for tick in drawn[-1].axes[0].get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


def test_mean_coefficients_are_listed_as_their_lines_end(drawn, tmp_path):
    means = torch.tensor([[0.3, 0.3, 0.3], [0.2, 0.5, 0.4]])
    mean_coefficient_figure(means, TASKS, tmp_path / "mean.png")
    axes = drawn[0].axes[0]
    legend = axes.get_legend()
    assert labels(legend.get_texts()) == ["dtd", "cars", "mnist"]
    drawn_colours = [axes.lines[k].get_color() for k in (1, 2, 0)]
    assert [line.get_color() for line in legend.get_lines()] == drawn_colours
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "mean λ over the groups")


def test_lines_of_many_tasks_can_be_told_apart(drawn, tmp_path):
    mean_coefficient_figure(torch.rand(5, 20), [f"task{k}" for k in range(20)], tmp_path / "mean.png")
    styles = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(styles) == 20


def test_names_are_shown_as_they_are(drawn, tmp_path):
    names = ["_hidden", r"a$\frac$b", "数字"]  # no legend entry, a broken formula, no glyphs
    loss_figure(torch.rand(5, 3), names, tmp_path / "loss.png")
    mean_coefficient_figure(torch.rand(5, 3), names, tmp_path / "mean.png")
    coefficients_heatmap(torch.rand(3, 1), ["all"], names, tmp_path / "λ.png")
    assert sorted(labels(drawn[1].axes[0].get_legend().get_texts())) == sorted(names)
    assert labels(drawn[2].axes[0].get_yticklabels()) == names


def test_shapes_are_checked(tmp_path):
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(3, 3\)"):
        coefficients_heatmap(torch.rand(2, 3), ["a", "b", "c"], TASKS, tmp_path / "λ.png")
    with pytest.raises(ShapeError):
        loss_figure(torch.rand(5, 2), TASKS, tmp_path / "λ.png")
    with pytest.raises(ShapeError):
        mean_coefficient_figure(torch.rand(5, 2), TASKS, tmp_path / "λ.png")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_the_folder_is_an_output_error(tmp_path):
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(OutputError):
        loss_figure(torch.rand(5, 3), TASKS, tmp_path / "figures" / "loss.png")


def test_pyplot_is_never_imported_and_matplotlib_only_at_use(tmp_path):
    code = (
        "import sys, torch, pathlib\n"
        "from adamerge.evaluation.figures import loss_figure\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"loss_figure(torch.rand(5, 1), ['x'], pathlib.Path({str(tmp_path / 'loss.png')!r}))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert png_size(tmp_path / "loss.png")
