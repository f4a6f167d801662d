"""The chart of what each tensor weighs and what it was given for that."""

import struct

import pytest

from adamerge.errors import OutputError
from adamerge.evaluation import figures
from adamerge.evaluation.importance_figure import importance_figure

# In a state dict's order, where the output projection comes before the blocks.
SHARES = {
    "visual.proj": (0.05, 1),
    "visual.conv1.weight": (0.1, 2),
    "visual.transformer.resblocks.1.mlp.c_fc.weight": (0.2, 4),
    "visual.transformer.resblocks.0.ln_1.weight": (0.0, 0),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (0.65, 13),
}
IN_DEPTH = [(0.1, 2), (0.0, 0), (0.65, 13), (0.2, 4), (0.05, 1)]


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


def many(num_blocks):
    keys = [f"visual.transformer.resblocks.{i}.{name}.weight" for i in range(num_blocks) for name in ("ln_1", "ln_2")]
    return dict.fromkeys(keys, (1 / len(keys), 2))


def shown(axes):
    return [text for tick in axes.get_xticklabels() if (text := tick.get_text())]


def test_bars_stand_in_depth_order(drawn, tmp_path):
    importance_figure(SHARES, tmp_path / "importance.png")
    upper, lower = drawn[0].axes
    for axes, part in ((upper, 0), (lower, 1)):
        assert [bar.get_height() for bar in axes.patches] == [share[part] for share in IN_DEPTH]
        assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx(range(5))
        assert axes.get_ylim()[0] == 0
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("importance", "λ per task")
    assert "65%" in upper.yaxis.get_major_formatter()(0.65)


def test_lines_and_labels_mark_the_blocks(drawn, tmp_path):
    importance_figure(SHARES, tmp_path / "importance.png")
    upper, lower = drawn[0].axes
    for axes in (upper, lower):
        assert [line.get_xdata()[0] for line in axes.lines] == [0.5, 2.5, 3.5]
    assert shown(lower) == ["embed", "block 0", "block 1", "output"]
    assert list(lower.get_xticks()) == [0, 1.5, 3, 4]


def test_counts_have_whole_ticks(drawn, tmp_path):
    for most in (1, 3, 200):
        importance_figure(
            {key: (share, min(most, count * 20)) for key, (share, count) in SHARES.items()}, tmp_path / "i.png"
        )
        ticks = drawn[-1].axes[1].get_yticks()
        assert all(tick == int(tick) for tick in ticks)


def test_labels_of_many_blocks_lean_and_the_figure_stays_of_a_size(drawn, tmp_path):
    for num_blocks, rotation in ((4, 0), (24, 45)):
        importance_figure(many(num_blocks), tmp_path / "importance.png")
        assert {tick.get_rotation() for tick in drawn[-1].axes[1].get_xticklabels()} == {rotation}
    importance_figure(many(400), tmp_path / "importance.png")
    data = (tmp_path / "importance.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1500 < width < 3000
    assert 500 < height < 1000


def test_a_single_tensor(drawn, tmp_path):
    importance_figure({"visual.proj": (1.0, 3)}, tmp_path / "importance.png")
    upper, lower = drawn[0].axes
    assert not upper.lines
    assert shown(lower) == ["output"]


def test_a_file_in_the_way_of_the_folder_is_an_output_error(tmp_path):
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(OutputError):
        importance_figure(SHARES, tmp_path / "figures" / "importance.png")
