"""Federated learning for PyTorch Lightning: a round is an epoch, and a method is a callback."""

from lightning_fedhaw.adapter.progress import RoundProgressBar
from lightning_fedhaw.adapter.strategy import FederatedStrategy
from lightning_fedhaw.aggregation import (
    AggregationRule,
    FedAdagradCallback,
    FedAdamCallback,
    FedAdpCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FedBECallback,
    FedDFCallback,
    FedDynCallback,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedLWSCallback,
    FedNovaCallback,
    FedOptCallback,
    FedYogiCallback,
    GeometricMedianCallback,
    KrumCallback,
    LocalPace,
    MedianCallback,
    MultiKrumCallback,
    PublishedFedHAWCallback,
    RuleStep,
    ScaffoldCallback,
    ServerFineTuningCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.channel import (
    AvailabilityChannel,
    AWGNChannel,
    BitFlipChannel,
    Channel,
    DeadlineChannel,
    ErasureChannel,
    FadingChannel,
    GilbertElliott,
    OverTheAirChannel,
    PacketLossChannel,
    PrivacyChannel,
    QuantizedChannel,
    SparsifiedChannel,
)
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.data import (
    DirichletPartitioner,
    FederatedDataModule,
    IIDPartitioner,
    IndexPartitioner,
    KeyPartitioner,
)
from lightning_fedhaw.models.timm_classifier import TimmClassifier
from lightning_fedhaw.objectives import ClientObjective, FedDyn, FedProx, Scaffold
from lightning_fedhaw.observer import RoundObserver
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.server import Server
from lightning_fedhaw.streams import stream
from lightning_fedhaw.trainer import FederatedTrainer
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

__version__ = "0.1.0"

__all__ = [
    "AWGNChannel",
    "AggregationRule",
    "AvailabilityChannel",
    "BitFlipChannel",
    "Channel",
    "ClientObjective",
    "ClientUpdate",
    "ClientVectors",
    "Cohort",
    "DeadlineChannel",
    "DirichletPartitioner",
    "ErasureChannel",
    "FadingChannel",
    "FedAdagradCallback",
    "FedAdamCallback",
    "FedAdpCallback",
    "FedAvgCallback",
    "FedAvgMCallback",
    "FedBECallback",
    "FedDFCallback",
    "FedDyn",
    "FedDynCallback",
    "FedHAWCallback",
    "FedHyperCallback",
    "FedLAWCallback",
    "FedLWSCallback",
    "FedNovaCallback",
    "FedOptCallback",
    "FedProx",
    "FedYogiCallback",
    "FederatedDataModule",
    "FederatedStrategy",
    "FederatedTrainer",
    "FederationOptions",
    "GeometricMedianCallback",
    "GilbertElliott",
    "IIDPartitioner",
    "IndexPartitioner",
    "KeyPartitioner",
    "KrumCallback",
    "LocalPace",
    "MedianCallback",
    "MultiKrumCallback",
    "OverTheAirChannel",
    "PacketLossChannel",
    "ParameterLayout",
    "PrivacyChannel",
    "PublishedFedHAWCallback",
    "QuantizedChannel",
    "RoundObserver",
    "RoundProgressBar",
    "RuleStep",
    "Scaffold",
    "ScaffoldCallback",
    "Server",
    "ServerFineTuningCallback",
    "SparsifiedChannel",
    "TimmClassifier",
    "TrimmedMeanCallback",
    "stream",
]
