"""Federated learning for PyTorch Lightning: a round is an epoch, and a method is a callback."""

from lightning_fedhaw.adapter.progress import RoundProgressBar
from lightning_fedhaw.adapter.strategy import FederatedStrategy
from lightning_fedhaw.aggregation import (
    AggregationRule,
    CoordinateMedianCallback,
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
    LocalLRScale,
    MultiKrumCallback,
    PublishedFedHAWCallback,
    RuleOutput,
    ScaffoldCallback,
    ServerFineTuningCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.channel import (
    AvailabilityChannel,
    AWGNChannel,
    BitFlipChannel,
    Channel,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FadingChannel,
    GilbertElliott,
    OverTheAirChannel,
    PacketLossChannel,
    QuantizationChannel,
    SparsificationChannel,
    StragglerChannel,
)
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.data import (
    DirichletPartitioner,
    FederatedDataModule,
    IIDPartitioner,
    IndexPartitioner,
    NaturalIdPartitioner,
)
from lightning_fedhaw.models.timm_classifier import TimmClassifier
from lightning_fedhaw.objectives import ClientObjective, FedDynObjective, FedProx, ScaffoldObjective
from lightning_fedhaw.observer import FederatedCallback
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
    "CoordinateMedianCallback",
    "DifferentialPrivacyChannel",
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
    "FedDynCallback",
    "FedDynObjective",
    "FedHAWCallback",
    "FedHyperCallback",
    "FedLAWCallback",
    "FedLWSCallback",
    "FedNovaCallback",
    "FedOptCallback",
    "FedProx",
    "FedYogiCallback",
    "FederatedCallback",
    "FederatedDataModule",
    "FederatedStrategy",
    "FederatedTrainer",
    "FederationOptions",
    "GeometricMedianCallback",
    "GilbertElliott",
    "IIDPartitioner",
    "IndexPartitioner",
    "KrumCallback",
    "LocalLRScale",
    "MultiKrumCallback",
    "NaturalIdPartitioner",
    "OverTheAirChannel",
    "PacketLossChannel",
    "ParameterLayout",
    "PublishedFedHAWCallback",
    "QuantizationChannel",
    "RoundProgressBar",
    "RuleOutput",
    "ScaffoldCallback",
    "ScaffoldObjective",
    "Server",
    "ServerFineTuningCallback",
    "SparsificationChannel",
    "StragglerChannel",
    "TimmClassifier",
    "TrimmedMeanCallback",
    "stream",
]
