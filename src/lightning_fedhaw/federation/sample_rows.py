"""Parameters with one row for each training sample: whose client each row is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.numbered import sample_numbers
from lightning_fedhaw.vectors.layout import ParameterLayout


class SampleRows:
    """The rows of each client's samples, which are the numbers of the samples.

    Args:
        data: The clients' data.
        num_rows: The rows of each parameter, by name.

    Raises:
        ValueError: If two samples have one number, or a parameter has too few rows.
    """

    def __init__(self, data: ClientData, num_rows: Mapping[str, int]) -> None:
        numbers = sample_numbers(data.dataset)
        self._rows = [numbers[samples] for samples in data.train_indices]
        used, counts = torch.unique(torch.cat(self._rows), return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{int(counts.max())} training samples have the number {int(used[counts.argmax()])}, and each needs a"
                f" row of its own in `{next(iter(num_rows))}`. Number all samples in one call, those of several data"
                " sets as `with_indices([first, second])`."
            )
        for name, count in num_rows.items():
            if count <= int(used[-1]):
                raise ValueError(
                    f"`{name}` has {count} rows, and training samples are numbered up to {int(used[-1])}. Make a row"
                    " for every sample of the numbered data set, such as `SampleWeights(len(dataset))`."
                )

    def check(self, client: int, layout: ParameterLayout, vector: Tensor) -> None:
        """Refuse a client's vector that is not zero in rows of other clients' samples.

        Raises:
            ValueError: Naming the client and the row.
        """
        for name, rows in layout.views(vector).items():
            used = rows.reshape(len(rows), -1).any(1).nonzero().flatten().cpu()
            foreign = used[~torch.isin(used, self._rows[client])]
            if len(foreign):
                raise ValueError(
                    f"Client {client} reads row {int(foreign[0])} of `{name}`, which belongs to another client:"
                    " each client has the rows of its own samples. Give each sample its number in the data set"
                    " (`with_indices(dataset)`), and use it as the row."
                )

    def mask(self, clients: Iterable[int], layout: ParameterLayout, device: torch.device) -> Tensor:
        """Return a bool vector of a layout's shape: where some clients have their rows."""
        rows = torch.cat([self._rows[client] for client in clients]).to(device)
        mask = torch.zeros(layout.numel, dtype=torch.bool, device=device)
        for view in layout.views(mask).values():
            view[rows] = True
        return mask
