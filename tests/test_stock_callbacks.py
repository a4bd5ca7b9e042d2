"""Every callback of Lightning does what docs/trainer_arguments.md says."""

from __future__ import annotations

import csv
import importlib.util
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as stock
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from federations import QUIET, Classifier, flat, samples
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedCallback,
    FederatedTrainer,
    FedHAWCallback,
    IIDPartitioner,
    RoundProgressBar,
)

CLIENTS, BATCHES = 3, 4  # Every client has 32 samples in batches of 8.
FEDERATION: dict[str, Any] = {"num_clients": CLIENTS, "partitioner": IIDPartitioner(), "client_eval": False, "seed": 5}
DOCS = Path(__file__).parents[1] / "docs" / "trainer_arguments.md"
ENTRY_POINTS = pytest.mark.parametrize("door", [1, 2])


def table() -> dict[str, str]:
    """The documented callbacks, and the verdict on each."""
    section = DOCS.read_text(encoding="utf-8").split("\n## Lightning's callbacks\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    assert all(len(row) == 3 and row[2] for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return {name.strip("`"): verdict for name, verdict, _ in rows}


ROWS = table()


class Counter:
    """Counts the steps of all clients: a plain attribute of the module would be a client's own."""

    steps = 0


class Module(Classifier):
    """A classifier that brings its data, counts local steps and notes the models that it was validated with."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.learning_rate, self.batch_size = 0.1, 8
        self.backbone = self.net[0]
        self.counter = Counter()
        self.validated: list[torch.Tensor] = []

    @property
    def steps(self):
        return self.counter.steps

    def training_step(self, batch, batch_idx):
        self.counter.steps += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated.append(flat(self))
        super().validation_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(samples(CLIENTS * BATCHES * 8), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(32, seed=1), batch_size=8)


class GlobalModels(FederatedCallback):
    """Keeps the global model of every round."""

    def __init__(self) -> None:
        self.models: list[torch.Tensor] = []

    def on_round_end(self, trainer, pl_module, report):
        self.models.append(flat(pl_module))


def build(door: int, *callbacks: Any, rounds: int = 4, rule: Any = FedAvgCallback, **arguments: Any) -> pl.Trainer:
    """A trainer with a federation behind one of the two entry points."""
    arguments = {**QUIET, "num_sanity_val_steps": 0, **arguments}
    if any(isinstance(c, stock.Checkpoint) for c in callbacks):
        arguments["enable_checkpointing"] = True
    if door == 1:
        return FederatedTrainer(rounds=rounds, callbacks=[rule(), *callbacks], **FEDERATION, **arguments)
    return pl.Trainer(max_epochs=rounds, callbacks=[rule(**FEDERATION), *callbacks], **arguments)


def play(door: int, *callbacks: Any, module: Any = None, ckpt: str | None = None, **arguments: Any) -> tuple[Any, Any]:
    """Build, fit, and return trainer and module."""
    module = module or Module()
    trainer = build(door, *callbacks, **arguments)
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer, module


def saved(path: str | Path) -> torch.Tensor:
    """The model in a checkpoint."""
    module = Module()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return flat(module)


@cache
def global_models() -> list[torch.Tensor]:
    """The global models of a run without further callbacks."""
    seen = GlobalModels()
    play(1, seen)
    assert (seen.models[0] - seen.models[-1]).abs().max() > 0.01
    return seen.models


def csv_rows(trainer: Any) -> list[dict[str, str]]:
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


CHECKS: dict[str, Callable[..., None]] = {}


def row(check: Callable[..., None]) -> Callable[..., None]:
    """The test of the row with the function's name; it takes the number of the door and pytest's ``capsys``."""
    CHECKS[check.__name__] = check
    return check


# ---------------------------------------------------------------------- your own


class Mine(stock.Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.calls.append(("round",))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.append(("start", len(batch[0]), batch_idx))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.calls.append(("end", round(float(outputs["loss"]), 12) > 0, batch_idx))


HOOKS_OF_A_ROUND = [("round",)] + [
    call for _ in range(CLIENTS) for index in range(BATCHES) for call in (("start", 8, index), ("end", True, index))
]


@row
def Callback(door: int, _: Any) -> None:
    mine = Mine()
    play(door, mine)
    assert mine.calls == 4 * HOOKS_OF_A_ROUND


@row
def LambdaCallback(door: int, _: Any) -> None:
    mine = Mine()
    names = ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end")
    play(door, stock.LambdaCallback(**{name: getattr(mine, name) for name in names}))
    assert mine.calls == 4 * HOOKS_OF_A_ROUND


# ---------------------------------------------------------------------- checkpoints


@row
def Checkpoint(door: int, _: Any) -> None:
    class Saves(stock.Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(f"{trainer.current_epoch}.ckpt")

    saves = Saves()
    trainer, _module = play(door, saves)
    assert trainer.checkpoint_callback is saves
    for round_idx, model in enumerate(global_models()):
        assert torch.equal(saved(f"{round_idx}.ckpt"), model)


@row
def ModelCheckpoint(door: int, _: Any) -> None:
    models = global_models()

    def names(**arguments: Any) -> tuple[Any, dict[str, Path]]:
        keeper = stock.ModelCheckpoint(dirpath=f"{len(list(Path().iterdir()))}", **arguments)
        trainer, _module = play(door, keeper)
        assert trainer.checkpoint_callback is keeper
        return keeper, {path.stem: path for path in sorted(Path(str(keeper.dirpath)).iterdir())}

    every = [f"epoch={i}-step={i + 1}" for i in range(4)]
    _keeper, files = names(save_top_k=-1)
    assert list(files) == every
    for name, model in zip(every, models, strict=True):
        assert torch.equal(saved(files[name]), model)
    assert list(names()[1]) == every[-1:]
    assert list(names(save_top_k=-1, every_n_epochs=2)[1]) == every[1::2]
    assert list(names(save_top_k=-1, every_n_train_steps=2)[1]) == every[1::2]
    assert list(names(save_top_k=-1, every_n_train_steps=2, monitor="val_loss")[1]) == every[1::2]
    assert list(names(save_top_k=-1, train_time_interval=timedelta(0))[1]) == every
    keeper, files = names(save_last=True, every_n_epochs=3)
    assert list(files) == [every[2], "last"]

    keeper, files = names(monitor="train_loss", mode="min")
    assert list(files) == every[-1:]
    keeper, files = names(monitor="train_loss", mode="max")
    assert list(files) == every[:1]
    _trainer, module = play(1)
    losses = [torch.nn.functional.cross_entropy(_logits(model), samples(32, seed=1).tensors[1]) for model in models]
    keeper, files = names(monitor="val_loss", mode="min")
    assert list(files) == [every[int(torch.stack(losses).argmin())]]
    assert float(keeper.best_model_score) == pytest.approx(float(min(losses)), rel=1e-5)
    assert module.steps == 4 * CLIENTS * BATCHES


def _logits(model: torch.Tensor) -> torch.Tensor:
    module = Module()
    torch.nn.utils.vector_to_parameters(model.float(), module.parameters())
    return module.net(samples(32, seed=1).tensors[0]).detach()


class Breaks(Module):
    """Fails in the middle of the second client of the third round."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2 and self.steps == (2 * CLIENTS + 1) * BATCHES + 2:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


@row
def OnExceptionCheckpoint(door: int, _: Any) -> None:
    models, module = global_models(), Breaks()
    with warnings.catch_warnings():
        # With this callback, Lightning looks for its file and says so at the start of every `fit`.
        warnings.filterwarnings("ignore", ".*The last model of the previous `fit` call will be used")
        warnings.filterwarnings("ignore", ".*there is no last checkpoint available")
        with pytest.raises(RuntimeError, match="out of memory"):
            play(door, stock.OnExceptionCheckpoint("."), module=module)
    assert module.steps == (2 * CLIENTS + 1) * BATCHES + 2
    assert torch.equal(saved("on_exception.ckpt"), models[1])
    assert torch.equal(flat(module), models[1])
    for again in (lambda: play(door, ckpt="on_exception.ckpt"), lambda: play(door, stock.OnExceptionCheckpoint("."))):
        assert Path("on_exception.ckpt").exists()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*The last model of the previous `fit` call will be used")
            trainer, resumed = again()
        assert resumed.steps == 2 * CLIENTS * BATCHES
        assert trainer.global_step == trainer.current_epoch == 4
        assert torch.equal(flat(resumed), models[3])
    assert not Path("on_exception.ckpt").exists()


# ---------------------------------------------------------------------- stopping


@row
def EarlyStopping(door: int, _: Any) -> None:
    def rounds(monitor: str, **arguments: Any) -> int:
        rule = FedHAWCallback if monitor == "scale" else FedAvgCallback
        rest = {"check_val_every_n_epoch": arguments.pop("every")} if "every" in arguments else {}
        stopper = stock.EarlyStopping(monitor, **arguments)
        trainer, module = play(door, stopper, rounds=8, rule=rule, **rest)
        assert module.steps == trainer.global_step * CLIENTS * BATCHES
        return int(trainer.current_epoch)

    for monitor in ("train_loss", "val_loss", "scale"):
        assert rounds(monitor, min_delta=1e9, patience=2) == 3, monitor
        assert rounds(monitor, stopping_threshold=-1e9, min_delta=-1e9) == 8, monitor
    assert rounds("val_loss", min_delta=1e9, patience=2, every=2) == 6


@row
def Timer(door: int, _: Any) -> None:
    for interval in ("step", "epoch"):
        timer = stock.Timer(timedelta(microseconds=100), interval=interval)
        trainer, module = play(door, timer)
        assert module.steps == CLIENTS * BATCHES
        assert trainer.global_step == 1
        assert timer.time_elapsed("train") > 1e-4
    timer = stock.Timer("00:00:05:00")
    assert play(door, timer)[0].global_step == 4
    assert 0 < timer.time_remaining("train") < 300


# ---------------------------------------------------------------------- looking on


@row
def LearningRateMonitor(door: int, _: Any) -> None:
    class Halves(Module):
        interval = "epoch"

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.8)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}

    for logging_interval in (None, "epoch", "step"):
        for interval in ("epoch", "step"):
            module, monitor = Halves(), stock.LearningRateMonitor(logging_interval)
            module.interval = interval
            where = CSVLogger(".", name=f"{logging_interval}-{interval}")
            trainer, _module = play(door, monitor, module=module, logger=where)
            rates = {int(r["step"]): float(r["lr-SGD"]) for r in csv_rows(trainer) if r["lr-SGD"]}
            assert rates == pytest.approx({0: 0.8, 1: 0.4, 2: 0.2, 3: 0.1})
            assert monitor.lrs["lr-SGD"] == pytest.approx([0.8, 0.4, 0.2, 0.1])


@row
def DeviceStatsMonitor(door: int, _: Any) -> None:
    class Clock(CPUAccelerator):
        reads = 0

        def get_device_stats(self, device):
            self.reads += 1
            return {"reads": float(self.reads)}

    # Told to read the CPU, it asks the accelerator and not psutil.
    monitor = stock.DeviceStatsMonitor(cpu_stats=True)
    trainer, _module = play(door, monitor, accelerator=Clock(), devices=1, logger=CSVLogger("."), limit_val_batches=0)
    for hook, reads in (("start", ["1.0", "3.0", "5.0", "7.0"]), ("end", ["2.0", "4.0", "6.0", "8.0"])):
        name = f"DeviceStatsMonitor.on_train_batch_{hook}/reads"
        assert [r[name] for r in csv_rows(trainer) if r[name]] == reads
    if importlib.util.find_spec("psutil") is None:
        with pytest.raises(ModuleNotFoundError, match="`DeviceStatsMonitor` cannot log CPU stats as `psutil`"):
            play(door, stock.DeviceStatsMonitor(), logger=CSVLogger("."))


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@row
def ModelSummary(door: int, _: Any) -> None:
    records = _Records()
    log = logging.getLogger("lightning.pytorch.callbacks.model_summary")
    log.addHandler(records)
    log.setLevel(logging.INFO)
    try:
        trainer, module = play(door, stock.ModelSummary(max_depth=2), enable_model_summary=True)
    finally:
        log.removeHandler(records)
        log.setLevel(logging.NOTSET)
    assert [type(c) for c in trainer.callbacks if isinstance(c, stock.ModelSummary)] == [stock.ModelSummary]
    (text,) = (text for text in records.texts if "Trainable params" in text)
    assert f"{sum(p.numel() for p in module.parameters())} " in text
    assert "net.0" in text


@row
def RichModelSummary(door: int, capsys: Any) -> None:
    pytest.importorskip("rich")
    play(door, stock.RichModelSummary(), enable_model_summary=True)
    assert capsys.readouterr().out.count("Trainable params") == 1


@row
def BasePredictionWriter(door: int, _: Any) -> None:
    class Writes(stock.BasePredictionWriter):
        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            torch.save(torch.cat(predictions), "predictions.pt")

    trainer, module = play(door, Writes("epoch"))
    trainer.predict(module, module.val_dataloader(), return_predictions=False)
    assert torch.equal(torch.load("predictions.pt"), _logits(global_models()[-1]).argmax(1))


# ---------------------------------------------------------------------- what clients do, what the server keeps


@row
def GradientAccumulationScheduler(door: int, _: Any) -> None:
    class Counts(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *_: taken.append(self.trainer.global_step))
            return optimizer

    taken: list[int] = []
    _trainer, module = play(door, stock.GradientAccumulationScheduler({0: 1, 1: 2, 3: 4}), module=Counts())
    assert [taken.count(round_idx) for round_idx in range(4)] == [12, 6, 6, 3]
    assert module.steps == 4 * CLIENTS * BATCHES


def averaging(door: int, averager: Callable[[], Any], averages: list[torch.Tensor]) -> None:
    """One average a round; it is what validation, checkpoints and the end see, and the federation ignores it."""
    models, seen, module = global_models(), GlobalModels(), Module()
    keeper = stock.ModelCheckpoint(dirpath="averages", save_top_k=-1)
    play(door, averager(), seen, keeper, module=module)
    assert all(torch.equal(a, b) for a, b in zip(seen.models, models, strict=True))
    for validated, average in zip(module.validated, averages, strict=True):
        torch.testing.assert_close(validated, average)
    torch.testing.assert_close(flat(module), averages[-1])
    assert (averages[-1] - models[-1]).abs().max() > 1e-3
    for i, average in enumerate(averages):
        torch.testing.assert_close(saved(f"averages/epoch={i}-step={i + 1}.ckpt"), average)
    keeper = stock.ModelCheckpoint(dirpath="averages", save_top_k=-1)
    _trainer, resumed = play(door, averager(), keeper, ckpt="averages/epoch=1-step=2.ckpt")
    assert resumed.steps == 2 * CLIENTS * BATCHES
    assert torch.equal(flat(resumed), flat(module))


@row
def WeightAveraging(door: int, _: Any) -> None:
    models = global_models()
    averaging(door, stock.WeightAveraging, [torch.stack(models[: i + 1]).mean(0) for i in range(4)])


@row
def EMAWeightAveraging(door: int, _: Any) -> None:
    models = global_models()
    averages = models[:1]
    for model in models[1:]:
        averages.append(0.5 * averages[-1] + 0.5 * model)
    averaging(door, lambda: stock.EMAWeightAveraging(decay=0.5), averages)
    # Every second round, from the third on.
    late = stock.EMAWeightAveraging(decay=0.5, update_every_n_steps=2, update_starting_at_step=2)
    _trainer, module = play(door, late)
    torch.testing.assert_close(flat(module), models[2])


# ---------------------------------------------------------------------- progress bars


@row
def ProgressBar(door: int, _: Any) -> None:
    class Mine(stock.ProgressBar):
        def __init__(self) -> None:
            super().__init__()
            self.rounds, self.steps = 0, 0

        def disable(self) -> None:
            """It cannot be turned off."""

        def on_train_epoch_end(self, trainer, pl_module):
            self.rounds += 1
            assert "train_loss" in trainer.callback_metrics

        def on_train_batch_end(self, *_: Any):
            self.steps += 1

    bar = Mine()
    trainer, _module = play(door, bar, enable_progress_bar=True)
    assert trainer.progress_bar_callback is bar
    assert (bar.rounds, bar.steps) == (4, 4 * CLIENTS * BATCHES)


@contextmanager
def in_a_terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fedhaw.adapter.progress.is_shown_live", lambda: True)
        yield


@row
def TQDMProgressBar(door: int, capsys: Any) -> None:
    with in_a_terminal():
        trainer, module = play(door, stock.TQDMProgressBar(), enable_progress_bar=True)
    bar = trainer.progress_bar_callback
    assert type(bar) is RoundProgressBar
    assert bar.train_progress_bar.n == bar.train_progress_bar.total == 4
    shown = capsys.readouterr()
    assert "4/4" in shown.out + shown.err
    assert "Rounds" in shown.out + shown.err
    trainer.validate(module, module.val_dataloader(), verbose=False)
    assert bar.val_progress_bar.n == 4
    trainer, _module = play(door, stock.TQDMProgressBar(refresh_rate=0), enable_progress_bar=True)
    assert trainer.progress_bar_callback.is_disabled
    own = RoundProgressBar(refresh_rate=3)
    trainer, _module = play(door, own, enable_progress_bar=True)
    assert trainer.progress_bar_callback is own
    assert own.train_progress_bar.n == 4

    class Mine(stock.TQDMProgressBar):
        rounds = 0

        def init_train_tqdm(self):
            bar = super().init_train_tqdm()
            bar.set_description("mine")
            return bar

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            self.rounds += 1
            assert self.train_progress_bar.n == self.train_progress_bar.total == 1

    mine = Mine()
    trainer, _module = play(door, mine, enable_progress_bar=True)
    assert trainer.progress_bar_callback is mine
    assert mine.rounds == 4


@row
def RichProgressBar(door: int, capsys: Any) -> None:
    pytest.importorskip("rich")
    theme = stock.RichProgressBar().theme
    trainer, _module = play(door, stock.RichProgressBar(refresh_rate=7, theme=theme), enable_progress_bar=True)
    bar = trainer.progress_bar_callback
    assert isinstance(bar, stock.RichProgressBar), "a bar of the user's stays, in a file too"
    assert (bar.refresh_rate, bar.theme) == (7, theme)
    assert bar.train_progress_bar.completed == bar.train_progress_bar.total == 4
    with in_a_terminal():
        trainer, _module = play(door, enable_progress_bar=True)
    assert isinstance(trainer.progress_bar_callback, stock.RichProgressBar)
    assert trainer.progress_bar_callback.train_progress_bar.completed == 4

    class Mine(stock.RichProgressBar):
        rounds = 0

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            self.rounds += 1
            assert self.progress.tasks[self.train_progress_bar_id].completed == 1

    mine = Mine()
    trainer, _module = play(door, mine, enable_progress_bar=True)
    assert trainer.progress_bar_callback is mine
    assert mine.rounds == 4
    assert "Epoch 3/3" in capsys.readouterr().out


# ---------------------------------------------------------------------- refused


class FreezesLater(stock.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "BaseFinetuning": (FreezesLater, "FreezesLater .*Freeze before `fit`"),
    "BackboneFinetuning": (stock.BackboneFinetuning, "BackboneFinetuning .*Freeze before `fit`"),
    "BatchSizeFinder": (stock.BatchSizeFinder, "BatchSizeFinder .*`batch_size`"),
    "LearningRateFinder": (stock.LearningRateFinder, "LearningRateFinder .*learning rate"),
    "ModelPruning": (lambda: stock.ModelPruning("l1_unstructured", amount=0.5), "ModelPruning .*Prune before or after"),
    "SpikeDetection": (stock.SpikeDetection, 'SpikeDetection .*`on_nonfinite="exclude"`'),
    "StochasticWeightAveraging": (
        lambda: stock.StochasticWeightAveraging(swa_lrs=1e-2),
        "StochasticWeightAveraging .*`EMAWeightAveraging`",
    ),
    "ThroughputMonitor": (lambda: stock.ThroughputMonitor(batch_size_fn=len), "ThroughputMonitor .*run summary"),
}


class Brings(Module):
    """A module that configures callbacks itself."""

    def __init__(self, callback: Any) -> None:
        super().__init__()
        self.callback = callback

    def configure_callbacks(self):
        return [self.callback]


@ENTRY_POINTS
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_callback_stops_the_run_before_anything_is_trained(name, door):
    make, match = REFUSED[name]
    module = Module()
    before = flat(module)
    with pytest.raises(ValueError, match=f"`callbacks`: {match}"):
        play(door, make(), module=module)
    assert module.steps == 0
    assert torch.equal(flat(module), before)
    module = Brings(make())
    with pytest.raises(ValueError, match=f"`callbacks`: {match}"):
        play(door, module=module)
    assert module.steps == 0
    if door == 1:
        with pytest.raises(ValueError, match=match):
            build(door, make())


# ---------------------------------------------------------------------- the table


@ENTRY_POINTS
@pytest.mark.parametrize("name", [name for name, verdict in ROWS.items() if verdict != "refused"])
def test_callback(name, door, capsys):
    CHECKS[name](door, capsys)


def test_the_table_has_exactly_the_callbacks_of_the_installed_lightning():
    assert set(ROWS) == set(stock.__all__)
    assert {name for name, verdict in ROWS.items() if verdict == "refused"} == set(REFUSED)
    assert set(ROWS) - set(REFUSED) == set(CHECKS)
    assert set(ROWS.values()) == {"kept", "per round", "refused"}
