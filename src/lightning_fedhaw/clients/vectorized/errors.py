"""The error of steps that cannot be vectorized."""


class NotVectorizableError(RuntimeError):
    """The reason why a training step cannot be computed for many clients at once.

    The message is a sentence without its subject, ``training_step``; for example "logs the torchmetrics object
    `accuracy`".
    :func:`~lightning_fedhaw.clients.vectorized.trial.probe` completes it with the subject.
    """
