"""One data module for both kinds of training: federated in a federation, centralized in a stock trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.data.class_histogram import MAX_CLASSES, ClassHistogram, class_histogram
from lightning_fedhaw.data.labels import find_classes
from lightning_fedhaw.data.loader_settings import LoaderSettings, training_samples
from lightning_fedhaw.data.partitioners import IndexPartitioner, Partition, Partitioner
from lightning_fedhaw.data.preview import draw_histogram, format_histogram
from lightning_fedhaw.data.split import split
from lightning_fedhaw.data.subsets import balanced_subset
from lightning_fedhaw.options import FederationOptions

Source = Dataset[object] | DataLoader[object] | Sequence[DataLoader[object]]

OPTIONAL_LOADERS = ("val_dataloader", "test_dataloader", "predict_dataloader")


class FederatedDataModule(argument_names.NamedArguments, pl.LightningDataModule):
    """Training data that is split over clients, together with validation, test and proxy data.

    In a federation every client trains on its share of ``train``; in a stock ``Trainer`` without a rule callback the
    same object trains centrally on all of it.

    Args:
        train: A map-style data set; or a list with one data set per client; or an existing ``LightningDataModule``,
            whose training loader's data set is split and whose other loaders are used unchanged.
        num_clients: N. Default: the trainer's or the rule's ``num_clients``, else 10.
        partitioner: How ``train`` is split. Default: a Dirichlet(0.1) split where labels are found, else IID.
        batch_size: Samples in a batch. Default: 32, or that of the existing data module.
        val: Validation data: a data set, or ready loaders; or a list with one data set per client. The global model is
            validated on all of these together, and each client is evaluated on its own after the last round.
        test: Test data, likewise. Clients are evaluated on their own ``test`` where ``val`` is not theirs.
        train_eval: The samples of ``train`` as they are read for evaluation, in the same order: a data set without
            random augmentation, or a list with one data set per client. The clients' metrics at the end of ``fit`` are
            measured on it. Default: ``train`` itself.
        proxy: Server data for rules that need some: a data set, or a number of samples that is cut from the training
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
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(200, 4), torch.arange(200) % 2)
        >>> module = FederatedDataModule(data, num_clients=4, batch_size=16)
        >>> module.partition().sizes.sum().item()
        200
    """

    def __init__(
        self,
        train: Dataset[object] | Sequence[Dataset[object]] | pl.LightningDataModule,
        num_clients: int | None = None,
        partitioner: Partitioner | None = None,
        batch_size: int | None = None,
        val: Source | Sequence[Dataset[object]] | None = None,
        test: Source | Sequence[Dataset[object]] | None = None,
        proxy: Dataset[object] | int | None = None,
        *,
        train_eval: Dataset[object] | Sequence[Dataset[object]] | None = None,
        labels: Any = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        # Arguments that the federation's options have, too, get their checks and messages from there.
        options = FederationOptions(num_clients=num_clients, partitioner=partitioner, seed=seed)
        self.inner = train if isinstance(train, pl.LightningDataModule) else None
        self.num_clients = options.num_clients
        self.partitioner: Partitioner | None = options.partitioner
        self.batch_size = arguments.optional(arguments.integer, "batch_size", batch_size, minimum=1)
        self.labels = labels
        self._client_sets = {"val": _client_sets("val", val), "test": _client_sets("test", test)}
        self._val = _all_together(val, self._client_sets["val"])
        self._test = _all_together(test, self._client_sets["test"])
        self._proxy = _checked_proxy(proxy)
        self._loader_options: dict[str, Any] = {
            "num_workers": arguments.integer("num_workers", num_workers, minimum=0),
            "pin_memory": arguments.flag("pin_memory", pin_memory),
            "collate_fn": arguments.function("collate_fn", collate_fn, "collate_fn(samples)"),
        }
        self._drop_last = arguments.flag("drop_last", drop_last)
        self.seed = options.resolved_seed
        self.partition_in_use: Partition | None = None
        self._train: Dataset[object] | None = self._checked_train(train)
        self._train_eval = _checked_train_eval(train_eval, train)
        self._proxy_set: Dataset[object] | None = None
        if self.num_clients is not None:
            self.evaluation_sets(self.num_clients)
        # Of an existing data module's training loader, once it is set up.
        self._source: Dataset[object] | None = None
        self._fetches_in_bulk = False
        self._hide_missing_loaders()

    def _checked_train(self, train: object) -> Dataset[object] | None:
        """Return the training data; None for an existing data module, whose data exist only after its ``setup``."""
        if isinstance(train, pl.LightningDataModule):
            return None
        if isinstance(train, (list, tuple)):
            return self._concatenate(train)
        dataset = _map_style(train)
        _check_not_empty("train", dataset)
        return dataset

    def _concatenate(self, datasets: Sequence[Dataset[object]]) -> Dataset[object]:
        """Concatenate one data set per client, and set the partitioner that takes them apart again."""
        if not datasets:
            raise ValueError("`train` must hold one data set per client, got an empty list.")
        if self.partitioner is not None:
            raise ValueError(
                f"`partitioner` must be None where `train` is a list of data sets, one per client, got"
                f" {self.partitioner!r}: the list is a split already. Leave it out."
            )
        if self.num_clients not in (None, len(datasets)):
            raise ValueError(
                f"`num_clients`={self.num_clients} contradicts `train`, a list of {len(datasets)} data sets, one per"
                " client. Leave it out."
            )
        if isinstance(self._proxy, int):
            raise ValueError(
                f"`proxy`={self._proxy} cannot be cut from a list of data sets, one per client. Give a data set."
            )
        indices_of_clients = []
        num_samples = 0
        for dataset in datasets:
            begin = num_samples
            num_samples += _length(_map_style(dataset))
            indices_of_clients.append(range(begin, num_samples))
        self.partitioner = IndexPartitioner(indices_of_clients)
        self.num_clients = len(datasets)
        return ConcatDataset(datasets)

    # -----------------------------------------------------------------------------------------------------------------
    # Loaders without data
    # -----------------------------------------------------------------------------------------------------------------

    def _hide_missing_loaders(self) -> None:
        """Restore the base class's methods for loaders without data: Lightning asks whether a method is overridden."""
        sources = (self._val, self._test, self._test)
        for name, source in zip(OPTIONAL_LOADERS, sources, strict=True):
            if source is None and (self.inner is None or not is_overridden(name, self.inner)):
                setattr(self, name, getattr(super(), name))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, or for a copy.

        It leaves out the methods of :meth:`_hide_missing_loaders`, which are bound to this object.
        """
        state = dict(vars(self))
        for name in OPTIONAL_LOADERS:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state from another process, or for a copy."""
        vars(self).update(state)
        self._hide_missing_loaders()

    # -----------------------------------------------------------------------------------------------------------------
    # Training and proxy data
    # -----------------------------------------------------------------------------------------------------------------

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
                # Refuse loaders whose data set cannot be split, before its attributes are used.
                settings = LoaderSettings.of(loader)
                self._fetches_in_bulk = settings.bulk
                self._source = loader.dataset
                self._train, self.labels = training_samples(loader, self.labels, self.partitioner)
                self._check_template(settings)
        if self._train is not None:
            self._cut_proxy(self._train)

    def _check_template(self, settings: LoaderSettings) -> None:
        """Refuse to change the batches or samples of a loader that can only be used as it is."""
        if settings.template is None:
            return
        remedies = {"batch_size": "set it in the loader", "proxy": "give a data set"}
        for name, value in (("batch_size", self.batch_size), ("proxy", self._proxy)):
            if isinstance(value, int):
                raise ValueError(
                    f"`{name}`={value} would need another training loader, and the data module's"
                    f" {type(settings.template).__name__}, which makes batches in code of its own, can only be used as"
                    f" it is. Leave `{name}` out, or {remedies[name]}."
                )

    def _cut_proxy(self, train: Dataset[object]) -> None:
        """Cut the proxy set from the training data, once; a proxy data set is taken as it is."""
        if not isinstance(self._proxy, int):
            self._proxy_set = self._proxy
            return
        if self._proxy_set is not None:
            return
        classes = find_classes(train, self.labels, bulk=self._fetches_in_bulk)
        if classes is None:
            raise ValueError(
                f"`proxy`={self._proxy} is cut with the same number of samples from every class, and no labels were"
                " found in the data set. Give `labels=`, or a data set as `proxy`."
            )
        labels = classes.labels
        try:
            chosen, remaining = balanced_subset(labels, self._proxy, seed=self.seed)
        except ValueError as error:
            raise ValueError(
                f"`proxy`={self._proxy} cannot be cut from {len(labels)} training samples, the same number from every"
                f" class: {error} Or give a data set as `proxy`."
            ) from error
        self._proxy_set = Subset(train, chosen.tolist())
        self._train = Subset(train, remaining.tolist())
        if self._train_eval is not None:
            _check_same_length(self._train_eval, train)
            self._train_eval = Subset(self._train_eval, remaining.tolist())
        self.labels = labels[remaining]
        if classes.names is not None:
            self.labels = [classes.names[label] for label in self.labels.tolist()]

    @property
    def train_dataset(self) -> Dataset[object]:
        """The training data of all clients, without the proxy set.

        An existing data module is prepared and set up for it, if it is not yet.
        """
        if self._train is None:
            self.prepare_data()
            self.setup("fit")
        elif isinstance(self._proxy, int) and self._proxy_set is None:
            self._cut_proxy(self._train)
        assert self._train is not None
        return self._train

    @property
    def train_eval_dataset(self) -> Dataset[object] | None:
        """The training data of all clients as it is read for evaluation, without the proxy set; None if not given."""
        train = self.train_dataset
        if self._train_eval is not None:
            _check_same_length(self._train_eval, train)
        return self._train_eval

    @property
    def proxy_dataset(self) -> Dataset[object] | None:
        """The server's proxy data, if there is any."""
        # This sets up an existing data module, and cuts the proxy set.
        _ = self.train_dataset
        if isinstance(self._proxy, int):
            return self._proxy_set
        return self._proxy

    # -----------------------------------------------------------------------------------------------------------------
    # The split
    # -----------------------------------------------------------------------------------------------------------------

    def partition(self, seed: int | None = None) -> Partition:
        """Return the split of the training data: that of the last ``fit``, or before any ``fit`` that of the seed.

        Args:
            seed: The federation's seed; if it is given, its split is returned even after a ``fit``. Default: that of
                the data module.
        """
        if self.partition_in_use is not None and seed is None:
            return self.partition_in_use
        # First, because it sets up an existing data module.
        train = self.train_dataset
        result = split(
            train,
            num_clients=self.num_clients,
            partitioner=self.partitioner,
            labels=self.labels,
            seed=self.seed if seed is None else seed,
            bulk=self._fetches_in_bulk,
        )
        return result.partition

    def preview(
        self, path: str | Path | None = None, class_names: Sequence[str] | None = None, seed: int | None = None
    ) -> str:
        """Return the label histogram of every client as text, and draw it; without labels, the clients' sizes.

        Args:
            path: The file in which the picture is saved; its suffix determines the format. Needs matplotlib. Default:
                no picture.
            class_names: Names of the classes. Default: the labels.
            seed: The federation's seed, if it is not that of the data module.
        """
        classes = find_classes(self.train_dataset, self.labels, bulk=self._fetches_in_bulk)
        partition = self.partition(seed)
        histogram = None
        if classes is not None:
            # As many columns as there are samples at most: a larger number is no number of a class.
            most_columns = max(MAX_CLASSES, len(classes.labels))
            histogram = class_histogram(partition, classes, most_columns=most_columns)
        if histogram is None:
            # [N, 1]: all samples count as one class.
            histogram = ClassHistogram(partition.sizes[:, None], ("any",))
        class_names = class_names or histogram.names
        if path is not None:
            draw_histogram(histogram.counts, path, class_names)
        return format_histogram(histogram.counts, class_names)

    def evaluation_sets(self, num_clients: int) -> list[Dataset[object]] | None:
        """Return the data set on which each client is evaluated: of ``val``, else of ``test``, else None.

        Args:
            num_clients: The number of clients of the split.

        Raises:
            ValueError: If there is not one for each client.
        """
        for name, datasets in self._client_sets.items():
            if datasets is not None and len(datasets) != num_clients:
                raise ValueError(
                    f"`{name}` must be a data set, loaders, or one data set for each of the {num_clients} clients, got"
                    f" {len(datasets)}."
                )
        return self._client_sets["val"] or self._client_sets["test"]

    # -----------------------------------------------------------------------------------------------------------------
    # Loaders
    # -----------------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[object]:
        """Return a loader of all training data: a centralized fit iterates it, a federation splits its data set."""
        if self.inner is None:
            return DataLoader(
                self.train_dataset,
                batch_size=self.batch_size or LoaderSettings.batch_size,
                shuffle=True,
                drop_last=self._drop_last,
                **self._loader_options,
            )
        loader: DataLoader[object] = self.inner.train_dataloader()
        train = self.train_dataset
        is_cut = isinstance(self._proxy, int)
        if self.batch_size is None and not is_cut and self._source is loader.dataset:
            return loader
        settings = LoaderSettings.of(loader)
        if settings.template is not None:
            return loader
        if is_cut and settings.draws is not None:
            draws = settings.draws.of_subset(train.indices)  # type: ignore[attr-defined]  # a `Subset`, once it is cut
            settings = replace(settings, draws=draws)
        return replace(settings, batch_size=self.batch_size or settings.batch_size).central_loader(train)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return loaders of the server's validation data; without ``val``, those of an existing data module."""
        return self._evaluation_loaders(self._val, "val_dataloader")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Return loaders of the test data; without ``test``, those of an existing data module."""
        return self._evaluation_loaders(self._test, "test_dataloader")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return loaders of an existing data module's prediction data; without such a module, of the test data."""
        source = self._test if self.inner is None else None
        return self._evaluation_loaders(source, "predict_dataloader")

    def _evaluation_loaders(self, source: Source | None, name: str) -> EVAL_DATALOADERS:
        """Return loaders of a source; without one, those that the existing data module's method of a name returns."""
        if source is None:
            return getattr(self.inner, name)()
        if isinstance(source, (DataLoader, list, tuple)):
            return source
        return DataLoader(
            source,  # type: ignore[arg-type]  # a data set: loaders were returned above
            batch_size=self.batch_size or LoaderSettings.batch_size,
            **self._loader_options,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # The life of an existing data module
    # -----------------------------------------------------------------------------------------------------------------

    def teardown(self, stage: str | None = None) -> None:
        """Tear down an existing data module."""
        if self.inner is not None:
            self.inner.teardown(stage)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an existing data module."""
        if self.inner is None:
            return {}
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of an existing data module."""
        if self.inner is not None:
            self.inner.load_state_dict(state_dict)


def _checked_proxy(proxy: Any) -> Dataset[object] | int | None:
    """Check the argument ``proxy``: a data set, or a number of samples."""
    number = arguments.plain_number(proxy)
    if isinstance(number, int):
        return arguments.integer("proxy", number, minimum=1)
    # A float in a tensor without axes is a number, though the tensor has both methods; a string has them, too.
    is_dataset = hasattr(proxy, "__len__") and hasattr(proxy, "__getitem__") and number is None
    if is_dataset and not isinstance(proxy, str):
        _check_not_empty("proxy", proxy)
        dataset: Dataset[Any] = proxy
        return dataset
    if proxy is None:
        return None
    raise TypeError(
        "`proxy` must be a data set with a length, or a whole number of training samples to set aside, got"
        f" {type(proxy).__name__}."
    )


def _client_sets(name: str, source: Any) -> list[Dataset[object]] | None:
    """Return one data set per client; None where the argument is a data set or loaders.

    Args:
        name: The argument.
        source: Its value.
    """
    if not isinstance(source, (list, tuple)) or any(isinstance(entry, DataLoader) for entry in source):
        return None
    for client, dataset in enumerate(source):
        is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not is_map_style or not len(dataset):
            raise ValueError(
                f"`{name}` as a list must hold loaders, or one map-style data set with samples per client, got"
                f" {type(dataset).__name__} for client {client}."
            )
    return list(source)


def _all_together(source: Any, datasets: Sequence[Dataset[object]] | None) -> Source | None:
    """Return the data of all clients where each has a data set, else the source itself."""
    if datasets is not None:
        return ConcatDataset(datasets)
    loaders: Source | None = source
    return loaders


def _checked_train_eval(train_eval: object, train: object) -> Dataset[object] | None:
    """Check the argument ``train_eval``: data sets in the form of ``train``, with as many samples."""
    if train_eval is None:
        return None
    if isinstance(train, (list, tuple)) and isinstance(train_eval, (list, tuple)):
        lengths = [_length(_map_style(dataset)) for dataset in train]
        lengths_here = [_length(_map_style(dataset, "train_eval")) for dataset in train_eval]
        if lengths_here != lengths:
            raise ValueError(
                f"`train_eval` must have a data set for each of `train`, with as many samples ({lengths[:10]}), got"
                f" {lengths_here[:10]}. Make them of the same files, with the transform for evaluation."
            )
        return ConcatDataset(train_eval)
    dataset = _map_style(train_eval, "train_eval")
    if not isinstance(train, (list, tuple, pl.LightningDataModule)):
        _check_same_length(dataset, _map_style(train))
    return dataset


def _check_same_length(train_eval: Dataset[object], train: Dataset[object]) -> None:
    """Refuse a data set for evaluation that does not have the samples of the training data."""
    num_eval = _length(train_eval)
    num_train = _length(train)
    if num_eval != num_train:
        raise ValueError(
            f"`train_eval` must have the {num_train} samples of `train`, in the same order, got {num_eval}."
            " Make it of the same files, with the transform for evaluation."
        )


def _check_not_empty(name: str, dataset: Dataset[object]) -> None:
    """Refuse a data set without samples."""
    if not _length(dataset):
        raise ValueError(f"`{name}` must have at least one sample, got a {type(dataset).__name__} without any.")


def _length(dataset: Dataset[object]) -> int:
    """Return the number of samples; a ``Dataset`` need not have one, but :func:`_map_style` asks for it."""
    return len(cast(Sized, dataset))


def _map_style(dataset: object, argument: str = "train") -> Dataset[object]:
    """Refuse a data set that is not map-style."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"`{argument}` must be a map-style data set (with `__getitem__` and `__len__`), a list of such, one per"
            f" client, or a LightningDataModule, got {type(dataset).__name__}."
        )
    # Anything with the two methods will do, as for torch's own loaders.
    return cast("Dataset[object]", dataset)
