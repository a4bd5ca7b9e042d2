"""MOON: draw a client's representations to those of the global model, and away from those of its own last model.

Q. Li, B. He, D. Song: Model-Contrastive Federated Learning. CVPR 2021.

With the representation ``z`` of a sample by the local model, ``z_glob`` by the model that the client received and
``z_prev`` by the client's own model after its last local training, and ``s`` the cosine similarity::

    f_k(y) - mu log(e^(s(z, z_glob) / tau) / (e^(s(z, z_glob) / tau) + e^(s(z, z_prev) / tau)))
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from lightning_fedhaw import arguments
from lightning_fedhaw.objectives.base import END_BUFFER, ClientObjective, ClientState, Named
from lightning_fedhaw.objectives.view import StepView


class MOON(ClientObjective):
    """The model-contrastive term, added to the loss of ``training_step``.

    The client's state is its model after its last local training, with its buffers and local parameters. A client that
    takes part for the first time has none: the model that it received is used instead, with which the term has no
    gradient. The term costs two more forward passes per step, through both models in evaluation mode.

    Args:
        representation: The name of the submodule whose output is the representation ``[batch, ...]``, such as an
            encoder or a projection head; ``"forward"`` is the module's own call ``self(...)``. ``training_step`` has to
            call it once.
        mu: The factor of the term, at least 0. The paper tries 0.1, 1, 5 and 10.
        tau: The temperature, above 0.
        name: Distinguishes two objectives of one class in a checkpoint.

    Raises:
        ValueError: If an argument is not one of the allowed values; when ``fit`` begins, if the module has no such
            submodule; in training, if its output has no axis after the batch.
    """

    key = "MOON"

    def __init__(self, representation: str, mu: float = 1.0, tau: float = 0.5, *, name: str | None = None) -> None:
        super().__init__(name)
        self.representation = arguments.text("representation", representation)
        self.mu = arguments.number("mu", mu, minimum=0)
        self.tau = arguments.number("tau", tau, above=0)

    @property
    def watched(self) -> Sequence[str]:
        """What gives the representation."""
        return (self.representation,)

    def loss(self, step: StepView, state: ClientState) -> Tensor:
        """Return the term, the mean over the batch."""
        current = self._flat(step.result(self.representation))
        received = self._flat(step.result_at_start(self.representation))
        previous_model = {name: state[name] for name in step.start}
        previous_buffers = {name: state[name] for name in step.start_buffers}
        previous = self._flat(step.result_at(self.representation, previous_model, previous_buffers))
        return self.mu * contrast(current, received, previous, self.tau)

    def _flat(self, representation: Tensor) -> Tensor:
        """Return a representation as ``[batch, features]``, in float32 at least."""
        if representation.ndim < 2:
            raise ValueError(
                f"`MOON` needs a representation [batch, ...], got {list(representation.shape)} from"
                f" '{self.representation}'. Name another submodule by `MOON(representation=...)`."
            )
        flat = representation.flatten(1)
        if flat.dtype.itemsize < 4:
            return flat.float()
        return flat

    def init_client(self, start: Named) -> ClientState:
        """Return the model that the client received, in the place of one of its own."""
        return dict(start)

    def begin_client(self, client: int, start: Named, buffers: Named) -> ClientState:
        """Return the client's previous model with its buffers, and the buffers it starts from."""
        return {**buffers, **super().begin_client(client, start, buffers)}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """Return the client's model after local training, with its buffers."""
        # Copies: the engine trains the next client in the same tensors.
        model = {name: value.clone() for name, value in end.items()}
        for name, value in state.items():
            if name.startswith(END_BUFFER):
                model[name.removeprefix(END_BUFFER)] = value
        return model


def contrast(current: Tensor, received: Tensor, previous: Tensor, tau: float) -> Tensor:
    """Return the mean over samples of ``-log(e^(s_g / tau) / (e^(s_g / tau) + e^(s_p / tau)))``.

    Args:
        current: ``[batch, features]``, the representations of the model that trains.
        received: ``[batch, features]``, those of the received model, whose similarity is ``s_g``.
        previous: ``[batch, features]``, those of the client's previous model, whose similarity is ``s_p``.
        tau: The temperature.

    Returns:
        A scalar.
    """
    to_received = cosine_similarity(current, received, dim=1)  # [batch]
    to_previous = cosine_similarity(current, previous, dim=1)  # [batch]
    # The same as `log(1 + e^(...))`, without overflow.
    return softplus((to_previous - to_received) / tau).mean()
