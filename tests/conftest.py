"""What every test shares."""

import functools
import gc
import importlib.metadata
import os
import random
import sys

import pytest


def pytest_configure(config):
    """Leave the order of tests to pytest-randomly, where it is installed, and random numbers to the hook below."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False
    # The oldest generation holds torch and Lightning, and looking through it took a tenth of the suite's time.
    gc.set_threshold(700, 10, 200)
    # A trainer looks through all installed packages for callbacks, and none is installed while tests run.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


ENVIRONMENT = {"WANDB_MODE": "offline", **os.environ}
"""The environment in which every test starts."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Start from the same state whatever ran before, fixtures of a whole module included."""
    # `seed_everything` leaves the default seed behind, and a launcher of processes `LOCAL_RANK`, with which the next
    # one would wait for processes that it does not start.
    for name in set(os.environ) - set(ENVIRONMENT):
        if not name.startswith("PYTEST_"):
            del os.environ[name]
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTEST_")})
    import numpy as np
    import torch

    torch.set_num_threads(1)
    # `torch.manual_seed` also keeps a trace of its caller for each kind of device, which takes a millisecond.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield
    # A module of a test's own folder would be found under its name in later tests, whose folders lack it.
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]
