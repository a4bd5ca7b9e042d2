"""Buffers of every kind: policies by name, spectral norms, observers, queues, NaN, and frozen tensors that move."""

from __future__ import annotations

import copy
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, loader, samples, trainer
from lightning_fedhaw import FedAvgCallback, FederatedCallback
from lightning_fedhaw.clients.frozen import covering_patterns
from lightning_fedhaw.data import IndexPartitioner
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.layout import ParameterLayout


def targets(*values):
    """Full batches of samples (1, y): one SGD step at rate 0.5 takes a weight `w` of the loss (w - y)^2 to `y`."""
    y = torch.tensor(values).reshape(-1, 1)
    return DataLoader(TensorDataset(torch.ones_like(y), y), batch_size=len(values))


class Regression(pl.LightningModule):
    """One weight, and what a test adds: `after_step` is called after every optimizer step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.net.weight)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.after_step(batch[1])

    def after_step(self, y):
        """Do nothing more."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.5)


def unequal(rounds, module, door=1, **options):
    """Play rounds of two clients: one with a sample of the target 1, and one with three of the target 5."""
    options = {"num_clients": 2, "partitioner": IndexPartitioner([[0], [1, 2, 3]]), "alpha": None, **options}
    callbacks = options.pop("callbacks", [])
    fit = options.pop("fit", {})
    if door == 1:
        runner = trainer(rounds=rounds, callbacks=callbacks, client_eval=False, **options)
    else:
        split = {name: options.pop(name) for name in ("num_clients", "partitioner", "buffers") if name in options}
        options.pop("alpha")
        rule = FedAvgCallback(**split, client_eval=False)
        runner = pl.Trainer(max_epochs=rounds, callbacks=[rule, *callbacks], **{**QUIET, **options})
    runner.fit(module, targets(1.0, 5.0, 5.0, 5.0), **fit)
    return runner


class Starts(FederatedCallback):
    """Remembers the buffers that clients end with."""

    def __init__(self):
        self.ends = {}

    def on_client_end(self, trainer, pl_module, update):
        self.ends[trainer.global_step, update.client] = {name: b.clone() for name, b in update.buffers.items()}


# ---------------------------------------------------------------------- spectral norms


class Spectral(Classifier):
    def __init__(self, norm):
        super().__init__(hidden=12)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(norm(nn.Linear(6, 12)), nn.ReLU(), norm(nn.Linear(12, 3)))
        self.make_optimizer = lambda parameters: torch.optim.Adam(parameters, 0.02)


def gains(module):
    layers = copy.deepcopy(module.net).eval()
    with torch.no_grad():
        layers(torch.zeros(1, 6))
        return [float(torch.linalg.matrix_norm(layers[i].weight, 2)) for i in (0, 2)]


@pytest.mark.parametrize("policy", ["average", "keep", "local", "recalibrate", {"net.*": "keep"}], ids=str)
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, hooked_spectral_norm], ids=["new", "old"])
def test_the_global_gain_of_a_spectral_norm_is_one(norm, policy):
    module = Spectral(norm)
    trainer(rounds=2, alpha=0.1, buffers=policy, engine="sequential", client_eval=False).fit(module, loader())
    assert gains(module) == pytest.approx([1.0, 1.0], abs=2e-4)


def test_one_client_with_a_spectral_norm_is_a_stock_run():
    stock = Spectral(parametrizations.spectral_norm)
    data = DataLoader(samples(30), batch_size=30)
    pl.Trainer(max_epochs=3, **QUIET).fit(stock, data)
    for policy in ("average", "local"):
        module = Spectral(parametrizations.spectral_norm)
        trainer(rounds=3, num_clients=1, alpha=None, buffers=policy, client_eval=False, optimizer_state="kept").fit(
            module, data
        )
        for name, value in stock.state_dict().items():
            assert torch.allclose(value, module.state_dict()[name], atol=1e-6), name


def test_a_module_with_the_old_spectral_norm_can_be_copied_between_rounds():
    class Copies(FederatedCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            copy.deepcopy(pl_module.net)

    module = Spectral(hooked_spectral_norm)
    trainer(rounds=1, callbacks=[Copies()], engine="sequential", client_eval=False).fit(module, loader())


# ---------------------------------------------------------------------- observers


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_observers_have_the_widest_range_and_the_scale_that_follows():
    class Observed(Regression):
        def __init__(self):
            super().__init__()
            self.observer = MinMaxObserver()
            self.quantize = FakeQuantize(observer=MinMaxObserver, quant_min=0, quant_max=255)

        def after_step(self, y):
            self.observer(y - 2)
            self.quantize(y - 2)

    module = Observed()
    unequal(2, module)
    # The clients saw -1 and 3.
    assert (float(module.observer.min_val), float(module.observer.max_val)) == (-1.0, 3.0)
    assert float(module.quantize.scale) == pytest.approx(4 / 255)
    assert int(module.quantize.zero_point) == 64  # 1 / (4 / 255) = 63.75


# ---------------------------------------------------------------------- policies by name


class Buffered(Regression):
    """Three buffers, to which every step adds the client's target."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c"):
            self.register_buffer(f"sum_{name}", torch.zeros(2))

    def after_step(self, y):
        for name in ("a", "b", "c"):
            self.get_buffer(f"sum_{name}").add_(y.mean())


BY_NAME = {"sum_a": "local", "sum_b": "keep", "sum_*": "average"}


@pytest.mark.parametrize("door", [1, 2])
def test_the_first_pattern_that_matches_is_the_policy(door):
    module, starts = Buffered(), Starts()
    runner = unequal(2, module, door, buffers=BY_NAME, callbacks=[starts])
    # Averaged: 0.25 * 1 + 0.75 * 5 = 4 in each round.
    assert [module.get_buffer(f"sum_{name}")[0].item() for name in ("a", "b", "c")] == [0.0, 0.0, 8.0]
    last = [[starts.ends[1, client][f"sum_{name}"][0].item() for name in ("a", "b", "c")] for client in (0, 1)]
    assert last == [[2.0, 1.0, 5.0], [10.0, 5.0, 9.0]]
    # Eight bytes of `sum_c`, and four of the weight.
    assert runner.fit_loop.federation.transport.message_bytes("uplink") == 12
    assert set(runner.fit_loop.federation.state_dict()["buffers"][0]) == {"sum_a"}


def test_what_no_pattern_matches_is_averaged():
    module = Buffered()
    unequal(1, module, buffers={"sum_[ab]": "keep", "sum_c": "average"})
    assert [module.get_buffer(f"sum_{name}")[0].item() for name in ("a", "b", "c")] == [0.0, 0.0, 4.0]


def test_policies_by_name_survive_a_checkpoint(tmp_path):
    straight, resumed = Buffered(), Buffered()
    options = {"buffers": BY_NAME}
    whole = unequal(4, straight, **options)
    unequal(2, Buffered(), **options).save_checkpoint(tmp_path / "half.ckpt")
    part = unequal(4, resumed, fit={"ckpt_path": tmp_path / "half.ckpt"}, **options)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    locals_of = [runner.fit_loop.federation.buffers.local.of_clients for runner in (whole, part)]
    assert [local[1]["sum_a"].tolist() for local in locals_of] == [[20.0, 20.0]] * 2


@pytest.mark.parametrize(
    ("buffers", "said"),
    [
        ({"bn.*": "keep"}, r'The pattern "bn\.\*" of `buffers` matches no buffer .* Its buffers are `sum_a`, `sum_b`'),
        ({"net.*": "keep"}, "matches trainable parameters, which are always aggregated"),
        ({"sum_a": "recalibrate"}, 'The policy "recalibrate" recomputes running statistics .* `sum_a` only'),
    ],
)
def test_patterns_that_mean_nothing_are_refused(buffers, said):
    with pytest.raises(ValueError, match=said):
        unequal(1, Buffered(), buffers=buffers)


@pytest.mark.parametrize(
    ("buffers", "said"),
    [
        (
            {"sum_a": "mean"},
            r"`buffers\[\"sum_a\"\]` must be one of 'average', 'keep', 'local', 'recalibrate', got 'mean'",
        ),
        ({}, "a mapping from one or more name patterns to policies, got {}"),
        ({3: "keep"}, "a mapping from one or more name patterns"),
        ("sum", "Or give a mapping from name patterns to these"),
    ],
)
def test_policies_are_checked_at_construction(buffers, said):
    with pytest.raises(ValueError, match=said):
        FedAvgCallback(buffers=buffers)


# ---------------------------------------------------------------------- buffers of an unknown kind


def test_averages_of_unknown_buffers_are_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unequal(3, Buffered())
    said = [str(w.message) for w in caught if "in its own way" in str(w.message)]
    assert len(said) == 1
    assert "`sum_a`, `sum_b`, `sum_c`" in said[0]
    assert '`buffers={"sum_a": "local"}`' in said[0]


def test_buffers_that_clients_agree_on_need_no_word():
    class Counts(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("table", torch.arange(4.0))

        def after_step(self, y):
            self.steps += 1

    module = Counts()
    unequal(2, module)
    assert float(module.steps) == 2.0


# ---------------------------------------------------------------------- NaN, and memory that is shared


class Threshold(Regression):
    def __init__(self, after=None):
        super().__init__()
        self.register_buffer("threshold", torch.tensor([float("nan"), float("inf")]))
        self.after = after

    def after_step(self, y):
        if self.after is not None:
            self.threshold.copy_(torch.tensor([self.after(float(y[0]))] * 2))


def test_a_buffer_that_was_not_finite_before_training_is_no_divergence():
    module = Threshold()
    unequal(2, module)
    assert module.threshold[0].isnan()
    assert module.threshold[1] == float("inf")
    again = Threshold()
    again.threshold[1] = float("nan")
    again.after = lambda y: float("nan")
    unequal(2, again)
    assert again.net.weight.item() == 4.0


class Calibrated(Threshold):
    """Validation computes the threshold, and every step makes it unknown again."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def on_validation_epoch_end(self):
        self.threshold.fill_(0.5)


def test_a_threshold_that_is_nan_until_validation_may_be_nan_again():
    """The sanity check of validation sets it before the first round."""
    module = Calibrated(lambda y: float("nan"))
    data = TensorDataset(torch.ones(8, 1), torch.ones(8, 1))
    runner = pl.Trainer(max_epochs=2, callbacks=[FedAvgCallback(num_clients=2)], **QUIET)
    runner.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    assert runner.federation_summary["nonfinite_updates"] == 0
    assert module.threshold.tolist() == [0.5, 0.5]


def test_what_clients_compute_for_such_a_buffer_is_averaged():
    module = Threshold(lambda y: y)
    unequal(1, module, buffers={"threshold": "average"})
    assert module.threshold.tolist() == [4.0, 4.0]


def test_a_client_that_makes_a_buffer_non_finite_has_diverged():
    module = Threshold(lambda y: float("nan") if y == 5.0 else 0.5)
    module.threshold.zero_()
    with pytest.warns(UserWarning, match=r"Client 1 returned non-finite buffers \['threshold'\]"):
        unequal(1, module, buffers={"threshold": "average"})
    assert module.threshold.tolist() == [0.5, 0.5]


def test_an_expanded_buffer_gets_memory_of_its_own():
    class Expanded(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([2.0]).expand(3))

        def after_step(self, y):
            self.scale[0] += 1

    module = Expanded()
    unequal(1, module)
    assert module.scale.tolist() == [3.0, 2.0, 2.0]


# ---------------------------------------------------------------------- frozen tensors that the step moves


class Taught(Regression):
    """A momentum teacher: its weight moves half the way to the student's after each step."""

    def __init__(self, move="in place"):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.fixed = copy.deepcopy(self.teacher)
        self.move = move

    def after_step(self, y):
        teacher, student = self.teacher.weight, self.net.weight
        if self.move == "in place":
            teacher.mul_(0.5).add_(student, alpha=0.5)
        elif self.move == "data replaced":
            teacher.data = 0.5 * teacher.data + 0.5 * student.data
        elif self.move == "data in place":
            teacher.data.mul_(0.5).add_(student.data, alpha=0.5)
        else:
            self.teacher.load_state_dict({"weight": 0.5 * teacher + 0.5 * student})


MOVES = ["in place", "data replaced", "data in place", "load_state_dict"]


@pytest.mark.parametrize("move", MOVES)
def test_a_frozen_parameter_that_moves_is_refused_with_the_line_that_lets_it(move):
    with pytest.raises(RuntimeError, match="Client 0 changed the frozen parameter `teacher.weight`") as error:
        unequal(1, Taught(move))
    assert re.search(r"`buffers=\{(.*)\}`", str(error.value))[1] == '"teacher.*": "average"'


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("move", MOVES)
def test_a_teacher_is_averaged(move, door):
    module = Taught(move)
    runner = unequal(2, module, door, buffers={"teacher.*": "average"})
    # Students end at 1 and 5. Teachers: 0.5 and 2.5, on average 2; then 1.5 and 3.5, on average 3.
    assert module.net.weight.item() == 4.0
    assert module.teacher.weight.item() == 3.0
    assert not module.teacher.weight.requires_grad
    assert runner.fit_loop.federation.transport.message_bytes("downlink") == 8


def test_a_teacher_may_stay_with_its_client_or_not_move_at_all():
    module, starts = Taught(), Starts()
    runner = unequal(2, module, buffers={"teacher.*": "local"}, callbacks=[starts])
    assert [float(starts.ends[1, client]["teacher.weight"]) for client in (0, 1)] == [0.75, 3.75]
    assert float(module.teacher.weight) == 0.0
    assert runner.fit_loop.federation.transport.message_bytes("downlink") == 4
    unequal(2, module, buffers={"teacher.*": "keep"})
    assert float(module.teacher.weight) == 0.0


def test_a_teacher_survives_a_checkpoint(tmp_path):
    for policy in ("average", "local"):
        options = {"buffers": {"teacher.*": policy}}
        straight, resumed = Taught(), Taught()
        unequal(4, straight, **options)
        unequal(2, Taught(), **options).save_checkpoint(tmp_path / "half.ckpt")
        runner = unequal(4, resumed, fit={"ckpt_path": tmp_path / "half.ckpt"}, **options)
        assert torch.equal(straight.teacher.weight, resumed.teacher.weight)
        if policy == "local":
            # 5 (1 - 2^-4)
            assert float(runner.fit_loop.federation.buffers.local.of_clients[1]["teacher.weight"]) == 4.6875


def test_the_closing_evaluation_does_not_move_a_teacher():
    class Moves(Taught):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.teacher.weight += 1
            self.log("loss", loss)
            return loss

        def after_step(self, y):
            """The teacher has moved in the step."""

    module = Moves()
    trainer(rounds=2, num_clients=2, alpha=None, buffers={"teacher.*": "average"}).fit(module, targets(1.0, 5.0))
    assert module.teacher.weight.item() == 2.0


def test_a_round_that_fails_leaves_the_teacher_as_it_was():
    class Fails(Taught):
        def after_step(self, y):
            super().after_step(y)
            if self.trainer.global_step == 1 and float(y[0]) == 5.0:
                raise KeyError("lost")

    for policy in ("average", "local"):
        module = Fails()
        with pytest.raises(KeyError, match="lost"):
            unequal(2, module, buffers={"teacher.*": policy})
        assert float(module.teacher.weight) == (2.0 if policy == "average" else 0.0)
        local = module.trainer.fit_loop.federation.buffers.local.of_clients
        assert {client: float(own["teacher.weight"]) for client, own in local.items()} == (
            {} if policy == "average" else {0: 0.5, 1: 2.5}
        )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("policy", ["average", "local"])
def test_a_teacher_on_two_processes(policy):
    modules = [Taught(), Taught()]
    places = ({}, {"devices": 2, "strategy": "federated_notebook"})
    for module, place in zip(modules, places, strict=True):
        unequal(3, module, buffers={"teacher.*": policy}, reduction="ordered", **place)
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, modules[1].state_dict()[name]), name


def test_many_clients_with_a_teacher_train_one_after_another(caplog):
    class Ordinary(Classifier):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    options = {"num_clients": 10, "buffers": {"teacher.*": "average"}, "client_eval": False}
    caplog.set_level("INFO")
    trainer(rounds=1, **options).fit(Ordinary(), loader())
    assert "Engine: sequential, because `Ordinary.training_step` moves frozen parameters" in caplog.text
    with pytest.raises(ValueError, match="moves frozen parameters, such as `teacher.0.weight`"):
        trainer(rounds=1, engine="vectorized", **options).fit(Ordinary(), loader())


def test_a_rule_that_evaluates_on_the_server_does_not_move_the_teacher():
    class Moves(Taught):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.teacher.weight += 1
            return super().training_step(batch, batch_idx)

        def after_step(self, y):
            """The teacher has moved in the step."""

    module = Moves()
    layout = ParameterLayout.of(module, ["teacher.*"])
    assert layout.frozen_parameters == ("teacher.weight",)
    batch = [torch.ones(1, 1), torch.ones(1, 1)]
    assert float(Server(module, layout).loss(torch.zeros(1), batch, 0)) == 1.0
    assert module.teacher.weight.item() == 0.0


def test_patterns_cover_what_changed_and_nothing_else():
    frozen = ["net.bone.w", "net.teacher.0.w", "net.teacher.1.w", "head.w", "old"]
    assert covering_patterns(["net.teacher.0.w", "net.teacher.1.w"], frozen) == ["net.teacher.*"]
    assert covering_patterns(["net.teacher.1.w", "head.w", "old"], frozen) == ["net.teacher.1.*", "head.*", "old"]
