"""Bilevel rules in federations of every kind: processes, entry points, losses, channels, precisions, further fits."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from federations import QUIET, Classifier, flat, loader, trainer, val_loader
from lightning_fedhaw import (
    AggITDCallback,
    AWGNChannel,
    BitFlipChannel,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FadingChannel,
    FederatedCallback,
    FedNestCallback,
    FedProx,
    OverTheAirChannel,
    PacketLossChannel,
    QuantizationChannel,
    SimFBOCallback,
    SparsificationChannel,
)
from lightning_fedhaw.extending import Channel
from lightning_fedhaw.report.summary import format_summary
from resuming import assert_same, check_resume

U = 6 * 8 + 8
P = 8 * 3 + 3
"""Numbers of the first layer of the classifier, which is upper, and of its second one."""

RULES = {
    "AggITD": partial(AggITDCallback, "net.0", lower_rounds=2, q="sum", upper_lr=0.5),
    "FedNest": partial(FedNestCallback, "net.0", terms=1, upper_lr=0.5),
    "SimFBO": partial(SimFBOCallback, "net.0", upper_lr=0.5),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())


class Diary(FederatedCallback):
    """Keeps the model and the report after every round."""

    def __init__(self) -> None:
        self.models: list[Tensor] = []
        self.reports: list[Any] = []

    def on_round_end(self, trainer: Any, pl_module: pl.LightningModule, report: Any) -> None:
        self.models.append(flat(pl_module))
        self.reports.append(report)


def play(rule: Any, module: Any = None, callbacks: Any = (), rounds: int = 4, **options: Any) -> tuple[Any, Any]:
    """Fit, and return trainer and module."""
    module = module or Classifier()
    options = {"client_eval": False, "client_val_fraction": 0.2, **options}
    runner = trainer(rounds, rule, callbacks, **options)
    runner.fit(module, loader())
    return runner, module


def left_behind(rule: Any, **options: Any) -> dict[str, Any]:
    """Fit, and return all that is left."""
    runner, module = play(rule, **options)
    summary = dict(runner.federation_summary)
    del summary["seconds"]
    del summary["run"]
    return {"model": dict(module.state_dict()), "rule": rule.state_dict(), "summary": summary}


# ---------------------------------------------------------------------- where it runs


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(("name", "processes"), [("AggITD", 2), ("FedNest", 3), ("SimFBO", 2)])
def test_several_processes_give_the_bits_of_one(name: str, processes: int) -> None:
    def ends(**place: Any) -> dict[str, Any]:
        module = Classifier(norm=True, dropout=0.2)
        options = {"num_clients": 5, "clients_per_round": 4, "reduction": "ordered", "callbacks": [ErasureChannel(0.2)]}
        if name != "AggITD":
            options["buffers"] = "recalibrate"
        return left_behind(RULES[name](), module=module, **options, **place)

    assert_same(ends(), ends(devices=processes, strategy="federated_notebook"))


@every_rule
def test_both_entry_points_agree(make: Any) -> None:
    _, module = play(make())
    other = Classifier()
    rule = make(num_clients=4, alpha=10.0, client_val_fraction=0.2, client_eval=False)
    pl.Trainer(max_epochs=4, callbacks=[rule], **QUIET).fit(other, loader())
    assert torch.equal(flat(module), flat(other))


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_run_is_resumed_within_an_outer_step_to_the_bit(engine: str) -> None:
    def make() -> list[pl.Callback]:
        rule = AggITDCallback("net.0", lower_rounds=4, lower_lr=0.1, upper_lr=0.5, upper_optimizer=torch.optim.Adam)
        return [rule, ErasureChannel(0.3)]

    check_resume(make, loader(60), engine=engine, precision="32-true", client_val_fraction=0.2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@every_rule
def test_precisions(make: Any, precision: str) -> None:
    rule = make()
    _, module = play(rule, precision=precision, rounds=rule.rounds_per_outer_step)
    upper = module.net[0].weight
    assert torch.isfinite(flat(module)).all()
    assert not torch.allclose(upper.float(), Classifier().net[0].weight, atol=1e-3)
    # Small steps add up in the state, and not in 16 bits.
    assert rule.state["upper"].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert torch.equal(rule.state["upper"][: upper.numel()].to(upper.dtype), upper.detach().flatten())


# ---------------------------------------------------------------------- what is lost


class Silence(Channel):
    """Loses all messages of some rounds."""

    def __init__(self, rounds: list[int], **settings: Any) -> None:
        super().__init__(**settings)
        self.rounds = rounds

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        return torch.full((len(clients),), round_idx in self.rounds)


@pytest.mark.filterwarnings("ignore:No client update was received in round")
@pytest.mark.parametrize("link", ["uplink", "downlink"])
@pytest.mark.parametrize("name", ["AggITD", "FedNest"])
def test_a_round_that_nobody_answers_is_repeated_and_no_factor_is_lost(name: str, link: str) -> None:
    settings = {"fallback": "discard"}
    if link == "downlink":
        # Clients train the model of an earlier round, and have not received the vector.
        settings = {"fallback": "reuse_model", "link": "downlink"}

    def end(rounds: int, *channels: Channel) -> tuple[Tensor, Any, float]:
        rule = RULES[name]()
        options = {"num_clients": 3, "local_steps": 1, "precision": "64-true"}
        diary = Diary()
        module = Classifier()
        runner = trainer(rounds, rule, [*channels, diary], client_eval=False, client_val_fraction=0.2, **options)
        runner.fit(module, loader(batch_size=64))
        repeated = sum(report.metrics.get("bilevel/repeated_rounds", 0.0) for report in diary.reports)
        return flat(module), rule.state, repeated

    length = RULES[name]().rounds_per_outer_step
    whole, state, _ = end(length)
    later, later_state, repeated = end(length + 2, Silence([1, length], **settings))
    assert state["outer_step"] == later_state["outer_step"] == 1
    assert torch.allclose(whole, later, atol=1e-12)
    # Without any update the server skips the round by itself.
    assert repeated == (2 if link == "downlink" else 0)


def test_a_failed_round_leaves_the_upper_variables_of_the_round_before() -> None:
    class Fails(FederatedCallback):
        def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
            if trainer.current_epoch == 3:
                # What a step of the rule would have written.
                pl_module.net[0].weight.data.add_(1.0)
                raise ZeroDivisionError("stop")

    rule = RULES["AggITD"]()
    module = Classifier()
    diary = Diary()
    with pytest.raises(ZeroDivisionError):
        play(rule, module, [diary, Fails()])
    assert len(diary.models) == 3
    assert torch.equal(flat(module), diary.models[-1])
    assert rule.state["outer_step"] == 1
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_on_nonfinite_raise_ends_the_run_with_the_first_answer() -> None:
    class Spoils(Channel):
        def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
            return message * float("nan")

    with pytest.raises(FloatingPointError, match=r"answer of client 0 \(directions\) in round 0 .*`on_nonfinite=\"rai"):
        play(RULES["SimFBO"](), callbacks=[Spoils()], on_nonfinite="raise")


def test_an_upper_loss_that_is_not_finite_is_left_out() -> None:
    class Infinite(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.net(batch[0]).square().mean()
            # Its gradient is finite.
            self.log("val_loss", loss + torch.where(batch[0].sum() > 0, float("inf"), 0.0))

    with (
        pytest.warns(UserWarning, match="The answer of client 0 .* is not finite and was left out"),
        pytest.raises(FloatingPointError, match="Every client of round 0 returned non-finite"),
    ):
        play(RULES["SimFBO"](), Infinite(), num_clients=1)


# ---------------------------------------------------------------------- channels

CHANNELS = {
    "erasure": partial(ErasureChannel, 0.3),
    "AWGN": partial(AWGNChannel, 20.0),
    "fading": partial(FadingChannel, 20.0),
    "quantized": partial(QuantizationChannel, 6),
    "sparsified": partial(SparsificationChannel, 0.3),
    "bit flips": partial(BitFlipChannel, 0.01, bits=8),
    "packets": partial(PacketLossChannel, 0.3, 64),
    "over the air": partial(OverTheAirChannel, 20.0, truncation=0.1),
}
LINKS = [(name, link) for name in CHANNELS for link in ("uplink", "downlink")]
"""Every channel that changes messages, on each link that it exists on."""
for uplink_only in ("sparsified", "over the air"):
    LINKS.remove((uplink_only, "downlink"))


def through(name: str, link: str) -> Channel:
    """Make a channel."""
    if link == "uplink":
        return CHANNELS[name]()
    return CHANNELS[name](link=link)


@pytest.fixture(scope="module")
def without() -> dict[str, Tensor]:
    """The models after four rounds without a channel."""
    return {name: flat(play(make())[1]) for name, make in RULES.items()}


@pytest.mark.filterwarnings("ignore:No client update was received in round")
@pytest.mark.parametrize(("channel", "link"), LINKS)
def test_channels_act_on_all_messages(channel: str, link: str, without: dict[str, Tensor]) -> None:
    name = list(RULES)[LINKS.index((channel, link)) % 3]
    _, module = play(RULES[name](), callbacks=[through(channel, link)])
    assert torch.isfinite(flat(module)).all()
    assert not torch.allclose(flat(module), without[name], atol=1e-6)


@pytest.mark.parametrize("link", ["uplink", "downlink"])
@pytest.mark.parametrize("name", RULES)
def test_channels_that_do_nothing_are_none(name: str, link: str, without: dict[str, Tensor]) -> None:
    channels = [AWGNChannel(float("inf"), link=link), QuantizationChannel(32, link=link)]
    assert torch.equal(flat(play(RULES[name](), callbacks=channels)[1]), without[name])


@every_rule
def test_differential_privacy_is_refused_before_the_first_round(make: Any) -> None:
    diary = Diary()
    privacy = DifferentialPrivacyChannel(0.5, 0.1, delta=None)
    with pytest.raises(ValueError, match=r"accounts for one message .* \w+ asks clients for further ones"):
        play(make(), callbacks=[privacy, diary], buffers="keep")
    assert not diary.models


# ---------------------------------------------------------------------- what is sent, computed and kept


def costs(make: Any, rounds: int) -> tuple[list[tuple[float, float]], int]:
    """Return the numbers that a client was sent and sent in each round, and the products of all clients."""
    diary = Diary()
    runner, _ = play(make(), callbacks=[diary], rounds=rounds)
    sent = []
    for report in diary.reports:
        sent.append((report.metrics["bytes_down"] / 16, report.metrics["bytes_up"] / 16))
    return sent, runner.federation_summary["second_derivatives"]


@pytest.mark.parametrize(
    ("make", "sent", "products"),
    [
        # y and x down, y and z up; z down too; then the hypergradient.
        (RULES["AggITD"], [(P + U, 2 * P), (2 * P + U, 2 * P), (2 * P + U, U)], 2),
        # Mean gradient, corrected steps, p_0, p_1, hypergradient.
        (RULES["FedNest"], [(P + U, P), (2 * P + U, P), (P + U, P), (2 * P + U, P), (2 * P + U, U)], 2),
        (partial(RULES["FedNest"], variant="LFedNest"), [(P + U, P), (P + U, U)], 2),
        # v down; directions of y, v and x up.
        (RULES["SimFBO"], [(2 * P + U, 2 * P + U)] * 2, 4),
        (partial(RULES["SimFBO"], single_loop_steps=3), [(2 * P + U, 2 * P + U)], 6),
    ],
)
def test_bytes_and_products_by_hand(make: Any, sent: list[tuple[int, int]], products: int) -> None:
    found, count = costs(make, len(sent))
    assert found == sent
    assert count == 4 * products


def test_products_are_in_the_run_summary() -> None:
    runner, _ = play(RULES["SimFBO"](), rounds=2)
    assert runner.federation_summary["answers"] == 8
    assert "8 answers, 16 products with second derivatives" in format_summary(runner.federation_summary)


def test_the_state_does_not_grow_with_the_lower_rounds() -> None:
    def numbers(lower_rounds: int, **settings: Any) -> int:
        rule = AggITDCallback("net.0", lower_rounds=lower_rounds, q="sum", upper_lr=0.1, **settings)
        play(rule, rounds=lower_rounds, num_clients=2)
        assert rule.state["position"] == lower_rounds
        tensors = [value for value in rule.state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() for tensor in tensors)

    assert numbers(2) == numbers(8) == P + U


# ---------------------------------------------------------------------- rates


class Steep(Classifier):
    """Has a rate of its own, with a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@every_rule
def test_the_rate_of_a_lower_step_is_the_schedules(make: Any) -> None:
    rates: list[float] = []

    class Reads(FederatedCallback):
        def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
            rates.append(rule._rate)

    rule = make()
    play(rule, Steep(), [Reads()])
    assert rates == [0.2, 0.1, 0.05, 0.025]


# ---------------------------------------------------------------------- beside other things, and afterwards


class Personal(Classifier):
    """A shared body that is upper, a middle that is lower, and a head that each client has for itself."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("make", "engine"),
    [
        (RULES["AggITD"], "sequential"),
        (RULES["AggITD"], "vectorized"),
        (partial(RULES["FedNest"], variant="FedNest_SGD"), "sequential"),
    ],
)
def test_local_parameters_stay_with_their_clients(make: Any, engine: str) -> None:
    rule = make()
    runner, module = play(rule, Personal(), rounds=6, local_parameters="net.4.*", engine=engine)
    start = Personal()
    assert torch.equal(module.net[4].weight, start.net[4].weight)
    for layer in (0, 2):
        assert not torch.equal(module.net[layer].weight, start.net[layer].weight)
    own = runner.fit_loop.federation.engine.local_parameters.of_clients
    assert len({float(parameters["net.4.weight"][0, 0]) for parameters in own.values()}) == 4


@pytest.mark.parametrize("make", [RULES["FedNest"], RULES["SimFBO"], partial(RULES["AggITD"], lower="svrg")])
def test_what_only_training_uses_is_refused_where_nobody_trains(make: Any) -> None:
    with pytest.raises(ValueError, match=r"`local_parameters`\) would never be trained. Use `AggITDCallback\(lower="):
        play(make(), Personal(), local_parameters="net.4.*")
    sentence = r"client objectives \(FedProx\) and `gradient_clip_val`=1.0 would change nothing. Use"
    with pytest.raises(ValueError, match=sentence):
        play(make(), callbacks=[FedProx(0.1)], gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"running statistics .* \(`net.1.running_mean`\) would stay .* Set `buffers="):
        play(make(), Classifier(norm=True))


def test_a_client_objective_takes_part_where_clients_train() -> None:
    with_term = flat(play(RULES["AggITD"](), callbacks=[FedProx(1.0)])[1])
    assert not torch.allclose(with_term, flat(play(RULES["AggITD"]())[1]), atol=1e-5)


def test_upper_variables_that_the_users_code_changes_between_rounds() -> None:
    class Bounds(FederatedCallback):
        def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
            with torch.no_grad():
                pl_module.net[0].bias.clamp_(-0.1, 0.1)

    # Its own steps are small.
    rule = SimFBOCallback("net.0", upper_lr=1e-6)
    play(rule, callbacks=[Bounds()], rounds=2)
    start = Classifier().net[0].bias.detach()
    assert float(start.abs().max()) > 0.2
    assert torch.allclose(rule.state["upper"][-8:], start.clamp(-0.1, 0.1), atol=1e-4)


def test_a_checkpoint_within_a_round_has_the_upper_variables_of_its_start() -> None:
    saved: list[Any] = []

    class Saves(FederatedCallback):
        def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                saved.append(trainer._checkpoint_connector.dump_checkpoint())

    rule = RULES["SimFBO"]()
    runner = trainer(2, rule, [Saves()], client_eval=False, client_val_fraction=0.2, num_sanity_val_steps=0)
    runner.fit(Classifier(), loader(), val_loader())
    # Validation follows the step, and the checkpoint is that of the round before.
    upper = next(state["upper"] for key, state in saved[0]["callbacks"].items() if "SimFBO" in key)
    assert torch.equal(saved[0]["state_dict"]["net.0.weight"].flatten(), upper[:48])


class Late(Classifier):
    """Makes its last layers when Lightning asks for it, and has two names for the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.net[0]

    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.late(self.net(batch[0])), batch[1])


def test_parts_of_configure_model_and_other_names() -> None:
    rule = AggITDCallback(["late", "alias"], lower_rounds=1)
    play(rule, Late(), rounds=2)
    assert rule.upper.layout.names == ("net.0.weight", "net.0.bias", "late.weight", "late.bias")


def test_a_checkpoint_is_that_of_an_ordinary_module() -> None:
    runner, module = play(RULES["AggITD"](), rounds=3)
    runner.save_checkpoint("end.ckpt")
    checkpoint = torch.load("end.ckpt", weights_only=True)
    again = Classifier()
    again.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(flat(again), flat(module))
    assert checkpoint["state_dict"].keys() == Classifier().state_dict().keys()
    assert all(parameter.requires_grad for parameter in again.parameters())


@every_rule
def test_a_rule_fits_again_from_the_start(make: Any) -> None:
    rule = make()
    _, first = play(rule, rounds=3)
    state = copy.deepcopy(rule.state)
    _, second = play(rule, rounds=3)
    assert torch.equal(flat(first), flat(second))
    assert_same(state, rule.state)


def test_upper_variables_are_trainable_after_a_fit_and_after_an_exception() -> None:
    class Notes(FederatedCallback):
        def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
            frozen.append([name for name, p in pl_module.named_parameters() if not p.requires_grad])

    frozen: list[list[str]] = []
    _, module = play(RULES["SimFBO"](), callbacks=[Notes()], rounds=1)
    assert frozen == [["net.0.weight", "net.0.bias"]]
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(ValueError, match="is not logged"):
        play(RULES["SimFBO"](upper_loss="nothing"), module)
    assert all(parameter.requires_grad for parameter in module.parameters())
