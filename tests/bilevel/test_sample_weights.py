"""Weights of samples, which stay with the clients: numbers worked by hand, several processes, resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

from federations import QUIET
from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.bilevel import AggITDCallback, SampleWeights, with_indices
from lightning_fedhaw.bilevel.row_steps import step_of_rows
from lightning_fedhaw.data.labels import find_labels

RATE = 0.5
TARGETS = [[1.0, 3.0], [2.0, -4.0, 5.0]]
HELD_OUT = [[0.5], [1.5]]


class Mean(pl.LightningModule):
    """One number, near the weighted mean of the samples; samples held out say which are worth something."""

    def __init__(self) -> None:
        super().__init__()
        self.y = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.weights = SampleWeights(5).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        targets, index = batch
        return (self.weights(index) * (self.y - targets) ** 2).mean() / 2

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", ((self.y - batch[0]) ** 2).mean() / 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.y], lr=RATE)


def sets(values: list[list[float]]) -> list[TensorDataset]:
    """One data set a client."""
    return [TensorDataset(torch.tensor(own, dtype=torch.float64)) for own in values]


def play(rule: Any, rounds: int, callbacks: Any = (), ckpt_path: Any = None, **options: Any) -> tuple[Any, Mean]:
    """Run some rounds of the two clients."""
    module = Mean()
    settings = {**QUIET, "client_eval": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **options}
    trainer = FederatedTrainer(rounds=rounds, callbacks=[rule, *callbacks], **settings)
    data = FederatedDataModule(with_indices(sets(TARGETS)), batch_size=8, val=sets(HELD_OUT))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


def derivatives(y: float, z: float) -> list[Tensor]:
    """Each client's own hypergradient in the logits of its samples, by hand: half of ``y - t``, times ``-l z``."""
    return [-RATE * z * 0.5 * (y - torch.tensor(own, dtype=torch.float64)) / len(own) for own in TARGETS]


def one_round() -> tuple[float, float]:
    """Return y after the first round and the mean of the upper gradients before it, by hand.

    The clients' means are 2 and 1, and each client takes one step from 0 with the rate 0.5: to 1 and 0.5.
    """
    return (1 + 0.5) / 2, (-0.5 - 1.5) / 2


@pytest.mark.parametrize("processes", [1, 2])
def test_each_client_steps_its_own_logits_by_its_own_derivative(processes: int) -> None:
    place: dict[str, Any] = {}
    if processes > 1:
        place = {"devices": processes, "strategy": "federated_notebook"}
    _, module = play(AggITDCallback("weights", lower_rounds=1, upper_lr=1.0), 2, **place)
    assert module.y.item() == 0.75
    expected = -torch.cat(derivatives(*one_round()))
    torch.testing.assert_close(module.weights.logits.detach(), expected, rtol=0, atol=1e-15)


def test_each_client_bounds_its_own_derivative() -> None:
    own = derivatives(*one_round())
    norms = [float(derivative.norm()) for derivative in own]
    # Between the two, so that one client's is cut and the other's is not.
    clip = sum(norms) / 2
    assert norms[0] < clip < norms[1]
    # The vector itself has the length 1, and is not cut.
    rule = AggITDCallback("weights", lower_rounds=1, upper_lr=1.0, clip=clip)
    rule.checked_vector = lambda vector, first_norm: vector  # type: ignore[method-assign]
    _, module = play(rule, 2)
    expected = -torch.cat([own[0], own[1] * (clip / norms[1])])
    torch.testing.assert_close(module.weights.logits.detach(), expected, rtol=0, atol=1e-15)


def test_a_client_that_comes_later_begins_with_the_memory_of_a_beginner() -> None:
    # Rprop's first step has the length of the rate; its memory of it is not zero before.
    rule = AggITDCallback("weights", lower_rounds=1, upper_lr=0.1, upper_optimizer=torch.optim.Rprop)
    # With this seed the second and the fourth round draw different clients.
    _, module = play(rule, 4, clients_per_round=1, seed=12)
    # The first client reaches its first sample, whose derivative is zero.
    assert module.weights.logits.abs().tolist() == [0, *[pytest.approx(0.1)] * 4]


def test_a_run_goes_on_from_the_middle_of_an_outer_step(tmp_path: Path) -> None:
    def rule() -> AggITDCallback:
        return AggITDCallback("weights", lower_rounds=2, upper_lr=0.1, upper_optimizer=torch.optim.Adam)

    path = tmp_path / "middle.ckpt"

    class Save(pl.Callback):
        def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(path)

    _, straight = play(rule(), 9, [Save()], clients_per_round=1)
    _, resumed = play(rule(), 9, ckpt_path=path, clients_per_round=1)
    assert torch.equal(straight.weights.logits, resumed.weights.logits)
    assert torch.equal(straight.y, resumed.y)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_is_not_resumed_with_samples_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = play(AggITDCallback("weights", lower_rounds=1), 1)
    trainer.save_checkpoint("other.ckpt")
    monkeypatch.setattr(f"{__name__}.TARGETS", [[3.0, 1.0], TARGETS[1]])
    with pytest.raises(ValueError, match="is of another federation: the checksum of the training samples, for which"):
        play(AggITDCallback("weights", lower_rounds=1), 2, ckpt_path="other.ckpt")


def numbered(count: int = 24) -> TensorDataset:
    return with_indices(TensorDataset(torch.arange(count, dtype=torch.float64), torch.arange(count) % 2))


class Numbers(Mean):
    """Takes the number from any batch, and knows which samples were read for the upper loss."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weights = SampleWeights(rows).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.weights(batch[-1]) * (self.y - batch[0] / 10) ** 2).mean() / 2

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", ((self.y - batch[0] / 10) ** 2).mean() / 2)


def changed(data: Any, rows: int = 24, rounds: int = 2, **options: Any) -> list[int]:
    """Return the samples whose weights two clients change."""
    module = Numbers(rows)
    settings = {**QUIET, "client_eval": False, "num_clients": 2, "client_val_fraction": 0.25, **options}
    rule = AggITDCallback("weights", lower_rounds=1, upper_lr=1.0)
    FederatedTrainer(rounds=rounds, callbacks=[rule], **settings).fit(module, data)
    return module.weights.logits.detach().nonzero().flatten().tolist()


def test_numbers_stay_with_their_samples() -> None:
    part = Subset(numbered(), range(4, 24))
    assert len(changed(DataLoader(part, batch_size=4, shuffle=True))) == 14
    data = FederatedDataModule(numbered(), num_clients=2, batch_size=4, proxy=4)
    assert len(changed(data, num_clients=None)) == 14


def test_numbers_that_are_no_rows() -> None:
    with pytest.raises(ValueError, match=r"`weights.logits` has 20 rows, and training samples are numbered up to 2\d"):
        changed(DataLoader(numbered(), batch_size=4), rows=20)
    with pytest.raises(ValueError, match=r"2 training samples have the number \d+, and each needs a row of its own"):
        changed(DataLoader(ConcatDataset([numbered(), numbered()]), batch_size=4))


def test_no_sample_is_left_out_for_good() -> None:
    """Nine training samples of each client make two whole batches, and a limit leaves one of them."""
    dropping = DataLoader(numbered(), batch_size=4, shuffle=True, drop_last=True)
    assert len(changed(dropping, rounds=16)) == 18
    assert len(changed(DataLoader(numbered(), batch_size=4, shuffle=True), rounds=16, limit_train_batches=1)) > 12


def test_a_sampler_that_never_draws_a_sample() -> None:
    weights = [float(number % 2) for number in range(24)]
    drawn = changed(DataLoader(numbered(), batch_size=4, sampler=WeightedRandomSampler(weights, 24)), rounds=8)
    assert drawn
    assert all(number % 2 for number in drawn)


def test_a_derivative_that_is_zero_is_one() -> None:
    rule = AggITDCallback("weights", upper_lr=1.0, upper_optimizer=partial(torch.optim.SGD, momentum=0.5))
    rule.upper.freeze(Mean())
    state = rule.init(torch.zeros(1, dtype=torch.float64), torch.tensor([2, 3]))
    everybody = {"placed": torch.ones(5, dtype=torch.bool)}
    state = {**state, **rule.upper_step(state, torch.ones(5, dtype=torch.float64), 0.0, everybody).state}
    others = {"placed": torch.tensor([True, True, False, False, False])}
    after = rule.upper_step(state, torch.zeros(5, dtype=torch.float64), 0.0, others).state["upper"]
    # The momentum of those who answered goes on, and the others stand still.
    assert after.tolist() == [-1.5, -1.5, -1, -1, -1]


def test_each_client_counts_its_own_steps() -> None:
    """Adam's first step has the length of the rate, also where others have made many."""
    values = torch.zeros(2, dtype=torch.float64)
    memory: dict[str, Any] = {}
    for rows in ([True, False],) * 9 + ([False, True], [True, True]):
        values, memory = step_of_rows(
            torch.optim.Adam, 0.1, values, torch.ones_like(values), torch.tensor(rows), memory
        )
    assert values.tolist() == [pytest.approx(-1.0), pytest.approx(-0.2)]
    assert memory["steps"].tolist() == [10, 2]
    assert sorted(memory["numbers"]) == [2, 10]


class Normalized(Numbers):
    """Divides by the sum of the weights of a batch, which changes nothing while they are all one."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weights = self.weights(batch[-1])
        return (weights * (self.y - batch[0] / 10) ** 2).sum() / weights.sum() / 2


@pytest.mark.parametrize(("kind", "size"), [(Numbers, 1024), (Normalized, 4)])
def test_larger_batches_have_the_same_derivatives_in_both_kinds_of_variables(kind: Any, size: int) -> None:
    rule = AggITDCallback("weights", lower_rounds=1)
    settings = {**QUIET, "client_eval": False, "num_clients": 2, "client_val_fraction": 0.25}
    trainer = FederatedTrainer(rounds=1, callbacks=[rule], **settings)
    trainer.fit(kind(24), DataLoader(numbered(), batch_size=4))
    passes = trainer.fit_loop.federation.inquiries.problems._passes
    assert passes[False].settings.batch_size == size


class Noisy(Dataset[Any]):
    """Adds a thousand to each sample, as an augmentation does."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return (self.dataset[index][0] + 1000, *self.dataset[index][1:])


def test_held_out_samples_are_read_as_for_evaluation() -> None:
    read: list[float] = []

    class Reads(Numbers):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            read.extend(batch[0].tolist())
            super().validation_step(batch, batch_idx)

    data = FederatedDataModule(Noisy(numbered()), train_eval=numbered(), num_clients=2, batch_size=4)
    settings = {**QUIET, "client_eval": False, "client_val_fraction": 0.25}
    rule = AggITDCallback("weights", lower_rounds=1, lower_lr=1e-9)
    FederatedTrainer(rounds=1, callbacks=[rule], **settings).fit(Reads(24), data)
    assert read
    assert max(read) < 24


class Dictionaries(Dataset[Any]):
    """Samples without labels of their own."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"pixels": index}


def test_a_number_is_no_label() -> None:
    assert find_labels(with_indices(Dictionaries())) is None
    assert find_labels(with_indices(TensorDataset(torch.zeros(4, 2)))) is None
    labeled = TensorDataset(torch.zeros(3), torch.tensor([2, 0, 1]))
    for dataset in (with_indices(labeled), Subset(with_indices(Subset(labeled, range(3))), [0, 1, 2])):
        labels = find_labels(dataset)
        assert labels is not None
        assert labels.tolist() == [2, 0, 1]
