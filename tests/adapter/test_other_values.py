"""Checkpoints outside of rounds, while the module holds other values than the global model's."""

import signal

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from federations import Classifier, flat, loader, trainer, val_loader


class Moments:
    """Saves in some calls of a layer, in a handler of a signal. It is outside of the step, which has no side effects.

    Args:
        moments: The calls, counted from 0.
    """

    def __init__(self, *moments):
        self.moments = moments
        self.calls = 0
        self.runner = None

    def __call__(self, layer, *_):
        if isinstance(layer, nn.Linear) and layer.in_features == 6:
            if self.calls in self.moments:
                path = f"{self.calls}.ckpt"
                before = signal.signal(signal.SIGUSR1, lambda *_: self.runner.save_checkpoint(path))
                signal.raise_signal(signal.SIGUSR1)
                signal.signal(signal.SIGUSR1, before)
            self.calls += 1


def fit(moments=None, ckpt_path=None, **options):
    module = Classifier()
    moments = moments or Moments()
    moments.runner = trainer(rounds=2, num_clients=2, **options)
    hook = register_module_forward_hook(moments)
    moments.runner.fit(module, loader(32), val_loader(), ckpt_path=ckpt_path)
    hook.remove()
    return flat(module).tolist()


def test_while_the_vectorized_engine_tries_the_step():
    options = {"engine": "vectorized", "num_sanity_val_steps": 0}
    whole = fit(**options)
    first = range(8)
    assert fit(Moments(*first), **options) == whole, "the run itself does not notice"
    for moment in first:
        checkpoint = torch.load(f"{moment}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 0
        for name, value in Classifier().state_dict().items():
            assert torch.equal(checkpoint["state_dict"][name], value), (moment, name)
    assert fit(ckpt_path="4.ckpt", **options) == whole


def test_while_a_resumed_run_tries_the_step():
    options = {"engine": "vectorized", "num_sanity_val_steps": 0, "client_eval": False}
    count = Moments()
    whole = fit(count, **options)
    # The last three are two batches of validation and one of training.
    in_round_1 = count.calls - 3
    fit(Moments(in_round_1), **options)
    fit(Moments(4), ckpt_path=f"{in_round_1}.ckpt", **options)
    assert torch.load("4.ckpt", weights_only=True)["global_step"] == 1
    assert fit(ckpt_path="4.ckpt", **options) == whole


def test_while_clients_are_evaluated_with_parameters_of_their_own():
    options = {"local_parameters": "net.3.*", "client_eval": True, "client_val_fraction": 0.3, "engine": "sequential"}
    count = Moments()
    whole = fit(count, **options)
    last = count.calls - 1
    assert fit(Moments(last), **options) == whole
    checkpoint = torch.load(f"{last}.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    module = Classifier()
    module.load_state_dict(checkpoint["state_dict"])
    assert flat(module).tolist() == whole
