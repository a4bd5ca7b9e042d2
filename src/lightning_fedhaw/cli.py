"""The third entry point: a federation from the command line and from YAML files. Needs jsonargparse."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

import lightning_fedhaw
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.data.partition import Partitioner
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.trainer import FederatedTrainer

FEDERATION = frozenset(f.name for f in fields(FederationOptions))
TRAINER = (
    frozenset({*inspect.signature(Trainer).parameters, *inspect.signature(FederatedTrainer).parameters}) - FEDERATION
)
GROUPS = {
    "rule": AggregationRule | None,
    "channel": Channel | list[Channel] | None,
    "objective": ClientObjective | list[ClientObjective] | None,
}
BASES: dict[str, type] = {
    "rule": AggregationRule,
    "channel": Channel,
    "objective": ClientObjective,
    "model": LightningModule,
    "data": LightningDataModule,
    "federation.partitioner": Partitioner,
    "federation.sampler": CohortSampler,
    "trainer.callbacks": Callback,
}

register_type(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), lambda name: getattr(torch, name))


class FederatedArgumentParser(LightningArgumentParser):
    """A parser in which each setting of the federation has one place and one name, and whose errors are sentences."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """The arguments of a class, without those that the group ``federation`` has.

        What a rule of the user's own declares itself stays, whatever its name.
        """
        skip = set(kwargs.pop("skip", None) or ())
        if nested_key == "trainer":
            skip |= FEDERATION
        elif isinstance(theclass, type) and issubclass(theclass, AggregationRule):
            skip |= FEDERATION - inspect.signature(theclass).parameters.keys()
        added: list[str] = super().add_class_arguments(theclass, nested_key, skip=skip, **kwargs)
        return added

    def add_instantiator(self, instantiator: Any, class_type: type, **kwargs: Any) -> None:
        """Lightning's instantiators, which tell an object its hyper-parameters: those of its group.

        They are another's for a data module within a :class:`~lightning_fedhaw.FederatedDataModule`. That one is made
        plainly, and ``save_hyperparameters`` reads its own arguments.
        """

        def make(kind: type, *args: Any, applied_instantiation_links: dict[str, Any], **given: Any) -> Any:
            cli = instantiator.cli
            path = getattr(_entry(cli, cli.config, "data"), "class_path", "") if instantiator.key == "data" else ""
            if path and path.rpartition(".")[2] != kind.__name__:
                return kind(*args, **given)
            return instantiator(kind, *args, applied_instantiation_links=applied_instantiation_links, **given)

        super().add_instantiator(make, class_type, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with one sentence, and without the page of usage."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"{parser.prog.split(' [')[0]}: error: {_sentence(message)}\n")


class SaveRunConfig(SaveConfigCallback):
    """Saves ``config.yaml`` into the folder of the run, whichever the logger.

    Loggers such as W&B's share one folder between runs. With them the file goes beside the run's checkpoints, into
    ``<save_dir>/<name>/<version>``, and the logger is told the configuration too. Without a logger it goes among the
    checkpoints of a ``fit``, never into the working directory, where the user's own ``config.yaml`` may be.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, in the first process."""
        logger, checkpoints = trainer.logger, trainer.checkpoint_callback
        if isinstance(logger, (CSVLogger, TensorBoardLogger)):
            super().setup(trainer, pl_module, stage)
        elif trainer.is_global_zero and not self.already_saved:
            if logger is not None:
                folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))
            elif checkpoints is not None and stage == "fit":
                folder = Path(getattr(checkpoints, "dirpath", None) or Path(trainer.default_root_dir, "checkpoints"))
            else:
                return
            self.already_saved = True
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            self.parser.save(self.config, path, skip_none=False, overwrite=True)
            if logger is not None:
                logger.log_hyperparams({"config": path.read_text()})


class FederatedCLI(LightningCLI):
    """``lightning.pytorch.cli.LightningCLI`` with a :class:`~lightning_fedhaw.FederatedTrainer`.

    Needs jsonargparse: ``pip install "lightning-fedhaw[cli]"``. The command ``fedhaw`` is this class without arguments:
    any model and any data by class path. A script of one's own may fix them, as with the stock class.

    Beside Lightning's groups there are

    - ``federation``: who the clients are and what they do (:class:`~lightning_fedhaw.FederationOptions`);
    - ``rule``: an :class:`~lightning_fedhaw.AggregationRule`, by name or class path, with its arguments;
    - ``channel``, ``objective``: one, or a list (``--channel+=ErasureChannel --channel.probability=0.1``).

    Rounds are ``trainer.rounds``. ``seed_everything`` (0 by default) is the federation's seed too, unless
    ``federation.seed`` is another.

    Args:
        args: As of ``LightningCLI``.
        kwargs: As of ``LightningCLI``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {
            "trainer_class": FederatedTrainer,
            "parser_class": FederatedArgumentParser,
            "save_config_callback": SaveRunConfig,
            "seed_everything_default": 0,  # as Lightning chooses where nobody says, but without its warning
        }
        named = inspect.signature(LightningCLI).bind_partial(*args, **kwargs).arguments
        super().__init__(**{**defaults, **named})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the federation's groups; a class that overrides this calls it too."""
        parser.add_class_arguments(
            FederatedTrainer, "federation", skip=set(TRAINER), instantiate=False, fail_untyped=False, sub_configs=True
        )
        for name, kind in GROUPS.items():
            parser.add_argument(f"--{name}", type=kind, default=None)

    def instantiate_classes(self) -> None:
        """Make the objects; what this package refuses is said in its sentence, without a traceback."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            ours: BaseException = error
            while ours.__cause__ is not None:
                ours = ours.__cause__  # jsonargparse wraps what constructors raise
            if not _raised_here(ours):
                raise
            self.parser.error(str(ours), error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the federation's settings, the rule, channels and objectives."""
        given = _entry(self, self.config_init, "trainer")
        callbacks = _listed(given.get("callbacks"))
        for group in GROUPS:
            callbacks += _listed(_entry(self, self.config_init, group))
        if self.subcommand != "fit" and given.get("rounds") is None and given.get("max_epochs") is None:
            kwargs = {"rounds": 0, **kwargs}
        trainer: Any = super().instantiate_trainer(
            **{**_entry(self, self.config_init, "federation"), "callbacks": callbacks, **kwargs}
        )
        has_rule = any(isinstance(callback, AggregationRule) for callback in trainer.callbacks)
        if self.subcommand == "fit" and not has_rule and not is_overridden("configure_callbacks", self.model):
            raise ValueError(
                "`fit` needs an aggregation rule, got none. Add `--rule=FedHAWCallback`, or `rule: FedHAWCallback` to"
                " the configuration."
            )
        return cast(Trainer, trainer)


def _entry(cli: LightningCLI, config: Any, key: str) -> Any:
    """An entry of a configuration, which may be that of a subcommand."""
    return config.get(str(cli.subcommand), config).get(key)


def _raised_here(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("lightning_fedhaw.")


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list) else [given]


def _sentence(message: str) -> str:
    """What jsonargparse found, on one line and with the nearest name, where it is about names."""
    noise: tuple[str, ...] = (
        "Errors:",
        "Subtypes:",
        "Does not validate",
        "Expected a path but",
        "Expected a <class 'list'>",
        "Expected a <class 'NoneType'>",
        "Given",
    )
    if "Expected a dot import path" in message:  # the name of a class that is not there, whatever else may be given
        noise += ("Expected a <class", "Expected a typing.")
    lines = [line.strip(" -") for line in message.splitlines()]
    text = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    text = re.sub(r'Parser key "([\w.]+)":', r"`--\1`:", text)
    if unknown := re.search(r"Expected a dot import path string: (\w+)$", text):
        key = text[3:].split("`")[0]
        known = [name for name, kind in _named().items() if issubclass(kind, BASES.get(key, ()))]
        hint = _nearest(unknown[1], known) or ("There are " + ", ".join(known) + "." if key in GROUPS else "")
        return (
            f"{text[: unknown.start()]}there is no class `{unknown[1]}`; give a name or an import path. {hint}".strip()
        )
    if unknown := re.search(r"class_path '[\w.]*?(\w+)'.* Option '(\w+)' is not accepted", text):
        owner = _named().get(unknown[1])
        return f"{text}. {_place(unknown[2], inspect.signature(owner).parameters if owner else ())}".strip()
    if unknown := re.search(r"(?:arguments: --|accept option ')(federation|trainer)\.(\w+)", text):
        known = list(FEDERATION if unknown[1] == "federation" else TRAINER)
        return f"{text}. {_place(unknown[2], known)}".strip()
    given = re.findall(r"Given value: (?!NestedArg|Namespace|[{\[])(.+)", message)
    return f"{text}, got {given[0]}" if given and given[0] not in text else text


def _named() -> dict[str, type]:
    """The classes of this package by name."""
    found = {name: getattr(lightning_fedhaw, name) for name in lightning_fedhaw.__all__}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and kind not in BASES.values()}


def _place(name: str, known: Iterable[str]) -> str:
    return f"It is `--federation.{name}`." if name in FEDERATION else _nearest(name, known)


def _nearest(name: str, known: Iterable[str]) -> str:
    short = {_short(each): each for each in known}
    near = get_close_matches(_short(name), short, 1)
    return f"Did you mean `{short[near[0]]}`?" if near else ""


def _short(name: str) -> str:
    return re.sub("(callback|channel)$", "", name.lower())
