"""The examples run as a newcomer runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digits(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits.py"), "--rounds", "3", "--output", "pictures"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for word in ("FedAvg", "FedHAW", "worst decile", "mean of last 10"):
        assert word in done.stdout
    assert "3/3" in done.stdout, "the bar counts rounds"
    for name in ("digits_clients.png", "digits_weights.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5_000


def test_compare_rules(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare_rules.py"), "--rounds", "2", "--output", "pictures"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("server ms") :]
    for name in ("FedAvg ", "FedHyper G+CL", "FedLAW in stages", "GeometricMedian"):
        assert name in table
    assert (tmp_path / "pictures" / "rules.png").stat().st_size > 5_000


def test_communication_errors(tmp_path):
    command = [sys.executable, str(EXAMPLES / "communication_errors.py"), "--rounds", "2", "--output", "pictures"]
    done = subprocess.run(
        [*command, "--methods", "FedAvg", "FedHAW", "--errors", "0.8", "0", "--legacy-seed", "23"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("method ") :]
    assert table.index("errors up to 0 ") < table.index("errors up to 0.8")
    for name in ("FedAvg", "FedHAW"):
        assert name in table
    for name in ("communication_errors.png", "communication_errors_rounds.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5_000


def test_personalization(tmp_path):
    command = [sys.executable, str(EXAMPLES / "personalization.py"), "--rounds", "2", "--clients", "4"]
    done = subprocess.run(
        [*command, "--fine-tuning-epochs", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("Accuracy on each client's held-out samples") :]
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
def test_what_is_learned(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--rounds", "2", "--output", "pictures"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert f"pictures/{name}.png" in done.stdout
    assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 5_000
