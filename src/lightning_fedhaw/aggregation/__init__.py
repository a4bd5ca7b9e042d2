"""Aggregation rules: one file each, a pure function that is the paper and a small class that keeps the state."""

from lightning_fedhaw.aggregation.base import AggregationRule, RuleStep
from lightning_fedhaw.aggregation.fedadp import FedAdpCallback
from lightning_fedhaw.aggregation.fedavg import FedAvgCallback
from lightning_fedhaw.aggregation.fedhaw import FedHAWCallback
from lightning_fedhaw.aggregation.fedlws import FedLWSCallback
from lightning_fedhaw.aggregation.fednova import FedNovaCallback
from lightning_fedhaw.aggregation.fedopt import (
    FedAdagradCallback,
    FedAdamCallback,
    FedAvgMCallback,
    FedOptCallback,
    FedYogiCallback,
)
from lightning_fedhaw.aggregation.robust import (
    GeometricMedianCallback,
    KrumCallback,
    MedianCallback,
    MultiKrumCallback,
    TrimmedMeanCallback,
)

__all__ = [
    "AggregationRule",
    "FedAdagradCallback",
    "FedAdamCallback",
    "FedAdpCallback",
    "FedAvgCallback",
    "FedAvgMCallback",
    "FedHAWCallback",
    "FedLWSCallback",
    "FedNovaCallback",
    "FedOptCallback",
    "FedYogiCallback",
    "GeometricMedianCallback",
    "KrumCallback",
    "MedianCallback",
    "MultiKrumCallback",
    "RuleStep",
    "TrimmedMeanCallback",
]
