"""The benchmarks do what they say: everybody trains the same thing. Nothing is timed here."""

from __future__ import annotations

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
