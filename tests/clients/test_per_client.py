"""What may differ between clients: local work, learning rates, and what the module does when it is their turn."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, samples, trainer
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedCallback,
    FederatedTrainer,
    FederationOptions,
    FedNovaCallback,
    IIDPartitioner,
    IndexPartitioner,
    PublishedFedHAWCallback,
    ScaffoldCallback,
)
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.turns import ManyClients
from lightning_fedhaw.data.loader_settings import pass_lengths

PARTS = IndexPartitioner([range(8), range(8, 20), range(20, 40)])  # 2, 3 and 5 batches of 4
DATA = TensorDataset(torch.arange(40.0)[:, None])


class Down(pl.LightningModule):
    """One parameter that moves down by the learning rate with every step."""

    def __init__(self, rate=1.0, optimizer=torch.optim.SGD):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.rate = rate
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.w.sum() + 0 * batch[0].sum()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.rate)


class Notes(FederatedCallback):
    def __init__(self):
        self.steps = {}
        self.ends = {}
        self.starts = []

    def on_client_start(self, trainer, pl_module, client):
        self.starts.append((client, trainer.federation_client, flat(pl_module).sum().item()))

    def on_client_end(self, trainer, pl_module, update):
        assert trainer.federation_client == update.client
        self.steps.setdefault(update.client, []).append(update.num_steps)
        self.ends[update.client] = update.displacement.sum().item()


def play(module=None, rule=None, door=1, rounds=1, **kwargs):
    notes = Notes()
    options = {"partitioner": PARTS, "client_eval": False, **kwargs}
    data = DataLoader(DATA, batch_size=4, shuffle=True)
    module = module or Down()
    if door == 1:
        callbacks = [rule or FedAvgCallback(), notes]
        runner = FederatedTrainer(rounds=rounds, callbacks=callbacks, **QUIET, **options)
    else:
        runner = pl.Trainer(max_epochs=rounds, callbacks=[FedAvgCallback(**options), notes], **QUIET)
    runner.fit(module, data)
    return runner, module, notes


# ---------------------------------------------------------------------- local work


@pytest.mark.parametrize(
    ("epochs", "per_pass", "lengths"),
    [(2, 3, [3, 3]), (0.25, 8, [2]), (0.25, 5, [2]), (0.1, 30, [3]), (1.1, 10, [10, 1]), (2.3, 10, [10, 10, 3]),
     (1.0, 4, [4]), (0.001, 4, [1])],
)  # fmt: skip
def test_a_fraction_of_a_pass_is_rounded_up_to_batches(epochs, per_pass, lengths):
    assert pass_lengths(per_pass, epochs) == lengths


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize(
    ("work", "steps"),
    [
        ({"local_epochs": 0.5}, [1, 2, 3]),
        ({"local_epochs": 1.5}, [3, 5, 8]),
        ({"local_epochs": [1, 2, 0.2]}, [2, 6, 1]),
        ({"local_epochs": {2: 0.4, 0: 1, 1: 1}}, [2, 3, 2]),
        ({"local_steps": torch.tensor([4, 1, 7])}, [4, 1, 7]),
        ({"local_epochs": 0.5, "limit_train_batches": 3}, [1, 2, 2]),
    ],
)
def test_each_client_makes_its_own_steps(work, steps, engine):
    _, module, notes = play(engine=engine, **work)
    assert [notes.steps[client] for client in range(3)] == [[count] for count in steps]
    # Weights 8, 12 and 20 of 40; a step is -1.
    assert module.w.item() == pytest.approx(-(0.2 * steps[0] + 0.3 * steps[1] + 0.5 * steps[2]), abs=1e-5)


@pytest.mark.parametrize("door", [1, 2])
def test_both_entry_points_take_it(door):
    _, module, notes = play(door=door, local_epochs=[1, 2, 0.2], client_lr_scale=[1, 0.5, 2])
    assert notes.steps == {0: [2], 1: [6], 2: [1]}
    assert module.w.item() == pytest.approx(-(0.2 * 2 + 0.3 * 3 + 0.5 * 2))


def test_a_quarter_of_the_samples_is_another_one_in_every_round():
    seen = []

    class Seeing(Down):
        def training_step(self, batch, batch_idx):
            seen.append(sorted(batch[0].flatten().tolist()))
            return super().training_step(batch, batch_idx)

    play(Seeing(), rounds=4, local_epochs=0.2, partitioner=IndexPartitioner([range(40)]))
    assert [len(batch) for batch in seen] == [4] * 8
    assert len(set(map(tuple, seen))) == 8


def test_accumulation_windows_end_with_a_pass():
    # 5 batches and then 3 of the third client, in windows of 2: three steps, and two.
    _, _, notes = play(local_epochs=[1, 1, 1.5], accumulate_grad_batches=2)
    assert notes.steps == {0: [1], 1: [2], 2: [5]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_epochs": 0.0}, "`local_epochs` must be a whole number of at least 1, or as a float .*, got 0.0."),
        ({"local_epochs": [1, -0.5]}, r"`local_epochs` must be .*, got -0.5. That is the value of client 1."),
        ({"local_epochs": [1, 2], "num_clients": 3}, "`local_epochs` must be one value, or .* 3 clients, got 2."),
        (
            {"local_steps": {0: 1, 5: 2}, "num_clients": 2},
            r"the clients 0 to 1, got values for .* \[0, 5\]",
        ),
        ({"local_steps": {"a": 1}}, "`local_steps` must be a mapping from client numbers to values"),
        ({"local_steps": [1, 2.5]}, "`local_steps` must be a whole number of at least 1, got 2.5. That is"),
        ({"local_epochs": {1, 2}}, r"`local_epochs` must be .* got \{1, 2\}"),
        ({"client_lr_scale": 0}, "`client_lr_scale` must be a finite number above 0, got 0."),
        ({"client_lr_scale": [1.0, float("nan")]}, "`client_lr_scale` must be .* That is the value of client 1."),
    ],
)
def test_what_is_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        FederationOptions(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_epochs": [1, 2]}, "`local_epochs` must be one value, or one for each of the 3 clients, got 2."),
        (
            {"client_lr_scale": lambda client: 1 - client},
            "`client_lr_scale` must be .*, got 0. That is its value",
        ),
    ],
)
def test_what_is_refused_with_the_data_in_hand(options, said):
    with pytest.raises(ValueError, match=said):
        play(**options)


# ---------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("scale", [[1.0, 0.5, 2.0], {0: 1, 1: 0.5, 2: 2}, lambda client: [1, 0.5, 2][client]])
def test_each_client_has_its_own_rate(scale, engine):
    runner, module, notes = play(Down(0.1), rounds=2, client_lr_scale=scale, engine=engine)
    assert [notes.ends[client] for client in range(3)] == pytest.approx([-0.2, -0.15, -1.0])
    assert module.w.item() == pytest.approx(2 * -(0.2 * 0.2 + 0.3 * 0.15 + 0.5 * 1.0))
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.1


class Groups(Classifier):
    """Two groups of parameters with rates of their own, and a schedule."""

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.05}, {"params": self.net[-1].parameters(), "lr": 0.2}]
        optimizer = self.make_optimizer(groups)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}


def fit(engine="sequential", optimizer=None, rounds=2, rule=None, ckpt_path=None, **kwargs):
    runner = trainer(rounds=rounds, rule=rule, engine=engine, client_eval=False, **{"num_clients": 6, **kwargs})
    module = Groups(optimizer or OPTIMIZERS["momentum"])
    runner.fit(module, DataLoader(samples(130), batch_size=8, shuffle=True), ckpt_path=ckpt_path)
    return runner, flat(module)


DIFFERENT = {"local_epochs": [1, 0.5, 2, 1.5, 1, 0.2], "client_lr_scale": [1, 0.5, 2, 0.1, 1.5, 3], "alpha": 1.0}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_engines_agree_on_clients_that_differ(optimizer):
    _, one = fit("sequential", OPTIMIZERS[optimizer], **DIFFERENT)
    _, other = fit("vectorized", OPTIMIZERS[optimizer], **DIFFERENT)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    _, alike = fit("sequential", OPTIMIZERS[optimizer], alpha=1.0)
    assert not torch.allclose(one, alike, atol=1e-3)


@pytest.mark.parametrize(
    "rule",
    [ScaffoldCallback, FedNovaCallback],
    ids=["SCAFFOLD II", "FedNova"],
)
def test_both_engines_agree_on_rules_that_use_local_work(rule):
    one = fit("sequential", rule=rule(), rounds=3, **DIFFERENT)[1]
    other = fit("vectorized", rule=rule(), rounds=3, **DIFFERENT)[1]
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_scaffold_divides_by_the_rate_of_the_client():
    rule = ScaffoldCallback()
    play(Down(0.1), rule=rule, client_lr_scale=[1.0, 0.5, 2.0])
    # The gradient is 1 everywhere, so the control variate of every client is 1, and so is their mean.
    assert rule.objectives[0].mean["w"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("tau_eff", ["normalizer", "steps"])
def test_fednova_normalizes_by_steps_times_rate(tau_eff):
    _, module, _ = play(Down(0.1), rule=FedNovaCallback(tau_eff=tau_eff), client_lr_scale=[1.0, 0.5, 2.0])
    # In units of the rate 0.1 the clients move by 2, 1.5 and 10; per unit all move by -0.1; the mean number is 5.85.
    assert module.w.item() == pytest.approx(-0.1 * (0.2 * 2 + 0.3 * 1.5 + 0.5 * 10))


def test_a_rule_that_computes_with_one_rate_is_refused():
    with pytest.raises(ValueError, match="`PublishedFedHAWCallback` as it is set here computes with one rate for all"):
        play(rule=PublishedFedHAWCallback(0.1, 0.1, normalize_by="lr*steps"), client_lr_scale=2.0)


@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
])  # fmt: skip
def test_schedules_that_the_module_steps_keep_the_factor_and_lose_it_afterwards(schedule):
    class Manual(Down):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.w.sum())
            optimizer.step()
            self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [schedule(optimizer)]

    runner, _, notes = play(Manual(), local_steps=2, client_lr_scale=[1.0, 3.0, 0.5])
    assert [notes.ends[client] for client in range(3)] == pytest.approx([-1.5, -4.5, -0.75])
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.25
    assert runner.lr_scheduler_configs[0].scheduler.base_lrs == [1.0]


def test_an_optimizer_that_is_not_proportional_is_trained_one_by_one():
    options = {"alpha": None, "partitioner": IIDPartitioner(), "num_clients": 10}
    with pytest.raises(ValueError, match="`ASGD` may not make steps in proportion to its learning rate"):
        fit("vectorized", torch.optim.ASGD, client_lr_scale=0.5, **options)
    runner, _ = fit("auto", torch.optim.ASGD, client_lr_scale=0.5, **options)
    assert type(runner.fit_loop.federation.engine).__name__ == "SequentialEngine"


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_stopping_and_resuming_changes_no_bit(engine):
    options = {"optimizer_state": "kept", "clients_per_round": 4, "engine": engine, **DIFFERENT}
    straight = fit(rounds=4, **options)[1]
    half, _ = fit(rounds=2, **options)
    half.save_checkpoint("half.ckpt")
    assert torch.equal(straight, fit(rounds=4, ckpt_path="half.ckpt", **options)[1])


def test_a_round_that_fails_leaves_the_rates_as_they_were():
    class Failing(Down):
        def training_step(self, batch, batch_idx):
            if self.trainer.federation_client == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module = Failing(0.1)
    with pytest.raises(RuntimeError, match="broken") as caught:
        play(module, client_lr_scale=[1.0, 0.5, 2.0])
    assert "client 2, round 0" in caught.value.__notes__[0]
    assert module.trainer.federation_client is None
    assert module.optimizers().param_groups[0]["lr"] == 0.1
    assert module.w.item() == 0.0


# ---------------------------------------------------------------------- whose turn it is


ASKED = {"training": [], "validation": []}
"""What the module found, outside of the module, whose attributes a round or an evaluation may restore."""


class Turns(Classifier):
    """Class weights of each client's own."""

    def __init__(self, clients):
        super().__init__()
        self.class_weights = torch.rand(clients, 3, generator=torch.Generator().manual_seed(1))
        ASKED["training"].clear()
        ASKED["validation"].clear()

    def training_step(self, batch, batch_idx):
        weights = self.class_weights[self.trainer.federation_client]
        ASKED["training"].append(self.trainer.federation_client)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], weights)

    def validation_step(self, batch, batch_idx):
        ASKED["validation"].append(self.trainer.federation_client)
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("door", [1, 2])
def test_the_module_can_ask_whose_turn_it_is(door):
    options = {"num_clients": 3, "partitioner": IIDPartitioner()}
    if door == 1:
        runner = FederatedTrainer(rounds=2, callbacks=[FedAvgCallback()], **options, **QUIET)
    else:
        runner = pl.Trainer(max_epochs=2, callbacks=[FedAvgCallback(**options)], **QUIET)
    module = Turns(3)
    runner.fit(module, DataLoader(samples(60), 10), DataLoader(samples(20), 10))
    assert ASKED["training"] == [0, 0, 1, 1, 2, 2] * 2
    # Two batches before the first round, two after each; then two of each client.
    assert ASKED["validation"] == [None] * 6 + [0, 0, 1, 1, 2, 2]
    assert runner.federation_client is None


def test_a_step_that_asks_is_trained_one_client_at_a_time():
    options = {"num_clients": 12, "alpha": None, "partitioner": IIDPartitioner(), "client_eval": False, "rounds": 1}
    data = DataLoader(samples(120), 5)
    with pytest.raises(ValueError, match="`Turns.training_step` asks `trainer.federation_client`"):
        trainer(engine="vectorized", **options).fit(Turns(12), data)
    runner = trainer(engine="auto", **options)
    runner.fit(Turns(12), data)
    assert type(runner.fit_loop.federation.engine).__name__ == "SequentialEngine"


@pytest.mark.parametrize(
    "ask",
    [lambda c: c == 3, lambda c: [1.0][c], lambda c: {0: 1.0}.get(c), lambda c: 1 / (c + 1),
     lambda c: f"{c}", lambda c: isinstance(c, int), bool, lambda c: c % 2],
)  # fmt: skip
def test_any_use_of_the_number_is_noticed(ask):
    with pytest.raises(NotVectorizableError, match="asks `trainer.federation_client`"):
        ask(ManyClients())


def test_a_step_that_asks_late_is_trained_again_one_by_one():
    class Late(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 1:
                return loss * (1 + self.trainer.federation_client)
            return loss

    options = {"num_clients": 12, "alpha": None, "partitioner": IIDPartitioner(), "client_eval": False, "rounds": 2}
    with pytest.warns(UserWarning, match="in round 1 `training_step` asks `trainer.federation_client`"):
        trainer(engine="auto", **options).fit(Late(), DataLoader(samples(120), 5))


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_hook_sees_each_client_before_it_trains(engine):
    _, module, notes = play(rounds=2, engine=engine)
    after_one_round = -(0.2 * 2 + 0.3 * 3 + 0.5 * 5)
    starts = [(client, client, 0.0) for client in range(3)]
    starts += [(client, client, pytest.approx(after_one_round)) for client in range(3)]
    assert notes.starts == starts
    assert module.w.item() == pytest.approx(2 * after_one_round)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_the_hook_changes_no_bit(engine):
    class Watching(FederatedCallback):
        def on_client_start(self, trainer, pl_module, client):
            assert pl_module.training

    vectors = []
    for callbacks in ((), [Watching()]):
        runner = trainer(callbacks=callbacks, engine=engine, num_clients=6, buffers="local")
        module = Classifier(norm=True)
        runner.fit(module, DataLoader(samples(120), batch_size=8, shuffle=True, drop_last=True))
        vectors.append(flat(module))
    assert torch.equal(*vectors)


def test_two_processes_give_the_bits_of_one():
    options = {"local_epochs": [1, 0.5, 1, 2], "client_lr_scale": [1, 2, 3, 0.5], "reduction": "ordered"}
    vectors = []
    for place in ({}, {"devices": 2, "strategy": "federated_notebook"}):
        runner = trainer(rounds=2, alpha=None, partitioner=IIDPartitioner(), **options, **place)
        module = Turns(4)
        runner.fit(module, DataLoader(samples(60), batch_size=8, shuffle=True))
        vectors.append(flat(module))
    assert torch.equal(*vectors)
