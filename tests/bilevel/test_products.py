"""Exact second derivatives of a module's own loss, and the draws that upper and lower loss share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from federations import QUIET, Classifier, flat
from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.bilevel import Answers, BilevelRule, Inquiry, LocalProblem, OuterRound, Progress

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
FOUND: dict[str, Any] = {}


class Asks(BilevelRule):
    """Asks one client for derivatives, and for differences of gradients."""

    def outer_rounds(self) -> Sequence[OuterRound]:
        return [OuterRound(self.ask, self.finish)]

    def ask(self, state: Any, server: Any) -> Inquiry:
        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
            lower, upper = problem.lower, problem.upper
            generator = torch.Generator().manual_seed(1)
            v = torch.randn(len(lower), generator=generator, dtype=lower.dtype)
            w = torch.randn(len(upper), generator=generator, dtype=upper.dtype)
            step = 1e-5
            ahead = problem.at(lower + step * v, upper).lower_gradient()
            behind = problem.at(lower - step * v, upper).lower_gradient()
            hessian_product, mixed_product = problem.products(v)
            FOUND["hessian"] = (hessian_product, (ahead - behind) / (2 * step))
            FOUND["alone"] = problem.hessian_product(v)
            FOUND["mixed product"] = mixed_product
            FOUND["mixed alone"] = problem.mixed_product(v)
            # v'J w both ways: J v is derived in the lower variables, the difference in the upper ones.
            ahead = problem.at(lower, upper + step * w).lower_gradient()
            behind = problem.at(lower, upper - step * w).lower_gradient()
            FOUND["mixed"] = (mixed_product @ w, ((ahead - behind) / (2 * step)) @ v)
            FOUND["gradients"] = (problem.lower_gradient(), problem.upper_gradients().lower)
            return {"nothing": torch.zeros_like(lower)}

        return Inquiry("derivatives", answer, {"nothing": server.layout}, replaces_training=True)

    def finish(self, cohort: Any, answers: Answers | None, state: Any) -> Progress:
        return Progress()


class Network(pl.LightningModule):
    """A body and a head in float64; the body is upper."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body.double()
        self.head = nn.Linear(width, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        if hidden.dim() == 3:
            hidden = hidden.mean(1)
        return self.head(hidden)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def upper_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequences(count: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 5, 4, generator=g, dtype=torch.float64), torch.arange(count) % 3)


def rows(count: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 4, generator=g, dtype=torch.float64), torch.arange(count) % 3)


def ask(
    module: pl.LightningModule, train: TensorDataset, held_out: TensorDataset, upper: str, batch_size: int = 8
) -> None:
    """Let the one client of a federation answer."""
    rule = Asks(upper, upper_loss=None)
    trainer = FederatedTrainer(rounds=1, callbacks=[rule], client_eval=False, buffers="keep", **QUIET)
    trainer.fit(module, FederatedDataModule([train], val=[held_out], batch_size=batch_size))
    assert torch.equal(FOUND["mixed alone"], FOUND["mixed product"])


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)


MODELS = {
    # The body is upper: mixed derivatives go through the layer, the Hessian is the head's.
    "GRU": (lambda: Network(nn.GRU(4, 3, batch_first=True), 3), sequences, "body"),
    "transformer": (lambda: Network(transformer(), 4), sequences, "body"),
    # The head is upper: the Hessian is the layer's.
    "GRU's Hessian": (lambda: Network(nn.GRU(4, 3, batch_first=True), 3), sequences, "head"),
    "transformer's Hessian": (lambda: Network(transformer(), 4), sequences, "head"),
    "LSTM's Hessian": (lambda: Network(nn.LSTM(4, 3, batch_first=True), 3), sequences, "head"),
    "BatchNorm": (
        lambda: Network(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3)), 5),
        rows,
        "body.0",
    ),
}


@pytest.mark.parametrize(("make", "data", "upper"), MODELS.values(), ids=MODELS.keys())
def test_products_against_central_differences(make: Any, data: Any, upper: str) -> None:
    torch.manual_seed(0)
    module = make()
    before = flat(module)
    # Two batches of training, the second of them smaller.
    ask(module, data(12, seed=2), data(8, seed=3), upper)
    product, difference = FOUND["hessian"]
    assert float((product - difference).norm()) < 1e-6 * float(difference.norm())
    assert torch.equal(FOUND["alone"], product)
    mixed, difference = FOUND["mixed"]
    assert float(mixed) == pytest.approx(float(difference), rel=1e-6)
    # Neither running statistics nor parameters have moved.
    assert torch.equal(flat(module), before)


def test_upper_and_lower_loss_see_one_dropout_mask() -> None:
    """With the same samples and batches of one size, the two gradients are equal, whatever the masks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5))
    ask(Network(net, 16), rows(12, seed=2), rows(12, seed=2), "body", batch_size=4)
    lower, upper = FOUND["gradients"]
    assert torch.equal(lower, upper)
    # Batches of another size draw other masks.
    ask(Network(net, 16), rows(12, seed=2), rows(11, seed=2), "body", batch_size=4)
    lower, upper = FOUND["gradients"]
    assert not torch.allclose(lower, upper, rtol=0.05)


def test_the_upper_loss_of_a_validation_step_has_no_dropout() -> None:
    module = Classifier(dropout=0.5)
    rule = Asks("net.0", upper_loss="val_loss")
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(12, 6, generator=generator), torch.arange(12) % 3)
    held_out = TensorDataset(*(tensor.clone() for tensor in data.tensors))
    trainer = FederatedTrainer(rounds=1, callbacks=[rule], client_eval=False, **QUIET)
    trainer.fit(module, FederatedDataModule([data], val=[held_out], batch_size=12))
    module.eval()
    module.zero_grad()
    cross_entropy(module.net(data.tensors[0]), data.tensors[1]).backward()
    gradient = torch.cat([module.net[3].weight.grad.flatten(), module.net[3].bias.grad])
    assert torch.allclose(FOUND["gradients"][1], gradient, atol=1e-6)
    assert not torch.allclose(FOUND["gradients"][0], gradient, atol=1e-3)
