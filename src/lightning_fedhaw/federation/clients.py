"""What belongs to each client of a federation: its samples, and its own part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedhaw.federation.federation import Federation


class FederationClients:
    """The clients of a federation, as ``trainer.federation_clients``: what each of them has and others do not.

    It is there from the beginning of ``fit`` on, and after it. Do not create it yourself.

    Args:
        federation: The federation.

    Attributes:
        train_indices: For each client ``[samples]`` int64, the indices of its training samples in the training data.
        held_out_indices: For each client the indices of the samples that ``client_val_fraction`` or ``client_val``
            holds out; its training never sees them.
    """

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self.train_indices: Sequence[Tensor] = federation.data.train_indices
        self.held_out_indices: Sequence[Tensor] = federation.data.held_out_indices

    def __len__(self) -> int:
        return len(self.train_indices)

    def train_set(self, client: int) -> Dataset[Any]:
        """Return a client's training samples as a data set, with its labels where a split changes them.

        Args:
            client: The client's number.
        """
        return self._federation.data.subset(client, self.train_indices[client])

    def held_out_set(self, client: int) -> Dataset[Any]:
        """Return a client's held-out samples as a data set, read as ``train_eval`` reads them if it is given.

        Where the data module's ``val`` or ``test`` has a data set for each client, it is the client's. Else it is empty
        without ``client_val_fraction`` or ``client_val``.

        Args:
            client: The client's number.
        """
        evaluation = self._federation.data.evaluation
        if evaluation is not None:
            return evaluation.subset(client, evaluation.train_indices[client])
        return self._federation.data.subset(client, self.held_out_indices[client], for_evaluation=True)

    def own_state(self, client: int) -> dict[str, Tensor]:
        """Return a client's own part of the model, which makes it that client's model.

        These are the parameters of ``local_parameters`` (the initial ones, if the client has not trained) and, with
        ``buffers="local"``, its buffers: ``module.load_state_dict(clients.own_state(3), strict=False)``. On several
        processes each has those of the clients that it trained, and after ``fit`` those of all clients.

        Args:
            client: The client's number.
        """
        federation = self._federation
        own = {**federation.engine.local_parameters.start(client), **federation.buffers.local.start(client)}
        return {name: value.detach().cpu().clone() for name, value in own.items()}
