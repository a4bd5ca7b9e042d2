"""Compare methods: the same federations, resumable, in one process and in several."""

import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch

from cli_task import Samples
from comparison_task import Half, small
from federations import Classifier
from lightning_fedhaw import ErasureChannel, FedAvgCallback, FedHAWCallback
from lightning_fedhaw.comparing import Cell, compare
from lightning_fedhaw.comparing.cells import merged_options
from lightning_fedhaw.comparing.federations import CELLS
from lightning_fedhaw.comparing.plan import Recipe
from lightning_fedhaw.plotting import read_run

SHORT = {"rounds": 2, "seeds": [0]}


def curves(comparison):
    return {record["run"]["method"]: record["curve"] for record in comparison.records}


def test_methods_have_the_same_cohorts_batches_and_initial_model(tmp_path):
    """The first round's training loss shows all three; the second one's differs with the rule."""
    rules = {"one": FedAvgCallback, "two": FedAvgCallback, "half": partial(Half, share=0.25)}
    results = compare(rules, small(), settings={"clients_per_round": [2]}, output=tmp_path, **SHORT)
    losses = {}
    for record in results.records:
        losses[record["run"]["method"]] = read_run(tmp_path / record["log"]).curve("train_loss")
    assert losses["one"] == losses["two"]
    assert losses["one"][0] == losses["half"][0]
    assert losses["one"][1] != losses["half"][1]
    other = compare(rules, small(), settings={"clients_per_round": [2]}, rounds=2, seeds=[1], output=tmp_path / "b")
    assert curves(other)["one"] != curves(results)["one"]


def test_nothing_of_the_process_changes(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads()
    compare("FedAvg", small(), output=tmp_path, **SHORT)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_finished_runs_are_not_repeated(tmp_path):
    lines = []
    first = compare(["FedAvg"], "comparison_task.small", output=tmp_path, progress=lines.append, **SHORT)
    journal = tmp_path / "runs.jsonl"
    with journal.open("a") as file:
        file.write('{"run": {"cell"')  # a run that was cut off while its line was written
    settings = {"local_epochs": [1, 2]}
    again = compare(["FedAvg", "FedHAW"], "comparison_task.small", output=tmp_path, progress=lines.append, **SHORT)
    assert [line.partition(":")[0] for line in lines] == [
        "[1/1] comparison_task.small, FedAvg, seed 0",
        "[1/1] comparison_task.small, FedHAW, seed 0",
    ]
    assert again.records[0] == first.records[0]
    assert len(journal.read_text().splitlines()) == 2
    more = compare("FedAvg", "comparison_task.small", settings=settings, output=tmp_path, **SHORT)
    assert [record["run"]["settings"] for record in more.records] == [{"local_epochs": 1}, {"local_epochs": 2}]
    assert more.records[0]["curve"] == first.records[0]["curve"]
    assert more.records[1]["curve"] != first.records[0]["curve"]


def test_a_cell_of_functions_is_the_same_in_another_process():
    """What identifies a run must not hold the address of an object."""

    def identity():
        def source():
            return None

        options = {"labels": source, "num_clients": 4}
        return Recipe("x", Cell("x", partial(Classifier, partial(source)), partial(Samples, source), options)).identity

    assert identity() == identity()
    assert " at 0x" not in identity()


def test_a_damaged_record_is_told_by_its_line(tmp_path):
    (tmp_path / "runs.jsonl").write_text("nothing\n")
    with pytest.raises(ValueError, match="Line 1 of .* is no record of a run"):
        compare("FedAvg", small(), output=tmp_path, **SHORT)


def test_several_processes_give_the_numbers_of_one(tmp_path):
    arguments = {"cells": "comparison_task.small", "settings": {"errors": [0.8], "model.hidden": [3]}, **SHORT}
    rules = ["FedHAW", "comparison_task.Half(share=0.5)"]
    alone = compare(rules, output=tmp_path / "one", **arguments)
    together = compare(rules, output=tmp_path / "two", jobs=2, **arguments)
    assert curves(together) == curves(alone)
    assert together.failures == []


def test_what_cannot_be_sent_to_another_process_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`jobs` above 1 must be able to send small, own, seed 0"):
        compare({"own": lambda: FedAvgCallback()}, small(), seeds=[0, 1], rounds=1, jobs=2, output=tmp_path)


def test_everything_is_written(tmp_path):
    results = compare(["FedAvg", "FedHAW"], small(), output=tmp_path, rounds=2, seeds=[0, 1], target=0.1)
    for name in ("table.txt", "table.md", "table.tex", "differences.md", "results.csv", "results.json", "runs.jsonl"):
        assert (tmp_path / name).stat().st_size > 100, name
    assert (tmp_path / "table.tex").read_text() == results.table("latex")
    paths = results.draw()
    assert [path.name for path in paths] == ["curves_small.png", "curves_small.pdf"]
    assert paths[1].read_bytes().startswith(b"%PDF")
    summary = json.loads((tmp_path / "results.json").read_text())["federations"][0]
    assert summary["methods"]["FedHAW"]["seeds"] == [0, 1]
    assert list(summary["ahead_of"]) == ["FedAvg"]


def test_the_baselines(tmp_path):
    """Centralized training is a federation of one client; alone, a client's curve is that of its own data."""
    cell = small()
    results = compare("FedAvg", cell, baselines=["centralized", "alone"], output=tmp_path, **SHORT)
    one = Cell("one", cell.model, cell.data, {"num_clients": 1, "alpha": 10.0, "optimizer_state": "kept"})
    same = compare("FedAvg", one, output=tmp_path, **SHORT)
    assert curves(results)["centralized"] == pytest.approx(curves(same)["FedAvg"])
    alone = []
    for client in range(4):
        settings = {"sampler": [f"FixedSequenceSampler([[{client}], [{client}]])"]}
        alone.append(compare("FedAvg", cell, settings=settings, output=tmp_path, **SHORT).records[0]["curve"])
    assert curves(results)["alone"] == pytest.approx(np.mean(alone, axis=0).tolist())
    assert results.records[-1]["bytes_up"] is None
    assert read_run(tmp_path / results.records[-1]["log"]).curve("val_acc") == curves(results)["alone"]


def test_a_run_that_fails_leaves_the_others(tmp_path):
    rules = ["FedAvg", "comparison_task.Broken", "comparison_task.Runaway"]
    results = compare(rules, small(), output=tmp_path, rounds=3, seeds=[0], progress=print)
    assert [failure.error for failure in results.failures] == ["ZeroDivisionError: no step"]
    assert "in step" in results.failures[0].details
    runaway = results.records[1]
    assert runaway["diverged"]
    assert len(runaway["curve"]) == 3
    assert "comparison_task.Runaway (1 diverged)" in results.table()


def test_channels_and_objectives_are_settings(tmp_path):
    settings = {"channel": [None, "ErasureChannel(probability=1.0)"], "objective": ["FedProx(mu=100.0)"]}
    results = compare("FedAvg", small(), settings=settings, output=tmp_path, **SHORT)
    without, lost = (record["bytes_up"] for record in results.records)
    assert without > 0
    assert lost == 0


def test_options_that_replace_each_other():
    base = {"partitioner": "p", "local_epochs": 2, "num_clients": 3}
    assert merged_options(base, {"alpha": 0.5}) == {"alpha": 0.5, "local_epochs": 2, "num_clients": 3}
    assert merged_options(base, {"local_steps": 5}) == {"partitioner": "p", "local_steps": 5, "num_clients": 3}


@pytest.mark.parametrize("name", ["synthetic", "wine", "breast_cancer", "diabetes", "mislabeled_digits"])
def test_built_in_cells_run(name, tmp_path):
    record = compare("FedHAW", name, rounds=1, seeds=[0], output=tmp_path).records[0]
    assert record["metric"] == ("val_r2" if name == "diabetes" else "val_acc")
    assert record["curve"][0] == record["curve"][0]


def test_arrays_in_a_file(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {"train_x": draw.integers(0, 255, (60, 16, 16), dtype=np.uint8), "train_y": np.arange(60) % 3}
    arrays |= {"test_x": draw.integers(0, 255, (20, 16, 16), dtype=np.uint8), "test_y": np.arange(20) % 3}
    path = tmp_path / "pictures.npz"
    np.savez(path, **arrays)
    cell = CELLS["npz"](str(path))
    assert cell.model().net[0].weight.shape == (32, 1, 5, 5)
    settings = {"data.proxy": [6], "alpha": [1.0]}
    results = compare("FedAvg", str(path), settings=settings, rounds=1, seeds=[0], output=tmp_path)
    assert results.records[0]["run"]["cell"] == "pictures"


def broken(**changes):
    return {"rules": "FedAvg", "cells": small(), **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (broken(rules="FedAvgg"), "There is no `FedAvgg`, in `FedAvgg`. Did you mean `FedAvg`?"),
        (broken(rules="FedAvgM(learning=1)"), "unexpected keyword argument 'learning'"),
        (broken(rules=["FedAvg", "FedAvg"]), "`rules` has `FedAvg` twice"),
        (broken(rules="FedProx(mu=0.1)"), "must be one aggregation rule"),
        (broken(rules=[]), "`rules` must hold at least one"),
        (broken(rules=[FedHAWCallback()]), "`rules` must hold expressions"),
        (broken(rules={"alone": "FedAvg"}, baselines=["alone"]), "`rules` must not call a method `alone`"),
        (broken(cells="digit"), "There is no cell `digit`. Did you mean `digits`?"),
        (broken(cells="nowhere.npz"), "there is no file 'nowhere.npz'"),
        (broken(settings={"alpa": [1]}), "There is no setting `alpa`. Did you mean `alpha`?"),
        (broken(settings={"alpha": 0.1}), "`alpha` must be a list of values, got 0.1."),
        (broken(settings={"alpha": [-1]}), "`alpha` must be"),
        (broken(settings={"errors": [1.5]}), "`errors` must be"),
        (broken(settings={"channel": ["FedAvg()"]}), "`channel` must be a channel"),
        (broken(settings={"channel": [ErasureChannel(0.5)]}), "must be created for every run"),
        (broken(seeds=[0.5]), "`seeds` must be"),
        (broken(rounds=0), "`rounds` must be"),
        (broken(jobs=0), "`jobs` must be"),
        (broken(baselines=["central"]), "`baselines` must be one of 'centralized', 'alone'"),
        (broken(reference="FedHAW"), "`reference` must be one of the methods (FedAvg), got 'FedHAW'."),
    ],
)
def test_mistakes_are_told_before_the_first_run(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(**arguments, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_cell_creates_its_objects_anew():
    cell = small()
    with pytest.raises(TypeError, match="`model` must create a new one for every run, got Network"):
        Cell("x", cell.model(), cell.data)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpa'; did you mean `alpha`"):
        Cell("x", cell.model, cell.data, {"alpa": 1.0})


def test_a_metric_that_is_not_logged_is_a_failure_that_names_those_that_are(tmp_path):
    with pytest.warns(UserWarning, match="1 of 1 runs failed and are missing in the tables, the first with ValueError"):
        results = compare("FedAvg", small(), metric="val_f1", output=tmp_path, **SHORT)
    assert "`metric` must be one that `small` logs" in results.failures[0].error
    assert "val_acc" in results.failures[0].error
