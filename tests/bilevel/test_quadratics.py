"""Bilevel rules on two quadratic clients, whose hypergradients are known; the numbers were worked by hand.

Client i has ``g = y'Hy/2 - y'(Bx + c)`` and ``f = |y - a|^2/2 + 0.05 x^2``; x is one number, y two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from federations import QUIET
from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.bilevel import AggITDCallback, FedNestCallback, SimFBOCallback
from lightning_fedhaw.bilevel.aggitd import drawn_start

H = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.5], [0.5, 3.0]]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
A = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
RATE = 0.2
EXACT = 0.1982344951
MINIMUM = torch.tensor([0.55319149, 0.68085106], dtype=torch.float64)


class Quadratic(pl.LightningModule):
    """Lower variables y from zero, one upper variable x at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.y = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h, b, c = batch
        y = self.y
        return (torch.einsum("i,nij,j->n", y, h, y) / 2 - (b * self.x + c) @ y).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", ((self.y - batch[0]) ** 2).sum(1).mean() / 2 + 0.05 * (self.x**2).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.y], lr=RATE)


def data() -> FederatedDataModule:
    """The two clients, each with one training and one validation sample."""
    train = [TensorDataset(H[i : i + 1], B[i : i + 1], C[i : i + 1]) for i in range(2)]
    return FederatedDataModule(train, val=[TensorDataset(A[i : i + 1]) for i in range(2)])


def hypergradient(rule: Any, module: pl.LightningModule | None = None, **options: Any) -> float:
    """Return the change of x in one outer step of rate 1."""
    module = module or Quadratic()
    before = module.x.item()
    play(rule, module, rounds=rule.rounds_per_outer_step, **options)
    return before - module.x.item()


def play(rule: Any, module: pl.LightningModule, rounds: int, callbacks: Any = (), **options: Any) -> FederatedTrainer:
    """Run some rounds."""
    trainer = FederatedTrainer(
        rounds=rounds,
        callbacks=[rule, *callbacks],
        num_sanity_val_steps=0,
        limit_val_batches=0,
        client_eval=False,
        **QUIET,
        **options,
    )
    trainer.fit(module, data())
    return trainer


def exact(value: float) -> Any:
    """The numbers have eight decimals."""
    return pytest.approx(value, abs=6e-9)


INDIVIDUAL = {0: 0.01217031, 1: 0.02910000, 2: 0.05838125, 3: 0.10900625, 4: 0.19650625}


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_aggitd_by_the_round_in_which_the_vector_starts(engine: str) -> None:
    seeds: dict[int, int] = {}
    for seed in range(12):
        seeds.setdefault(drawn_start(seed, 0, 5), seed)
    assert seeds.keys() == set(range(5))
    for start, seed in seeds.items():
        rule = AggITDCallback("x", lower_rounds=5, upper_lr=1.0)
        module = Quadratic()
        assert hypergradient(rule, module, seed=seed, engine=engine) == exact(INDIVIDUAL[start])
        assert module.y.tolist() == [exact(0.48719625), exact(0.64882438)]


@pytest.mark.parametrize(("rounds", "mean", "end"), [(1, -0.05, (0.2, 0.3)), (5, 0.08103281, (0.48719625, 0.64882438))])
def test_the_mean_of_aggitd_over_its_draws(rounds: int, mean: float, end: tuple[float, float]) -> None:
    seeds: dict[int, int] = {}
    for seed in range(40):
        seeds.setdefault(drawn_start(seed, 0, rounds), seed)
    values = [
        hypergradient(AggITDCallback("x", lower_rounds=rounds, upper_lr=1.0), seed=seed) for seed in seeds.values()
    ]
    assert len(values) == rounds
    assert sum(values) / rounds == exact(mean)


@pytest.mark.parametrize("lower", ["sgd", "svrg"])
def test_the_sum_of_aggitd(lower: str) -> None:
    rule = AggITDCallback("x", lower_rounds=5, q="sum", lower=lower, upper_lr=1.0)
    # z_5 = sum_j (I - l H)^(4 - j) (y_j - a): five rounds, by hand in the same order.
    hessian = H.mean(0)
    y = torch.zeros(2, dtype=torch.float64)
    z = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        z = z - RATE * hessian @ z + (y - A.mean(0))
        y = y - RATE * (hessian @ y - B.mean(0) - C.mean(0))
    expected = 0.1 + RATE * float(B.mean(0) @ z)
    assert hypergradient(rule) == pytest.approx(expected, abs=1e-12)


def test_many_rounds_give_the_exact_hypergradient() -> None:
    rule = AggITDCallback("x", lower_rounds=60, q="sum", upper_lr=1.0)
    module = Quadratic()
    module.y.data.copy_(MINIMUM)
    assert hypergradient(rule, module) == pytest.approx(EXACT, abs=1e-7)


@pytest.mark.parametrize(("rounds", "value"), [(1, 0.03), (5, 0.16256671), (20, 0.19820595)])
@pytest.mark.parametrize("variant", ["FedNest", "FedNest_SGD"])
def test_the_neumann_series_is_iterative_differentiation(variant: str, rounds: int, value: float) -> None:
    rule = FedNestCallback("x", lower_rounds=rounds, terms=rounds - 1, variant=variant, upper_lr=1.0)
    assert hypergradient(rule) == exact(value)


@pytest.mark.parametrize("variant", ["LFedNest", "LFedNest_SVRG"])
def test_the_mean_of_the_clients_own_hypergradients_is_another(variant: str) -> None:
    module = Quadratic()
    module.y.data.copy_(MINIMUM)
    rule = FedNestCallback("x", lower_rounds=1, terms=100, variant=variant, upper_lr=1.0, lower_lr=RATE)
    # At the common minimum, by hand: x enters f_i by 0.1 x, and y - a_i goes through each client's own inverse.
    own = [0.1 + float(B[i] @ torch.linalg.solve(H[i], MINIMUM - A[i])) for i in range(2)]
    assert hypergradient(rule, module) == pytest.approx(sum(own) / 2, abs=1e-7)


@pytest.mark.parametrize(
    ("rule", "rounds"),
    [
        (partial(AggITDCallback, lower_rounds=5), 6),
        (partial(AggITDCallback, lower_rounds=5, lower="svrg"), 11),
        (partial(AggITDCallback, lower_rounds=5, upper_steps=3), 7),
        (partial(FedNestCallback, lower_rounds=2, terms=4), 2 * 2 + 4 + 2),
        (partial(FedNestCallback, lower_rounds=2, terms=4, upper_steps=2), 2 * 2 + 4 + 3),
        (partial(FedNestCallback, lower_rounds=2, terms=4, variant="FedNest_SGD"), 2 + 4 + 2),
        (partial(FedNestCallback, lower_rounds=2, terms=4, variant="LFedNest"), 2 + 1),
        (partial(FedNestCallback, lower_rounds=2, terms=4, variant="LFedNest_SVRG"), 2 * 2 + 1),
        (partial(FedNestCallback, lower_rounds=2, terms=4, series="own"), 2 * 2 + 1 + 2),
        (SimFBOCallback, 1),
    ],
)
def test_rounds_of_an_outer_step(rule: Any, rounds: int) -> None:
    assert rule("x").rounds_per_outer_step == rounds


def test_single_loop_converges_to_the_bilevel_solution() -> None:
    module = Quadratic()
    play(SimFBOCallback("x", lower_lr=0.5, upper_lr=0.5), module, rounds=60)
    hessian = H.mean(0)
    # y*(x) = H^-1 (B x + c); F(x) = mean |y* - a|^2 / 2 + 0.05 x^2, whose derivative is zero at x.
    slope = torch.linalg.solve(hessian, B.mean(0))
    offset = torch.linalg.solve(hessian, C.mean(0))
    x = float(slope @ (A.mean(0) - offset) / (slope @ slope + 0.1))
    assert module.x.item() == pytest.approx(x, abs=1e-6)
    assert torch.allclose(module.y, slope * x + offset, atol=1e-6)


def test_local_upper_steps_correct_the_global_direction() -> None:
    # f's own derivative in x is 0.1 x, the same for all clients: x <- x - (b/2)(0.1 (x - x_0) + h), twice.
    plain = hypergradient(AggITDCallback("x", q="sum", upper_lr=1.0))
    two_steps = hypergradient(AggITDCallback("x", q="sum", upper_lr=1.0, upper_steps=2))
    assert two_steps == pytest.approx(plain / 2 + (plain - 0.1 * plain / 2) / 2, abs=1e-12)


def test_clients_and_server_agree_on_the_vector_without_a_series() -> None:
    # The clients' own series with one term: p_0 and (I - l H_i) p_0, the mean of which is that of the mean Hessian.
    own = hypergradient(FedNestCallback("x", terms=1, series="own", upper_lr=1.0))
    average = hypergradient(FedNestCallback("x", terms=1, upper_lr=1.0))
    assert own == pytest.approx(average, abs=1e-12)
    own = hypergradient(FedNestCallback("x", terms=2, series="own", upper_lr=1.0))
    average = hypergradient(FedNestCallback("x", terms=2, upper_lr=1.0))
    assert own != pytest.approx(average, abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        partial(AggITDCallback, "x", lower_rounds=16, q="sum"),
        partial(FedNestCallback, "x", terms=16),
        partial(FedNestCallback, "x", terms=16, series="own"),
        partial(SimFBOCallback, "x"),
    ],
)
def test_a_vector_that_explodes_ends_the_run_or_is_clipped(make: Any) -> None:
    # The largest eigenvalue of the mean Hessian is 2.1, so the rate has to be below 0.95.
    settings = {"lower_lr": 3.0, "upper_lr": 1e-9}
    module = Quadratic()
    with pytest.raises(FloatingPointError, match=r"explodes: its norm grew from .*\(3\) must be .* Lower `lower_lr`"):
        play(make(**settings), module, rounds=20)
    assert torch.isfinite(torch.cat([module.x, module.y])).all()
    rule = make(**settings, clip=2.0)
    play(rule, Quadratic(), rounds=18)
    assert float(torch.linalg.vector_norm(rule.state["vector"])) <= 2.0 + 1e-9


ESTIMATES = [
    partial(AggITDCallback, lower_rounds=3),
    partial(AggITDCallback, lower_rounds=3, q="sum"),
    partial(FedNestCallback, terms=2),
    partial(FedNestCallback, terms=2, variant="LFedNest"),
]


@pytest.mark.parametrize("make", ESTIMATES)
def test_a_schedule_changes_no_estimate(make: Any) -> None:
    class Slowing(Quadratic):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([self.y], lr=RATE)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    found = []
    for module in (Quadratic(), Slowing()):
        # Where no lower step moves, all terms of an estimate have the rate with which the outer step begins.
        module.y.data.copy_(torch.linalg.solve(H.mean(0), B.mean(0) + C.mean(0)))
        found.append(hypergradient(make("x", upper_lr=1.0), module))
    assert found[1] == pytest.approx(found[0], abs=1e-12)


@pytest.mark.parametrize("make", [*ESTIMATES[1:3], partial(SimFBOCallback)])
def test_a_weight_decay_is_a_part_of_the_lower_problem(make: Any) -> None:
    class Decaying(Quadratic):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.y], lr=RATE, weight_decay=0.5)

    class Penalized(Quadratic):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.25 * self.y @ self.y

    ends = []
    for module in (Decaying(), Penalized()):
        play(make("x", upper_lr=1.0), module, rounds=6)
        ends.append(torch.cat([module.x, module.y]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


def test_a_gradient_that_grows_from_nothing_is_no_explosion() -> None:
    class Far(Quadratic):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            # Flat at the start, where y is zero.
            self.log("val_loss", (self.y**4).sum() * 1e9 + 1e-8 * self.y.sum())

    rule = AggITDCallback("x", lower_rounds=3, q="sum", upper_lr=1e-12)
    play(rule, Far(), rounds=4)
    assert rule.state["outer_step"] >= 1


def test_a_series_without_its_factor() -> None:
    scaled = hypergradient(FedNestCallback("x", upper_lr=1.0))
    unscaled = hypergradient(FedNestCallback("x", upper_lr=1.0, scales_series=False))
    assert unscaled - 0.1 == pytest.approx((scaled - 0.1) / RATE, abs=1e-12)
