"""The same federation trained by both engines."""

import pytest
import torch
from torch.utils.data import DataLoader

from federations import Classifier, flat, samples, trainer
from lightning_fedhaw import FederatedCallback
from lightning_fedhaw.clients.vectorized import engine as vectorized


class Updates(FederatedCallback):
    """Keeps every client's update, and the model that the module held then."""

    def __init__(self):
        super().__init__()
        self.updates, self.models = [], []

    def on_client_end(self, trainer, pl_module, update):
        self.updates.append((update, update.displacement.clone()))
        self.models.append(flat(pl_module))


def play(engine, module=None, *, data=None, batch_size=8, dtype=torch.float32, rounds=2, rule=None, **kwargs):
    """Six unequal clients, one of them smaller than a batch."""
    watch = Updates()
    if dtype == torch.float64:
        kwargs["precision"] = "64-true"
    callbacks = [watch, *kwargs.pop("callbacks", [])]
    options = {"num_clients": 6, "alpha": 1.0, "seed": 1, **kwargs}
    runner = trainer(rounds=rounds, rule=rule, engine=engine, callbacks=callbacks, **options)
    module = module() if module is not None else Classifier()
    loader = data or DataLoader(samples(130), batch_size=batch_size, shuffle=True)
    runner.fit(module, loader)
    return runner, module, watch


def assert_equal_engines(module=None, tolerance=2e-6, **kwargs):
    _, first, a = play("sequential", module, **kwargs)
    other, second, b = play("vectorized", module, **kwargs)
    assert isinstance(other.fit_loop.federation.engine, vectorized.VectorizedEngine)
    assert len(a.updates) == len(b.updates) > 0
    for (x, mine), (y, theirs) in zip(a.updates, b.updates, strict=True):
        assert (x.client, x.num_examples, x.num_steps, x.num_skipped) == (
            y.client, y.num_examples, y.num_steps, y.num_skipped,
        )  # fmt: skip
        assert mine.norm() > 0, "something moved"
        assert (mine - theirs).norm() <= tolerance * mine.norm()
        assert x.buffers.keys() == y.buffers.keys()
        for name in x.buffers:
            assert torch.allclose(x.buffers[name].double(), y.buffers[name].double(), rtol=10 * tolerance, atol=1e-7)
        assert x.logged.keys() == y.logged.keys()
        for name in x.logged:
            assert y.logged[name].value == pytest.approx(x.logged[name].value, rel=10 * tolerance)
            assert y.logged[name].weight == x.logged[name].weight
            assert y.logged[name].options == x.logged[name].options
    for mine, theirs in zip(a.models, b.models, strict=True):
        assert torch.allclose(mine, theirs, rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.allclose(flat(first), flat(second), rtol=10 * tolerance, atol=10 * tolerance)
    return other, second, b
