"""Aggregation rules: one file each, a pure function that is the paper and a small class that keeps the state."""

from lightning_fedhaw.aggregation.base import AggregationRule, LocalPace, RuleStep
from lightning_fedhaw.aggregation.fedavg import FedAvgCallback
from lightning_fedhaw.aggregation.fedbe import FedBECallback
from lightning_fedhaw.aggregation.feddf import FedDFCallback
from lightning_fedhaw.aggregation.fedhaw import FedHAWCallback
from lightning_fedhaw.aggregation.fedhyper import FedHyperCallback
from lightning_fedhaw.aggregation.fedlaw import FedLAWCallback
from lightning_fedhaw.aggregation.serverft import ServerFineTuningCallback

__all__ = [
    "AggregationRule",
    "FedAvgCallback",
    "FedBECallback",
    "FedDFCallback",
    "FedHAWCallback",
    "FedHyperCallback",
    "FedLAWCallback",
    "LocalPace",
    "RuleStep",
    "ServerFineTuningCallback",
]
