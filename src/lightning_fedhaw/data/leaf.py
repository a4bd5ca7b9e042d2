"""Federations in LEAF's JSON form, such as FEMNIST and Shakespeare: a client is a user.

S. Caldas and others: LEAF: A Benchmark for Federated Settings. arXiv:1812.01097. Its scripts write folders ``train``
and ``test`` with files of this form::

    {"users": ["f0000_14", ...], "num_samples": [155, ...], "user_data": {"f0000_14": {"x": [...], "y": [...]}, ...}}

In FEMNIST ``x`` holds 784 numbers and ``y`` a class; in Shakespeare ``x`` holds 80 characters and ``y`` the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_fedhaw import arguments
from lightning_fedhaw.data.module import FederatedDataModule

LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""The 80 characters of LEAF's Shakespeare, in the order of its classes."""


class LeafDataModule(FederatedDataModule):
    """The users of a LEAF data set as clients, with their own test data.

    Numbers become float32 tensors and texts tensors of the numbers of their characters, so that every character is a
    class; whole numbers as targets are classes too. If the test data is of the same users, each client has its own; if
    it is of other users (LEAF's split by user), all of it together validates the global model.

    Args:
        root: The folder that holds ``train`` and ``test``, each with one JSON file or more. Without ``test`` there is
            no validation data.
        shape: The shape of a sample, such as ``(1, 28, 28)`` for FEMNIST. Default: as it is in the file.
        max_clients: The number of users that are read, in the order of the files. Default: all.
        min_samples: Users with fewer training samples are left out.
        letters: The characters of texts, by number.
        batch_size: Samples in a batch. Default: 32.
        kwargs: Further arguments of :class:`~lightning_fedhaw.FederatedDataModule`.

    Attributes:
        users: The name of each client.

    Raises:
        FileNotFoundError: If there is no such folder, or no JSON file in it.
        ValueError: If a file has another form, or a text has a character that is not among ``letters``.
    """

    def __init__(
        self,
        root: str | Path,
        shape: Sequence[int] | None = None,
        *,
        max_clients: int | None = None,
        min_samples: int = 1,
        letters: str = LETTERS,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._shape: list[int] | None = None
        if shape is not None:
            self._shape = arguments.integers("shape", shape, minimum=1, allowed="a list of sizes")
        arguments.optional(arguments.integer, "max_clients", max_clients, minimum=1)
        arguments.integer("min_samples", min_samples, minimum=1)
        # Before the files are read, which may take a while.
        arguments.optional(arguments.integer, "batch_size", batch_size, minimum=1)
        self._number_of = {letter: number for number, letter in enumerate(arguments.text("letters", letters))}
        folder = Path(root)
        train = self._read(folder / "train", min_samples, max_clients)
        self.users: tuple[str, ...] = tuple(train)
        val: list[Dataset[object]] | Dataset[object] | None = None
        if "val" not in kwargs and folder.joinpath("test").is_dir():
            val = self._test_data(folder / "test")
        super().__init__(list(train.values()), batch_size=batch_size, **{"val": val, **kwargs})

    def _test_data(self, folder: Path) -> list[Dataset[object]] | Dataset[object]:
        """Return the test data of each client, or of other users all together."""
        test = self._read(folder, 1, None)
        if set(self.users) <= set(test):
            return [test[user] for user in self.users]
        return torch.utils.data.ConcatDataset(list(test.values()))

    def _read(self, folder: Path, min_samples: int, most: int | None) -> dict[str, TensorDataset]:
        """Read the users of all files of a folder.

        Args:
            folder: The folder.
            min_samples: Users with fewer samples are left out.
            most: The number of users after which reading ends; None for all.
        """
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise FileNotFoundError(
                f"There is no JSON file in {str(folder)!r}. `root` is the folder that holds LEAF's `train` and `test`,"
                " such as `leaf/data/femnist/data`."
            )
        users: dict[str, TensorDataset] = {}
        for path in paths:
            for user, samples in _users_of(path).items():
                if most is not None and len(users) == most:
                    return users
                if len(samples["y"]) >= min_samples:
                    users[user] = self._dataset(user, samples, path)
        if not users:
            raise ValueError(f"No user in {str(folder)!r} has at least `min_samples`={min_samples} samples.")
        return users

    def _dataset(self, user: str, samples: Mapping[str, Any], path: Path) -> TensorDataset:
        inputs = self._tensor(samples["x"], user, path)
        if self._shape is not None:
            if math.prod(self._shape) != inputs[0].numel():
                raise arguments.invalid("shape", f"a shape of {inputs[0].numel()} numbers", self._shape)
            inputs = inputs.reshape(len(inputs), *self._shape)
        targets = self._tensor(samples["y"], user, path)
        # One character is one class, and no text of one character.
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if not targets.is_floating_point() or bool((targets == targets.round()).all()):
            targets = targets.long()
        return TensorDataset(inputs, targets)

    def _tensor(self, values: Sequence[Any], user: str, path: Path) -> Tensor:
        """Return numbers in float32, and texts as the numbers of their characters."""
        if isinstance(values[0], str):
            try:
                return torch.tensor([[self._number_of[letter] for letter in text] for text in values])
            except KeyError as error:
                raise ValueError(
                    f"User {user!r} in {str(path)!r} has the character {error.args[0]!r}, which is not among `letters`."
                    " Give all characters: `letters=...`."
                ) from error
        return torch.tensor(values, dtype=torch.float32)


def _users_of(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file: for each user with samples, ``x`` and ``y``.

    Raises:
        ValueError: If it has another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        users = {}
        for user in content["users"]:
            samples = content["user_data"][user]
            if len(samples["x"]) != len(samples["y"]):
                raise ValueError(f"user {user!r} has {len(samples['x'])} inputs and {len(samples['y'])} targets")
            if samples["y"]:
                users[user] = {"x": samples["x"], "y": samples["y"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no file of LEAF ({type(error).__name__}: {error}). It must hold `users`, and in"
            " `user_data` for each user `x` and `y` of equal length."
        ) from error
    return users
