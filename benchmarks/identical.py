"""Check bit for bit whether a change of the code changes the results of small federations of every kind.

    python benchmarks/identical.py record FILE.pt [--only PATTERN] [--workers 2] [--twice]
    python benchmarks/identical.py compare OLD.pt NEW.pt [--only PATTERN] [--map OLD_KEY=NEW_KEY ...]

``record`` runs the federations of ``SCENARIOS`` below: every rule, channel and objective, both engines, one and two
processes, kept optimizer states, all buffer policies, storage, precisions, a resumed run, and both entry points. It
also records the partitions of every partitioner, the cohorts of every sampler, and the names that identify random
streams and checkpoint states.

For each federation it stores the final parameters and buffers, the state of every callback and of the federation in the
last checkpoint, every logged number, and the numbers of the run summary. Times are omitted. A federation that fails is
recorded by its error message. ``--twice`` runs each federation twice and stops if the results differ, because such a
recording could not be compared.

A recording is a dictionary ``{federation: {path: text}}``. A tensor's text is its dtype, its shape, a hash of its bytes
and its first numbers, so that equal texts are equal bits. ``compare`` prints the first path that differs
for each federation, and exits with 1 if there is any. ``--map`` handles intended renamings: ``OLD_KEY`` is replaced by
``NEW_KEY`` wherever it stands between slashes in an old path, or is a complete old text. If a key contains ``=``, write
``OLD_KEY=>NEW_KEY``.

Recordings can be compared only if they were made on the same machine with the same versions of torch and Lightning. All
names of the package are imported in one place. To compare with a recording of older code after a renaming, change the
imports and the arguments, and keep the names of the federations.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedhaw import (
    AvailabilityChannel,
    AWGNChannel,
    BitFlipChannel,
    CoordinateMedianCallback,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FadingChannel,
    FedAdagradCallback,
    FedAdamCallback,
    FedAdpCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FedAWACallback,
    FedBECallback,
    FedDFCallback,
    FedDynCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedExPCallback,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedLWSCallback,
    FedNovaCallback,
    FedOptCallback,
    FedProx,
    FedVGCallback,
    FedYogiCallback,
    GeometricMedianCallback,
    GilbertElliott,
    KrumCallback,
    MultiKrumCallback,
    OverTheAirChannel,
    PacketLossChannel,
    PublishedFedHAWCallback,
    QuantizationChannel,
    ScaffoldCallback,
    ServerFineTuningCallback,
    SparsificationChannel,
    StragglerChannel,
    TrimmedMeanCallback,
)
from lightning_fedhaw.data import (
    DirichletPartitioner,
    FixedSequenceSampler,
    FullParticipationSampler,
    HybridDirichletPartitioner,
    IIDPartitioner,
    IndexPartitioner,
    LabelSwapPartitioner,
    LongTailPartitioner,
    NaturalIdPartitioner,
    QuantitySkewPartitioner,
    ShardPartitioner,
    UniformSampler,
    WeightedSampler,
    balanced_subset,
)
from lightning_fedhaw.extending import AggregationRule, Channel, ClientObjective, RuleOutput, stream
from lightning_fedhaw.objectives import FedDynObjective, ScaffoldObjective

ROUNDS = 3
CLIENTS = 6
CLASSES = 4
FEATURES = 6
BATCH = 14
"""A batch size that leaves no client with a batch of one sample, which is an error in BatchNorm."""

SIDE = 8
"""Height and width of an image."""

NOT_RECORDED = ("ModelCheckpoint", "channels_and_objectives", "format", "run_id", "scheme", "seconds")
"""Keys of a checkpoint or a log that hold paths, names, descriptions and times, and no results."""

REPEATED = ("best", "best_client", "run", "worst_client")
"""Entries of the run summary that hold times and paths, or pick out numbers that are recorded elsewhere."""

Record = dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Data and models
# ---------------------------------------------------------------------------------------------------------------------


def vectors(count: int = 180, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Return learnable classification samples ``[count, FEATURES]``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return TensorDataset(inputs.to(dtype), (inputs @ truth).argmax(1))


def images(count: int = 120, seed: int = 0) -> TensorDataset:
    """Return small images ``[count, 2, SIDE, SIDE]`` whose label is their brightest quarter."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, SIDE, SIDE, generator=generator)
    quarters = inputs.unfold(2, SIDE // 2, SIDE // 2).unfold(3, SIDE // 2, SIDE // 2).sum((1, 4, 5))
    return TensorDataset(inputs, quarters.flatten(1).argmax(1))


class Listed(Dataset[Any]):
    """The same samples one by one, like data that is read from disk."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples
        self.targets = samples.tensors[1].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[index][0], self.targets[index]


def sgd(parameters: Any) -> Any:
    return SGD(parameters, lr=0.1)


def momentum(parameters: Any) -> Any:
    return SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> Any:
    return Adam(parameters, lr=0.01)


def adamw(parameters: Any) -> Any:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def scheduled(parameters: Any) -> Any:
    optimizer = SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)
    return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, step_size=1, gamma=0.5)}


class Classifier(pl.LightningModule):
    """The module of all federations; subclasses change the network."""

    def __init__(self, make_optimizer: Callable[[Any], Any] = sgd) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = self.network()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Normalized(Classifier):
    """A network with BatchNorm, whose statistics are buffers, and dropout, which is random."""

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        )


class Convolutional(Classifier):
    """A network for images, with BatchNorm and dropout."""

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16, CLASSES),
        )


class PartlyFrozen(Classifier):
    """A network whose first layer is frozen."""

    def network(self) -> nn.Module:
        network = super().network()
        network.get_submodule("0").requires_grad_(False)
        return network

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Manual(Classifier):
    """Manual optimization of two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, _, last = self.net.children()
        return [SGD(first.parameters(), lr=0.1), Adam(last.parameters(), lr=0.01)]


class Diverging(Classifier):
    """A module whose loss is NaN for batches without a sample of class 0, so that some clients diverge."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if bool((batch[1] == 0).any()) else loss * torch.nan


class Module(pl.LightningDataModule):
    """An ordinary data module."""

    def train_dataloader(self) -> Any:
        return DataLoader(vectors(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(vectors(40, seed=1), batch_size=BATCH)


# ---------------------------------------------------------------------------------------------------------------------
# Extensions that users could write
# ---------------------------------------------------------------------------------------------------------------------


class NoisyLoss(Channel):
    """A channel that loses 30 % of the messages and adds noise to the others."""

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        draws = [torch.rand((), generator=self.stream(seed, round_idx, client, "outage")) for client in clients]
        return torch.stack(draws) < 0.3

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        noise = torch.randn(message.shape, generator=self.stream(seed, round_idx, client, "noise"))
        return message + 1e-3 * noise.to(message)


class LateErasure(ErasureChannel):
    """A user's subclass of a channel: its random numbers differ from those of the base class."""


class Sparse(ClientObjective):
    """A penalty without a closed-form gradient."""

    def penalty(self, parameters: Any, start: Any, state: Any) -> Tensor:
        return sum((1e-2 * (value - start[name]).abs().sum() for name, value in parameters.items()), torch.zeros(()))


class SquareRoots(AggregationRule):
    """A user's rule."""

    def unnormalized_weight(self, update: Any) -> float:
        return float(update.num_examples) ** 0.5

    def step(self, cohort: Any, state: Any, server: Any) -> RuleOutput:
        roots = cohort.num_examples.double().sqrt()
        weights = roots / roots.sum()
        return RuleOutput(cohort.vectors.weighted_sum(weights), {"rounds": cohort.round + 1}, weights)


# ---------------------------------------------------------------------------------------------------------------------
# The federations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """One federation.

    Attributes:
        callbacks: Creates the rule and the other callbacks.
        model: Creates the module.
        data: Creates the data for ``fit``.
        stock: Whether a stock trainer runs it, with the rule as a callback.
        resumed: Whether it is stopped before its last round, and resumed from its checkpoint.
        settings: Arguments of the trainer.
    """

    callbacks: Callable[[], list[Any]]
    model: Callable[[], Classifier] = Classifier
    data: Callable[[], Any] | None = None
    stock: bool = False
    resumed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


SCENARIOS: dict[str, Scenario] = {}


def add(name: str, *callbacks: Callable[[], Any], **options: Any) -> None:
    """Add a federation to the table; the default rule is FedAvg."""
    names = ("model", "data", "stock", "resumed")
    arguments = {key: options.pop(key) for key in names if key in options}
    SCENARIOS[name] = Scenario(partial(make_all, callbacks or (FedAvgCallback,)), settings=options, **arguments)


def make_all(factories: Iterable[Callable[[], Any]]) -> list[Any]:
    return [make() for make in factories]


def with_proxy() -> Any:
    return FederatedDataModule(vectors(), batch_size=BATCH, proxy=24, val=vectors(40, seed=1))


def of_images() -> Any:
    return FederatedDataModule(images(), batch_size=8, val=images(32, seed=1))


def one_by_one() -> Any:
    return FederatedDataModule(Listed(vectors()), batch_size=BATCH, val=vectors(40, seed=1))


def in_double_precision() -> Any:
    double = torch.float64
    return FederatedDataModule(vectors(dtype=double), batch_size=BATCH, val=vectors(40, seed=1, dtype=double))


def list_of_clients() -> Any:
    return FederatedDataModule([vectors(20 + 10 * client, seed=client) for client in range(CLIENTS)], batch_size=BATCH)


def trace() -> list[list[float]]:
    return [[1.0, 0.0, 1.0, 1.0, 0.5, 1.0], [0.0, 1.0, 1.0, 0.5, 1.0, 1.0]]


TWO = {"devices": 2, "strategy": "federated_notebook"}
FREE = FedHAWCallback
PUBLISHED = partial(PublishedFedHAWCallback, 1e-3, 1e-1)
LOSSY = partial(ErasureChannel, 0.4)

# Rules.
add("rule/fedavg", FedAvgCallback)
add("rule/fedavg, batches", partial(FedAvgCallback, "batches"))
add("rule/fedavg, uniform", partial(FedAvgCallback, "uniform"))
add("rule/fedhaw", FREE)
add("rule/fedhaw, weights", partial(FREE, lr_lambda=0.3))
add(
    "rule/fedhaw, no scale, host, Adam", partial(FREE, lr_gamma=0.0, lr_lambda=0.3, memory="host", hyper_optimizer=Adam)
)
add("rule/fedhaw, bounds", partial(FREE, scale_bounds=(0.5, 2.0), step_bounds=(1.0, 2.0)))
add("rule/published fedhaw", PUBLISHED)
add("rule/published fedhaw, exact", partial(PUBLISHED, jacobian="exact", scale_bounds=(0.9, 1.1)))
add("rule/published fedhaw, plain, old", partial(PUBLISHED, pseudo_gradient="plain", gamma_for_lambda="old"))
add(
    "rule/published fedhaw, steps",
    partial(PUBLISHED, normalize_by="lr*steps", memory="host"),
    model=partial(Classifier, adam),
)
add("rule/published fedhaw, given rate, Adam", partial(PUBLISHED, learning_rate=0.2, hyper_optimizer=Adam))
add("rule/fedhyper G", partial(FedHyperCallback, "G"))
add("rule/fedhyper SL", partial(FedHyperCallback, "SL", weighting="uniform"))
add("rule/fedhyper CL", partial(FedHyperCallback, "CL", normalize_by="norms", hyper_lr=0.1))
add("rule/fedhyper G+SL", partial(FedHyperCallback, "G+SL", normalize_by="lr", alpha_bounds=(0.2, 5.0)))
add("rule/fedhyper G+CL", partial(FedHyperCallback, "G+CL", normalize_by="norms", hyper_lr=0.1))
add("rule/fedadp", FedAdpCallback)
add("rule/fedadp, rounds", partial(FedAdpCallback, 2.0, smooth_by="rounds", smooth_substitutes=True), LOSSY)
add("rule/fedlws", FedLWSCallback)
add("rule/fedexp", FedExPCallback)
add("rule/fedawa", partial(FedAWACallback, 0.1, server_epochs=2), LOSSY)
add("rule/fedvg", partial(FedVGCallback, batch_size=8), data=with_proxy)
add("rule/fednova", FedNovaCallback, model=partial(Classifier, momentum))
add("rule/fednova, fedprox", partial(FedNovaCallback, tau_eff="steps"), partial(FedProx, 0.1), local_epochs=2)
add("rule/scaffold II", ScaffoldCallback, LOSSY)
add("rule/scaffold I", partial(ScaffoldCallback, "I", server_lr=0.5), model=partial(Classifier, adam))
add("rule/feddyn", partial(FedDynCallback, 0.1))
add("rule/feddyn, norm", partial(FedDynCallback, 0.05, penalty="norm"), LOSSY)
add(
    "rule/fedopt",
    partial(FedOptCallback, partial(SGD, momentum=0.9, nesterov=True), 0.5, lr_scheduler=partial(StepLR, step_size=1)),
)
add("rule/fedopt on fedadp", lambda: FedOptCallback(Adam, 0.1, rule=FedAdpCallback(2.0)))
add("rule/fedopt on fedhaw", lambda: FedAvgMCallback(1.0, 0.5, rule=FedHAWCallback()))
add("rule/fedopt on scaffold", lambda: FedOptCallback(rule=ScaffoldCallback()))
add("rule/fedavgm", FedAvgMCallback)
add("rule/fedadagrad", FedAdagradCallback)
add("rule/fedadam", FedAdamCallback)
add("rule/fedyogi", partial(FedYogiCallback, initial_second_moment=0.0))
add("rule/fedlaw", partial(FedLAWCallback, server_epochs=4, batch_size=8), data=with_proxy)
add("rule/fedlaw, in stages", partial(FedLAWCallback, "in_stages", server_epochs=14, batch_size=24), data=with_proxy)
add(
    "rule/fedlaw, scale, quadratic",
    partial(FedLAWCallback, "scale", base="quadratic", server_epochs=3),
    data=with_proxy,
)
add("rule/fedlaw, nothing", partial(FedLAWCallback, "nothing", scale=0.97, weighting="uniform"))
add("rule/feddf", partial(FedDFCallback, 3, batch_size=8), data=with_proxy)
add("rule/fedbe", partial(FedBECallback, 3, samples=2, ensemble="probabilities"), data=with_proxy)
add("rule/server fine-tuning", partial(ServerFineTuningCallback, 2, batch_size=8), data=with_proxy)
add("rule/median", CoordinateMedianCallback)
add("rule/trimmed mean", TrimmedMeanCallback, clients_per_round=5)
add("rule/krum", partial(KrumCallback, 0))
add("rule/multi-krum", MultiKrumCallback, clients_per_round=5)
add("rule/geometric median", GeometricMedianCallback)
add("rule/a user's", SquareRoots)

# Channels.
add("channel/erasure", FedAvgCallback, LOSSY)
for fallback in ("discard", "reuse_update", "reuse_model"):
    add(f"channel/erasure, {fallback}", FREE, partial(LOSSY, fallback=fallback))
add("channel/erasure, per client", FedAvgCallback, partial(ErasureChannel, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
add("channel/erasure, up to a rate", FedAvgCallback, partial(ErasureChannel, max_probability=0.9))
add("channel/erasure, the authors' draws", PUBLISHED, partial(ErasureChannel, max_probability=0.5, legacy_seed=23))
add(
    "channel/erasure, bursts",
    FREE,
    lambda: ErasureChannel(burst=GilbertElliott(0.5, 0.3, 0.1, 0.9), fallback="discard"),
)
add("channel/erasure, downlink", FedAvgCallback, partial(LOSSY, link="downlink"))
add("channel/erasure, downlink, reuse", ScaffoldCallback, partial(LOSSY, link="downlink", fallback="reuse_model"))
add("channel/erasure, two names", FedAvgCallback, LOSSY, partial(LOSSY, name="second", fallback="discard"))
add("channel/erasure, everything", FREE, partial(ErasureChannel, 1.0))
add("channel/erasure, everything, follow", PUBLISHED, partial(ErasureChannel, 1.0), empty_round="follow")
add("channel/deadline", FedAvgCallback, partial(StragglerChannel, 1.0, 0.03, client_spread=0.5))
add("channel/availability", FedAvgCallback, partial(AvailabilityChannel, mean=0.6, period=3))
add("channel/availability, trace", FedAvgCallback, lambda: AvailabilityChannel(trace(), fallback="reuse_update"))
add("channel/packets", FedAvgCallback, partial(PacketLossChannel, 0.3, 64, retries=1))
add("channel/packets, last", FedAvgCallback, partial(PacketLossChannel, 0.3, 64, lost="last"))
add("channel/packets, downlink", FedAvgCallback, partial(PacketLossChannel, 0.3, 64, link="downlink"))
add("channel/awgn", FedAvgCallback, partial(AWGNChannel, 10.0))
add("channel/awgn, layers", FedAvgCallback, partial(AWGNChannel, 10.0, per="layer"))
add("channel/awgn, floor, downlink", FREE, partial(AWGNChannel, noise_std=0.01, link="downlink"))
add("channel/fading", FedAvgCallback, partial(FadingChannel, 10.0, k_factor=1.0, block=2))
add("channel/fading, rate", FedAvgCallback, partial(FadingChannel, 10.0, rate=3.0))
add(
    "channel/fading, inversion",
    FedAvgCallback,
    partial(FadingChannel, 10.0, inversion=True, truncation=0.3, per="layer"),
)
add("channel/bit flips", FedAvgCallback, partial(BitFlipChannel, 1e-4))
add("channel/bit flips, codes", FedAvgCallback, partial(BitFlipChannel, 1e-2, bits=8, link="downlink"))
add("channel/quantized", FedAvgCallback, partial(QuantizationChannel, 4))
add("channel/quantized, nearest, layers", FREE, partial(QuantizationChannel, 6, "nearest", per="layer"))
add("channel/quantized, qsgd, downlink", FedAvgCallback, partial(QuantizationChannel, 8, "qsgd", link="downlink"))
add("channel/sparsified", FedAvgCallback, partial(SparsificationChannel, 0.2), LOSSY)
add("channel/sparsified, random, layers", FREE, partial(SparsificationChannel, 0.3, "random", per="layer"))
add(
    "channel/sparsified, forgetful", FedAvgCallback, partial(SparsificationChannel, 0.3, "random", error_feedback=False)
)
add("channel/over the air", FedAvgCallback, partial(OverTheAirChannel, 20.0, 0.2))
add("channel/privacy", partial(FedAvgCallback, "uniform"), partial(DifferentialPrivacyChannel, 0.5, 0.1, delta=None))
add(
    "channel/many",
    FREE,
    partial(LOSSY, link="downlink", fallback="reuse_model"),
    partial(SparsificationChannel, 0.5),
    partial(QuantizationChannel, 8),
    partial(AWGNChannel, 20.0),
    partial(LOSSY, fallback="reuse_update"),
)
add("channel/a user's", FedAvgCallback, NoisyLoss)
add("channel/a user's, by inheritance", FedAvgCallback, partial(LateErasure, 0.4))

# Objectives.
for engine in ("sequential", "vectorized"):
    add(f"objective/fedprox, {engine}", FREE, partial(FedProx, 0.1), engine=engine)
    add(f"objective/feddyn, {engine}", FedAvgCallback, partial(FedDynObjective, 0.1), engine=engine)
    add(
        f"objective/scaffold, {engine}",
        FREE,
        ScaffoldObjective,
        LOSSY,
        engine=engine,
        model=partial(Classifier, momentum),
    )
    add(f"objective/a user's, {engine}", FedAvgCallback, Sparse, engine=engine)
add(
    "objective/two of a kind",
    FedAvgCallback,
    partial(FedProx, 0.1),
    partial(FedProx, 0.2, name="second"),
    ScaffoldObjective,
)

# Engines and models.
for engine in ("sequential", "vectorized", "auto"):
    add(f"engine/{engine}, SGD", engine=engine)
    add(f"engine/{engine}, Adam, kept", engine=engine, model=partial(Classifier, adam), optimizer_state="kept")
    add(f"engine/{engine}, schedule", FREE, engine=engine, model=partial(Classifier, scheduled), local_epochs=2)
    add(f"engine/{engine}, images", FREE, engine=engine, model=Convolutional, data=of_images)
add("engine/vectorized, chunks", engine="vectorized", chunk_memory=6000, model=partial(Normalized, adamw))
add("engine/vectorized, frozen layer", FREE, engine="vectorized", model=PartlyFrozen)
add("engine/vectorized, clipping", engine="vectorized", gradient_clip_val=0.5, local_steps=5)
add("engine/sequential, clipping, accumulation", engine="sequential", gradient_clip_val=0.5, accumulate_grad_batches=2)
add("engine/sequential, manual", FREE, engine="sequential", model=Manual)
add("engine/sequential, frozen layer", FREE, engine="sequential", model=PartlyFrozen)
add("engine/sequential, one by one", engine="sequential", data=one_by_one, model=Normalized)
add("engine/sequential, channels last", engine="sequential", channels_last=True, model=Convolutional, data=of_images)
add("engine/sequential, non-finite clients", engine="sequential", model=Diverging, alpha=0.1)
add("engine/sequential, data on the CPU", engine="sequential", data_device="cpu", local_steps=3, limit_train_batches=2)

# Buffers, storage, precision.
for policy in ("average", "keep", "local", "recalibrate"):
    add(f"buffers/{policy}, images", FREE, buffers=policy, engine="sequential", model=Convolutional, data=of_images)
    add(f"buffers/{policy}, vectorized", LOSSY, FedAvgCallback, buffers=policy, engine="vectorized", model=Normalized)
add("storage/device", storage="device")
add("storage/host", FREE, storage="host")
add("storage/bfloat16", FREE, storage_dtype=torch.bfloat16)
add("storage/float64 on the host", PUBLISHED, storage="host", storage_dtype=torch.float64)
for engine in ("sequential", "vectorized"):
    add(f"precision/64-true, {engine}", FREE, precision="64-true", engine=engine, data=in_double_precision)
    add(f"precision/bf16-mixed, {engine}", FREE, precision="bf16-mixed", engine=engine, model=Normalized)
    add(f"precision/bf16-true, {engine}", FREE, precision="bf16-true", engine=engine)

# A run that is resumed; what it must find again differs.
KEPT = {"optimizer_state": "kept", "buffers": "local", "model": partial(Normalized, momentum)}
add("resumed/fedhaw, kept", FREE, resumed=True, **KEPT)
add("resumed/published fedhaw, vectorized", PUBLISHED, resumed=True, engine="vectorized", optimizer_state="kept")
add("resumed/scaffold, reuse", ScaffoldCallback, partial(LOSSY, fallback="reuse_update"), resumed=True)
add("resumed/feddyn", partial(FedDynCallback, 0.1), partial(SparsificationChannel, 0.3), resumed=True)
add("resumed/fedadam", FedAdamCallback, partial(LOSSY, link="downlink", fallback="reuse_model"), resumed=True)
add("resumed/fedhyper", partial(FedHyperCallback, "G+SL"), resumed=True, model=partial(Classifier, scheduled))
add("resumed/bf16-true", FREE, resumed=True, precision="bf16-true")

# Two processes.
add("processes/fedavg", **TWO)
add("processes/fedhaw, ordered, kept", FREE, reduction="ordered", **KEPT, **TWO)
add(
    "processes/scaffold, channels, vectorized",
    ScaffoldCallback,
    LOSSY,
    partial(SparsificationChannel, 0.5),
    engine="vectorized",
    **TWO,
)
add("processes/robust, ordered", GeometricMedianCallback, reduction="ordered", **TWO)
add("processes/over the air, ordered", FedAvgCallback, partial(OverTheAirChannel, 20.0), reduction="ordered", **TWO)
add("processes/fedlaw", partial(FedLAWCallback, server_epochs=2), data=with_proxy, **TWO)
add("processes/resumed", FREE, partial(LOSSY, fallback="reuse_update"), resumed=True, **KEPT, **TWO)

# Data, cohorts and entry points.
OURS = {"num_clients": CLIENTS, "alpha": 0.5, "clients_per_round": 4, "seed": 7}
add("entry/stock trainer", partial(FREE, **OURS), stock=True)
add("entry/stock trainer, data module", partial(FedAdamCallback, **OURS), LOSSY, stock=True, data=Module)
add(
    "entry/stock trainer, federated data",
    partial(FedAvgCallback, clients_per_round=0.5, seed=7),
    stock=True,
    data=list_of_clients,
)
add("entry/stock trainer, no argument", FREE, stock=True)
add(
    "entry/stock trainer, resumed",
    partial(FREE, optimizer_state="kept", **OURS),
    stock=True,
    resumed=True,
    model=partial(Classifier, adam),
)
add(
    "entry/stock trainer, two processes",
    partial(FREE, reduction="ordered", **OURS),
    stock=True,
    devices=2,
    strategy="ddp_notebook",
)
add("entry/data module", data=Module)
add("entry/one data set per client", FREE, data=list_of_clients, num_clients=None, alpha=None, clients_per_round=None)
add("entry/held out", FREE, client_val_fraction=0.2, seed=11)
add("entry/fast development run", FREE, fast_dev_run=True)
add(
    "data/label swaps",
    FREE,
    alpha=None,
    partitioner=LabelSwapPartitioner(DirichletPartitioner(1.0), 0.5, per_client=True),
)
add(
    "data/quantity skew",
    FREE,
    alpha=None,
    partitioner=QuantitySkewPartitioner(1.0),
    sampler=WeightedSampler(3),
    clients_per_round=None,
)
add("data/fixed cohorts", FREE, sampler=FixedSequenceSampler([[0, 1], [1, 2, 3], [4, 5]]), clients_per_round=None)


# ---------------------------------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """Return a text that is equal for two values if and only if their bits are equal."""
    if not isinstance(value, Tensor):
        return repr(value)
    plain = value.detach().cpu().contiguous()
    digest = hashlib.blake2b(plain.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=10).hexdigest()
    first = [f"{number:.9g}" for number in plain.flatten()[:3].double().tolist()]
    return f"{str(plain.dtype).removeprefix('torch.')}{list(plain.shape)} {digest} {' '.join(first)}"


def flattened(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and text of each leaf of nested dictionaries and lists."""
    if isinstance(value, Mapping):
        entries: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        entries = enumerate(value)
    else:
        yield path, text_of(value)
        return
    for key, entry in entries:
        if not any(str(key).startswith(name) for name in NOT_RECORDED):
            yield from flattened(entry, f"{path}/{key}")


def logged_numbers(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every number of the logger's table except times, by name and round."""
    table = folder / "metrics.csv"
    if not table.exists():
        return
    header, *rows = table.read_text().splitlines()
    names = header.split(",")
    for row in rows:
        cells = dict(zip(names, row.split(","), strict=True))
        for name, cell in cells.items():
            is_repeated = name.startswith(tuple(f"summary/{entry}/" for entry in REPEATED))
            if cell and name != "step" and "seconds" not in name and not is_repeated:
                yield f"logged/{name}/{cells['step']}", cell


def summary_numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the numbers of the run summary, without descriptions."""
    numbers = {}
    for name, value in summary.items():
        if isinstance(value, (int, float, Mapping)) and name not in REPEATED:
            numbers[name] = value
    yield from flattened(numbers, "summary")


def fit(scenario: Scenario, rounds: int, folder: Path, ckpt_path: Path | None = None) -> Record:
    """Train for a number of rounds, and return the record of the results."""
    dev_run = bool(scenario.settings.get("fast_dev_run"))
    checkpoint = ModelCheckpoint(folder, filename="rounds={step}", auto_insert_metric_name=False, save_top_k=-1)
    logger = CSVLogger(folder, name="", version="log")
    common: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": logger,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [*scenario.callbacks(), checkpoint],
    }
    if scenario.stock:
        trainer = pl.Trainer(max_epochs=rounds, **{**common, **scenario.settings})
    else:
        trainer = FederatedTrainer(rounds=rounds, **{**common, **OURS, **scenario.settings})
    model = scenario.model()
    if scenario.data is not None:
        trainer.fit(model, scenario.data(), ckpt_path=ckpt_path)
    else:
        trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
    record = {f"parameters/{name}": text_of(value) for name, value in model.named_parameters()}
    record |= {f"buffers/{name}": text_of(value) for name, value in model.named_buffers()}
    record |= dict(logged_numbers(folder / "log"))
    # A stock strategy does not return the summary from the processes that it forks.
    record |= dict(summary_numbers(getattr(trainer, "federation_summary", {})))
    if not dev_run:
        saved = torch.load(folder / f"rounds={rounds}.ckpt", map_location="cpu", weights_only=True)
        record |= dict(flattened(saved["callbacks"], "callbacks"))
        record |= dict(flattened(saved["loops"]["fit_loop"]["state_dict"]["federation"], "federation"))
    return record


def loaders() -> list[Any]:
    return [DataLoader(vectors(), batch_size=BATCH, shuffle=True), DataLoader(vectors(40, seed=1), batch_size=BATCH)]


def play(scenario: Scenario) -> Record:
    """Run a federation from its first round to its last."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        if not scenario.resumed:
            return fit(scenario, ROUNDS, folder)
        fit(scenario, ROUNDS - 1, folder / "before")
        return fit(scenario, ROUNDS, folder, folder / "before" / f"rounds={ROUNDS - 1}.ckpt")


def partitions() -> Record:
    """Return the partitions of each partitioner."""
    labels = vectors(240).tensors[1]
    dirichlet = DirichletPartitioner(0.5)
    schemes: dict[str, Any] = {
        "iid": IIDPartitioner(),
        "dirichlet, balanced": dirichlet,
        "dirichlet, unbalanced": DirichletPartitioner(0.5, "unbalanced", min_size=3),
        "dirichlet, client": DirichletPartitioner(0.5, "client"),
        "dirichlet, sizes": DirichletPartitioner(0.5, "client", sizes=[10, 20, 30, 40, 50, 60]),
        "dirichlet, moved": DirichletPartitioner(0.01, min_size=10, max_tries=1, on_infeasible="move"),
        "hybrid": HybridDirichletPartitioner(min_size=2),
        "shards": ShardPartitioner(),
        "shards of a size": ShardPartitioner(3, shard_size=10),
        "quantity": QuantitySkewPartitioner(),
        "quantity, alpha": QuantitySkewPartitioner(alpha=1.0),
        "long tail": LongTailPartitioner(4.0, dirichlet),
        "label swap": LabelSwapPartitioner(dirichlet, 0.5),
        "label swap, each": LabelSwapPartitioner(IIDPartitioner(), 0.7, per_client=True),
        "keys": NaturalIdPartitioner([index % CLIENTS for index in range(240)]),
        "indices": IndexPartitioner([range(start, start + 30) for start in range(0, 180, 30)]),
    }
    record: Record = {}
    for name, scheme in schemes.items():
        for seed in (0, 7):
            split = scheme.partition(CLIENTS, num_samples=240, labels=labels, seed=seed)
            parts = {"indices": split.indices, "swaps": split.label_swaps, "fingerprint": split.fingerprint()}
            record |= dict(flattened(parts, f"{name}/{seed}"))
    record |= dict(flattened(balanced_subset(labels, 24, seed=7), "subset"))
    return record


def cohorts() -> Record:
    """Return the cohorts of each sampler."""
    samplers: dict[str, Any] = {
        "everyone": FullParticipationSampler(),
        "uniform": UniformSampler(3),
        "uniform, share": UniformSampler(0.5),
        "weighted": WeightedSampler(3),
        "weighted, given": WeightedSampler(2, [1.0, 0.0, 2.0, 3.0, 0.0, 1.0]),
        "fixed": FixedSequenceSampler([[0, 3], [5], [1, 2]]),
    }
    sizes = torch.arange(10, 10 + 5 * CLIENTS, 5)
    return {
        f"{name}/{round_idx}": repr(sampler.sample(round_idx, num_clients=CLIENTS, sizes=sizes, seed=7))
        for name, sampler in samplers.items()
        for round_idx in range(ROUNDS)
    }


def resume_keys() -> Record:
    """Return the names that identify random streams and checkpoint states, and the first draw of each channel."""
    record = {"stream": text_of(torch.rand(3, generator=stream(7, "client", 2, "round", 1, "batches")))}
    for name, scenario in SCENARIOS.items():
        for index, callback in enumerate(scenario.callbacks()):
            path = f"{name}/{index}"
            record[f"{path}/state_key"] = repr(callback.state_key)
            if hasattr(callback, "resume_key"):
                record[f"{path}/resume_key"] = repr(callback.resume_key)
            if isinstance(callback, Channel):
                record[f"{path}/draw"] = text_of(torch.rand(2, generator=callback.stream(7, 1, 2, "any")))
    return record


TABLES: dict[str, Callable[[], Record]] = {
    "partitions": partitions,
    "samplers": cohorts,
    "identities": resume_keys,
}


def record_one(name: str, twice: bool) -> tuple[str, Record, float]:
    """Return a name, its record, and the seconds it took."""
    prepare()
    begin = time.perf_counter()
    record = attempt(name)
    if twice:
        difference = first_difference(record, attempt(name))
        if difference:
            raise RuntimeError(f"{name}: two runs in a row differ. {difference}")
    return name, record, time.perf_counter() - begin


def attempt(name: str) -> Record:
    """Return the record of a federation or table; an error is recorded as well."""
    with redirect_stdout(io.StringIO()):
        try:
            return TABLES[name]() if name in TABLES else play(SCENARIOS[name])
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def prepare() -> None:
    """Make this process quiet and deterministic."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def selected(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatch(name, pattern)]


def record_all(path: Path, pattern: str, workers: int, twice: bool) -> None:
    names = selected([*TABLES, *SCENARIOS], pattern)
    if not names:
        raise SystemExit(f"`--only` must match a federation, got {pattern!r}. There are: {', '.join(SCENARIOS)}.")
    if workers == 1:
        results = [record_one(name, twice) for name in names]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            results = list(pool.map(record_one, names, [twice] * len(names)))
    records = {name: record for name, record, _ in results}
    versions = {"torch": str(torch.__version__), "lightning": str(pl.__version__)}
    torch.save({"versions": versions, "records": records}, path)
    for name, record, seconds in sorted(results, key=lambda result: -result[2])[:5]:
        print(f"{seconds:6.2f} s  {name} ({len(record)} entries)")
    for name, record in records.items():
        if "error" in record:
            print(f"{name}: {record['error']}")
    entries = sum(len(record) for record in records.values())
    total = sum(seconds for _, _, seconds in results)
    print(f"{len(records)} federations and tables, {entries} entries, {total:.0f} s: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def renamings(maps: Iterable[str]) -> dict[str, str]:
    """Return ``OLD=NEW`` entries as a dictionary."""
    renamed = {}
    for entry in maps:
        old, sign, new = entry.partition("=>" if "=>" in entry else "=")
        if not (old and sign and new):
            raise SystemExit(f"`--map` must be OLD_KEY=NEW_KEY, got {entry!r}.")
        renamed[old] = new
    return renamed


def translated(record: Record, renamed: Mapping[str, str]) -> Record:
    """Return an old record under new names."""
    result = {}
    for path, text in record.items():
        for old, new in renamed.items():
            path = f"/{path}/".replace(f"/{old}/", f"/{new}/").strip("/")
            if text.strip("'") == old:
                text = repr(new)
        result[path] = text
    return result


def first_difference(old: Record, new: Record) -> str:
    """Describe the first difference between two records; return an empty string if there is none."""
    for path, text in old.items():
        if path not in new:
            return f"{path} is only in the old recording: {text}"
        if new[path] != text:
            return f"{path}: {text} -> {new[path]}"
    for path, text in new.items():
        if path not in old:
            return f"{path} is only in the new recording: {text}"
    return ""


def compare(old_path: Path, new_path: Path, pattern: str, maps: Iterable[str]) -> bool:
    old = torch.load(old_path, weights_only=True)
    new = torch.load(new_path, weights_only=True)
    if old["versions"] != new["versions"]:
        print(f"The recordings have different versions: {old['versions']} and {new['versions']}.")
    renamed = renamings(maps)
    differing = 0
    names = selected(dict.fromkeys([*old["records"], *new["records"]]), pattern)
    for name in names:
        if name not in new["records"] or name not in old["records"]:
            difference = f"only in {new_path if name in new['records'] else old_path}"
        else:
            difference = first_difference(translated(old["records"][name], renamed), new["records"][name])
        if difference:
            differing += 1
            print(f"{name}: {difference}")
    print(f"{len(names) - differing} of {len(names)} are identical.")
    return differing == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--only", default="*", help="a pattern of names, such as 'channel/*'")
    recording.add_argument("--workers", type=int, default=1)
    recording.add_argument("--twice", action="store_true", help="run everything twice, and stop at a difference")
    comparison = commands.add_parser("compare")
    comparison.add_argument("old", type=Path)
    comparison.add_argument("new", type=Path)
    comparison.add_argument("--only", default="*")
    comparison.add_argument("--map", nargs="*", default=[], metavar="OLD_KEY=NEW_KEY")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record_all(arguments.file, arguments.only, arguments.workers, arguments.twice)
    elif not compare(arguments.old, arguments.new, arguments.only, arguments.map):
        sys.exit(1)


if __name__ == "__main__":
    main()
