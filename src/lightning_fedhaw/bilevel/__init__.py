"""Federated bilevel optimization: upper variables that are trained by the hypergradient of another loss."""

from lightning_fedhaw.bilevel.aggitd import AggITDCallback
from lightning_fedhaw.bilevel.base import BilevelRule
from lightning_fedhaw.bilevel.fednest import FedNestCallback
from lightning_fedhaw.bilevel.parts import ClassLogits, LayerDecay, SampleWeights
from lightning_fedhaw.bilevel.rounds import OuterRound, Progress
from lightning_fedhaw.bilevel.simfbo import SimFBOCallback
from lightning_fedhaw.data.numbered import with_indices
from lightning_fedhaw.inquiry import Answers, Inquiry, LocalProblem, UpperGradients

__all__ = [
    "AggITDCallback",
    "Answers",
    "BilevelRule",
    "ClassLogits",
    "FedNestCallback",
    "Inquiry",
    "LayerDecay",
    "LocalProblem",
    "OuterRound",
    "Progress",
    "SampleWeights",
    "SimFBOCallback",
    "UpperGradients",
    "with_indices",
]
