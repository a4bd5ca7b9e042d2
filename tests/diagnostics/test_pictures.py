"""Pictures of diagnostics: one function each, which returns a figure."""

import pytest
import torch

from federations import train
from lightning_fedhaw import FedHAWCallback
from lightning_fedhaw.diagnostics import (
    Coherence,
    Drift,
    ParameterHistogram,
    Shrinking,
    draw_coherence,
    draw_cosines,
    draw_drift,
    draw_parameters,
    draw_shrinking,
)
from lightning_fedhaw.plotting import RunHistory, main, read_run

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run():
    history = RunHistory()
    observers = [Coherence(), Shrinking(), Drift(every_n_rounds=2), ParameterHistogram(bins=5)]
    train(rounds=3, rule=FedHAWCallback(), callbacks=[*observers, history], storage="device")
    return history


def test_series_are_drawn_with_labels(run):
    for draw in (draw_coherence, draw_shrinking):
        figure = draw({"FedHAW": [run]}, "picture.pdf")
        for axes in figure.axes:
            assert axes.get_xlabel() == "round"
            assert axes.get_ylabel()
        assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [1, 2, 3]


def test_the_critical_round_is_marked():
    history = RunHistory()
    history.metrics = [{"diagnostics/coherence": value} for value in (0.2, 0.1, -0.1, -0.2)]
    axes = draw_coherence({"run": [history]}, window=1).axes[0]
    assert any(line.get_xdata()[0] == line.get_xdata()[1] == 3 for line in axes.get_lines())


def test_layers_are_drawn_where_they_were_measured(run):
    lines = draw_drift(run, "picture.png").axes[1].get_lines()
    assert [line.get_label() for line in lines] == ["net.0", "net.3"]
    assert list(lines[0].get_xdata()) == [2]


def test_cosines_are_drawn_of_a_round(run):
    assert draw_cosines(run, "picture.png").axes[0].get_title() == "round 3"
    assert draw_cosines(run, round_idx=0).axes[0].get_title() == "round 1"
    with pytest.raises(ValueError, match=r"`round_idx` must be a round of which .* \(0, 1, 2\), got 7"):
        draw_cosines(run, round_idx=7)
    with pytest.raises(ValueError, match="No run has 'diagnostics/coherence': add its observer"):
        draw_coherence({"empty": [RunHistory()]})


def test_parameters_are_drawn_as_a_density(run):
    axes = draw_parameters({"first": run, "again": run}, "picture.png").axes[0]
    first, again = axes.get_lines()
    assert first.get_label() == "first, round 3"
    low, high = run.tables["diagnostics/parameters/ends"][2].tolist()
    assert torch.as_tensor(again.get_ydata()).nansum() * (high - low) / 5 == pytest.approx(1)
    assert draw_parameters({"first": run}, round_idx=0).axes[0].get_lines()[0].get_label() == "first, round 1"
    with pytest.raises(ValueError, match="must be a round of which the run has kept"):
        draw_parameters({"first": run}, round_idx=5)


def test_a_checkpoint_has_the_tables_and_the_command_draws_the_series():
    runner, _ = train(rounds=2, callbacks=[Coherence(), Drift()], storage="device")
    runner.save_checkpoint("run.ckpt")
    assert draw_cosines(read_run("run.ckpt")).axes
    names = [path.name for path in main(["run.ckpt", "--metric", "train_loss"])]
    assert "coherence.png" in names
    assert "drift.png" in names
