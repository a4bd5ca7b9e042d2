"""The guard against collapse: when it steps in, what it then returns, and that it says so once and counts."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from federations import Classifier, flat, loader, samples, trainer
from lightning_fedhaw import (
    FedAWACallback,
    FederatedDataModule,
    FedHAWCallback,
    FedLAWCallback,
    PublishedFedHAWCallback,
)
from lightning_fedhaw.extending import ClientVectors, Cohort, RuleOutput

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Server:
    """A server with or without data, whose loss is the square of the distance from (2, 0)."""

    seed = 0

    def __init__(self, samples: int = 0):
        self.proxy_dataset = range(samples) if samples else None

    def proxy_batch(self, index: Tensor) -> Tensor:
        return index

    def loss(self, vector: Tensor, batch: Tensor, batch_idx: int = 0) -> Tensor:
        return (vector - torch.tensor([2.0, 0.0], dtype=vector.dtype)).square().sum()


def cohort(start=(1.0, 0.0), moves=((2.0, 0.0), (0.0, 0.0))):
    """Two clients with 1 and 3 samples: the average of the moves is (0.5, 0)."""
    origin = torch.tensor(start, dtype=torch.float64)
    return Cohort(
        round=4,
        clients=torch.arange(2),
        num_examples=torch.tensor([1, 3]),
        num_steps=torch.ones(2, dtype=torch.int64),
        received=torch.ones(2, dtype=torch.bool),
        start=origin,
        vectors=ClientVectors(torch.tensor(moves, dtype=torch.float64), origin),
    )


def judged(mix, state=None, server=None, given=None, guard=True):
    rule = FedHAWCallback(guard=guard)
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64)
    output = RuleOutput(torch.tensor(mix, dtype=torch.float64), {"own": 1.0}, weights)
    return rule.guarded(output, given or cohort(), state or {}, server or Server())


# The average is (1.5, 0).
@pytest.mark.parametrize(
    ("mix", "complaint"),
    [
        ((4.6, 0.0), "its norm is 4.6, and the average's 1.5"),
        ((0.0, 0.49), "its norm has fallen to 0.49, and has been 1"),
        ((math.nan, 0.0), "it is not finite"),
        ((math.inf, 0.0), "it is not finite"),
    ],
)
def test_a_collapse_by_norms(mix, complaint):
    with pytest.warns(
        UserWarning, match=f"FedHAWCallback's model of round 4 was replaced .*, because {complaint}. This"
    ):
        end = judged(mix)
    assert end.parameters.tolist() == [1.5, 0.0]
    assert end.weights.tolist() == [0.25, 0.75]
    assert end.metrics["guarded_rounds"] == 1.0
    assert end.state["own"] == 1.0


@pytest.mark.parametrize("mix", [(4.4, 0.0), (0.0, 0.51), (1.5, 0.0), (-1.0, 1.0)])
def test_a_model_that_is_only_different_stays(mix):
    end = judged(mix)
    assert end.parameters.tolist() == list(mix)
    assert end.weights.tolist() == [0.9, 0.1]
    assert end.metrics["guarded_rounds"] == 0.0


def test_a_model_that_shrinks_with_the_average_stays():
    """The clients themselves went to 0.1, so that a model of 0.2 is no collapse of the rule."""
    given = cohort(moves=((-0.9, 0.0), (-0.9, 0.0)))
    assert judged((0.2, 0.0), given=given).metrics["guarded_rounds"] == 0.0


def test_the_norm_is_compared_with_the_largest_of_all_rounds():
    first = judged((1.0, 0.0), given=cohort(start=(10.0, 0.0), moves=((-9.0, 0.0), (-9.0, 0.0))))
    assert first.metrics["guarded_rounds"] == 0.0
    with pytest.warns(UserWarning, match=r"has fallen to 1.4, and has been 10\."):
        judged((1.4, 0.0), state=first.state)


def test_a_model_that_starts_at_zero_may_grow():
    given = cohort(start=(0.0, 0.0))
    assert judged((1.4, 0.0), given=given).metrics["guarded_rounds"] == 0.0
    nothing = cohort(start=(0.0, 0.0), moves=((0.0, 0.0), (0.0, 0.0)))
    assert judged((1.4, 0.0), given=nothing).metrics["guarded_rounds"] == 0.0


def test_proxy_data_judge_instead_of_norms():
    """The average has the loss 0.25: up to 0.3125 is tolerated, which is 0.559 from (2, 0)."""
    server = Server(samples=5)
    assert judged((2.55, 0.0), server=server).metrics["guarded_rounds"] == 0.0
    with pytest.warns(UserWarning, match=r"its loss on the proxy data is 0.314, and the average's 0.25\. This"):
        assert judged((2.56, 0.0), server=server).parameters.tolist() == [1.5, 0.0]


def test_it_is_said_once_and_counted():
    with pytest.warns(UserWarning, match="was replaced by the plain average"):
        first = judged((9.0, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = judged((9.0, 0.0), state=first.state)
        third = judged((1.0, 0.0), state=second.state)
    assert third.metrics["guarded_rounds"] == 2.0


def test_without_a_guard_the_model_is_the_rules():
    end = judged((9.0, 0.0), guard=False)
    assert end.parameters.tolist() == [9.0, 0.0]
    assert set(end.state) == {"own"}


def test_the_guard_is_on_for_the_rule_without_units_and_off_for_the_published_ones():
    assert FedHAWCallback().guard
    for rule in (PublishedFedHAWCallback(), FedLAWCallback(), FedAWACallback()):
        assert not rule.guard


DYING = {"lr_gamma": 1.0, "lr_lambda": 0.0}
"""Steps of the published rule that make the model of this federation vanish."""


@pytest.mark.filterwarnings("ignore:FedHAW's scale left", "ignore:FedHAW's hypergradient step")
def test_a_rule_that_dies_is_replaced_and_the_count_survives_a_resume(tmp_path):
    def fit(rounds, rule, path=None):
        module = Classifier()
        runner = trainer(rounds, rule, enable_checkpointing=True, default_root_dir=tmp_path)
        runner.fit(module, loader(), ckpt_path=path)
        return runner, module

    with pytest.warns(UserWarning, match="PublishedFedHAWCallback's model of round"):
        whole, module = fit(6, PublishedFedHAWCallback(**DYING, guard=True))
    count = whole.callback_metrics["guarded_rounds"]
    assert count > 1
    _, dead = fit(6, PublishedFedHAWCallback(**DYING))
    assert flat(dead).norm() < 0.1
    assert flat(module).norm() > 1
    with pytest.warns(UserWarning, match="PublishedFedHAWCallback's model of round"):
        first, _ = fit(5, PublishedFedHAWCallback(**DYING, guard=True))
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    resumed, again = fit(6, PublishedFedHAWCallback(**DYING, guard=True), path)
    assert torch.equal(flat(again), flat(module))
    assert resumed.callback_metrics["guarded_rounds"] == count
    assert resumed.federation_summary["guarded_rounds"] == count


def test_proxy_data_that_fit_no_loss_are_refused_before_the_first_round():
    data = FederatedDataModule(samples(), proxy=samples(features=2), batch_size=8)
    with pytest.raises(ValueError, match="`FedHAWCallback` cannot use the data given as `proxy`"):
        trainer(2, FedHAWCallback()).fit(Classifier(), datamodule=data)
    trainer(2, FedHAWCallback(guard=False)).fit(Classifier(), datamodule=data)
