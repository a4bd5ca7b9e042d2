"""One data module for both kinds of training: federated in a federation, centralized in a stock trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_fedhaw import arguments
from lightning_fedhaw.data.labels import find_labels
from lightning_fedhaw.data.loader_settings import LoaderSettings
from lightning_fedhaw.data.partitioners import IndexPartitioner, Partition, Partitioner
from lightning_fedhaw.data.preview import draw_histogram, format_histogram
from lightning_fedhaw.data.split import split
from lightning_fedhaw.data.subsets import balanced_subset
from lightning_fedhaw.options import FederationOptions

Source = Dataset[Any] | DataLoader[Any] | Sequence[DataLoader[Any]]

OPTIONAL_LOADERS = ("val_dataloader", "test_dataloader", "predict_dataloader")


class FederatedDataModule(arguments.NamedArguments, pl.LightningDataModule):
    """Training data that is dealt to clients, with validation, test and proxy data beside it.

    In a federation every client trains on its part of ``train``; in a stock ``Trainer`` without a rule callback the
    same object trains centrally on all of it.

    Args:
        train: A map-style data set; or a list with one data set per client; or an existing ``LightningDataModule``,
            whose training loader's data set is split and whose other loaders are kept.
        num_clients: N. Default: the trainer's or the rule's ``num_clients``, else 10.
        partitioner: How ``train`` is split. Default: a Dirichlet(0.1) split where labels are found, else IID.
        batch_size: Samples in a batch. Default: 32, or what the existing data module uses.
        val: Validation data of the server: a data set, or ready loaders.
        test: Test data, likewise.
        proxy: Server data for rules that want some: a data set, or a number of samples that is cut from the training
            data, the same for every class.
        labels: Labels for a label-skewed split: an array ``[samples]``, or a callable that takes the data set.
        num_workers: Worker processes of the loaders.
        pin_memory: Whether loaders use page-locked memory.
        drop_last: Whether an incomplete last training batch is left out.
        collate_fn: Makes a batch from a list of samples.
        seed: Seed of the proxy cut and of :meth:`preview`. Default: the one given to ``seed_everything``, else 0.

    Raises:
        TypeError: If ``train`` is iterable only, or of another kind.
        ValueError: If ``num_clients`` contradicts a list of data sets.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(200, 4), torch.arange(200) % 2)
        >>> module = FederatedDataModule(data, num_clients=4, batch_size=16)
        >>> module.partition().sizes.sum().item()
        200
    """

    def __init__(
        self,
        train: Dataset[Any] | Sequence[Dataset[Any]] | pl.LightningDataModule,
        num_clients: int | None = None,
        partitioner: Partitioner | None = None,
        batch_size: int | None = None,
        val: Source | None = None,
        test: Source | None = None,
        proxy: Dataset[Any] | int | None = None,
        *,
        labels: Any = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        # What the federation's options say too has the same checks and the same sentences.
        options = FederationOptions(num_clients=num_clients, partitioner=partitioner, seed=seed)
        self.inner = train if isinstance(train, pl.LightningDataModule) else None
        self.num_clients = options.num_clients
        self.partitioner: Partitioner | None = options.partitioner
        self.batch_size = arguments.optional(arguments.integer, "batch_size", batch_size, minimum=1)
        self.labels = labels
        self._val = val
        self._test = test
        self._proxy = _checked_proxy(proxy)
        self._loader = {
            "num_workers": arguments.integer("num_workers", num_workers, minimum=0),
            "pin_memory": arguments.flag("pin_memory", pin_memory),
            "collate_fn": arguments.function("collate_fn", collate_fn, "collate_fn(samples)"),
        }
        self._drop_last = arguments.flag("drop_last", drop_last)
        self.seed = options.resolved_seed
        self.partition_in_use: Partition | None = None
        self._train: Dataset[Any] | None = None
        self._proxy_set: Dataset[Any] | None = None
        if self.inner is None:
            self._train = self._joined(train)
        self._hide_missing_loaders()

    def _hide_missing_loaders(self) -> None:
        """Lightning asks whether a hook is overridden; without data it must not seem to be."""
        for name, source in zip(OPTIONAL_LOADERS, (self._val, self._test, self._test), strict=True):
            if source is None and (self.inner is None or not is_overridden(name, self.inner)):
                setattr(self, name, getattr(super(), name))

    def __getstate__(self) -> dict[str, Any]:
        """What other processes are sent: methods are hidden there anew."""
        return {name: value for name, value in vars(self).items() if name not in OPTIONAL_LOADERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The same module as here."""
        vars(self).update(state)
        self._hide_missing_loaders()

    def _joined(self, train: Any) -> Dataset[Any]:
        if isinstance(train, (list, tuple)):
            if not train:
                raise ValueError("`train` must hold one data set per client, got an empty list.")
            if self.partitioner is not None:
                raise ValueError("`partitioner` has no meaning with a list of data sets: each client brings its own.")
            if self.num_clients not in (None, len(train)):
                raise ValueError(
                    f"`num_clients`={self.num_clients} contradicts `train`, a list of {len(train)} data sets, one per"
                    " client. Leave it out."
                )
            if isinstance(self._proxy, int):
                raise ValueError(
                    f"`proxy`={self._proxy} cannot be cut from a list of data sets, one per client. Give a data set."
                )
            parts = [_map_style(part) for part in train]
            ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
            ranges = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
            self.partitioner = IndexPartitioner(ranges)
            self.num_clients = len(parts)
            return ConcatDataset(parts)
        dataset: Dataset[Any] = _map_style(train)
        return dataset

    def prepare_data(self) -> None:
        """Let an existing data module download."""
        if self.inner is not None:
            self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up an existing data module, and cut the proxy set."""
        if self.inner is not None:
            self.inner.trainer = self.trainer
            self.inner.setup(stage)  # type: ignore[arg-type]
            if self._train is None and stage in (None, "fit"):
                loader = self.inner.train_dataloader()
                LoaderSettings.of(loader)
                self._train = loader.dataset
        if self._train is not None:
            self._cut_proxy(self._train)

    def _cut_proxy(self, train: Dataset[Any]) -> None:
        if not isinstance(self._proxy, int):
            self._proxy_set = self._proxy
            return
        if self._proxy_set is not None:
            return
        labels = find_labels(train, self.labels)
        if labels is None:
            raise ValueError(
                f"`proxy`={self._proxy} is cut with the same number of samples from every class, and the data set shows"
                " no labels. Give `labels=`, or a data set as `proxy`."
            )
        try:
            chosen, rest = balanced_subset(labels, self._proxy, seed=self.seed)
        except ValueError as error:
            raise ValueError(
                f"`proxy`={self._proxy} cannot be cut from {len(labels)} training samples, the same number from every"
                f" class: {error} Or give a data set as `proxy`."
            ) from error
        self._proxy_set, self._train = Subset(train, chosen.tolist()), Subset(train, rest.tolist())
        self.labels = labels[rest]

    @property
    def train_dataset(self) -> Dataset[Any]:
        """The training data that clients share, without the proxy set.

        Raises:
            RuntimeError: Before :meth:`setup` of an existing data module.
        """
        if self._train is None:
            self.prepare_data()
            self.setup("fit")
        elif isinstance(self._proxy, int) and self._proxy_set is None:
            self._cut_proxy(self._train)
        assert self._train is not None
        return self._train

    @property
    def proxy_dataset(self) -> Dataset[Any] | None:
        """The server's proxy data, if there is any."""
        _ = self.train_dataset
        return self._proxy_set if isinstance(self._proxy, int) else self._proxy

    def partition(self, seed: int | None = None) -> Partition:
        """Who owns which training sample: as the last ``fit`` dealt them, before that as one with this seed would.

        Args:
            seed: The federation's seed; asks for its split even after a ``fit``.
        """
        if self.partition_in_use is not None and seed is None:
            return self.partition_in_use
        partition, _, _ = split(
            self.train_dataset,
            num_clients=self.num_clients,
            partitioner=self.partitioner,
            labels=self.labels,
            seed=self.seed if seed is None else seed,
        )
        return partition

    def preview(
        self, path: str | Path | None = None, class_names: Sequence[str] | None = None, seed: int | None = None
    ) -> str:
        """The label histogram of every client, as text and, with a path, as a picture; without labels, the sizes.

        Args:
            path: Where the picture goes; its suffix chooses the format. Needs matplotlib.
            class_names: Names of the classes.
            seed: The federation's seed, where it is not that of the data module.
        """
        labels, partition = find_labels(self.train_dataset, self.labels), self.partition(seed)
        if labels is None:
            histogram, class_names = partition.sizes[:, None], class_names or ["any"]
        else:
            histogram = partition.histogram(labels)
        if path is not None:
            draw_histogram(histogram, path, class_names)
        return format_histogram(histogram, class_names)

    def train_dataloader(self) -> DataLoader[Any]:
        """All training data: what a centralized fit iterates, and what a federation deals to its clients."""
        if self.inner is not None:
            own = self.inner.train_dataloader()
            if self.batch_size is None and self._train is own.dataset:
                return own  # type: ignore[no-any-return]
            settings = LoaderSettings.of(own)
            return DataLoader(
                self.train_dataset,
                batch_size=self.batch_size or settings.batch_size,
                shuffle=settings.shuffle,
                drop_last=settings.drop_last,
                num_workers=settings.num_workers,
                pin_memory=settings.pin_memory,
                collate_fn=settings.collate_fn,
                worker_init_fn=settings.worker_init_fn,
            )
        return DataLoader(
            self.train_dataset,
            batch_size=self.batch_size or LoaderSettings.batch_size,
            shuffle=True,
            drop_last=self._drop_last,
            **self._loader,  # type: ignore[arg-type]
        )

    def val_dataloader(self) -> Any:
        """The server's validation data; an existing data module's without ``val``."""
        return self._evaluation(self._val, "val_dataloader")

    def test_dataloader(self) -> Any:
        """The test data; an existing data module's without ``test``."""
        return self._evaluation(self._test, "test_dataloader")

    def predict_dataloader(self) -> Any:
        """An existing data module's prediction data, else the test data."""
        return self._evaluation(None if self.inner is not None else self._test, "predict_dataloader")

    def _evaluation(self, source: Source | None, name: str) -> Any:
        if source is None:
            return getattr(self.inner, name)()
        if isinstance(source, (DataLoader, list, tuple)):
            return source
        return DataLoader(source, batch_size=self.batch_size or LoaderSettings.batch_size, **self._loader)  # type: ignore[arg-type]

    def teardown(self, stage: str | None = None) -> None:
        """Tear down an existing data module."""
        if self.inner is not None:
            self.inner.teardown(stage)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """An existing data module's state."""
        return self.inner.state_dict() if self.inner is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give an existing data module its state back."""
        if self.inner is not None:
            self.inner.load_state_dict(state_dict)


def _checked_proxy(proxy: Any) -> Dataset[Any] | int | None:
    number = arguments.plain_number(proxy)
    if isinstance(number, int):
        return arguments.integer("proxy", number, minimum=1)
    is_dataset = hasattr(proxy, "__len__") and hasattr(proxy, "__getitem__") and number is None
    if proxy is None or (is_dataset and not isinstance(proxy, str)):
        return proxy
    raise TypeError(
        "`proxy` must be a data set with a length, or a whole number of training samples to set aside, got"
        f" {type(proxy).__name__}."
    )


def _map_style(dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            "`train` must be a map-style data set (with `__getitem__` and `__len__`), a list of such, one per client,"
            f" or a LightningDataModule, got {type(dataset).__name__}."
        )
    return dataset
