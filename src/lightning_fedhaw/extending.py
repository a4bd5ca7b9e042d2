"""The classes and functions for authors of new rules, channels, objectives, partitioners and samplers.

Users who train with the existing ones need none of these names; the names they need are in ``lightning_fedhaw``.
"""

from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.channel.base import (
    AggregateChannel,
    Arrivals,
    BlockChannel,
    Channel,
    ChannelContext,
    MessageSize,
    Substitute,
)
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.data.partitioners.base import Partitioner
from lightning_fedhaw.data.partitioners.partition import Partition
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.federation.clients import FederationClients
from lightning_fedhaw.federation.observation import Aggregated
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.objectives.view import StepView
from lightning_fedhaw.probe import ProbeResult
from lightning_fedhaw.rule import LocalLRScale, Rule, RuleOutput, ServerView
from lightning_fedhaw.streams import stream
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

__all__ = [
    "AggregateChannel",
    "Aggregated",
    "AggregationRule",
    "Arrivals",
    "BlockChannel",
    "Channel",
    "ChannelContext",
    "ClientObjective",
    "ClientUpdate",
    "ClientVectors",
    "Cohort",
    "CohortSampler",
    "CohortVectors",
    "FederationClients",
    "LocalLRScale",
    "LocalTraining",
    "MessageSize",
    "ParameterLayout",
    "Partition",
    "Partitioner",
    "ProbeResult",
    "Rule",
    "RuleOutput",
    "ServerView",
    "StepView",
    "Substitute",
    "stream",
]
