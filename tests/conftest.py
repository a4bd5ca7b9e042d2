"""What every test shares."""

import os
import random

import numpy as np
import pytest
import torch


def pytest_configure(config):
    """Leave the order of tests to pytest-randomly, where it is installed, and random numbers to the hook below."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Start from the same state whatever ran before, fixtures of a whole module included."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # `seed_everything` leaves it behind, and it is the default seed
    os.environ.setdefault("WANDB_MODE", "offline")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
