"""The error of steps that cannot be vectorized."""

ASKS_FOR_CLIENT = "asks `trainer.federation_client` for the client at work, and many train at once"
"""The reason of a step that wants to know whose turn it is."""


class NotVectorizableError(RuntimeError):
    """The reason why a training step cannot be computed for many clients at once.

    The message is a sentence without its subject, ``training_step``; for example "logs the torchmetrics object
    `accuracy`".
    :func:`~lightning_fedhaw.clients.vectorized.trial.probe` completes it with the subject.
    """
