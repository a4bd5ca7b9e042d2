"""The clients' data: partitioners, client samplers, and the data module."""

from lightning_fedhaw.data.dogs import StanfordDogs
from lightning_fedhaw.data.features import cache_features
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.labels import find_labels
from lightning_fedhaw.data.leaf import LeafDataModule
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.data.partitioners import (
    DirichletPartitioner,
    HybridDirichletPartitioner,
    IIDPartitioner,
    IndexPartitioner,
    LabelSwapPartitioner,
    LongTailPartitioner,
    NaturalIdPartitioner,
    Partition,
    Partitioner,
    QuantitySkewPartitioner,
    ShardPartitioner,
)
from lightning_fedhaw.data.preview import draw_histogram, format_histogram
from lightning_fedhaw.data.rows import RowsDataModule
from lightning_fedhaw.data.samplers import (
    CohortSampler,
    FixedSequenceSampler,
    FullParticipationSampler,
    UniformSampler,
    WeightedSampler,
)
from lightning_fedhaw.data.split import split
from lightning_fedhaw.data.subsets import balanced_subset, subset_by_class
from lightning_fedhaw.data.synthetic import Synthetic

__all__ = [
    "CohortSampler",
    "DirichletPartitioner",
    "FederatedDataModule",
    "FixedSequenceSampler",
    "FullParticipationSampler",
    "HoldOut",
    "HybridDirichletPartitioner",
    "IIDPartitioner",
    "IndexPartitioner",
    "LabelSwapPartitioner",
    "LeafDataModule",
    "LongTailPartitioner",
    "NaturalIdPartitioner",
    "Partition",
    "Partitioner",
    "QuantitySkewPartitioner",
    "RowsDataModule",
    "ShardPartitioner",
    "StanfordDogs",
    "Synthetic",
    "UniformSampler",
    "WeightedSampler",
    "balanced_subset",
    "cache_features",
    "draw_histogram",
    "find_labels",
    "format_histogram",
    "split",
    "subset_by_class",
]
