"""What bilevel rules refuse, each in one sentence."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from federations import Classifier, loader, samples, trainer
from lightning_fedhaw import AggITDCallback, FederatedDataModule, FedNestCallback, SimFBOCallback
from lightning_fedhaw.data.origins import count_shared

AGGITD = partial(AggITDCallback, "net.0", lower_rounds=1)
CLIENTS = [range(20 * client, 20 * client + 20) for client in range(3)]


def fit(rule: Any, module: Any = None, data: Any = None, rounds: int = 2, **options: Any) -> Any:
    """Fit a federation whose clients hold out a fifth of their samples."""
    module = module or Classifier()
    if data is None:
        data = loader()
        options = {"client_val_fraction": 0.2, **options}
    else:
        options = {"num_clients": None, "alpha": None, **options}
    runner = trainer(rounds, rule, client_eval=False, **options)
    try:
        runner.fit(module, data, ckpt_path=options.get("ckpt_path"))
    finally:
        assert all(parameter.requires_grad for parameter in module.parameters())
    return runner


def refused(sentence: str, rule: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        fit(rule, *args, **kwargs)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- held-out samples


def test_clients_without_held_out_samples() -> None:
    sentence = (
        r"`AggITDCallback` computes the upper loss on held-out samples of every client, and 4 of 4 clients have none"
    )
    refused(sentence, AGGITD(), client_val_fraction=0.0)
    small = FederatedDataModule([samples(20), samples(1, seed=1)])
    sentence = (
        r"and 1 of 2 clients have none \(client 1\)\. Hold some out .* leave small clients out by `min_client_samples="
    )
    refused(sentence, AGGITD(), data=small, client_val_fraction=0.2)


whole = samples(60)
OVERLAPS = {
    "the same sets": lambda train: train,
    "subsets of one set": lambda _: [Subset(whole, range(10)), Subset(whole, range(39, 45)), Subset(whole, range(60))],
    "parts of one": lambda train: [ConcatDataset([samples(5, seed=9), part]) for part in train],
}


@pytest.mark.parametrize("make", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_held_out_samples_that_are_training_samples(make: Any) -> None:
    train = [Subset(whole, own) for own in CLIENTS]
    sentence = r"needs held-out samples that no lower loss is computed on, and \d+ of client 0 are among its training"
    refused(sentence, AGGITD(), data=FederatedDataModule(train, val=make(train)))


def test_disjoint_subsets_of_one_set_are_accepted() -> None:
    train = [Subset(whole, range(20 * client, 20 * client + 15)) for client in range(3)]
    held_out = [Subset(whole, range(20 * client + 15, 20 * client + 20)) for client in range(3)]
    fit(AGGITD(), data=FederatedDataModule(train, val=held_out))
    everything = torch.arange(15)
    # The first two samples of the second client are its own; of a concatenation, those of its second part.
    second = Subset(whole, range(33, 48))
    assert count_shared(train[1], everything, second, everything) == 2
    assert (
        count_shared(ConcatDataset(train), torch.arange(15, 30), ConcatDataset([held_out[0], second]), torch.arange(20))
        == 2
    )


# ---------------------------------------------------------------------- upper and lower variables


def test_names_that_are_not_there() -> None:
    refused(
        r"`upper` names 'nett.0', and no trainable parameter has such a name; did you mean 'net.0'\?",
        AggITDCallback("nett.0"),
    )
    refused(
        r"`upper` names 'qqq', and no .* such a name\. There are \['net\.0\.weight',", AggITDCallback(["net.0", "qqq"])
    )

    module = Classifier()
    module.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"`upper` names 'net\.0', whose parameters are frozen in the module"):
        trainer(1, AGGITD(), client_val_fraction=0.2).fit(module, loader())
    assert not module.net[0].weight.requires_grad


def test_all_parameters_upper() -> None:
    refused(r"`upper`='net' names all 4 trainable parameters, and none is left for clients", AggITDCallback("net"))


def test_a_run_shorter_than_an_outer_step_is_told() -> None:
    with pytest.warns(UserWarning, match="of AggITDCallback takes 2 rounds, and the run has 1: the upper variables"):
        runner = fit(AGGITD(), rounds=1)
    assert runner.federation_summary["outer_steps"] == 0


@pytest.mark.parametrize("upper", ["", [], 3, None, [""], ["a", 3]])
def test_no_names(upper: Any) -> None:
    with pytest.raises(ValueError, match="`upper` must be the name of a submodule or of a parameter"):
        AggITDCallback(upper)


def test_an_optimizer_of_matrices() -> None:
    with pytest.raises(ValueError, match=r"`upper_optimizer` steps one vector of all upper .* Muon refuses"):
        AGGITD(upper_optimizer=torch.optim.Muon)


class Apart(Classifier):
    """Has a parameter that only the upper loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(2))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean() + self.extra.sum())


class InSomeBatches(Apart):
    """Has a parameter that only the lower loss of some batches depends on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * self.extra.prod() if batch_idx == 1 else loss


def test_upper_variables_of_some_batches_are_accepted() -> None:
    fit(AggITDCallback("extra", lower_rounds=1), InSomeBatches())


@pytest.mark.parametrize("kind", [AggITDCallback, FedNestCallback, SimFBOCallback])
def test_upper_variables_that_no_lower_loss_depends_on(kind: Any) -> None:
    sentence = r"loss that `training_step` returns does not depend on the upper variables \(extra\) together with"
    refused(sentence, kind("extra", lower_lr=0.1), Apart(), rounds=10)


def test_an_optimizer_of_upper_variables_only() -> None:
    def make(parameters: Any) -> Any:
        weight, *rest = parameters
        return torch.optim.SGD([{"params": [weight]}, {"params": rest}], lr=0.1)

    refused(
        "`configure_optimizers` makes an optimizer of the upper variable `net.0.weight`, which",
        AGGITD(),
        Classifier(make),
    )


def test_upper_variables_that_stay_with_clients() -> None:
    refused("`local_parameters`", AGGITD(), local_parameters="net.0.*")


# ---------------------------------------------------------------------- the upper loss


class Logs(Classifier):
    """Logs an upper loss of some kind."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.net(batch[0]).square().mean()
        self.log("val_loss", self.make(loss))
        self.log("other", loss)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Tensor.detach, r"a tensor of the shape \[\] that requires gradients: False"),
        (Tensor.item, "float"),
    ],
)
def test_an_upper_loss_that_is_detached(make: Any, found: str) -> None:
    sentence = rf"`validation_step` must log 'val_loss' as a differentiable scalar .* got {found}\. Log the loss itself"
    refused(sentence, AGGITD(), Logs(make))


def test_an_upper_loss_that_is_not_logged() -> None:
    sentence = (
        r"The upper loss 'valloss' is not logged by `validation_step`, which logs 'val_loss', 'other'\. Log it there"
    )
    refused(sentence, AGGITD(upper_loss="valloss"), Logs(Tensor.clone))


def test_a_module_without_an_upper_loss() -> None:
    class Plain(Classifier):
        validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]

    refused(
        r"The upper loss 'val_loss' is logged by `validation_step`, and Plain has none\. Implement it",
        AGGITD(),
        Plain(),
    )
    refused(r"`upper_loss=None` takes the loss of `upper_step`, and Classifier has none", AGGITD(upper_loss=None))


def test_a_module_that_optimizes_by_hand() -> None:
    class Manual(Classifier):
        automatic_optimization = False

    refused(
        "asks clients for derivatives of the loss that `training_step` returns, and with `automatic_",
        AGGITD(),
        Manual(),
    )


def test_a_loss_scale() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused(r"which underflow with a loss scale\. Use `precision=\"bf16-mixed\"`", AGGITD(), plugins=[plugin])


# ---------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("make", "finding"),
    [
        (torch.optim.Adam, "the clients' optimizer is Adam"),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), "the clients' SGD has `momentum`=0.9"),
    ],
)
def test_optimizers_whose_steps_are_not_proportional_to_gradients(make: Any, finding: str) -> None:
    refused(rf"takes that of plain SGD, but {finding}\. Give `lower_lr=`", AGGITD(), Classifier(make))
    fit(AGGITD(lower_lr=0.05), Classifier(make), rounds=1)


def test_optimizers_that_solve_another_problem() -> None:
    refused(
        "their SGD has `maximize=True`. Return the negative loss",
        AGGITD(lower_lr=0.1),
        Classifier(partial(torch.optim.SGD, lr=0.1, maximize=True)),
    )
    with pytest.warns(UserWarning, match=r"AdamW shrinks parameters by `weight_decay`=0.01 apart from the loss, which"):
        fit(AGGITD(lower_lr=0.1), Classifier(torch.optim.AdamW), rounds=1)


def test_several_rates() -> None:
    def groups(parameters: Any) -> Any:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first, rest[1]]}, {"params": [rest[0], rest[2]], "lr": 0.2}], lr=0.1)

    refused(r"the clients train with the rates \[0\.1, 0\.2\]", AGGITD(), Classifier(groups))
    refused(
        "`client_lr_scale` gives clients learning rates of their own", AGGITD(), client_lr_scale=[1.0, 2.0, 1.0, 1.0]
    )


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("rule", "there", "here"),
    [
        (AggITDCallback("net.3", lower_rounds=2), "upper='net.0'", "upper='net.3'"),
        (AggITDCallback("net.0", lower_rounds=3), "lower_rounds=2", "lower_rounds=3"),
        (AggITDCallback("net.0", lower_rounds=2, q="sum"), "q='random'", "q='sum'"),
        (
            AggITDCallback("net.0", lower_rounds=2, upper_optimizer=torch.optim.Adam),
            "upper_optimizer=SGD",
            "upper_optimizer=Adam",
        ),
        (FedNestCallback("net.0"), "AggITDCallback", "FedNestCallback"),
    ],
)
def test_a_checkpoint_of_another_split_of_variables(rule: Any, there: str, here: str) -> None:
    runner = fit(AggITDCallback("net.0", lower_rounds=2), rounds=1)
    runner.save_checkpoint("other.ckpt")
    again = trainer(3, rule, client_eval=False, client_val_fraction=0.2)
    with pytest.raises(
        ValueError, match=f"is of another federation: the rule was .*{there}.* there and is .*{here}.* here"
    ):
        again.fit(Classifier(), loader(), ckpt_path="other.ckpt")
