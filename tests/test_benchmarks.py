"""The benchmarks do what they say: everybody trains the same thing. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    """Import a file of the benchmarks by name, and forget it afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS / "contenders"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def job(harness, tmp_path):
    """Logistic regression; a batch holds a client's data, so that the order of samples changes nothing."""
    workloads = harness("workloads")
    changes = {"sizes": [4, 9, 6], "cohort": 2, "batch": 20, "epochs": 3, "lr": 0.1, "random_sizes": False, "rounds": 2}
    job = workloads.Job("W3", str(tmp_path / "data.npz"), changes=changes)
    workloads.prepare(job.workload, tmp_path / "data.npz")
    return job


def test_the_tuned_loop_and_ours_end_with_the_same_loss(harness, job):
    """And one round fewer ends elsewhere, so equal is not idle."""
    clock, loss = harness("tuned").play(job)
    other_clock, other_loss = harness("ours").play(job)
    assert other_loss() == pytest.approx(loss(), rel=1e-6)
    assert len(clock.seconds) == len(other_clock.seconds) == job.rounds

    start = harness("workloads").train_loss(job.network(), *job.samples())
    assert loss() < start - 0.1


def test_rounds_end_with_the_time_and_one_is_always_timed(harness, job):
    """One before the clock counts, one timed; another number of rounds to skip is kept."""
    for name in ("tuned", "ours"):
        clock, _ = harness(name).play(replace(job, seconds=0.0))
        assert len(clock.seconds) == 2
        clock, _ = harness(name).play(replace(job, seconds=0.0, skip=2))
        assert len(clock.seconds) == 3
        clock, _ = harness(name).play(replace(job, seconds=600.0))
        assert len(clock.seconds) == job.rounds


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pfl", 896 + 18_496 + 12_544 * 128 + 128 + 1_290),
        ("flute_lr", 7_850),
        ("flute_cnn", 320 + 18_496 + 1_179_776 + 128 * 62 + 62),
        ("blazefl_cnn", 456 + 2_416 + 48_120 + 10_164 + 850),
        ("blazefl_resnet", 11_181_642),
    ],
)
def test_published_workloads_have_the_published_models(harness, name, parameters):
    """Counted by hand from the layers they publish; and the data has the model's shape and classes."""
    workloads = harness("workloads")
    work = workloads.workload(name, quick=True)
    model = workloads.network(work.model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, *work.shape)).shape == (2, work.classes)


def test_the_tables_show_medians_ratios_and_failures(harness):
    speed = harness("speed")
    run = {"seconds": [9.0, 1.0], "import_mb": 1, "peak_mb": 3, "tree_mb": 3, "loss": 0.25}
    contenders = {
        "tuned loop": [{**run, "median": 1.0, "ratio": 1.0}],
        "ours": [{**run, "median": 2.0, "ratio": ratio} for ratio in (1.9, 2.0, 2.2)],
        "pfl-research": [{"error": "not installed"}],
    }
    results = {
        "machine": dict.fromkeys(("processor", "cores", "memory_gib", "gpu", "python", "torch", "lightning"), "?"),
        "settings": {"device": "cpu", "quick": False},
        "date": "today",
        "works": {"W3": {"steps": 100.0, "data": "", "contenders": contenders}},
    }
    text = "\n".join(speed.tables(results))
    assert "| ours | 2 | 2.00 | 1.90 to 2.20 | +10000.0 | 7.00 | 2 | 3 | 0.2500 |" in text
    assert "| W3 | 2.00 | 0.25 | 2.00 (ours) | 0.12 |  |" in text
    assert "| pfl-research | not installed |" in text


def test_the_server_step_equals_the_formulas_of_the_authors(harness, monkeypatch):
    step = harness("server_step")
    monkeypatch.setattr(step, "LR_GAMMA", 1e-3)
    monkeypatch.setattr(step, "LR_LAMBDA", 1e-2)
    start, *rows = torch.randn(9, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stacks = [0.01 * torch.stack(rows[:4]), 0.01 * torch.stack(rows[4:])]
    clock = harness("workloads").Clock()
    ours = step.ours(start, stacks, 4, clock)
    torch.testing.assert_close(ours, step.authors(start, stacks, 4, clock))
    assert (ours - start).norm() > 0.01 * start.norm()


def test_a_quick_workload_is_a_small_one_of_the_same_kind(harness):
    workloads = harness("workloads")
    for name, work in workloads.WORKLOADS.items():
        quick = workloads.workload(name, quick=True)
        assert sum(quick.sizes) <= sum(work.sizes)
        assert replace(quick, **{f: getattr(work, f) for f in workloads.QUICK[name]}) == work


def test_a_round_of_the_federated_vit_is_an_epoch_of_the_stock_trainer(harness, monkeypatch):
    """As many images and steps, and a time for each round that counts."""
    vit = harness("vit_throughput")
    batches = []
    step = vit.fed.TimmClassifier.training_step
    monkeypatch.setattr(
        vit.fed.TimmClassifier,
        "training_step",
        lambda module, batch, index: batches.append(len(batch[0])) or step(module, batch, index),
    )
    args = Namespace(
        model="test_vit", image_size=32, clients=3, images=8, batch_size=4, precision="32-true", rounds=2, device="cpu"
    )
    samples = TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24) % 5)
    for rule in (None, "FedAvg", "FedHAW"):
        batches.clear()
        assert len(vit.play(rule, samples, args)) == 2
        assert batches == [4] * 18


def test_gpu_sh_is_a_shell_script_that_names_its_parts():
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    wrong = subprocess.run(["bash", str(script), "3"], capture_output=True, text=True, timeout=30)
    assert wrong.returncode == 2
    assert wrong.stderr == "usage: bash benchmarks/gpu.sh [1 | 2], got: 3\n"


STEP = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import sheet
sheet.tell({"row": 1})
print("noise")
if sys.argv[1] == "hangs":
    time.sleep(60)
if sys.argv[1] == "raises":
    raise ValueError("a | b")
if sys.argv[1] == "crashes":
    os.abort()
"""


@pytest.mark.parametrize(
    ("what", "ending"),
    [
        ("ends", ""),
        ("hangs", "not finished after 1 s"),
        ("raises", "ValueError: a / b"),
        ("crashes", "ended with code -6 and said nothing"),
    ],
)
def test_what_a_step_told_is_kept_however_it_ends(harness, tmp_path, what, ending):
    told = []
    command = [sys.executable, "-c", STEP, what, str(BENCHMARKS)]
    limit = 1 if what == "hangs" else 60
    assert harness("sheet").run(command, limit, tmp_path / "log", told.append) == ending
    assert told == [{"row": 1}]


def test_checks_on_the_cpu_pass_and_what_needs_a_gpu_does_not_apply(harness, tmp_path, monkeypatch, capsys):
    checks = harness("gpu_checks")
    monkeypatch.setattr(checks, "quiet", lambda: None)
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        checks.run_group(["precisions", "out_of_memory"], "cpu")
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("sheet: "))["row"] for line in lines if line.startswith("sheet: ")]
    verdicts = {row[0]: row[3] for row in rows}
    assert verdicts.pop("16-mixed, sequential: from float32") == "n/a"
    assert verdicts.pop("recovers from out of memory: from sequential") == "n/a"
    assert set(verdicts.values()) == {"pass"}
    assert len(verdicts) == 4


def test_a_check_that_is_wrong_or_raises_is_a_failure(harness, monkeypatch, capsys):
    checks = harness("gpu_checks")
    monkeypatch.setattr(checks, "quiet", lambda: None)
    one = torch.tensor([3.0, 4.0])

    def wrong(lab):
        yield "equal", lambda: checks.near(one, one, 0.0)
        yield "a tenth off", lambda: checks.near(1.1 * one, one, 0.09)
        yield "nan", lambda: checks.near(one * float("nan"), one, 1.0)
        yield "raises", lambda: [][0]

    monkeypatch.setitem(checks.GROUPS, "wrong", (wrong, 1))
    checks.run_group(["wrong"], "cpu")
    rows = [json.loads(line.removeprefix("sheet: "))["row"] for line in capsys.readouterr().out.splitlines()]
    assert [row[3] for row in rows] == ["pass", "**FAIL**", "**FAIL**", "**FAIL**"]
    assert rows[1][1:3] == ["1.0e-01", "0.09"]
    assert rows[3][1] == "IndexError: list index out of range"


def test_every_rule_is_checked(harness, tmp_path):
    checks = harness("gpu_checks")
    titles = [title for title, _ in checks.rules(checks.Lab("cpu", tmp_path))]
    rules = [name for name in checks.fed.__all__ if name.endswith("Callback") and name != "FederatedCallback"]
    assert titles == [f"{name}: resumed from straight" for name in sorted(rules)]


@pytest.mark.parametrize(
    ("ending", "verdict"), [("not finished after 60 s", "not finished"), ("died: Segmentation fault", "FAIL")]
)
def test_a_group_that_was_stopped_is_told_from_one_that_failed(harness, tmp_path, ending, verdict):
    table = harness("gpu_checks").Table({"a": ["one", "two", "three"]}, "head", [tmp_path])
    table.add(["one", "0", "0", "pass", "1.0"])
    table.close(["one", "two", "three"], ending)
    assert table.verdicts == ["pass", f"**{verdict}**", "not run"]
    text = (tmp_path / "gpu_checks.md").read_text()
    assert f"1 {verdict}, 1 not run, 1 pass." in text
    assert f"| two | {ending} |  | **{verdict}** |  |" in text


def test_published_rows_extrapolate_and_are_held_against_their_aims(harness):
    speed = harness("gpu_speed")
    records = {
        "pfl": {"ours": {"seconds": [9.0, 0.03, 0.03], "engine": "vectorized"}},
        "blazefl_resnet": {"ours": {"seconds": [3.0], "engine": "sequential"}, "tuned loop": {"error": "no"}},
    }
    pfl, resnet, failed = speed.published_rows(records, is_quick=False)
    assert pfl[2:] == ["0.03", "vectorized", "3", "45 (1,500)", "", "0.04", "yes"]
    assert resnet[2:] == ["15", "sequential", "1, of 0.2 of the cohort, extrapolated", "75 (5)", "23", "12", "no"]
    assert failed[2] == "no"


def test_time_that_is_over_is_said_and_not_taken(harness, job):
    speed = harness("gpu_speed")
    assert speed.attempt("ours", job, left=1.0, waiting=1) == {"error": "not run: no time left"}
    record = speed.attempt("ours", job, left=60.0, waiting=1)
    assert record["engine"] in ("sequential", "vectorized")
    assert len(record["seconds"]) == job.workload.rounds


def test_a_play_is_divided_by_its_speakers(harness, tmp_path):
    study = harness("learned_server_optimizer")
    assert study.speeches("ANNE:\nOne.\nTwo.\n\nBOB:\n\nBOB:\nYes.\n\nANNE:\nNo.") == {
        "ANNE": "One.\nTwo.\nNo.",
        "BOB": "Yes.",
    }
    path = tmp_path / "play.txt"
    path.write_text(f"ANNE:\n{'abcd' * 250}\n\nBOB:\nab\n\nCLEO:\n{'dcba' * 150}")
    play = study.play_of(path)
    assert [part.start for part in play.parts] == [0, 10]
    assert [len(part) for part in play.parts] == [10, 6]
    assert len(play.test) == 3
    assert play.characters == len(set(path.read_text()))


def test_the_mean_of_the_best_of_some_draws(harness):
    mean_of_best = harness("learned_server_optimizer").expected_maximum
    assert mean_of_best([3.0, 1.0, 2.0], 1) == pytest.approx(2.0)
    # Of nine pairs of draws five have a 3, three have a 2 and no 3, and one has only a 1.
    assert mean_of_best([3.0, 1.0, 2.0], 2) == pytest.approx((5 * 3 + 3 * 2 + 1) / 9)


def test_a_study_that_is_continued_repeats_no_run(harness, tmp_path, capsys):
    journal = harness("journal").Journal("study", "rule", "seed")
    journal.path = tmp_path / "results" / "study.jsonl"
    assert journal.runs() == []
    journal.add({"rule": "FedAvg", "seed": 1, "accuracy": 0.5})
    assert journal.has("FedAvg", 1)
    assert not journal.has("FedAvg", 2)
    assert journal.runs() == [{"rule": "FedAvg", "seed": 1, "accuracy": 0.5}]
    assert "0.5" in capsys.readouterr().out


@pytest.mark.parametrize("study", ["bilevel", "label_noise", "learned_server_optimizer"])
def test_a_table_is_there_before_the_first_run(harness, study, tmp_path):
    program = harness(study)
    program.JOURNAL.path = tmp_path / "study.jsonl"
    assert program.table()
