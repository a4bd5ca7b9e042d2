"""The one error of this package."""


class NotVectorizableError(RuntimeError):
    """Say why a training step cannot be computed for many clients at once.

    The message is the rest of a sentence about ``training_step``, such as "logs the torchmetrics object `accuracy`".
    :func:`~lightning_fedhaw.clients.vectorized.trial.probe` completes it with the subject.
    """
