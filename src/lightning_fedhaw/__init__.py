"""Federated learning for PyTorch Lightning: a round is an epoch, and a method is a callback."""

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
    RuleStep,
    ScaffoldCallback,
    ServerFineTuningCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.channel import Channel
from lightning_fedhaw.cohort import ClientUpdate, ClientVectors, Cohort
from lightning_fedhaw.data import (
    DirichletPartitioner,
    FederatedDataModule,
    IIDPartitioner,
    IndexPartitioner,
    KeyPartitioner,
)
from lightning_fedhaw.layout import ParameterLayout
from lightning_fedhaw.objectives import ClientObjective, FedDyn, FedProx, Scaffold
from lightning_fedhaw.observer import RoundObserver
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.progress import RoundProgressBar
from lightning_fedhaw.server import Server
from lightning_fedhaw.strategy import FederatedStrategy
from lightning_fedhaw.streams import stream
from lightning_fedhaw.trainer import FederatedTrainer

__version__ = "0.1.0"

__all__ = [
    "AggregationRule",
    "Channel",
    "ClientObjective",
    "ClientUpdate",
    "ClientVectors",
    "Cohort",
    "DirichletPartitioner",
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
    "IIDPartitioner",
    "IndexPartitioner",
    "KeyPartitioner",
    "KrumCallback",
    "LocalPace",
    "MedianCallback",
    "MultiKrumCallback",
    "ParameterLayout",
    "RoundObserver",
    "RoundProgressBar",
    "RuleStep",
    "Scaffold",
    "ScaffoldCallback",
    "Server",
    "ServerFineTuningCallback",
    "TrimmedMeanCallback",
    "stream",
]
