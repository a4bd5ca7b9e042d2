from __future__ import annotations

import sys

import pytest
import torch

from lightning_fedhaw.data.preview import draw_histogram, format_histogram

SMALL = torch.tensor([[3, 0, 12], [0, 5, 1]])


def test_table_with_a_column_per_class():
    assert format_histogram(SMALL, ["cat", "dog", "emu"]).split("\n") == [
        "client  samples  cat  dog  emu",
        "     0       15    3    0   12",
        "     1        6    0    5    1",
        "   all       21    3    5   13",
    ]


def test_table_of_largest_classes():
    histogram = torch.zeros(2, 30, dtype=torch.int64)
    histogram[0, [4, 20]] = torch.tensor([7, 9])
    histogram[1, :7] = 1
    assert format_histogram(histogram).split("\n") == [
        "client  samples  classes  largest classes",
        "     0       16        2  20: 9  4: 7",
        "     1        7        7  0: 1  1: 1  2: 1  3: 1  4: 1",
        "   all       23        8",
    ]


def test_summary_of_many_clients():
    histogram = torch.ones(21, 2, dtype=torch.int64)
    histogram[0] = torch.tensor([0, 8])
    assert format_histogram(histogram).split("\n") == [
        "21 clients, 48 samples, 2 classes",
        "                              smallest  median  largest",
        "samples of a client                  2       2        8",
        "classes of a client                  1       2        2",
        "largest class of a client, %        50      50      100",
        "clients that have a class           20    20.5       21",
    ]


def test_picture_has_a_rectangle_per_client_and_class_that_occurs(tmp_path):
    figure = draw_histogram(SMALL, tmp_path / "split.png", ["cat", "dog", "emu"])
    (axes,) = figure.axes
    corners = [path.vertices for path in axes.collections[0].get_paths()]
    spans = {(round(float(c[:, 1].mean() + 0.01)), float(c[:, 0].min()), float(c[:, 0].max())) for c in corners}
    assert spans == {(0, 0.0, 3.0), (0, 3.0, 15.0), (1, 0.0, 5.0), (1, 5.0, 6.0)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog", "emu"]
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (300, 100)])
def test_picture_of_any_size(shape, tmp_path):
    draw_histogram(torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)), tmp_path / "split.png")


def test_picture_touches_no_global_state():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    draw_histogram(SMALL)
    assert pyplot.get_fignums() == before


def test_matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="`draw_histogram` needs .* `pip install matplotlib`"):
        draw_histogram(SMALL)


@pytest.mark.parametrize("show", [format_histogram, draw_histogram])
def test_wrong_arguments(show):
    for wrong in (SMALL[0], SMALL.float(), -SMALL, SMALL[:0]):
        with pytest.raises(ValueError, match="`histogram` must be a table of counts"):
            show(wrong)
    with pytest.raises(ValueError, match=r"`class_names` must have one name per class \(3\), got 2"):
        show(SMALL, class_names=["a", "b"])
