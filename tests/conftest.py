"""What every test shares."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_alone(tmp_path, monkeypatch):
    """One thread, a directory of its own, no seed left over."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    os.environ.setdefault("WANDB_MODE", "offline")
