"""The third entry point: a federation from the command line and from YAML files. Needs jsonargparse."""

from __future__ import annotations

import inspect
import sys
import traceback
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.cli_messages import FEDERATION, GROUPS, TRAINER, dtype_of, offered_classes, rules_in, sentence
from lightning_fedhaw.cli_yaml import limit_yaml
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.trainer import FederatedTrainer

limit_yaml()
register_type(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), dtype_of)


def _int_before_float(kind: Any) -> Any:
    """Return a union with ``int`` before ``float``, so that ``10`` is read as a whole number.

    The kinds of a union are tried in their order, and 1 client is not a share of 1.0. The order that was declared does
    not survive: :mod:`typing` gives the same object for unions of the same kinds, whichever package made one first.
    """
    if get_origin(kind) not in (Union, UnionType):
        return kind
    kinds = list(get_args(kind))
    if int not in kinds or float not in kinds or kinds.index(int) < kinds.index(float):
        return kind
    kinds[kinds.index(int)] = float
    kinds[kinds.index(float)] = int
    return reduce(or_, kinds)


class FederatedArgumentParser(LightningArgumentParser):
    """A parser in which each setting of the federation has one place and one name, and whose errors are sentences.

    Attributes:
        commands: The group of subcommands, to which more may be added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations a misspelled argument could set another one.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.commands: Any = None

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the group of subcommands."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, without those that the group ``federation`` has."""
        skip = set(kwargs.pop("skip", None) or ())
        if nested_key == "trainer":
            skip |= FEDERATION
        elif isinstance(theclass, type) and issubclass(theclass, AggregationRule):
            # An argument that a rule of the user's own declares itself stays, whatever its name.
            skip |= FEDERATION - inspect.signature(theclass).parameters.keys()
        added: list[str] = super().add_class_arguments(theclass, nested_key, skip=skip, **kwargs)
        for action in self._actions:
            # jsonargparse keeps the type of an argument there; other actions have none.
            kind = getattr(action, "_typehint", None)
            if kind is not None:
                action._typehint = _int_before_float(kind)  # type: ignore[attr-defined]
        return added

    def add_instantiator(self, instantiator: Any, class_type: type, **kwargs: Any) -> None:
        """Add Lightning's instantiator, which gives an object the hyper-parameters of its group.

        For a data module within a :class:`~lightning_fedhaw.FederatedDataModule` they would be those of the outer one.
        So the inner one is created without the instantiator, and ``save_hyperparameters`` reads its own arguments.

        Args:
            instantiator: Lightning's, of one group of the configuration.
            class_type: The class of the group's objects.
            kwargs: Further arguments, passed on.
        """

        def instantiate(kind: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
            cli = instantiator.cli
            outer_class = ""
            if instantiator.key == "data":
                class_path = getattr(entry(cli, cli.config, "data"), "class_path", "")
                outer_class = class_path.rpartition(".")[2]
            if outer_class not in ("", kind.__name__):
                return kind(*args, **kwargs)
            return instantiator(kind, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)

        super().add_instantiator(instantiate, class_type, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one sentence instead of a page of usage."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        # The name of a subcommand's parser holds usage too: "fedhaw [options] fit".
        program = parser.prog.split(" [")[0]
        self.exit(2, f"{program}: error: {sentence(message)}\n")

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help, without the base classes among the classes that an argument takes."""
        help_text: str = super().format_help(*args, **kwargs)
        return offered_classes(help_text)


class SaveRunConfig(SaveConfigCallback):
    """A callback that saves ``config.yaml`` into the folder of the run, whichever the logger.

    Loggers such as W&B's share one folder between runs. With them the file goes next to the run's checkpoints, into
    ``<save_dir>/<name>/<version>``, and the logger receives the configuration too. Without a logger it goes into the
    folder of the checkpoints of a ``fit``, never into the working directory, where the user's own ``config.yaml`` may
    be.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, in the first process."""
        logger = trainer.logger
        if isinstance(logger, (CSVLogger, TensorBoardLogger)):
            super().setup(trainer, pl_module, stage)
            return
        if not trainer.is_global_zero or self.already_saved:
            return
        folder = _config_folder(trainer, stage)
        if folder is None:
            return
        self.already_saved = True
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.config_filename
        self.parser.save(self.config, path, skip_none=False, overwrite=True)
        if logger is not None:
            logger.log_hyperparams({"config": path.read_text()})


def _config_folder(trainer: Trainer, stage: str) -> Path | None:
    """Return the folder for the configuration of a run that is not logged to files; None if nothing is saved."""
    logger = trainer.logger
    if logger is not None:
        return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))
    checkpoints = trainer.checkpoint_callback
    if checkpoints is None or stage != "fit":
        return None
    folder = getattr(checkpoints, "dirpath", None)
    if folder:
        return Path(folder)
    return Path(trainer.default_root_dir, "checkpoints")


class FederatedCLI(LightningCLI):
    """``lightning.pytorch.cli.LightningCLI`` with a :class:`~lightning_fedhaw.FederatedTrainer`.

    The command ``fedhaw`` is this class without arguments: any model and any data by class path. A script of one's own
    may fix them, as with the stock class.

    In addition to Lightning's groups there are

    - ``federation``: who the clients are and what they do (:class:`~lightning_fedhaw.FederationOptions`);
    - ``rule``: an :class:`~lightning_fedhaw.extending.AggregationRule`, by name or class path, with its arguments;
    - ``channel``, ``objective``: one, or a list (``--channel+=ErasureChannel --channel.probability=0.1``).

    Rounds are ``trainer.rounds``. ``seed_everything`` (0 by default) is the federation's seed too, unless
    ``federation.seed`` is another.

    Args:
        args: The arguments of ``LightningCLI``.
        kwargs: The arguments of ``LightningCLI``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings: dict[str, Any] = {
            "trainer_class": FederatedTrainer,
            "parser_class": FederatedArgumentParser,
            "save_config_callback": SaveRunConfig,
            # Lightning's own choice where no seed is given, but without its warning.
            "seed_everything_default": 0,
        }
        settings.update(inspect.signature(LightningCLI).bind_partial(*args, **kwargs).arguments)
        try:
            super().__init__(**settings)
        except (TypeError, ValueError, ImportError, FileNotFoundError, MisconfigurationException) as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            self._parser(self.subcommand).error(str(refusal), error)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse two rules, and a configuration that is another kind of file, such as a checkpoint."""
        words = sys.argv[1:] if args is None else args
        rules = rules_in(words) if isinstance(words, list) else []
        if len(rules) > 1:
            parser.error(f"`--rule` is given {len(rules)} times ({', '.join(rules)}). A federation has one: keep one.")
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            parser.error(f"A configuration must be a text in UTF-8, got a file that is not ({error}).", error)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the federation's groups; a class that overrides this calls it too."""
        parser.add_class_arguments(
            FederatedTrainer, "federation", skip=set(TRAINER), instantiate=False, fail_untyped=False, sub_configs=True
        )
        for name, kind in GROUPS.items():
            parser.add_argument(f"--{name}", type=kind, default=None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer, with the federation's settings, the rule, channels and objectives.

        Raises:
            ValueError: If ``fit`` has no rule or no data.
        """
        has_data = self.datamodule is not None or is_overridden("train_dataloader", self.model)
        if self.subcommand == "fit" and not has_data:
            raise ValueError(
                "`fit` needs data, got none. Add `--data=mine.MyData`, the import path of a LightningDataModule, or"
                " define `train_dataloader` in the module."
            )
        config = entry(self, self.config_init, "trainer")
        callbacks = _as_list(config.get("callbacks"))
        for group in GROUPS:
            callbacks += _as_list(entry(self, self.config_init, group))
        settings: dict[str, Any] = {**entry(self, self.config_init, "federation")}
        settings["callbacks"] = callbacks
        if self.subcommand != "fit" and config.get("rounds") is None and config.get("max_epochs") is None:
            # Nothing is trained, but the trainer requires a number of rounds.
            settings["rounds"] = 0
        settings.update(kwargs)
        trainer: Trainer = super().instantiate_trainer(**settings)
        has_rule = any(isinstance(callback, AggregationRule) for callback in callbacks_of(trainer))
        # A module that adds callbacks may bring the rule.
        if self.subcommand == "fit" and not has_rule and not is_overridden("configure_callbacks", self.model):
            raise ValueError(
                "`fit` needs an aggregation rule, got none. Add `--rule=FedHAWCallback`, or `rule: FedHAWCallback` to"
                " the configuration."
            )
        return trainer


_FURTHER_COMMANDS = {
    "plot": "Draw pictures of finished runs.",
    "compare": "Compare rules on the same federations, over seeds and settings.",
    "sweep": "Run a W&B sweep file on this machine, without an account.",
    "init": "Write a project to start from.",
}
"""Commands with parsers of their own, and their purposes."""


class FedhawCommand(FederatedCLI):
    """The command ``fedhaw``, which lists the commands with parsers of their own among its subcommands."""

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Add commands to the list of the subcommands, for ``--help``; :mod:`lightning_fedhaw.__main__` runs them."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        assert isinstance(self.parser, FederatedArgumentParser)
        for name, purpose in _FURTHER_COMMANDS.items():
            self.parser.commands.add_subcommand(name, ArgumentParser(), help=purpose)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse these commands where they do not come first."""
        super().parse_arguments(parser, args)
        name = self.config["subcommand"]
        if name in _FURTHER_COMMANDS:
            parser.error(f"`{name}` comes first, and its options follow: `fedhaw {name} --help` lists them.")


def entry(cli: LightningCLI, config: Any, key: str) -> Any:
    """Return an entry of a configuration, which may be that of a subcommand."""
    return config.get(str(cli.subcommand), config).get(key)


_NOT_OF_USERS = frozenset(
    {"lightning_fedhaw", "lightning", "lightning_utilities", "jsonargparse", "contextlib", "fsspec"}
)
"""Packages between the command line and an error of Lightning that a configuration causes."""


def _refusal(error: BaseException) -> BaseException | None:
    """Find the error by which this package or Lightning refuses an argument, among the causes of an error.

    Some mistakes are found only when ``fit`` has read the data.

    Args:
        error: The error that was raised; jsonargparse wraps the errors of constructors.

    Returns:
        The error; None if a user needs the traceback, because it was raised in a round, by other code, or by Lightning
        where the user's code calls it.
    """
    cause: BaseException | None = error
    while cause is not None:
        packages = []
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            if frame.f_code is Federation.run_round.__code__:
                return None
            packages.append(str(frame.f_globals.get("__name__", "")).partition(".")[0])
        # The last frame is where it was raised.
        if packages and packages[-1] == "lightning_fedhaw":
            return cause
        if packages and packages[-1] == "lightning" and _NOT_OF_USERS.issuperset(packages):
            return cause
        cause = cause.__cause__
    return None


def _as_list(value: object) -> list[object]:
    """Return a list of one value, of several, or of none."""
    if value is None:
        return []
    if isinstance(value, list):
        return list(value)
    return [value]
