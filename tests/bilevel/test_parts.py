"""The upper parts that a module may have: class logits, weight decays by layer, weights of samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset

from federations import QUIET, samples
from lightning_fedhaw import FederatedDataModule, FederatedTrainer, IndexPartitioner
from lightning_fedhaw.bilevel import (
    AggITDCallback,
    ClassLogits,
    FedNestCallback,
    LayerDecay,
    SampleWeights,
    SimFBOCallback,
    with_indices,
)

PARTS = [range(0, 10), range(10, 16), range(16, 30), range(30, 36)]
WRONG = [1, 4, 12, 20, 25, 33]


class Weighted(pl.LightningModule):
    """A linear classifier whose training samples have weights."""

    def __init__(self, row: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(6, 3)
        self.weights = SampleWeights(36)
        self.row = row or (lambda index: index)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        losses = cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return (self.weights(self.row(batch[2])) * losses).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.3)


def data() -> FederatedDataModule:
    """Four clients, some of whose labels are wrong, with right held-out samples."""
    clean = samples(36, seed=1)
    inputs, labels = clean.tensors
    labels = labels.clone()
    labels[WRONG] = (labels[WRONG] + 1) % 3
    held_out = [samples(12, seed=10 + client) for client in range(4)]
    train = with_indices(TensorDataset(inputs, labels))
    return FederatedDataModule(train, partitioner=IndexPartitioner(PARTS), num_clients=4, batch_size=18, val=held_out)


def play(rule: Any, rounds: int, module: pl.LightningModule | None = None, **options: Any) -> Any:
    """Run some rounds, and return trainer and module."""
    module = module or Weighted()
    settings = {**QUIET, "client_eval": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **options}
    trainer = FederatedTrainer(rounds=rounds, callbacks=[rule], **settings)
    trainer.fit(module, data())
    return trainer, module


@pytest.mark.parametrize(
    "rule",
    [
        partial(AggITDCallback, lower_rounds=3, q="sum"),
        partial(FedNestCallback, terms=2, variant="FedNest_SGD"),
        partial(FedNestCallback, terms=2, variant="LFedNest"),
        partial(SimFBOCallback, vector_lr=0.3),
    ],
)
def test_wrong_labels_get_smaller_weights(rule: Any) -> None:
    _, module = play(rule("weights", upper_lr=60.0), rounds=24)
    weights = 2 * torch.sigmoid(module.weights.logits.detach())
    wrong = torch.zeros(36, dtype=torch.bool)
    wrong[WRONG] = True
    assert weights[wrong].mean() < weights[~wrong].mean() - 0.1


def test_only_clients_that_take_part_change_their_weights_also_with_memory() -> None:
    rule = AggITDCallback("weights", lower_rounds=2, q="sum", upper_optimizer=torch.optim.Adam, upper_lr=0.1)
    module = Weighted()
    before: list[Tensor] = []
    cohorts: list[list[int]] = []

    class Watch(pl.Callback):
        def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
            before.append(pl_module.weights.logits.detach().clone())
            cohorts.append(list(report.clients))

    settings = {**QUIET, "client_eval": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = FederatedTrainer(rounds=12, clients_per_round=2, callbacks=[rule, Watch()], **settings)
    trainer.fit(module, data())
    for number in range(1, 12):
        changed = set((before[number] != before[number - 1]).nonzero().flatten().tolist())
        if number % 3 != 2:
            assert not changed
            continue
        own = {sample for client in cohorts[number] for sample in PARTS[client]}
        assert changed == own
    memory = rule.state["memory"]["placed"]["tensors"]
    absent = set(range(4)) - {client for cohort in cohorts[2::3] for client in cohort}
    for client in absent:
        assert not memory["exp_avg"][list(PARTS[client])].any()


def test_weights_are_not_sent() -> None:
    trainer, _ = play(AggITDCallback("weights", lower_rounds=2, q="sum"), rounds=3)
    model = 4 * (6 * 3 + 3)
    # Down: the model in three rounds, the vector in the last two. Up: model and vector twice, no hypergradient.
    assert trainer.federation_summary["bytes_down"] == 4 * (3 + 2) * model
    assert trainer.federation_summary["bytes_up"] == 4 * (2 + 2) * model


def test_a_client_that_reads_rows_of_another_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Client 0 reads row 1\d of `weights.logits`, which belongs to another client"
    ):
        play(AggITDCallback("weights", lower_rounds=1, q="sum"), 2, Weighted(row=lambda index: (index + 5) % 36))


def test_weights_and_local_upper_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="`weights.logits` stays with the clients"):
        play(AggITDCallback("weights", upper_steps=2), 2)


class Decayed(Weighted):
    """A classifier with shared upper parts, one of which is a weight decay for each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = LayerDecay(self.net, initial=0.1)
        self.classes = ClassLogits(3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        losses = cross_entropy(self.classes(self.net(batch[0])), batch[1], reduction="none")
        return (self.weights(batch[2]) * losses).mean() + self.decay(self.net)


def test_shared_and_client_placed_parts_together() -> None:
    rule = AggITDCallback(["decay", "classes", "weights"], lower_rounds=2, q="sum", upper_lr=1.0)
    _, module = play(rule, 12, Decayed())
    assert rule.upper.shared.names == ("decay.log_decay", "classes.scale", "classes.shift")
    assert rule.upper.placed.names == ("weights.logits",)
    assert (module.decay.log_decay != torch.tensor(0.1).log()).all()
    assert (module.classes.shift != 0).all()
    assert (module.weights.logits != 0).all()


def test_a_decay_is_the_gradient_of_its_penalty() -> None:
    layer = nn.Linear(2, 2)
    decay = LayerDecay(layer, initial=0.5)
    with torch.no_grad():
        decay.log_decay[1] = torch.tensor(2.0).log()
    decay(layer).backward()
    assert torch.allclose(layer.weight.grad, 0.5 * layer.weight)
    assert torch.allclose(layer.bias.grad, 2.0 * layer.bias)
    with pytest.raises(ValueError, match="was made for 2 tensors and is called with 1"):
        decay([layer.weight])


def test_class_logits_by_hand() -> None:
    part = ClassLogits(2)
    with torch.no_grad():
        part.scale.copy_(torch.tensor([0.0, 2.0]))
        part.shift.copy_(torch.tensor([1.0, -1.0]))
    logits = part(torch.tensor([[4.0, 1.0]]))
    assert torch.allclose(logits, torch.tensor([[3.0, -1 + 0.880797]]))


def test_samples_with_their_numbers() -> None:
    images = Subset(TensorDataset(torch.eye(4), torch.tensor([3, 1, 2, 0])), [2, 3])
    numbered = with_indices(images)
    assert len(numbered) == 2
    assert numbered[1][1:] == (torch.tensor(0), 1)
