"""What a class is called in random streams and checkpoints stays, whatever its name."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_fedhaw
from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import (
    AWGNChannel,
    ErasureChannel,
    FedAvgCallback,
    FedAvgMCallback,
    FedHAWCallback,
    FedHyperCallback,
    PacketLossChannel,
    PublishedFedHAWCallback,
    QuantizationChannel,
    ScaffoldCallback,
    aggregation,
    channel,
    data,
    objectives,
)
from lightning_fedhaw.adapter.checkpoint import RoundCheckpoint
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.objectives import FedDynObjective
from lightning_fedhaw.report import history

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

# Written down once. A class may be renamed, and its line here gets the new name on the left; the right side stays.
KEYS = {
    "AggregationRule": "AggregationRule",
    "AggITDCallback": "AggITDCallback",
    "FedAdagradCallback": "FedAdagradCallback",
    "FedNestCallback": "FedNestCallback",
    "SimFBOCallback": "SimFBOCallback",
    "FedAdamCallback": "FedAdamCallback",
    "FedAdpCallback": "FedAdpCallback",
    "FedAWACallback": "FedAWACallback",
    "FedAvgCallback": "FedAvgCallback",
    "FedAvgMCallback": "FedAvgMCallback",
    "FedBECallback": "FedBECallback",
    "FedDFCallback": "FedDFCallback",
    "FedDynCallback": "FedDynCallback",
    "FedExPCallback": "FedExPCallback",
    "FedHAWCallback": "FedHAWCallback",
    "FedHyperCallback": "FedHyperCallback",
    "FedLAWCallback": "FedLAWCallback",
    "FedLWSCallback": "FedLWSCallback",
    "FedNovaCallback": "FedNovaCallback",
    "FedOptCallback": "FedOptCallback",
    "FedVGCallback": "FedVGCallback",
    "FedYogiCallback": "FedYogiCallback",
    "GeometricMedianCallback": "GeometricMedianCallback",
    "KrumCallback": "KrumCallback",
    "CoordinateMedianCallback": "MedianCallback",
    "LearnedClientRateCallback": "LearnedClientRateCallback",
    "LearnedWeightingCallback": "LearnedWeightingCallback",
    "MultiKrumCallback": "MultiKrumCallback",
    "PublishedFedHAWCallback": "PublishedFedHAWCallback",
    "QFedAvgCallback": "QFedAvgCallback",
    "ScaffoldCallback": "ScaffoldCallback",
    "ServerFineTuningCallback": "ServerFineTuningCallback",
    "TrimmedMeanCallback": "TrimmedMeanCallback",
    "AWGNChannel": "AWGNChannel",
    "AvailabilityChannel": "AvailabilityChannel",
    "BitFlipChannel": "BitFlipChannel",
    "BlockChannel": "BlockChannel",
    "Channel": "Channel",
    "StragglerChannel": "DeadlineChannel",
    "ErasureChannel": "ErasureChannel",
    "FadingChannel": "FadingChannel",
    "OverTheAirChannel": "OverTheAirChannel",
    "PacketLossChannel": "PacketLossChannel",
    "DifferentialPrivacyChannel": "PrivacyChannel",
    "QuantizationChannel": "QuantizedChannel",
    "SparsificationChannel": "SparsifiedChannel",
    "AggregateChannel": "SumChannel",
    "ClientObjective": "ClientObjective",
    "FedDynObjective": "FedDyn",
    "FedNTD": "FedNTD",
    "FedProx": "FedProx",
    "MOON": "MOON",
    "ScaffoldObjective": "Scaffold",
    "RunHistory": "History",
}


def public_classes():
    """Every class with a key that a user can import."""
    found = {}
    for module in (lightning_fedhaw, aggregation, channel, objectives, history):
        for name, thing in vars(module).items():
            if isinstance(thing, type) and issubclass(thing, KeyedCallback) and thing is not KeyedCallback:
                found[name] = thing
    return found


def subclasses(kind):
    """All classes of the package below one."""
    for each in kind.__subclasses__():
        if each.__module__.startswith("lightning_fedhaw."):
            yield each
        yield from subclasses(each)


def test_the_keys_are_those_that_were_written_down():
    assert {name: kind.key for name, kind in public_classes().items()} == KEYS


def test_no_two_classes_have_the_same_key():
    keys = [kind.key for kind in subclasses(KeyedCallback)]
    assert len(keys) > len(KEYS)
    assert len(set(keys)) == len(keys)


def test_a_class_without_a_key_of_its_own_is_called_by_its_name():
    class Louder(AWGNChannel):
        pass

    assert Louder.key == "test_a_class_without_a_key_of_its_own_is_called_by_its_name.<locals>.Louder"
    assert Louder(10.0, name="second").state_key == f"{Louder.key}/uplink/second"
    assert AWGNChannel.key == "AWGNChannel"


@pytest.mark.parametrize("key", [3, "", None, "Channel/uplink"])
def test_a_key_that_is_no_name_is_refused(key):
    with pytest.raises(TypeError, match='`key` of the class `Louder` must be .*, got .*key = "Loud'):
        type("Louder", (AWGNChannel,), {"key": key})


def renamed(kind):
    return type("Renamed", (kind,), {"key": kind.key})


def trained(*callbacks, **options):
    return flat(train(callbacks=callbacks, **options)[1])


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ErasureChannel, {"probability": 0.3}),
        (AWGNChannel, {"snr_db": 10.0, "link": "downlink"}),
        (PacketLossChannel, {"probability": 0.3, "packet_bytes": 32}),
        (QuantizationChannel, {"bits": 4}),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_a_channel_that_was_renamed_draws_the_same_numbers(kind, arguments):
    before = trained(kind(**arguments))
    assert torch.equal(trained(renamed(kind)(**arguments)), before)
    assert not torch.equal(trained(type("Another", (kind,), {})(**arguments)), before)


def run(rounds, rule, objective, ckpt_path=None):
    checkpoint = ModelCheckpoint(dirpath="kept", filename="{step}", save_top_k=-1)
    runner = trainer(rounds=rounds, rule=rule, callbacks=[objective, checkpoint], enable_checkpointing=True)
    module = Classifier()
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return flat(module)


@pytest.mark.parametrize(
    "rules",
    [
        (FedHAWCallback, renamed(FedHAWCallback)),
        (PublishedFedHAWCallback, renamed(PublishedFedHAWCallback)),
        (ScaffoldCallback, renamed(ScaffoldCallback)),
        (FedHyperCallback, renamed(FedHyperCallback)),
        (
            lambda: FedAvgMCallback(rule=FedAvgCallback()),
            lambda: renamed(FedAvgMCallback)(rule=renamed(FedAvgCallback)()),
        ),
    ],
    ids=["FedHAW", "published FedHAW", "SCAFFOLD", "FedHyper", "FedAvgM on FedAvg"],
)
def test_a_run_is_resumed_with_a_rule_and_an_objective_that_were_renamed(rules):
    rule, other = rules
    straight = run(3, rule(), FedDynObjective())
    run(2, rule(), FedDynObjective())
    assert torch.equal(run(3, other(), renamed(FedDynObjective)(), ckpt_path="kept/step=2.ckpt"), straight)


def test_a_run_is_not_resumed_with_another_rule_that_inherits():
    run(2, FedHAWCallback(), FedDynObjective())
    another = type("Another", (FedHAWCallback,), {})
    with pytest.raises(ValueError, match=r"another federation: the rule was 'FedHAWCallback\(.* and is 'Another\("):
        run(3, another(), FedDynObjective(), ckpt_path="kept/step=2.ckpt")


@pytest.mark.parametrize(
    "scheme",
    [
        data.IIDPartitioner(),
        data.DirichletPartitioner(0.5),
        data.HybridDirichletPartitioner(),
        data.ShardPartitioner(),
        data.QuantitySkewPartitioner(),
        data.LongTailPartitioner(2.0, data.IIDPartitioner()),
        data.LabelSwapPartitioner(data.IIDPartitioner(), 0.5),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_a_partition_is_drawn_by_the_scheme_and_not_by_the_name_of_its_class(scheme):
    kind = type(scheme)
    again = type("Renamed", (kind,), {})(**vars(scheme))
    given = {"num_samples": 120, "labels": torch.arange(120) % 3, "seed": 7}
    assert again.partition(4, **given).fingerprint() == scheme.partition(4, **given).fingerprint()


@pytest.mark.parametrize("sampler", [data.UniformSampler(3), data.WeightedSampler(3)])
def test_a_cohort_is_drawn_by_the_round_and_not_by_the_name_of_the_sampler(sampler):
    again = type("Renamed", (type(sampler),), {})(**vars(sampler))
    given = {"num_clients": 8, "sizes": torch.arange(10, 18), "seed": 7}
    assert [again.sample(t, **given) for t in range(5)] == [sampler.sample(t, **given) for t in range(5)]


def test_lightning_names_the_checkpoint_callback_by_its_class():
    assert RoundCheckpoint(2).state_key.startswith("RoundCheckpoint{")
