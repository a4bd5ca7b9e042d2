"""Every argument of every public constructor: what is refused, in which sentence, and what is kept of what is accepted.

The walk goes by the annotations. Whoever adds an argument says here what it is given where its annotation says too
little, or why anything will do.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, nan
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lightning_fedhaw
from federations import QUIET, Classifier
from lightning_fedhaw import (
    FederatedDataModule,
    FederatedTrainer,
    arguments,
    channel,
    data,
    deploy,
    diagnostics,
    extending,
    objectives,
)
from lightning_fedhaw.data.features import cache_features

DATA = TensorDataset(torch.randn(8, 2), torch.arange(8) % 2)

# What a constructor needs beside the argument that is looked at, and where that depends on the argument.
NEEDS: dict[str, dict[str, Any]] = {
    "AWGNChannel": {"snr_db": 3.0},
    **{name: {"upper": "net.0"} for name in ("AggITDCallback", "FedNestCallback", "SimFBOCallback")},
    "AWGNChannel.noise_std": {"snr_db": None},
    "BitFlipChannel": {"rate": 0.1},
    "DirichletPartitioner": {"alpha": 0.5},
    "DirichletPartitioner.sizes": {"kind": "client"},
    "StragglerChannel": {"deadline": 2.0, "seconds_per_sample": 0.5},
    "ErasureChannel": {"probability": 0.1},
    "ErasureChannel.max_probability": {"probability": None},
    "ErasureChannel.legacy_seed": {"probability": None, "max_probability": 0.5},
    "ErasureChannel.burst": {"probability": None},
    "FadingChannel": {"snr_db": 3.0},
    "FadingChannel.truncation": {"inversion": True},
    "FederatedDataModule": {"train": DATA},
    "FederatedTrainer": {"rounds": 1, **QUIET},
    "FederatedTrainer.checkpoint_every_n_rounds": {"enable_checkpointing": True},
    "FixedSequenceSampler": {"cohorts": [[0]]},
    "GilbertElliott": {"enter": 0.1, "leave": 0.5},
    "HoldOut.groups": {"fraction": 0.5},
    "HoldOut.stratify": {"fraction": 0.5},
    "IndexPartitioner": {"indices": [[0]]},
    "NaturalIdPartitioner": {"keys": ["a"]},
    "LeafDataModule": {"root": "nowhere"},
    "RowsDataModule": {"train": [{"x": 1.0}, {"x": 2.0}]},
    "LabelSwapPartitioner": {"base": data.IIDPartitioner(), "fraction": 0.5},
    "LongTailPartitioner": {"rho": 2.0, "base": data.IIDPartitioner()},
    "MOON": {"representation": "encoder"},
    "OverTheAirChannel": {"snr_db": 3.0},
    "PacketLossChannel": {"probability": 0.1},
    "DifferentialPrivacyChannel": {"clip": 1.0, "noise_multiplier": 0.5},
    "ClientSide": {"make_trainer": len, "make_model": len, "make_data": len},
    "ServerSide": {
        "trainer": FederatedTrainer(rounds=1, callbacks=[lightning_fedhaw.FedAvgCallback()], **QUIET),
        "model": Classifier(),
        "sites": deploy.InMemorySites({}),
        "num_sites": 3,
    },
    "SparsificationChannel": {"fraction": 0.5},
    "StanfordDogs": {"root": "nowhere"},
    "TimmClassifier": {"model_name": "test_vit", "num_classes": 3, "model_kwargs": {"img_size": 32}},
    "TimmClassifier.lora_alpha": {"trainable": "head", "lora_rank": 1},
    "TimmClassifier.lora_rank": {"trainable": "head"},
    "UniformSampler": {"clients_per_round": 2},
    "WeightedSampler": {"clients_per_round": 2},
}

# A value to try of numbers without a default, or with one that two numbers of other kinds would not share.
SAMPLES: dict[str, float] = {
    "alpha": 0.5,
    "alpha_balanced": 8.0,
    "alpha_skewed": 0.5,
    "backbone_lr": 0.125,
    "clients_per_round": 2,
    "delta": 0.125,
    "fraction": 0.5,
    "initial_second_moment": 0.25,
    "layer_decay": 0.5,
    "learning_rate": 0.5,
    "lora_alpha": 2.0,
    "max_probability": 0.5,
    "momentum": 0.5,
    "noise_std": 0.5,
    "proximal": 0.5,
    "rate": 0.5,
    "rho": 2.0,
    "sigma": 0.5,
    "snr_db": 3.0,
    "truncation": 0.5,
}

NEGATIVE = {"snr_db", "rounds", "exponent"}
"""Numbers that may be negative: decibels, -1 rounds, which is no limit, and the exponent of a weight."""

INFINITE = {"snr_db", "deadline", "k_factor", "clip", "tau_max", "damping"}
"""Numbers that may be infinite: no noise, no deadline, no fading, no clipping, no bound, no division."""

# Arguments of other kinds, each with something that is none.
WRONG: dict[str, Any] = {
    "alpha_bounds": (2.0, 3.0),
    "base": "iid",
    "beta_bounds": "wide",
    "burst": (0.1, 0.5),
    "client_val": 3,
    "clients": {"a": 3},
    "cohorts": [["a"]],
    "RowsDataModule.columns": "x",
    "LeafDataModule.shape": "flat",
    "Landscape.clients": [0, 1, 1],
    "collate_fn": 3,
    "groups": 3,
    "head_widths": 64,
    "hyper_optimizer": "adam",
    "indices": [[0.5]],
    "keys": "abc",
    "LabelSwapPartitioner.labels": (1, 1),
    "lora_targets": "qkv",
    "lr_scheduler": 3,
    "local_parameters": 3,
    "logits": 3,
    "model_kwargs": 3,
    "RoundTable.metrics": "val_acc",
    "make_data": 3,
    "make_model": 3,
    "make_trainer": 3,
    "ServerSide.model": 3,
    "ServerSide.sites": 3,
    "ServerSide.trainer": 3,
    "optimizer": 3,
    "partitioner": "iid",
    "phases": ["noon"],
    "ErasureChannel.probability": "half",
    "proxy": 0.5,
    "rule": 3,
    "sampler": 3,
    "scale_bounds": 3,
    "scheduler": 3,
    "sizes": [0],
    "step_bounds": 3,
    "storage_dtype": torch.int8,
    "target_transform": 3,
    "trace": [[2.0]],
    "upper": 3,
    "upper_optimizer": 3,
    "train": 3,
    "train_eval": 3,
    "trainable": None,
    "transform": 3,
    "weights": [-1.0],
    "targets": 3,
    "bounds": 3,
    "learn": 3,
    "links": 3,
    "probe": 3,
}

# Arguments that take anything, each with the reason.
ANYTHING = {
    "checkpoint_path": "a path of any kind; a file that is not there is refused when it is read",
    "labels": "an array of any library, or a function; what it holds is checked with the data in hand",
    "folder": "a path of any kind",
    "memory_folder": "a path of any kind",
    "root": "a path of any kind; a folder without the data is refused when it is read",
    "test": "whatever `test_dataloader` may return, which Lightning checks",
    "val": "whatever `val_dataloader` may return, which Lightning checks",
}

# What the package makes and users read: no user writes these calls.
RECORDS = {"Arrivals", "Batch", "ClientData", "ClientUpdate", "ClientVectors", "Cohort", "Substitute", "LoaderSettings"}
RECORDS |= {
    "Histogram",
    "LocalTraining",
    "Aggregated",
    "Eigenvalues",
    "Estimate",
    "HeldOutLoss",
    "ShapleyValues",
    "ShrinkingTerms",
    "ParameterLayout",
    "Message",
    "ProbeResult",
    "MessageSize",
    "Partition",
    "RuleOutput",
    "ChannelContext",
    "FederationClients",
    "Server",
}

# Reads files when it is made: only what it refuses before that is looked at.
NEEDS_FILES = {"LeafDataModule", "StanfordDogs"}


@dataclass(frozen=True)
class Case:
    """One argument of one constructor."""

    kind: type
    name: str
    hint: Any
    default: Any
    needs: dict[str, Any] = field(default_factory=dict)

    def make(self, value: object) -> Any:
        return self.kind(**{**self.needs, self.name: value})

    @property
    def wrong(self) -> Any:
        """Something that is refused, for arguments whose annotation does not say what would be."""
        return WRONG.get(f"{self.kind.__name__}.{self.name}", WRONG.get(self.name))

    @property
    def is_listed(self) -> bool:
        return bool({self.name, f"{self.kind.__name__}.{self.name}"} & {*WRONG})

    @property
    def kinds(self) -> set[Any]:
        """What the annotation allows, without None and Literals."""
        return {part for part in parts(self.hint) if get_origin(part) is not Literal and part is not type(None)}

    @property
    def words(self) -> tuple[Any, ...]:
        """The words that the annotation allows."""
        return tuple(word for part in parts(self.hint) if get_origin(part) is Literal for word in get_args(part))

    @property
    def sample(self) -> float:
        """A number to try."""
        if self.name in self.needs and self.needs[self.name] is not None:
            return self.needs[self.name]
        fallback = self.default if isinstance(self.default, (int, float)) else 3
        return SAMPLES.get(self.name, fallback)


def parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def public_classes() -> list[type]:
    found = {}
    for module in (lightning_fedhaw, channel, data, deploy, diagnostics, extending, objectives):
        for name in module.__all__:
            kind = getattr(module, name)
            if inspect.isclass(kind) and not inspect.isabstract(kind) and name not in RECORDS:
                found[name] = kind
    return [found[name] for name in sorted(found)]


def constructor_arguments(kind: type) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each argument of a class, and of its base where it takes ``**settings`` of that."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        if not base.__module__.startswith("lightning_fedhaw"):
            break  # no constructor of the package's own, such as that of an observer
        hints = get_type_hints(base.__init__)
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, (hints[p.name], p.default))
        if not any(p.name == "settings" for p in parameters):
            break
    return found


def cases() -> list[Any]:
    listed = []
    for kind in public_classes():
        own = kind.__name__
        for name, (hint, default) in constructor_arguments(kind).items():
            needs = {**NEEDS.get(own, {}), **NEEDS.get(f"{own}.{name}", {})}
            case = Case(kind, name, hint, default, needs)
            listed.append(pytest.param(case, id=f"{own}.{name}"))
    return listed


CASES = cases()


def of_kind(test: Callable[[Case], bool]) -> Any:
    return pytest.mark.parametrize("case", [param for param in CASES if test(param.values[0])])


def is_number(case: Case) -> bool:
    return bool(case.kinds & {int, float}) and not case.is_listed


def message(case: Case, value: object) -> str:
    """The sentence in which a value is refused."""
    with pytest.raises((ValueError, TypeError)) as caught:
        case.make(value)
    return str(caught.value)


def test_the_walk_knows_every_argument():
    for param in CASES:
        case = param.values[0]
        known = is_number(case) or case.words or case.kinds <= {bool, str} or case.is_listed or case.name in ANYTHING
        assert known, f"say in WRONG what {param.id} refuses, or in ANYTHING why it refuses nothing"
    assert len(CASES) > 200


@of_kind(is_number)
def test_what_is_no_number_is_refused(case):
    for value in ("x", True, nan, [], np.bool_(True), torch.tensor(True)):
        assert f"`{case.name}` must be " in message(case, value)
        assert f", got {value!r}." in message(case, value)
    if case.name not in INFINITE:
        assert ", got inf." in message(case, inf)
    if case.name not in NEGATIVE:
        assert ", got -1." in message(case, -1)
    if float not in case.kinds:
        assert "must be a whole number" in message(case, 2.5)
    if type(None) not in parts(case.hint):
        assert ", got None." in message(case, None)


@of_kind(lambda case: is_number(case) and case.kind.__name__ not in NEEDS_FILES)
def test_scalars_of_numpy_and_torch_are_numbers_and_become_plain(case):
    of_numpy = np.float32 if isinstance(case.sample, float) or int not in case.kinds else np.int64
    for convert in (of_numpy, torch.tensor):
        given = convert(case.sample)
        made = case.make(given)
        assert not list(scalars(made)), f"{case.name} was kept as it was given"
        owner = made.fit_loop.options if isinstance(made, FederatedTrainer) else made
        if case.name in vars(owner):
            kept = vars(owner)[case.name]
            assert type(kept) in (int, float)
            assert kept == given.item()


def scalars(thing: Any, depth: int = 0) -> Any:
    """The scalars of NumPy in an object, and in what it is made of."""
    if isinstance(thing, np.generic):
        yield thing
    if depth > 3 or isinstance(thing, (torch.Tensor, torch.nn.Module, type)):
        return
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, (tuple, list)):
        inner = list(thing)
    elif isinstance(thing, partial):
        inner = [*thing.args, *thing.keywords.values()]
    elif type(thing).__module__.startswith("lightning_fedhaw"):
        inner = list(vars(thing).values())
    else:
        inner = []
    for part in inner:
        yield from scalars(part, depth + 1)


@of_kind(lambda case: bool(case.words) and str not in case.kinds)
def test_an_unknown_word_is_refused_and_the_known_ones_are_named(case):
    sentence = message(case, "unheard-of")
    assert f"`{case.name}` must be " in sentence
    assert ", got 'unheard-of'." in sentence
    if not case.kinds:
        assert all(repr(word) in sentence for word in case.words)
        assert f"`{case.name}` must be one of " in message(case, 3)


@of_kind(lambda case: bool(case.words) and not case.kinds and case.kind.__name__ not in NEEDS_FILES)
def test_a_word_is_kept_as_pythons_own(case):
    made = case.make(np.str_(case.words[-1]))
    assert not list(scalars(made))


@of_kind(lambda case: case.kinds == {bool})
def test_a_flag_is_no_text_and_no_number(case):
    for value in ("yes", 1, None):
        assert message(case, value) == f"`{case.name}` must be True or False, got {value!r}."


@of_kind(lambda case: case.kinds == {bool} and case.kind.__name__ not in NEEDS_FILES)
def test_numpys_booleans_are_flags(case):
    needs = {"pin_memory": np.bool_(False), "pretrained": np.bool_(False)}
    made = case.make(needs.get(case.name, np.bool_(True)))
    assert not list(scalars(made))


@of_kind(lambda case: case.kinds == {str} and not case.words)
def test_a_text_is_no_number(case):
    assert message(case, 3) == f"`{case.name}` must be a string, got 3."


@of_kind(lambda case: case.is_listed)
def test_other_arguments_are_refused_by_name(case):
    assert f"`{case.name}`" in message(case, case.wrong)


# ---------------------------------------------------------------------- single ones


def test_the_features_of_a_frozen_network(tmp_path):
    keep = partial(cache_features, lambda images: images, DATA, tmp_path, key="k", progress=False)
    with pytest.raises(ValueError, match="`batch_size` must be a whole number of at least 1, got True"):
        keep(batch_size=True)
    with pytest.raises(ValueError, match="`num_workers` must be a whole number of at least 0, got -1"):
        keep(num_workers=-1)
    with pytest.raises(ValueError, match="`progress` must be True or False, got 'no'"):
        keep(progress="no")
    with pytest.raises(ValueError, match="`key` must be a string, got 3"):
        keep(key=3)
    with pytest.raises(TypeError, match="`extract` must be a function that can be called as `extract"):
        cache_features(3, DATA, tmp_path, key="k")
    assert len(keep(shard_size=np.int64(3), batch_size=torch.tensor(2))) == 8
    assert len(list(tmp_path.iterdir())) == 1
    keep(shard_size=3)
    assert len(list(tmp_path.iterdir())) == 1, "the same numbers are the same features"


def test_hyperparameters_are_plain():
    module = lightning_fedhaw.TimmClassifier(
        "test_vit",
        np.int64(3),
        trainable=np.int64(2),
        head_widths=np.array([4]),
        lr=np.float32(0.1),
        model_kwargs={"img_size": 32},
    )
    assert module.hparams["num_classes"] == 3
    assert type(module.hparams["num_classes"]) is int
    assert type(module.hparams["trainable"]) is int
    assert module.hparams["head_widths"] == [4]
    assert module.hparams["lr"] == float(np.float32(0.1))
    assert type(module.hparams["lr"]) is float


def test_an_unknown_argument_of_a_channel_is_told_with_the_nearest_of_its_own():
    with pytest.raises(TypeError, match="`ErasureChannel` .* 'max_probabilty'; did you mean `max_probability`?"):
        channel.ErasureChannel(max_probabilty=0.5)
    with pytest.raises(TypeError, match="`AWGNChannel` .* 'noise_sd'; did you mean `noise_std`?"):
        channel.AWGNChannel(noise_sd=0.5)
    with pytest.raises(TypeError, match="`BitFlipChannel` .* 'lnk'; did you mean `link`?"):
        channel.BitFlipChannel(0.1, lnk="uplink")
    with pytest.raises(
        TypeError, match="`QuantizationChannel` .* 'zzz'; it takes bits, fallback, link, name, per, scheme"
    ):
        channel.QuantizationChannel(zzz=1)


def test_lists_of_whole_numbers_take_those_of_numpy_and_torch():
    for given in ([np.int64(1), torch.tensor(2)], np.array([1, 2]), torch.tensor([1, 2])):
        swap = data.LabelSwapPartitioner(data.IIDPartitioner(), 0.5, given)
        assert swap.labels == (1, 2)
        assert {type(label) for label in swap.labels} == {int}
        fixed = data.IndexPartitioner([given, [np.uint8(0)]])
        assert [chosen.tolist() for chosen in fixed.partition(2, num_samples=3).indices] == [[1, 2], [0]]
        assert data.DirichletPartitioner(1.0, "client", sizes=given).sizes == (1, 2)
    for wrong in ([1, True], [1, 2.0], "12", 3, [1, None]):
        with pytest.raises(ValueError, match="`labels` must be two different whole numbers, such as .1, 7., got"):
            data.LabelSwapPartitioner(data.IIDPartitioner(), 0.5, wrong)
        with pytest.raises(ValueError, match="`indices` must be lists of whole numbers, .* list of client 1"):
            data.IndexPartitioner([[0], wrong])


@pytest.mark.parametrize("make", [FederatedDataModule, FederatedTrainer, lightning_fedhaw.FedAvgCallback])
def test_a_class_in_the_place_of_an_object_is_told_to_be_called(make):
    given = {"train": DATA} if make is FederatedDataModule else {}
    with pytest.raises(
        TypeError, match=r"`partitioner` must be .*, got the class DirichletPartitioner\. Write `DirichletPartitioner"
    ):
        make(**given, partitioner=data.DirichletPartitioner)
    with pytest.raises(TypeError, match=r"`base` must be .*, got the class IIDPartitioner\. Write `IIDPartitioner\("):
        data.LabelSwapPartitioner(data.IIDPartitioner, 0.5)


# ---------------------------------------------------------------------- the checks


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({}, "a finite number"),
        ({"infinite": True}, "a number"),
        ({"minimum": 0}, "a finite number of at least 0"),
        ({"minimum": 0, "infinite": True}, "a number of at least 0"),
        ({"above": 0}, "a finite number above 0"),
        ({"maximum": 2.5}, "a finite number of at most 2.5"),
        ({"below": 2.5}, "a finite number below 2.5"),
        ({"minimum": 0, "maximum": 1}, "a number in [0, 1]"),
        ({"above": 0, "below": 1}, "a number in (0, 1)"),
        ({"minimum": 0, "below": 1}, "a number in [0, 1)"),
    ],
)
def test_the_sentence_says_the_limits(limits, allowed):
    with pytest.raises(ValueError, match="`rate`") as caught:
        arguments.number("rate", "x", **limits, hint="Say how fast.")
    assert str(caught.value) == f"`rate` must be {allowed}, got 'x'. Say how fast."


def test_limits_themselves():
    assert arguments.number("rate", 0, minimum=0, below=1) == 0.0
    assert arguments.number("rate", 1, above=0, maximum=1) == 1.0
    assert arguments.number("rate", inf, minimum=0, infinite=True) == inf
    for value in (0, 1):
        with pytest.raises(ValueError, match=f"`rate` must be a number in .0, 1., got {value}."):
            arguments.number("rate", value, above=0, below=1)
    with pytest.raises(ValueError, match="got -inf"):
        arguments.number("rate", -inf)
    with pytest.raises(ValueError, match="`rate` must be a finite number, got 1000"):
        arguments.number("rate", 10**400)


def test_a_value_too_long_to_show_is_cut():
    with pytest.raises(ValueError, match="`count`") as caught:
        arguments.integer("count", "x" * 1000, minimum=1)
    assert len(str(caught.value)) < 200
    assert str(caught.value).endswith("xxx ....")


def test_numbers_are_a_copy():
    given = torch.tensor([0.25, 0.5], dtype=torch.float64)
    kept = arguments.numbers("rates", given, allowed="numbers")
    given.zero_()
    assert kept.tolist() == [0.25, 0.5]
    for value in (np.array([True]), torch.tensor([1j]), [[1.0]], [1.0, "x"], "12", None, 0.5, [inf]):
        with pytest.raises(ValueError, match="`rates` must be numbers, got"):
            arguments.numbers("rates", value, allowed="numbers")


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: objectives.FedProx(m=1), "`FedProx` .* 'm'; did you mean `mu`"),
        (lambda: objectives.FedProx(zzz=1), "`FedProx` .* 'zzz'; it takes mu, name"),
        (lambda: FederatedDataModule(DATA, num_clinets=3), "`FederatedDataModule` .*; did you mean `num_clients`"),
        (lambda: data.DirichletPartitioner(alfa=0.1), "`DirichletPartitioner` .*; did you mean `alpha`"),
        (lambda: data.UniformSampler(clients_per_rund=2), "`UniformSampler` .*; did you mean `clients_per_round`"),
        (lambda: channel.QuantizationChannel(bit=8), "`QuantizationChannel` .*; did you mean `bits`"),
        (lambda: channel.GilbertElliott(entr=0.1, leave=0.5), "`GilbertElliott` .*; did you mean `enter`"),
        (
            lambda: lightning_fedhaw.FederationOptions(num_client=3),
            "`FederationOptions` .*; did you mean `num_clients`",
        ),
        (lambda: lightning_fedhaw.RoundProgressBar(refresh=3), "`RoundProgressBar` .*; did you mean `refresh_rate`"),
        (lambda: lightning_fedhaw.TimmClassifier("resnet18", num_class=3), "`TimmClassifier` .*; did you mean `num_cl"),
        (lambda: data.StanfordDogs("dogs", downlod=True), "`StanfordDogs` .*; did you mean `download`"),
    ],
)
def test_an_unknown_argument_is_told_with_the_nearest(make, said):
    with pytest.raises(TypeError, match=said):
        make()


def test_the_check_of_names_is_not_seen_elsewhere():
    class Mine(objectives.FedProx):
        """Takes what its parent takes."""

    class Open(objectives.FedProx):
        def __init__(self, **more):
            super().__init__()
            self.more = more

    class Bare(data.IIDPartitioner):
        __init__ = object.__init__

    expected = ["mu", "name"]
    assert list(inspect.signature(objectives.FedProx).parameters) == expected
    assert list(inspect.signature(Mine).parameters) == expected
    assert list(inspect.signature(data.ShardPartitioner).parameters) == ["shards_per_client", "shard_size"]
    assert Open(anything=1).more == {"anything": 1}
    with pytest.raises(TypeError):
        Bare(3)
    for made in (data.DirichletPartitioner(0.5), data.UniformSampler(2)):
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
        assert replace(made) == made
    assert pickle.loads(pickle.dumps(objectives.FedProx(mu=0.5))).mu == 0.5
