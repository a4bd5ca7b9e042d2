"""Parameters that stay with their clients: trained like the others, never sent, kept per client."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, loader, momentum, train, val_loader
from lightning_fedhaw import (
    MOON,
    ErasureChannel,
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHyperCallback,
    FedLAWCallback,
    FedNTD,
    FedProx,
    IndexPartitioner,
    LabelSwapPartitioner,
    ScaffoldCallback,
    UniformSampler,
)
from lightning_fedhaw.extending import ParameterLayout
from lightning_fedhaw.objectives import ClientObjective, ScaffoldObjective
from lightning_fedhaw.objectives.base import ClientState
from lightning_fedhaw.objectives.view import StepView

ENGINES = ("sequential", "vectorized")
HEAD = "net.3.*"


class Line(pl.LightningModule):
    """``head * (body * x)`` with the loss ``(prediction - y)^2 / 2``: small enough to train by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.body.weight, 1.0)
        nn.init.constant_(self.head.weight, 2.0)

    def error(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self.head(self.body(x)) - y).square().mean() / 2

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.error(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("error", self.error(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


# The samples (1, 1) of client 0, (1, 3) of client 1, and (1, 2) of client 2, which never takes part.
POINTS = TensorDataset(torch.ones(3, 1), torch.tensor([[1.0], [3.0], [2.0]]))
OWNERS = IndexPartitioner([[0], [1], [2]])


class FirstTwo(UniformSampler):
    def sample(self, round_idx: int, **kwargs: Any) -> list[int]:
        return [0, 1]


def play_line(
    entry: str, rounds: int, engine: str = "sequential", callbacks: Any = (), module: Any = None, **options: Any
) -> Any:
    """Train the line by one of the two entry points."""
    arguments = {
        "partitioner": OWNERS, "sampler": FirstTwo(2), "local_parameters": "head.*", "engine": engine, **options,
    }  # fmt: skip
    rule = FedAvgCallback
    if entry == "trainer":
        runner: Any = FederatedTrainer(rounds=rounds, callbacks=[rule(), *callbacks], **arguments, **QUIET)
    else:
        runner = pl.Trainer(max_epochs=rounds, callbacks=[rule(**arguments), *callbacks], **QUIET)
    module = module or Line()
    runner.fit(module, DataLoader(POINTS, batch_size=1))
    return runner, module


def head_of(runner: Any, client: int) -> float:
    return runner.federation_clients.own_state(client)["head.weight"].item()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("entry", ["trainer", "rule"])
def test_fedper_by_hand(entry, engine):
    # With prediction p = head * body, the gradients are (p - y) head for the body and (p - y) body for the head.
    # Round 1, from body 1 and head 2: p = 2 for both clients.
    #   client 0, y = 1: body 1 - 0.5 * 2 = 0, head 2 - 0.5 * 1 = 1.5.
    #   client 1, y = 3: body 1 + 0.5 * 2 = 2, head 2 + 0.5 * 1 = 2.5.
    #   The server averages the bodies: 1.
    runner, module = play_line(entry, 1, engine)
    assert module.body.weight.item() == 1.0
    assert [head_of(runner, client) for client in (0, 1, 2)] == [1.5, 2.5, 2.0]
    # Round 2, from body 1:
    #   client 0: p = 1.5, body 1 - 0.5 * 0.5 * 1.5 = 0.625, head 1.5 - 0.5 * 0.5 = 1.25.
    #   client 1: p = 2.5, body 1 + 0.5 * 0.5 * 2.5 = 1.625, head 2.5 + 0.5 * 0.5 = 2.75.
    #   The server averages the bodies: 1.125.
    runner, module = play_line(entry, 2, engine)
    assert module.body.weight.item() == 1.125
    assert [head_of(runner, client) for client in (0, 1, 2)] == [1.25, 2.75, 2.0]
    # The global model keeps the initial head; each client is evaluated with its own:
    #   1.125 * (1.25, 2.75, 2) - (1, 3, 2) = (0.40625, 0.09375, 0.25).
    assert module.head.weight.item() == 2.0
    errors = torch.tensor([0.40625, 0.09375, 0.25]).square() / 2
    measured = runner.federation_summary["client_metrics"]["error"]
    assert measured["mean"] == pytest.approx(errors.mean().item())
    assert runner.federation_summary["local_parameters"] == ["head.weight"]


class TakesTurns(Line):
    """FedRep: the first step trains the head, the second one the body."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == 0:
            return (self.head(self.body(x).detach()) - y).square().mean() / 2
        return (self.body(x) * self.head.weight.detach() - y).square().mean() / 2


@pytest.mark.parametrize("engine", ENGINES)
def test_fedrep_by_hand(engine):
    # Client 0: head 2 - 0.5 * 1 = 1.5, then body 1 - 0.5 * (1.5 - 1) 1.5 = 0.625.
    # Client 1: head 2 + 0.5 * 1 = 2.5, then body 1 + 0.5 * (3 - 2.5) 2.5 = 1.625.
    runner, module = play_line("trainer", 1, engine, module=TakesTurns(), local_steps=2)
    assert module.body.weight.item() == 1.125
    assert [head_of(runner, client) for client in (0, 1)] == [1.5, 2.5]


def test_local_parameters_do_not_travel(capsys):
    lost = ErasureChannel(0.0)
    runner, _ = train(rounds=2, local_parameters=HEAD, callbacks=[lost])
    # 6 * 8 weights and 8 biases of the first layer, for 4 clients and 2 rounds; nothing of the second one.
    assert runner.federation_summary["parameters"] == 56
    assert runner.federation_summary["bytes_up"] == runner.federation_summary["bytes_down"] == 2 * 4 * 56 * 4
    shown = capsys.readouterr().out
    assert "local parameters  net.3.weight, net.3.bias (initial in the global model)" in shown
    assert "their training data and local parameters" in shown


def test_one_client_is_central_training_with_its_own_part():
    arguments = {"num_clients": 1, "alpha": None, "rounds": 2, "optimizer_state": "kept", "client_eval": False}
    _, central = train(Classifier(momentum), **arguments, gradient_clip_val=0.5)
    runner, module = train(Classifier(momentum), **arguments, gradient_clip_val=0.5, local_parameters=HEAD)
    module.load_state_dict(runner.federation_clients.own_state(0), strict=False)
    torch.testing.assert_close(flat(module), flat(central))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_state": "kept", "local_epochs": 2},
        {"gradient_clip_val": 0.1, "clients_per_round": 2},
        {"callbacks": [FedProx(0.1)]},
        {"rule": ScaffoldCallback(), "optimizer_state": "fresh"},
        {"rule": FedHyperCallback()},
        {"callbacks": [ScaffoldObjective("I")]},
    ],
    ids=["kept", "clipped", "FedProx", "SCAFFOLD", "FedHyper", "full gradients"],
)
def test_both_engines_agree(options):
    is_plain = isinstance(options.get("rule"), (ScaffoldCallback, FedHyperCallback))
    runs = []
    for engine in ENGINES:
        module = Classifier(None if is_plain else momentum, norm=True)
        runs.append(train(module, rounds=3, engine=engine, local_parameters=["net.0.bias", "net.4.*"], **options))
    (first, one), (second, other) = runs
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-4, atol=1e-5)
    for client in range(4):
        own = [runner.federation_clients.own_state(client) for runner in (first, second)]
        assert set(own[0]) == {"net.0.bias", "net.4.weight", "net.4.bias"}
        torch.testing.assert_close(own[0], own[1], rtol=1e-4, atol=1e-5)


def test_objectives_act_on_the_shared_parameters_only():
    # A huge proximal term holds the body where it was; the heads move freely, in the first step of a round by the
    # gradient (p - y) body = -1 and 1, times the rate 0.5.
    def hold(engine):
        return play_line("trainer", 1, engine, callbacks=[FedProx(1e6)])

    for engine in ENGINES:
        runner, _ = hold(engine)
        assert [head_of(runner, client) for client in (0, 1)] == [1.5, 2.5]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clients_own_rate_moves_its_local_parameters_too(engine):
    # With prediction p = head * body = 2, the gradients are (p - y) head for the body and (p - y) body for the head.
    #   client 0, y = 1, rate 0.5: body 1 - 0.5 * 2 = 0, head 2 - 0.5 * 1 = 1.5.
    #   client 1, y = 3, rate 0.25: body 1 + 0.25 * 2 = 1.5, head 2 + 0.25 * 1 = 2.25.
    runner, module = play_line("trainer", 1, engine, client_lr_scale=[1.0, 0.5, 1.0])
    assert module.body.weight.item() == 0.75
    assert [head_of(runner, client) for client in (0, 1, 2)] == [1.5, 2.25, 2.0]


class StartOutputs(ClientObjective):
    """Notes the prediction of the model that a client started from, in every step; the term is zero."""

    key = "StartOutputs"
    watched = ("forward",)

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[float] = []

    def loss(self, step: StepView, state: ClientState) -> torch.Tensor:
        self.outputs.append(step.result_at_start("forward").item())
        return 0.0 * step.result("forward").sum()


class Forward(Line):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def error(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self(x) - y).square().mean() / 2


def test_the_model_that_a_client_started_from_has_the_local_parameters_that_it_started_with():
    objective = StartOutputs()
    runner, module = play_line("trainer", 1, callbacks=[objective], module=Forward(), local_steps=2)
    # Body 1 and head 2 in both steps of both clients, whose heads move in the first one.
    assert objective.outputs == [2.0] * 4
    assert [head_of(runner, client) for client in (0, 1)] != [2.0, 2.0]
    # In the second round client 0 starts from the averaged body and its own head.
    objective = StartOutputs()
    heads = [head_of(runner, client) for client in (0, 1)]
    expected = [module.body.weight.item() * head for head in heads for _ in range(2)]
    play_line("trainer", 2, callbacks=[objective], module=Forward(), local_steps=2)
    assert objective.outputs[4:] == pytest.approx(expected)


def classes_of(batch: Any) -> torch.Tensor:
    return batch[1][:, 0].long() - 1


class Encoded(Forward):
    """Representations with a second feature, so that their direction depends on the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 2)
        self.head = nn.Linear(2, 3)
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), classes_of(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("local", ["body.bias", "head.*"])
@pytest.mark.parametrize("objective", [MOON("forward"), FedNTD(targets=classes_of)], ids=["MOON", "FedNTD"])
def test_both_engines_agree_on_terms_that_run_other_models(objective, local):
    ends = []
    for engine in ENGINES:
        runner, module = play_line(
            "trainer", 3, engine, [copy.deepcopy(objective)], Encoded(), local_steps=3, local_parameters=local
        )
        own = runner.federation_clients.own_state(1)
        ends.append(torch.cat([flat(module), *[value.flatten() for value in own.values()]]))
    torch.testing.assert_close(ends[1], ends[0])


@pytest.mark.parametrize("adapt", ["SL", "CL"])
def test_a_rule_that_scales_the_rates_scales_shared_parameters_in_both_engines(adapt):
    ends = []
    for engine in ENGINES:
        module = Line()
        rule = FedHyperCallback(
            adapt, partitioner=OWNERS, sampler=FirstTwo(2), local_parameters="head.*", engine=engine, local_steps=3
        )
        runner = pl.Trainer(max_epochs=2, callbacks=[rule], **QUIET)
        runner.fit(module, DataLoader(POINTS, batch_size=1))
        ends.append([module.body.weight.item(), head_of(runner, 0), head_of(runner, 1)])
    assert ends[1] == pytest.approx(ends[0])


def test_full_gradients_are_those_of_the_clients_own_model():
    # SCAFFOLD option I in round 2 at body 1: client 0 has the head 1.5 and the gradient (1.5 - 1) 1.5 = 0.75; client 1
    # has the head 2.5 and the gradient (2.5 - 3) 2.5 = -1.25.
    for engine in ENGINES:
        objective = ScaffoldObjective("I")
        play_line("trainer", 2, engine, callbacks=[objective])
        controls = objective.state_dict()["clients"]
        # Controls of round 1 were 2 and -2 with the mean 0, which shift the bodies of round 1 by nothing.
        assert [controls[client]["body.weight"].item() for client in (0, 1)] == [0.75, -1.25]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_bit_identical(engine, tmp_path):
    def play(rounds, **kwargs):
        callbacks = [ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")] if not kwargs else []
        module = Classifier(momentum, norm=True)
        runner = FederatedTrainer(
            rounds=rounds, num_clients=4, alpha=10.0, clients_per_round=2, optimizer_state="kept", buffers="local",
            local_parameters=["net.1.*", "net.4.*"], engine=engine, callbacks=[FedAvgCallback(), *callbacks],
            **{**QUIET, "enable_checkpointing": not kwargs},
        )  # fmt: skip
        runner.fit(module, loader(), **kwargs)
        return runner, module

    straight, module = play(4)
    resumed, again = play(4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(flat(module), flat(again))
    for client in range(4):
        own = [runner.federation_clients.own_state(client) for runner in (straight, resumed)]
        assert own[0].keys() == own[1].keys()
        assert all(torch.equal(own[0][name], own[1][name]) for name in own[0])
    metrics = [runner.federation_summary["client_metrics"] for runner in (straight, resumed)]
    assert metrics[0] == metrics[1]


def test_a_second_fit_goes_on_with_the_clients_own_parameters():
    straight, whole = play_line("trainer", 2)
    runner, module = play_line("trainer", 1)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, DataLoader(POINTS, batch_size=1))
    assert torch.equal(flat(module), flat(whole))
    assert [head_of(runner, client) for client in (0, 1, 2)] == [head_of(straight, client) for client in (0, 1, 2)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_other_local_parameters_is_refused(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="kept")
    options = {"enable_checkpointing": True, "client_eval": False}
    train(rounds=1, local_parameters=HEAD, callbacks=[checkpoint], **options)
    with pytest.raises(ValueError, match="the set of local parameters was .*net.3.weight.* and is None here"):
        runner = FederatedTrainer(rounds=2, num_clients=4, alpha=10.0, callbacks=[FedAvgCallback()], **QUIET)
        runner.fit(Classifier(), loader(), ckpt_path=tmp_path / "kept.ckpt")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_round_is_undone(engine):
    class Fails(pl.Callback):
        def on_client_end(self, trainer, pl_module, update):
            if trainer.global_step == 1 and update.client == 2:
                raise KeyError("in round 1")

    module = Classifier()
    runner = FederatedTrainer(
        rounds=3, num_clients=4, alpha=10.0, local_parameters=HEAD, engine=engine, client_eval=False,
        callbacks=[FedAvgCallback(), Fails()], **QUIET,
    )  # fmt: skip
    with pytest.raises(KeyError, match="in round 1"):
        runner.fit(module, loader())
    before, _ = train(rounds=1, local_parameters=HEAD, engine=engine, client_eval=False)
    for client in range(4):
        own = [each.federation_clients.own_state(client) for each in (runner, before)]
        assert all(torch.equal(own[0][name], own[1][name]) for name in own[0])
    initial = Classifier()
    assert torch.equal(module.net[3].weight, initial.net[3].weight)


def test_a_client_whose_local_parameters_are_not_finite_keeps_the_old_ones():
    class Spoils(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1 and batch[1].item() == 3.0:
                with torch.no_grad():
                    pl_module.head.weight.fill_(float("nan"))

    with pytest.warns(UserWarning, match="Client 1 returned non-finite local parameters in round 1"):
        runner, module = play_line("trainer", 2, callbacks=[Spoils()])
    assert [head_of(runner, client) for client in (0, 1)] == [1.25, 2.5]
    assert module.body.weight.item() == 0.625


def test_fedbn_evaluates_each_client_with_its_own_statistics():
    # Clients whose inputs have the means 0 and 10: only with its own statistics does each see normalized inputs.
    class Normalized(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, momentum=1.0)
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(self.norm(batch[0])).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("mean", self.norm(batch[0]).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    inputs = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
    data = DataLoader(TensorDataset(inputs), batch_size=2)
    runner = FederatedTrainer(
        rounds=2, partitioner=IndexPartitioner([[0, 1], [2, 3]]), local_parameters="norm.*", buffers="local",
        callbacks=[FedAvgCallback()], **QUIET,
    )  # fmt: skip
    module = Normalized()
    runner.fit(module, data)
    biases = [runner.federation_clients.own_state(client)["norm.bias"].item() for client in (0, 1)]
    means = runner.federation_summary["client_metrics"]["mean"]
    assert means["mean"] == pytest.approx(sum(biases) / 2, abs=1e-5)
    # The global model has the average of the statistics again afterwards, and the initial bias.
    assert module.norm.running_mean.item() == pytest.approx(5.0)
    assert module.norm.bias.item() == 0.0


def test_rules_that_work_on_the_server_say_with_which_local_parameters():
    data = FederatedDataModule(loader().dataset, num_clients=3, proxy=20, batch_size=8, seed=0)
    runner = FederatedTrainer(rounds=1, local_parameters=HEAD, callbacks=[FedLAWCallback()], **QUIET)
    with pytest.warns(UserWarning, match="`FedLAWCallback` computes with the global model .*net.3.weight, net.3.bias"):
        runner.fit(Classifier(), data)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_keep_what_one_keeps():
    def play(processes):
        place = {} if processes == 1 else {"devices": processes, "strategy": "federated_notebook"}
        return train(
            Classifier(momentum, norm=True), loader(drop_last=True), val_loader(), rounds=3, num_clients=5,
            clients_per_round=3, local_parameters=["net.1.*", "net.4.*"], buffers="local", reduction="ordered",
            **place,
        )  # fmt: skip

    (one, first), (two, second) = play(1), play(2)
    assert torch.equal(flat(first), flat(second))
    assert one.federation_summary["client_metrics"] == two.federation_summary["client_metrics"]


# ---------------------------------------------------------------------- what is selected


def test_names_are_selected_by_patterns_or_a_callable():
    def local(choice):
        runner, _ = train(rounds=1, local_parameters=choice, client_eval=False)
        return runner.federation_summary["local_parameters"]

    assert local("net.3.*") == local(lambda name: name.startswith("net.3")) == ["net.3.weight", "net.3.bias"]
    assert local(("*.bias",)) == ["net.0.bias", "net.3.bias"]
    assert local(["net.3.bias", "net.3.*"]) == ["net.3.weight", "net.3.bias"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("head.*", r"'head\.\*', which matches no .* Classifier\. .* net\.0\.weight, net\.0\.bias, net\.3"),
        (["net.3.*", "net.9.*"], r"'net\.9\.\*'"),
        (lambda name: False, "selects no trainable parameter.*net.0.weight"),
        ("*", "selects every trainable parameter"),
    ],
)
def test_selections_that_make_no_sense_are_refused(choice, said):
    with pytest.raises(ValueError, match=f"`local_parameters`.*{said}"):
        train(rounds=1, local_parameters=choice)


@pytest.mark.parametrize("choice", [3, [], "", ["head.*", 3], nn.Linear])
def test_other_values_are_refused(choice):
    with pytest.raises(ValueError, match="`local_parameters` must be a name or a pattern"):
        FederatedTrainer(rounds=1, local_parameters=choice, callbacks=[FedAvgCallback()], **QUIET)


def test_the_layout_of_local_parameters():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    layout = ParameterLayout.of(module, local=["0.bias"])
    assert layout.names == ("0.weight", "1.weight", "1.bias")
    assert (layout.numel, layout.trained[-1], layout.with_local(module).numel) == (10, "0.bias", 13)
    assert list(layout.local_tensors(module)) == ["0.bias"]
    assert not layout.frozen_tensors(module)


# ---------------------------------------------------------------------- each client's samples


def test_each_clients_samples_have_public_names():
    runner, _ = train(rounds=1, client_val_fraction=0.25, client_eval=False)
    clients = runner.federation_clients
    assert len(clients) == 4
    samples = loader().dataset
    seen = []
    for client in range(4):
        train_set, held_out = clients.train_set(client), clients.held_out_set(client)
        assert len(train_set) == len(clients.train_indices[client])
        assert len(held_out) == len(clients.held_out_indices[client]) > 0
        assert torch.equal(held_out[0][0], samples[int(clients.held_out_indices[client][0])][0])
        seen += clients.train_indices[client].tolist() + clients.held_out_indices[client].tolist()
    assert sorted(seen) == list(range(120))


def test_a_clients_samples_have_the_labels_that_it_trains_on():
    thirds = IndexPartitioner([list(range(40)), list(range(40, 80)), list(range(80, 120))])
    runner, _ = train(
        rounds=1, partitioner=LabelSwapPartitioner(thirds, 1.0, labels=(0, 2)), alpha=None, num_clients=None,
        client_eval=False,
    )  # fmt: skip
    samples = loader().dataset
    for client in (0, 1):
        train_set = runner.federation_clients.train_set(client)
        for position, index in enumerate(runner.federation_clients.train_indices[client].tolist()):
            label = int(samples[index][1])
            assert int(train_set[position][1]) == {0: 2, 1: 1, 2: 0}[label]


def test_held_out_samples_are_read_as_for_evaluation():
    read_for_training = TensorDataset(torch.zeros(12, 6), torch.arange(12) % 3)
    read_for_evaluation = TensorDataset(torch.ones(12, 6), torch.arange(12) % 3)
    swapped = LabelSwapPartitioner(IndexPartitioner([range(6), range(6, 12)]), fraction=1.0, labels=(0, 1))
    data = FederatedDataModule(read_for_training, partitioner=swapped, batch_size=2, train_eval=read_for_evaluation)
    runner = FederatedTrainer(rounds=1, client_val_fraction=0.5, callbacks=[FedAvgCallback()], **QUIET)
    runner.fit(Classifier(), data)
    clients = runner.federation_clients
    assert [x.sum().item() for x, _ in clients.train_set(1)] == [0.0] * 3
    assert [x.sum().item() for x, _ in clients.held_out_set(1)] == [6.0] * 3
    labels = [[1, 0, 2][index % 3] for index in clients.held_out_indices[1].tolist()]
    assert [int(y) for _, y in clients.held_out_set(1)] == labels
