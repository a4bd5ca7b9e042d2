"""The contract between a rule and the round: what a class must implement to be made."""

import copy
import inspect
import pickle

import pytest
from lightning.pytorch import Callback

from lightning_fedhaw import FedAvgCallback, FedHAWCallback
from lightning_fedhaw.aggregation.base import normalized
from lightning_fedhaw.aggregation.servertraining import ServerTraining
from lightning_fedhaw.extending import AggregationRule, RuleOutput
from lightning_fedhaw.rule import Rule, find_rule


def average(self, cohort, state, server):
    weights = normalized(cohort.num_examples)
    return RuleOutput(cohort.vectors.weighted_sum(weights), state, weights)


@pytest.mark.parametrize("name", ["stpe", "steps", "_step", "Step"])
def test_a_rule_that_misspells_step_is_refused_when_it_is_made(name):
    misspelled = type("Mean", (AggregationRule,), {name: average})
    with pytest.raises(
        TypeError,
        match=rf"^`Mean` must implement the method `step`, which is missing. It has `{name}`; did you mean `step`\?$",
    ):
        misspelled()


@pytest.mark.parametrize("names", [(), ("setup",), ("on_fit_start", "init", "aggregate"), ("stop",)])
def test_only_a_method_that_overrides_nothing_is_taken_for_a_misspelled_one(names):
    without = type("Mean", (AggregationRule,), dict.fromkeys(names, average))
    hint = r" It has `stop`; did you mean `step`\?" if "stop" in names else ""
    with pytest.raises(TypeError, match=rf"^`Mean` must implement the method `step`, which is missing.{hint}$"):
        without(num_clients=3)


def test_the_class_that_corrects_the_name_is_made():
    misspelled = type("Mean", (AggregationRule,), {"stpe": average})
    corrected = type("Mean", (misspelled,), {"step": average})
    assert corrected(num_clients=3).options.num_clients == 3


def test_a_rule_between_must_be_completed_too():
    with pytest.raises(TypeError, match=r"^`ServerTraining` must implement the method `objective`, which is missing.$"):
        ServerTraining()


@pytest.mark.parametrize("kind", [Rule, AggregationRule])
def test_the_bases_are_no_rules(kind):
    with pytest.raises(TypeError, match=rf"`{kind.__name__}` must implement the method `step`"):
        kind()


def test_what_editors_and_the_command_line_read_is_the_constructor():
    assert list(inspect.signature(FedAvgCallback).parameters) == ["weighting", "weights", "federation"]
    kind = type("Mean", (AggregationRule,), {"step": average})
    assert list(inspect.signature(kind).parameters) == ["federation"]


def test_a_rule_can_be_copied_and_sent_to_another_process():
    rule = FedHAWCallback(num_clients=3)
    rule.state = {"gamma": 0.5}
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert other.state == {"gamma": 0.5}
        assert other.options == rule.options


def test_a_rule_of_the_round_needs_no_trainer():
    kind = type("Mean", (Rule,), {"step": average})
    rule = kind()
    assert not isinstance(rule, Callback)
    assert find_rule([Callback(), rule]) is rule
    assert rule.state == {}
