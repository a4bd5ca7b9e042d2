"""Small deployments make many trainers."""

import pytest
from lightning.pytorch.trainer.connectors import callback_connector


@pytest.fixture(autouse=True)
def _fast_trainers(monkeypatch):
    """A trainer looks for callbacks of other packages, which takes most of the time of a small deployment."""
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda group: [])
