"""The third entry point: a federation from the command line and from YAML files. Needs jsonargparse."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.cli_messages import FEDERATION, GROUPS, TRAINER, sentence
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.trainer import FederatedTrainer

register_type(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), lambda name: getattr(torch, name))


class FederatedArgumentParser(LightningArgumentParser):
    """A parser in which each setting of the federation has one place and one name, and whose errors are sentences."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.commands: Any = None

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the group of subcommands, and keep it: more may be added later."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, without those that the group ``federation`` has.

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
        """Add Lightning's instantiator, which gives an object the hyper-parameters of its group.

        For a data module within a :class:`~lightning_fedhaw.FederatedDataModule` they would be those of the outer one.
        So the inner one is made plainly, and ``save_hyperparameters`` reads its own arguments.
        """

        def make(kind: type, *args: Any, applied_instantiation_links: dict[str, Any], **given: Any) -> Any:
            cli = instantiator.cli
            path = ""
            if instantiator.key == "data":
                path = getattr(_entry(cli, cli.config, "data"), "class_path", "")
            if path and path.rpartition(".")[2] != kind.__name__:
                return kind(*args, **given)
            return instantiator(kind, *args, applied_instantiation_links=applied_instantiation_links, **given)

        super().add_instantiator(make, class_type, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with one sentence, and without the page of usage."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"{parser.prog.split(' [')[0]}: error: {sentence(message)}\n")


class SaveRunConfig(SaveConfigCallback):
    """Saves ``config.yaml`` into the folder of the run, whichever the logger.

    Loggers such as W&B's share one folder between runs. With them the file goes beside the run's checkpoints, into
    ``<save_dir>/<name>/<version>``, and the logger is told the configuration too. Without a logger it goes among the
    checkpoints of a ``fit``, never into the working directory, where the user's own ``config.yaml`` may be.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, in the first process."""
        logger = trainer.logger
        checkpoints = trainer.checkpoint_callback
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
    - ``rule``: an :class:`~lightning_fedhaw.extending.AggregationRule`, by name or class path, with its arguments;
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
        try:
            super().__init__(**{**defaults, **named})
        except (TypeError, ValueError) as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            self._parser(self.subcommand).error(str(refusal), error)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the federation's groups; a class that overrides this calls it too."""
        parser.add_class_arguments(
            FederatedTrainer, "federation", skip=set(TRAINER), instantiate=False, fail_untyped=False, sub_configs=True
        )
        for name, kind in GROUPS.items():
            parser.add_argument(f"--{name}", type=kind, default=None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the federation's settings, the rule, channels and objectives."""
        config = _entry(self, self.config_init, "trainer")
        callbacks = _as_list(config.get("callbacks"))
        for group in GROUPS:
            callbacks += _as_list(_entry(self, self.config_init, group))
        if self.subcommand != "fit" and config.get("rounds") is None and config.get("max_epochs") is None:
            # Nothing is trained, and the trainer asks for a number of rounds.
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


class FedhawCommand(FederatedCLI):
    """The command ``fedhaw``, which can also plot."""

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """List ``plot`` among the commands; where it comes first, it has been carried out before."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        commands = cast(FederatedArgumentParser, self.parser).commands
        commands.add_subcommand("plot", ArgumentParser(), help="Draw pictures of finished runs.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse ``plot`` where it does not come first."""
        super().parse_arguments(parser, args)
        if self.config["subcommand"] == "plot":
            parser.error("`plot` comes first, and its options follow: `fedhaw plot --help` lists them.")


def _entry(cli: LightningCLI, config: Any, key: str) -> Any:
    """An entry of a configuration, which may be that of a subcommand."""
    return config.get(str(cli.subcommand), config).get(key)


def _refusal(error: BaseException) -> BaseException | None:
    """Find the error in which this package refuses what it was given; jsonargparse wraps what constructors raise.

    Some mistakes are found only when ``fit`` has the data in hand. From the first round on the traceback is worth more.
    """
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        if any(frame.f_code is Federation.play.__code__ for frame in frames):
            return None
        if frames and str(frames[-1].f_globals["__name__"]).startswith("lightning_fedhaw."):
            return cause
        cause = cause.__cause__
    return None


def _as_list(value: Any) -> list[Any]:
    """Make a list of one value, of several, or of none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
