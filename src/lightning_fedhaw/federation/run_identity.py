"""What makes a run the one that a checkpoint is of, and the settings in which a resumed run may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw.federation.checkpoint_entry import FORMAT, check_entry, describe_parts, new_run
from lightning_fedhaw.federation.context import RunContext

ROUND_OPTIONS = ("clients_per_round", "local_epochs", "local_steps", "optimizer_state", "buffers")
"""Options that may differ between a run and its checkpoint, although they seldom should."""

FINGERPRINT_WORDS = {
    "rule": "the rule",
    "num_clients": "`num_clients`",
    "seed": "`seed` (or that of `seed_everything`)",
    "parameters": "the number of trainable parameters",
    "local_parameters": "the set of local parameters",
    "samples": "the checksum of the training samples, for which clients keep parameters,",
}
"""The entries of a fingerprint, apart from the split, in words."""


class Keyed(Protocol):
    """A channel or a client objective, as a checkpoint names it."""

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""


class RunIdentity:
    """The identity of a run, by which processes and checkpoints are compared.

    Args:
        context: What all steps of a round work with.
        callbacks: The channels and client objectives.

    Attributes:
        run: The name of the run, which a resumed run keeps.
    """

    def __init__(self, context: RunContext, callbacks: Sequence[Keyed]) -> None:
        self.rule = context.rule
        self.data = context.data
        self.server = context.server
        self.options = context.options
        self.ranks = context.ranks
        self.seed = context.seed
        self.callbacks = callbacks
        self.run = new_run()
        self._samples: str | None = None
        if self.rule.client_placed:
            self._samples = self.data.sample_hash()

    @property
    def entries(self) -> dict[str, Any]:
        """The entries of a checkpoint that a run compares with its own before it resumes from there."""
        return {
            "format": FORMAT,
            "run_id": self.run,
            "channels_and_objectives": self.parts,
            "fingerprint": self.fingerprint,
            "scheme": self.data.partition.scheme,
            "round_options": self.round_options,
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The properties in which a run must agree with the checkpoint that it resumes from."""
        fingerprint = {
            "rule": self.rule.resume_key,
            "num_clients": self.data.num_clients,
            "split": self.data.partition.fingerprint(),
            "parameters": self.server.layout.numel,
            "seed": self.seed,
        }
        if self.server.layout.local:
            fingerprint["local_parameters"] = list(self.server.layout.local)
        if self._samples is not None:
            # Parameters of samples are found by position, which another order of the same samples would change.
            fingerprint["samples"] = self._samples
        return fingerprint

    @property
    def parts(self) -> list[str]:
        """The keys of the channels and the client objectives."""
        return [callback.state_key for callback in self.callbacks]

    @property
    def round_options(self) -> dict[str, Any]:
        """The values of ``ROUND_OPTIONS``, the batch size, and the clients' rates unless a function gives them."""
        options = {name: getattr(self.options, name) for name in ROUND_OPTIONS}
        options["batch_size"] = self.data.settings.batch_size
        if not callable(self.options.client_lr_scale):
            options["client_lr_scale"] = self.options.client_lr_scale
        return options

    def check_agreement(self) -> None:
        """Refuse to continue where processes have different data or another split.

        Raises:
            ValueError: Naming the processes that differ.
        """
        if self.ranks.size == 1:
            return
        resume_keys = self.ranks.gather((self.fingerprint, self.data.sample_hash()))
        different = []
        for rank, resume_key in enumerate(resume_keys):
            if resume_key != resume_keys[0]:
                different.append(rank)
        if different:
            raise ValueError(
                f"Processes {different} of {self.ranks.size} were given other training data, another split or another"
                " seed than process 0, and every process must know the whole federation. Call `seed_everything` before"
                " the data is made."
            )

    def resume(self, entry: Mapping[str, Any], source: str) -> None:
        """Become the run that a checkpoint is of, with a warning of settings that differ.

        Args:
            entry: The federation's entry in the checkpoint.
            source: The name of the checkpoint, for errors and warnings.

        Raises:
            ValueError: If it is of another federation, has another format, or lacks a part.
        """
        check_entry(entry, source)
        self._check_fingerprint(entry["fingerprint"], entry["scheme"], source)
        self._warn_of_changes(entry, source)
        self.run = entry.get("run_id", self.run)

    def _check_fingerprint(self, saved: Mapping[str, Any], scheme: str, source: str) -> None:
        """Refuse to resume from a checkpoint of another federation.

        Args:
            saved: Its fingerprint.
            scheme: The partitioner that made its split.
            source: Its name.
        """
        current = self.fingerprint
        changes = []
        for name, words in FINGERPRINT_WORDS.items():
            # Without local parameters there is no entry for them.
            if saved.get(name) != current.get(name):
                changes.append(f"{words} was {saved.get(name)!r} there and is {current.get(name)!r} here")
        if saved["split"] != current["split"]:
            if scheme != self.data.partition.scheme:
                changes.append(f"the split was {scheme} there and is {self.data.partition.scheme} here")
            elif saved["num_clients"] == current["num_clients"] and saved["seed"] == current["seed"]:
                changes.append(
                    f"the split, {scheme} here and there, gives clients other samples: the training data, its labels or"
                    " what the partitioner was made with has changed"
                )
        if changes:
            raise ValueError(
                f"{source} is of another federation: {'; '.join(changes)}."
                " Resume with the arguments of that run, or start a new run from its weights with"
                " `load_from_checkpoint`."
            )

    def _warn_of_changes(self, state: Mapping[str, Any], source: str) -> None:
        """Warn of options, channels and objectives that differ from those of the checkpoint."""
        current = self.round_options
        changes = []
        for name, value in state["round_options"].items():
            if name in current and value != current[name]:
                changes.append(f"`{name}` from {value} to {current[name]}")
        if changes:
            rank_zero_warn(f"The run is resumed with other settings of a round: {', '.join(changes)}.")
        parts = describe_parts(state.get("channels_and_objectives", self.parts), self.parts, source)
        if parts:
            rank_zero_warn(parts)
