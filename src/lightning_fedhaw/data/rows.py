"""Data sets of rows with named columns, such as those of Hugging Face, with a column that says whose a row is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_fedhaw import arguments
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.data.partitioners import NaturalIdPartitioner

_TRAIN = "train"
_VALIDATION = ("validation", "val", "test")


class Rows(Dataset[dict[str, object]]):
    """Some columns of a data set of rows, so that a batch is a dictionary of tensors.

    Args:
        rows: A data set whose samples are dictionaries.
        columns: The columns that a sample has.
        label: The column of the labels.
    """

    def __init__(self, rows: Any, columns: Sequence[str], label: str | None = None) -> None:
        self.rows = rows
        self.columns = list(columns)
        if label is not None:
            # Where a split by labels, histograms and previews look.
            self.targets = column_of(rows, label)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        row = self.rows[index]
        return {name: _as_tensor(row[name]) for name in self.columns}


class RowsDataModule(FederatedDataModule):
    """Rows with named columns, split over clients by one of the columns; batches are dictionaries.

    Args:
        train: The rows: a ``.jsonl`` file with one row a line; a folder that ``save_to_disk`` of Hugging Face's
            ``datasets`` has written; or any map-style data set whose samples are dictionaries, such as a
            ``datasets.Dataset``.
        client: The column that says whose a row is; each of its values is a client. Default: a split as of any other
            data set (``num_clients``, ``partitioner``).
        label: The column of the labels, for splits by labels and for histograms.
        columns: The columns that batches have. Default: all but ``client``.
        val: Validation rows, in the same forms. Default: the part ``validation``, ``val`` or ``test`` of a folder of
            several parts.
        batch_size: Samples in a batch. Default: 32.
        kwargs: Further arguments of :class:`~lightning_fedhaw.FederatedDataModule`, such as ``collate_fn`` for texts
            and lists of unequal length.

    Attributes:
        clients: The value of the column ``client`` of each client; empty without it.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the rows lack a column, or a file has another form.
    """

    def __init__(
        self,
        train: Any,
        client: str | None = None,
        label: str | None = None,
        columns: Sequence[str] | None = None,
        val: Any = None,
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        parts = _read("train", train)
        rows = parts.get(_TRAIN, next(iter(parts.values())))
        names = _column_names(rows)
        for argument, name in (("client", client), ("label", label)):
            if name is not None and arguments.text(argument, name) not in names:
                raise arguments.invalid(argument, f"a column of the rows ({', '.join(names)})", name)
        if columns is None:
            columns = [name for name in names if name != client]
        if isinstance(columns, str):
            raise arguments.invalid("columns", "a list of names", columns)
        for name in columns:
            arguments.choice("columns", name, names)
        self.clients: tuple[object, ...] = ()
        if client is not None:
            if "partitioner" in kwargs:
                raise ValueError("Give `client` or `partitioner`, not both: each value of the column is a client.")
            kwargs["partitioner"] = NaturalIdPartitioner(column_of(rows, client))
            self.clients = kwargs["partitioner"].names
        validation = None
        if val is not None:
            validation = next(iter(_read("val", val).values()))
        else:
            for name in _VALIDATION:
                if validation is None:
                    validation = parts.get(name)
        if validation is not None:
            kwargs["val"] = Rows(validation, columns)
        super().__init__(Rows(rows, columns, label), batch_size=batch_size, **kwargs)


def _read(argument: str, source: Any) -> dict[str, Any]:
    """Return the parts of a data set by name: one without a name, or those of a folder.

    Args:
        argument: The name of the argument, for messages.
        source: Its value: a path, or a data set.
    """
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__") or not len(source):
            raise arguments.invalid(argument, "a path, or a data set with rows", source)
        return {_TRAIN: source}
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {str(path)!r}.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must hold one row of JSON a line: {error}.") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} must hold one row of JSON a line, each a mapping from columns to values.")
    return {_TRAIN: rows}


def _read_folder(path: Path) -> dict[str, Any]:
    """Read what Hugging Face's ``save_to_disk`` has written: one data set, or several parts."""
    try:
        from datasets import load_from_disk  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The folder {str(path)!r} is read by Hugging Face's datasets, which is not installed:"
            " `pip install datasets`."
        ) from error
    saved = load_from_disk(str(path))
    if isinstance(saved, dict):
        return saved
    return {_TRAIN: saved}


def _column_names(rows: Any) -> list[str]:
    """Return the names of the columns, which a data set of Hugging Face has as an attribute."""
    names = getattr(rows, "column_names", None)
    if names is None:
        first = rows[0]
        if not isinstance(first, dict):
            raise arguments.invalid("train", "a data set whose samples are dictionaries", first)
        names = first
    return list(names)


def column_of(rows: Any, name: str) -> list[Any]:
    """Return a column, which a data set of Hugging Face gives without reading whole rows."""
    if hasattr(rows, "column_names"):
        return list(rows[name])
    return [row[name] for row in rows]


def _as_tensor(value: object) -> object:
    """Return numbers and lists of numbers as a tensor, and anything else as it is."""
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if isinstance(value, list) and value and not isinstance(value[0], (str, dict)):
        return torch.tensor(value)
    return value
