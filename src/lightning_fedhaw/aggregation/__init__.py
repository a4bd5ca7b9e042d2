"""Aggregation rules: one file each, a pure function that is the paper and a small class that keeps the state."""

from lightning_fedhaw.aggregation.adaptive import FedAdagradCallback, FedAdamCallback, FedYogiCallback
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.aggregation.fedadp import FedAdpCallback
from lightning_fedhaw.aggregation.fedavg import FedAvgCallback
from lightning_fedhaw.aggregation.fedawa import FedAWACallback
from lightning_fedhaw.aggregation.fedbe import FedBECallback
from lightning_fedhaw.aggregation.feddf import FedDFCallback
from lightning_fedhaw.aggregation.feddyn import FedDynCallback
from lightning_fedhaw.aggregation.fedexp import FedExPCallback
from lightning_fedhaw.aggregation.fedhaw import FedHAWCallback
from lightning_fedhaw.aggregation.fedhaw_published import PublishedFedHAWCallback
from lightning_fedhaw.aggregation.fedhyper import FedHyperCallback
from lightning_fedhaw.aggregation.fedlaw import FedLAWCallback
from lightning_fedhaw.aggregation.fedlws import FedLWSCallback
from lightning_fedhaw.aggregation.fednova import FedNovaCallback
from lightning_fedhaw.aggregation.fedopt import FedAvgMCallback, FedOptCallback
from lightning_fedhaw.aggregation.fedvg import FedVGCallback
from lightning_fedhaw.aggregation.learned_rate import LearnedClientRateCallback
from lightning_fedhaw.aggregation.learned_weighting import LearnedWeightingCallback
from lightning_fedhaw.aggregation.qfedavg import QFedAvgCallback
from lightning_fedhaw.aggregation.robust import (
    CoordinateMedianCallback,
    GeometricMedianCallback,
    KrumCallback,
    MultiKrumCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.aggregation.scaffold import ScaffoldCallback
from lightning_fedhaw.aggregation.serverft import ServerFineTuningCallback
from lightning_fedhaw.rule import LocalLRScale, RuleOutput

__all__ = [
    "AggregationRule",
    "CoordinateMedianCallback",
    "FedAWACallback",
    "FedAdagradCallback",
    "FedAdamCallback",
    "FedAdpCallback",
    "FedAvgCallback",
    "FedAvgMCallback",
    "FedBECallback",
    "FedDFCallback",
    "FedDynCallback",
    "FedExPCallback",
    "FedHAWCallback",
    "FedHyperCallback",
    "FedLAWCallback",
    "FedLWSCallback",
    "FedNovaCallback",
    "FedOptCallback",
    "FedVGCallback",
    "FedYogiCallback",
    "GeometricMedianCallback",
    "KrumCallback",
    "LearnedClientRateCallback",
    "LearnedWeightingCallback",
    "LocalLRScale",
    "MultiKrumCallback",
    "PublishedFedHAWCallback",
    "QFedAvgCallback",
    "RuleOutput",
    "ScaffoldCallback",
    "ServerFineTuningCallback",
    "TrimmedMeanCallback",
]
