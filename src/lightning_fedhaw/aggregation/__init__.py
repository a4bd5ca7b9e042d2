"""Aggregation rules: one file each, a pure function that is the paper and a small class that keeps the state."""

from lightning_fedhaw.aggregation.base import AggregationRule, RuleStep
from lightning_fedhaw.aggregation.fedavg import FedAvgCallback
from lightning_fedhaw.aggregation.fedhaw import FedHAWCallback

__all__ = ["AggregationRule", "FedAvgCallback", "FedHAWCallback", "RuleStep"]
