"""Schemes that split one data set over clients.

A scheme is a :class:`Partitioner`; it returns a :class:`Partition`. Most schemes first decide *how many* samples of
each class each client gets, a table of counts, and then assign the shuffled samples. Every draw comes from a generator
addressed by the seed and the scheme's name.
"""

from lightning_fedhaw.data.partitioners.base import Partitioner
from lightning_fedhaw.data.partitioners.dirichlet import DirichletPartitioner, HybridDirichletPartitioner
from lightning_fedhaw.data.partitioners.explicit import IndexPartitioner, NaturalIdPartitioner
from lightning_fedhaw.data.partitioners.iid import IIDPartitioner
from lightning_fedhaw.data.partitioners.label_swap import LabelSwapPartitioner
from lightning_fedhaw.data.partitioners.partition import Partition
from lightning_fedhaw.data.partitioners.skewed import LongTailPartitioner, QuantitySkewPartitioner, ShardPartitioner

__all__ = [
    "DirichletPartitioner",
    "HybridDirichletPartitioner",
    "IIDPartitioner",
    "IndexPartitioner",
    "LabelSwapPartitioner",
    "LongTailPartitioner",
    "NaturalIdPartitioner",
    "Partition",
    "Partitioner",
    "QuantitySkewPartitioner",
    "ShardPartitioner",
]
