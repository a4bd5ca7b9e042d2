"""The numbers of a comparison, worked by hand."""

from math import nan, sqrt

import pytest

from lightning_fedhaw.comparing.plan import file_name
from lightning_fedhaw.comparing.statistics import differences, differences_over_groups, groups_of, numbers_of, summarize
from lightning_fedhaw.comparing.tables import differences_table, results_json, results_table, runs_csv


def record(curve, method="FedAvg", seed=0, cell="digits", metric="val_acc", **changes):
    run = {"cell": cell, "method": method, "settings": {"alpha": 0.1}, "seed": seed, "rounds": len(curve)}
    content = {"run": run, "metric": metric, "curve": curve, "diverged": False, "seconds": 1.0, "server_seconds": 0.002}
    content |= {"bytes_down": 3_000_000, "bytes_up": 2_000_000, "state_bytes": 0, "log": "runs/x/seed_0"}
    return {**content, **changes}


CURVE = [0.2, 0.5, 0.4, 0.1, 0.6, 0.5]


def test_the_numbers_of_a_run():
    numbers = numbers_of(record(CURVE), target=0.5)
    assert numbers["final"] == 0.5
    assert numbers["best"] == 0.6
    assert numbers["dip"] == pytest.approx(0.4)
    assert numbers["area"] == numbers["last_ten"] == pytest.approx(2.3 / 6)
    assert numbers["rounds_to_target"] == 2
    assert (numbers["server_ms"], numbers["mb_up"], numbers["mb_down"]) == (2.0, 2.0, 3.0)
    long = numbers_of(record([0.0] * 5 + [0.1 * k for k in range(10)]))
    assert long["last_ten"] == pytest.approx(0.45)
    assert long["area"] == pytest.approx(4.5 / 15)


def test_a_loss_is_better_when_it_is_lower():
    numbers = numbers_of(record([2.0, 1.0, 1.5, 0.5], metric="val_loss"), target=1.0)
    assert numbers["best"] == 0.5
    assert numbers["dip"] == 0.5
    assert numbers["rounds_to_target"] == 2
    runs = [record([2.0], "a", metric="val_loss"), record([1.5], "b", metric="val_loss")]
    [difference] = differences(groups_of(runs)[0], "a")
    assert difference.scores["final"].mean == 0.5, "ahead is positive"


def test_the_spread_is_that_of_a_sample():
    summary = summarize([1.0, 2.0, nan, 6.0])
    assert (summary.mean, summary.count, summary.runs) == (3.0, 3, 4)
    assert summary.deviation == pytest.approx(sqrt((4 + 1 + 9) / 2))
    assert summary.error == pytest.approx(sqrt(7 / 3))


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than the methods; a seed that only one of them has does not count."""
    runs = [record([value], "FedAvg", seed) for seed, value in enumerate([0.1, 0.5, 0.9])]
    runs += [record([value], "FedHAW", seed) for seed, value in enumerate([0.2, 0.7])]
    [difference] = differences(groups_of(runs)[0], "FedAvg")
    assert difference.scores["final"].mean == pytest.approx(0.15)
    assert difference.scores["final"].error == pytest.approx(0.05)


def test_differences_over_federations():
    runs = []
    for cell, gain in (("a", 0.1), ("b", 0.3)):
        runs += [record([0.5], "FedAvg", cell=cell), record([0.5 + gain], "FedHAW", cell=cell)]
    runs.append(record([0.5], "only in one", cell="a"))
    found = differences_over_groups(groups_of(runs), "FedAvg")
    assert [difference.method for difference in found["val_acc"]] == ["FedHAW"]
    assert found["val_acc"][0].scores["final"].mean == pytest.approx(0.2)
    assert found["val_acc"][0].scores["final"].error == pytest.approx(0.1)


def test_tables():
    runs = [record([0.25], "Fed_Avg", 0), record([0.75], "Fed_Avg", 1), record([0.5], "b|c", 0, diverged=True)]
    groups = groups_of(runs)
    markdown = results_table(groups, "markdown", target=0.5)
    assert "**digits, alpha=0.1: val_acc in %, mean and standard deviation over 2 seeds**" in markdown
    assert "| Fed_Avg | 50.0 ± 35.4 | 50.0 ± 35.4 |" in markdown
    assert "| 1.0 (1 of 2) | 2 | 2 | 3 | 0 |" in markdown
    assert r"| b\|c (1 diverged) | 50.0 |" in markdown
    latex = results_table(groups, "latex")
    assert r"Fed\_Avg & 50.0 $\pm$ 35.4 &" in latex
    assert r"val\_acc in \%" in latex
    assert latex.count(r"\\") == 3
    assert "rounds to" not in latex
    text = results_table(groups, "text").splitlines()
    assert len({len(line) for line in text[2:]}) == 1, "columns are aligned"
    assert "b|c     +25.0    +25.0  +25.0  +25.0" in differences_table(groups, "Fed_Avg", "text")


def test_numbers_for_other_programs():
    import json

    runs = [record([0.25]), record([0.5], server_seconds=None, seed=1)]
    lines = runs_csv(runs).splitlines()
    assert lines[0].startswith("cell,method,alpha,seed,rounds,metric,diverged,final,")
    assert lines[1].startswith("digits,FedAvg,0.1,0,1,val_acc,False,0.25,")
    content = json.loads(results_json(groups_of(runs), "FedAvg"))
    numbers = content["federations"][0]["methods"]["FedAvg"]
    assert numbers["final"] == {
        "mean": 0.375,
        "deviation": pytest.approx(0.17677669),
        "error": pytest.approx(0.125),
        "count": 2,
    }
    assert numbers["rounds_to_target"]["mean"] is None


def test_long_names_of_files_are_shortened_and_stay_apart():
    assert file_name("a b(c=0.5)") == "a_b_c=0.5"
    names = {file_name("x" * 300 + end) for end in "ab"}
    assert [len(name) for name in names] == [120, 120]
