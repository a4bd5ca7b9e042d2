"""Figures: what notebooks show, how lines are divided into panels, what an axis covers, formats and themes."""

import pytest

from lightning_fedhaw.figures.base import plain_number
from lightning_fedhaw.plotting import RunHistory, draw_bands, draw_curves, draw_lines, main, theme

PNG = b"\x89PNG"


def history(values, **others):
    run = RunHistory()
    run.metrics = [{"val_loss": value, **others} for value in values]
    return run


def test_a_notebook_shows_a_figure():
    figure = draw_bands({"FedAvg": [history([2.0, 1.0])]}, ["val_loss"])
    assert figure._repr_png_().startswith(PNG)


def test_up_to_ten_lines_share_a_panel_and_more_have_one_each():
    curves = {f"rule {index}": [history([2.0, 1.0 + index])] for index in range(11)}
    ten = dict(list(curves.items())[:10])
    (shared,) = draw_bands(ten, ["val_loss"]).axes
    assert len(shared.get_lines()) == 10
    small = draw_bands(curves, ["val_loss"]).axes
    assert [axes.get_title() for axes in small] == list(curves)
    median, line = sorted(small[0].get_lines(), key=lambda each: each.get_label() != "_median")
    assert (median.get_ydata().tolist(), line.get_ydata().tolist()) == ([2.0, 6.0], [2.0, 1.0])
    assert small[0].get_ylim() == small[10].get_ylim()
    assert [axes.get_legend() for axes in small] == [None] * 11
    assert len(draw_curves({name: runs[0] for name, runs in curves.items()}, metric="val_loss").axes) == 12
    assert len(draw_lines([0, 1], {name: [0, 1] for name in curves}).axes) == 11


def test_a_line_that_explodes_leaves_the_axis_and_is_named():
    exploding = history([2.0, 1.0, 5000.0, 4e6, 1.0])
    (axes,) = draw_bands({"FedAvg": [history([2.0, 1.0, 0.5, 0.4, 0.3])], "FedX": [exploding]}, ["val_loss"]).axes
    assert axes.get_ylim()[1] < 3
    assert [text.get_text() for text in axes.texts] == ["off the axis: FedX to 4,000,000"]


@pytest.mark.parametrize(
    "lines",
    [
        [[2.0, 1.0, 0.5], [9.0, 8.0, 7.0]],  # not ten times
        [[0.01, 0.01, 0.01], [0.1, 0.5, 0.9]],  # shares
        [[100.0, 50.0, 25.0, 12.0, 6.0, 3.0, 1.0, 0.1]],  # a slow fall
    ],
)
def test_lines_that_differ_are_no_outliers(lines):
    (axes,) = draw_bands({str(index): [history(line)] for index, line in enumerate(lines)}, ["val_loss"]).axes
    assert axes.get_ylim()[1] > max(map(max, lines))
    assert not axes.texts


def test_numbers_have_no_offset():
    figure = draw_bands({"FedHAW": [history([1.000001, 1.000002])]}, ["val_loss"])
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert "1.000001" in [label.get_text() for label in axes.get_yticklabels()]
    assert [plain_number(value) for value in (0.1 + 0.2, -2.0, 1e6, 1e-7)] == ["0.3", "−2", "1,000,000", "1e−07"]


def test_the_dark_theme_lasts_as_long_as_its_block():
    run = {"FedHAW": [history([2.0, 1.0])]}
    with theme("dark"):
        dark = draw_bands(run, ["val_loss"])
    light = draw_bands(run, ["val_loss"])
    assert sum(dark.get_facecolor()[:3]) < 1 < sum(light.get_facecolor()[:3])
    assert dark.axes[0].xaxis.label.get_color() != light.axes[0].xaxis.label.get_color()
    with pytest.raises(ValueError, match="`name` must be one of 'light', 'dark', got 'sepia'"), theme("sepia"):
        pass


def test_fedhaw_plot_writes_the_formats_that_papers_take(tmp_path):
    (tmp_path / "FedAvg").mkdir()
    (tmp_path / "FedAvg/metrics.csv").write_text("epoch,step,val_loss\n0,1,2.0\n1,2,1.0\n")
    out = tmp_path / "pictures"
    paths = main([str(tmp_path / "FedAvg"), "--output", str(out), "--format", "pdf", "--format", "svg", "--theme=dark"])
    assert [path.name for path in paths] == ["val_loss.pdf", "val_loss.svg"]
    assert b"/Type3" not in paths[0].read_bytes()
    assert ">round</text>" in paths[1].read_text()
