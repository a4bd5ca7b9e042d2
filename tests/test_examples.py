"""The examples run as a newcomer runs them, but in this process, which has imported torch before."""

import logging
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Run an example with its command line, and return what it prints."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    # Python puts the folder of a script first.
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *arguments):
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    yield run
    logger.setLevel(level)


def test_digits(run_example, tmp_path):
    printed = run_example("digits", "--rounds", "3", "--output", "pictures")
    for word in ("FedAvg", "FedHAW", "worst decile", "mean of last 10"):
        assert word in printed
    assert "3/3" in printed, "the bar counts rounds"
    for name in ("digits_clients.png", "digits_weights.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5_000


def test_compare_rules(run_example, tmp_path):
    rules = ("FedAvg", "FedHyper G+CL", "FedLAW in stages", "GeometricMedian")
    printed = run_example("compare_rules", "--rounds", "2", "--output", "pictures", "--rules", *rules)
    table = printed[printed.index("server ms") :]
    for name in rules:
        assert f"{name} " in table
    assert (tmp_path / "pictures" / "rules.png").stat().st_size > 5_000


def test_communication_errors(run_example, tmp_path):
    short = ["--rounds", "2", "--methods", "FedAvg", "FedHAW", "--errors", "0.8", "0", "--legacy-seed", "23"]
    printed = run_example("communication_errors", *short, "--output", "pictures")
    table = printed[printed.index("method ") :]
    assert table.index("errors up to 0 ") < table.index("errors up to 0.8")
    for name in ("FedAvg", "FedHAW"):
        assert name in table
    for name in ("communication_errors.png", "communication_errors_rounds.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5_000


def test_personalization(run_example):
    printed = run_example("personalization", "--rounds", "2", "--clients", "4", "--fine-tuning-epochs", "1")
    table = printed[printed.index("Accuracy on each client's held-out samples") :]
    for name in ("local only", "global", "fine-tuned", "FedPer"):
        assert name in table
    assert len(table.strip().splitlines()) == 3 + 4 + 1


@pytest.mark.parametrize(
    "name",
    [
        "data_cleaning",
        "hyper_representation",
        "learned_client_rate",
        "learned_server_optimizer",
        "learned_weighting",
        "loss_tuning",
    ],
)
def test_what_is_learned(name, run_example, tmp_path):
    printed = run_example(name, "--rounds", "2", "--output", "pictures")
    assert f"pictures/{name}.png" in printed
    assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 5_000
