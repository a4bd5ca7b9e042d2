"""Every argument of Lightning's trainer means what docs/trainer_arguments.md says, through both doors."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import math
import os
import re
import warnings
from collections import UserDict, UserList
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.fabric.accelerators as fabric
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelSummary
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import AdvancedProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from federations import QUIET, Classifier, flat, samples
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedStrategy,
    FederatedTrainer,
    FederationOptions,
    FedHAWCallback,
    IIDPartitioner,
    IndexPartitioner,
    RoundTable,
)
from lightning_fedhaw.adapter.progress import RichRoundProgressBar

CLIENTS, BATCHES, RATE = 3, 4, 0.1  # Every client has 32 samples in batches of 8.
FEDERATION: dict[str, Any] = {"num_clients": CLIENTS, "partitioner": IIDPartitioner(), "client_eval": False, "seed": 5}
DOCS = Path(__file__).parents[1] / "docs" / "trainer_arguments.md"


def table(heading: str) -> dict[str, str]:
    """The table under a heading: what stands in the first column, and the verdict on it."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    assert all(len(row) == 3 and row[2] for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return {name.strip("`"): verdict for name, verdict, _ in rows}


class Watched(Classifier):
    """Notes what is done to it."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        # Of all clients together: plain attributes, lists and dicts would be a client's own.
        self.steps: UserList[tuple[int, int]] = UserList()  # round and batch index of every local step
        self.validated: list[int] = []  # rounds that were over at every validation
        self.evaluated: dict[str, int] = {"sanity": 0, "fit": 0, "validate": 0, "test": 0, "predict": 0}
        self.seen: UserDict[str, Any] = UserDict(optimizer_steps=0)

    def training_step(self, batch, batch_idx):
        self.steps.append((self.trainer.global_step, batch_idx))
        self.seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.seen["benchmark"] = torch.backends.cudnn.benchmark
        self.seen["dtype"] = self.net(batch[0]).dtype
        return super().training_step(batch, batch_idx)

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            assert not self.steps
            self.evaluated["sanity"] += 1
        else:
            self.evaluated[self.trainer.state.fn] += 1
        self.seen["inference"] = torch.is_inference_mode_enabled()
        self.seen["grad"] = torch.is_grad_enabled()
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.evaluated["test"] += 1

    def predict_step(self, batch, batch_idx):
        self.evaluated["predict"] += 1
        return super().predict_step(batch, batch_idx)

    @property
    def steps_by_round(self) -> list[int]:
        rounds = [round_idx for round_idx, _ in self.steps]
        return [rounds.count(round_idx) for round_idx in range(max(rounds, default=-1) + 1)]


class CountsOptimizerSteps(Watched):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(self._count)
        return optimizer

    def _count(self, *_: Any) -> None:
        self.seen["optimizer_steps"] += 1


def train_loader() -> DataLoader:
    return DataLoader(samples(CLIENTS * BATCHES * 8), batch_size=8, shuffle=True)


def val_loader() -> DataLoader:
    return DataLoader(samples(32, seed=1), batch_size=8)


def build(
    door: int, rounds: int | None = 3, rule: Any = FedAvgCallback, callbacks: Any = (), **arguments: Any
) -> pl.Trainer:
    """A trainer with a federation behind one of the two doors."""
    federation = {name: arguments.pop(name) for name in ("local_epochs",) if name in arguments}
    federation |= FEDERATION
    arguments = {**QUIET, **arguments}
    if door == 1:
        return FederatedTrainer(rounds=rounds, callbacks=[rule(), *callbacks], **federation, **arguments)
    return pl.Trainer(max_epochs=rounds, callbacks=[rule(**federation), *callbacks], **arguments)


def play(door: int, module: Any = None, *, val: bool = False, **arguments: Any) -> tuple[Any, Any]:
    """Build, fit, and return trainer and module."""
    module = module or Watched()
    trainer = build(door, **arguments)
    trainer.fit(module, train_loader(), val_loader() if val else None)
    return trainer, module


def moved(door: int, **arguments: Any) -> torch.Tensor:
    """How far a run takes the global model."""
    return flat(play(door, **arguments)[1]) - flat(Watched())


def refuses(door: int, match: str, *, processes: bool = False, **arguments: Any) -> None:
    """That a trainer is refused before anything is trained."""
    module = Watched()

    def attempt() -> None:
        trainer: Any = build(door, **arguments)
        if processes:
            # The hook that `fit` calls first, without starting the processes.
            trainer.callbacks[0].setup(trainer, module, "fit")
        else:
            trainer.fit(module, train_loader())

    with pytest.raises(ValueError, match=match):
        attempt()
    assert not module.steps


def files(*suffixes: str) -> list[str]:
    """What lies under the test's own directory."""
    return sorted(str(path) for path in Path().rglob("*") if path.suffix in suffixes)


def csv_rows(directory: str) -> list[dict[str, str]]:
    with (Path(directory) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _flags_are_put_back():
    environment, benchmark = dict(os.environ), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.clear()
    os.environ.update(environment)


# ---------------------------------------------------------------------- one check per row

CHECKS: dict[str, Callable[[int], None]] = {}


def row(check: Callable[[int], None]) -> Callable[[int], None]:
    """The test of the row with the function's name; it takes the number of the door."""
    CHECKS[check.__name__] = check
    return check


@row
def accelerator(door: int) -> None:
    class Noted(CPUAccelerator):
        devices: list[torch.device] = []  # noqa: RUF012

        def setup_device(self, device):
            self.devices.append(device)

    trainer, module = play(door, accelerator=Noted(), devices=1)
    assert Noted.devices == [torch.device("cpu")]
    assert type(trainer.accelerator) is Noted
    assert module.steps_by_round == [CLIENTS * BATCHES] * 3


@pytest.fixture
def a_mac(monkeypatch):
    """A machine of which Lightning believes that it has Apple's GPU."""
    for accelerator in (MPSAccelerator, fabric.MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", staticmethod(lambda: True))


@pytest.mark.usefixtures("a_mac")
@pytest.mark.parametrize("asked", ["mps", "gpu", MPSAccelerator()], ids=["mps", "gpu", "object"])
@pytest.mark.parametrize("door", [1, 2])
def test_apples_gpu_is_refused(door, asked):
    refuses(door, r"accelerator=mps.*float64.*Set `accelerator=\"cpu\"`", accelerator=asked, devices=1)


def test_apples_gpu_is_refused_by_name_on_any_machine():
    refuses(1, r"accelerator=mps.*float64", accelerator="mps")


@pytest.mark.usefixtures("a_mac")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize("arguments", [{"accelerator": "auto"}, {}])
def test_where_it_may_choose_a_federation_leaves_apples_gpu_alone(arguments, caplog):
    quiet = {name: value for name, value in QUIET.items() if name != "accelerator"}
    trainer = FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], **FEDERATION, **quiet, **arguments)
    assert isinstance(trainer.accelerator, CPUAccelerator)
    assert caplog.text.count('A federation computes on the CPU here (`accelerator="cpu"`)') == 1
    module = Watched()
    trainer.fit(module, train_loader())
    assert module.steps_by_round == [CLIENTS * BATCHES]


@pytest.mark.usefixtures("a_mac")
def test_a_stock_trainer_that_chose_apples_gpu_is_refused():
    refuses(2, r"accelerator=mps.*Set `accelerator=\"cpu\"`", accelerator="auto")


@row
def strategy(door: int) -> None:
    mine = SingleDeviceStrategy("cpu", accelerator=CPUAccelerator())
    trainer, module = play(door, strategy=mine, accelerator="auto")
    assert trainer.strategy is mine
    assert torch.equal(flat(module) - flat(Watched()), moved(door))
    refuses(door, "strategy=ModelParallelStrategy.*federated", processes=True, strategy=ModelParallelStrategy())


@row
def devices(door: int) -> None:
    assert play(door, devices=1)[1].steps_by_round == [CLIENTS * BATCHES] * 3
    forked = "federated_notebook" if door == 1 else "ddp_notebook"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers")
        two = moved(door, devices=2, strategy=forked)
    assert torch.allclose(two, moved(door), rtol=1e-6, atol=1e-7)


@row
def num_nodes(door: int) -> None:
    trainer: Any = build(door, num_nodes=2, devices=1)
    assert trainer.world_size == 2
    assert isinstance(trainer.strategy, FederatedStrategy if door == 1 else DDPStrategy)
    trainer.callbacks[0].setup(trainer, Watched(), "fit")


@row
def precision(door: int) -> None:
    for asked, weights, activations in (
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("32-true", torch.float32, torch.float32),
    ):
        trainer, module = play(door, precision=asked, rounds=1, val=True)
        assert module.net[0].weight.dtype == weights, asked
        assert module.seen["dtype"] == activations, asked
        assert trainer.fit_loop.federation.server.parameters().dtype == torch.promote_types(weights, torch.float32)
        assert (flat(module) - flat(Watched())).abs().max() > 0.01
    if door == 1:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")  # The refusal says it again.
            refuses(door, "precision='16-mixed'", precision="16-mixed")


@pytest.mark.filterwarnings("ignore:The evaluation of the clients has changed self.seen")
def test_every_client_is_evaluated_in_low_precision():
    for asked in ("bf16-true", "16-true", "bf16-mixed"):
        trainer = FederatedTrainer(
            rounds=1, callbacks=[FedAvgCallback()], **{**QUIET, **FEDERATION, "client_eval": True}, precision=asked
        )
        trainer.fit(Watched(), train_loader())
        assert 0 < trainer.federation_summary["client_metrics"]["val_loss"]["worst_decile"] < 10


@row
def logger(door: int) -> None:
    trainer, _ = play(door, val=True, logger=CSVLogger(".", name="log"))
    rows = csv_rows(trainer.logger.log_dir)
    trained = [r for r in rows if r["train_loss"]]
    assert [(r["step"], r["epoch"]) for r in trained] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({r["train_loss"] for r in trained}) == 3
    assert [r["step"] for r in rows if r["val_loss"]] == ["0", "1", "2"]
    assert [float(r["summary/rounds"]) for r in rows if r["summary/rounds"]] == [3.0]
    assert play(door, logger=False)[0].loggers == []


@row
def callbacks(door: int) -> None:
    class Mine(pl.Callback):
        rounds = 0

        def on_train_epoch_end(self, trainer, pl_module):
            self.rounds += 1

    mine = Mine()
    play(door, callbacks=[mine])
    assert mine.rounds == 3
    refuses(door, "exactly one aggregation rule among `callbacks`, got 2", callbacks=[FedHAWCallback()])
    if door == 1:
        with pytest.raises(ValueError, match="exactly one aggregation rule among `callbacks`, got none"):
            FederatedTrainer(rounds=1, **QUIET).fit(Watched(), train_loader())


@row
def fast_dev_run(door: int) -> None:
    for value, batches in ((True, 1), (1, 1), (3, 3)):
        trainer, module = play(
            door, rounds=7, val=True, fast_dev_run=value, logger=CSVLogger("."), enable_checkpointing=True
        )
        assert [index for _, index in module.steps] == list(range(batches)) * 2 * 2
        assert module.steps_by_round == [2 * batches] * 2
        assert module.evaluated["fit"] == 2 * batches
        assert [type(each) for each in trainer.loggers] == [DummyLogger]
        assert files(".ckpt", ".csv") == []
        assert trainer.current_epoch == trainer.global_step == 2


@row
def max_epochs(door: int) -> None:
    if door == 1:
        trainer = FederatedTrainer(max_epochs=2, callbacks=[FedAvgCallback()], **FEDERATION, **QUIET)
        with pytest.raises(ValueError, match="`rounds`=3 and `max_epochs`=2"):
            FederatedTrainer(rounds=3, max_epochs=2, callbacks=[FedAvgCallback()], **QUIET)
    else:
        trainer = build(door, rounds=2)
    module = Watched()
    trainer.fit(module, train_loader())
    assert module.steps_by_round == [CLIENTS * BATCHES] * 2
    assert trainer.current_epoch == trainer.global_step == trainer.max_epochs == 2


def stop_at_once() -> EarlyStopping:
    return EarlyStopping("train_loss", stopping_threshold=1e9)


@row
def min_epochs(door: int) -> None:
    assert play(door, rounds=5, callbacks=[stop_at_once()])[0].current_epoch == 1
    assert play(door, rounds=5, callbacks=[stop_at_once()], min_epochs=3)[0].current_epoch == 3


@row
def min_steps(door: int) -> None:
    assert play(door, rounds=5, callbacks=[stop_at_once()], min_steps=3)[0].current_epoch == 3


@row
def max_steps(door: int) -> None:
    for rounds in (5, -1, None):
        trainer, module = play(door, rounds=rounds, max_steps=2)
        assert module.steps_by_round == [CLIENTS * BATCHES] * 2
        assert trainer.current_epoch == trainer.global_step == 2
    assert play(door, rounds=2, max_steps=5)[0].global_step == 2


@row
def max_time(door: int) -> None:
    trainer, module = play(door, rounds=-1, max_time=timedelta(microseconds=100))
    assert module.steps_by_round == [CLIENTS * BATCHES]
    assert trainer.global_step == 1
    assert play(door, rounds=3, max_time="00:01:00:00")[0].global_step == 3


@row
def limit_train_batches(door: int) -> None:
    for limit, batches in ((1, 1), (2, 2), (99, BATCHES), (0.5, 2), (0.1, 1), (1.0, BATCHES), (None, BATCHES)):
        _, module = play(door, rounds=1, local_epochs=2, limit_train_batches=limit)
        assert [index for _, index in module.steps] == list(range(batches)) * 2 * CLIENTS, limit
    trainer, module = play(door, limit_train_batches=0)
    assert not module.steps
    assert trainer.global_step == 0


@row
def limit_val_batches(door: int) -> None:
    for limit, batches in ((1, 1), (0.5, 2), (1.0, 4), (0, 0)):
        assert play(door, val=True, limit_val_batches=limit, num_sanity_val_steps=0)[1].evaluated["fit"] == 3 * batches


@row
def limit_test_batches(door: int) -> None:
    trainer, module = play(door, limit_test_batches=2)
    trainer.test(module, val_loader(), verbose=False)
    assert module.evaluated["test"] == 2


@row
def limit_predict_batches(door: int) -> None:
    trainer, module = play(door, limit_predict_batches=3)
    assert len(trainer.predict(module, val_loader())) == module.evaluated["predict"] == 3


@row
def overfit_batches(door: int) -> None:
    refuses(door, "overfit_batches=2.*Use `limit_train_batches`", overfit_batches=2)


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("name", ["accumulate_grad_batches", "check_val_every_n_epoch"])
def test_intervals_of_zero_are_refused(door, name):
    refuses(door, f"`{name}` must be a whole number of at least 1, got 0", **{name: 0})


@pytest.mark.parametrize("door", [1, 2])
def test_clipping_to_nan_is_refused(door):
    refuses(door, "`gradient_clip_val` must be a number, got nan", gradient_clip_val=float("nan"))


@row
def val_check_interval(door: int) -> None:
    for arguments, rounds in (
        ({}, [1, 2, 3, 4]),
        ({"val_check_interval": 1.0}, [1, 2, 3, 4]),
        ({"val_check_interval": 1}, [1, 2, 3, 4]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, [2, 4]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3]),
        ({"val_check_interval": timedelta(0)}, [1, 2, 3, 4]),
        ({"val_check_interval": "00:00:00:00", "check_val_every_n_epoch": None}, [1, 2, 3, 4]),
        ({"val_check_interval": {"hours": 1}}, []),
    ):
        assert play(door, rounds=4, val=True, **arguments)[1].validated == rounds, arguments
    refuses(door, "val_check_interval=0.5.*Use `check_val_every_n_epoch`", val_check_interval=0.5)
    refuses(door, "val_check_interval=2.*Use `check_val_every_n_epoch=2`", val_check_interval=2)


@row
def check_val_every_n_epoch(door: int) -> None:
    assert play(door, rounds=5, val=True, check_val_every_n_epoch=2)[1].validated == [2, 4]


@row
def num_sanity_val_steps(door: int) -> None:
    for asked, batches in ((0, 0), (2, 2), (-1, 4)):
        assert play(door, val=True, num_sanity_val_steps=asked)[1].evaluated["sanity"] == batches


@row
def log_every_n_steps(door: int) -> None:
    for interval in (1, 2, 50):
        trainer, _ = play(door, logger=CSVLogger(".", name=f"every{interval}"), log_every_n_steps=interval)
        assert [r["step"] for r in csv_rows(trainer.logger.log_dir) if r["train_loss"]] == ["0", "1", "2"]


@row
def enable_checkpointing(door: int) -> None:
    play(door, enable_checkpointing=False)
    assert files(".ckpt") == []
    _, module = play(door, enable_checkpointing=True)
    (path,) = files(".ckpt")
    assert path.endswith("epoch=2-step=3.ckpt")
    assert torch.equal(flat(Watched.load_from_checkpoint(path)), flat(module))


@row
def enable_progress_bar(door: int) -> None:
    assert play(door)[0].progress_bar_callback is None
    in_a_file = play(door, enable_progress_bar=True)[0]
    assert in_a_file.progress_bar_callback is None
    assert any(isinstance(callback, RoundTable) for callback in in_a_file.callbacks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fedhaw.adapter.progress.is_shown_live", lambda: True)
        bar = play(door, enable_progress_bar=True, val=True)[0].progress_bar_callback
    assert isinstance(bar, RichRoundProgressBar)
    assert bar.train_progress_bar.completed == bar.train_progress_bar.total == 3


@row
def enable_model_summary(door: int) -> None:
    class Noted(ModelSummary):
        seen: list[int] = []  # noqa: RUF012

        @staticmethod
        def summarize(summary_data, total_parameters, *_: Any, **__: Any) -> None:
            Noted.seen.append(total_parameters)

    for enable, count in ((False, 0), (True, 1)):
        trainer, _ = play(door, enable_model_summary=enable)
        assert len([c for c in trainer.callbacks if isinstance(c, ModelSummary)]) == count
    play(door, enable_model_summary=True, callbacks=[Noted()])
    assert Noted.seen == [sum(p.numel() for p in Watched().parameters())]


@row
def accumulate_grad_batches(door: int) -> None:
    for window, steps in ((1, 4), (2, 2), (3, 2), (4, 1), (9, 1)):
        trainer, module = play(door, CountsOptimizerSteps(), accumulate_grad_batches=window)
        assert module.seen["optimizer_steps"] == 3 * CLIENTS * steps
        assert module.steps_by_round == [CLIENTS * BATCHES] * 3
        assert trainer.global_step == trainer.estimated_stepping_batches == 3
    # All of a client's batches behind one step, and equal clients: one step down the gradient of all data.
    central = Watched()
    x, y = samples(CLIENTS * BATCHES * 8).tensors
    cross_entropy(central.net(x), y).backward()
    down = torch.cat([-RATE * p.grad.flatten().double() for p in central.parameters()])
    torch.testing.assert_close(moved(door, rounds=1, accumulate_grad_batches=4), down, rtol=1e-4, atol=1e-7)


CLIP = 1e-3
FURTHEST = BATCHES * RATE * CLIP


@row
def gradient_clip_val(door: int) -> None:
    free, clipped = moved(door, rounds=1), moved(door, rounds=1, gradient_clip_val=CLIP)
    assert free.norm() > 100 * FURTHEST
    assert 0.5 * FURTHEST < clipped.norm() <= FURTHEST * 1.001


@row
def gradient_clip_algorithm(door: int) -> None:
    by_value = moved(door, rounds=1, gradient_clip_val=CLIP, gradient_clip_algorithm="value")
    assert 0.9 * FURTHEST < by_value.abs().max() <= FURTHEST * 1.001
    assert by_value.norm() > 2 * FURTHEST
    by_norm = moved(door, rounds=1, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
    assert torch.equal(by_norm, moved(door, rounds=1, gradient_clip_val=CLIP))


@row
def deterministic(door: int) -> None:
    assert play(door)[1].seen["deterministic"] is False
    assert play(door, deterministic=True)[1].seen["deterministic"] is True
    torch.use_deterministic_algorithms(False)
    assert torch.equal(moved(door), moved(door))


@row
def benchmark(door: int) -> None:
    for value in (True, False):
        assert play(door, benchmark=value)[1].seen["benchmark"] is value


@row
def inference_mode(door: int) -> None:
    for value in (True, False):
        trainer, module = play(door, val=True, inference_mode=value)
        assert module.seen["grad"] is False
        assert module.seen["inference"] is False
        trainer.validate(module, val_loader(), verbose=False)
        assert module.seen["grad"] is False
        assert module.seen["inference"] is value


@row
def use_distributed_sampler(door: int) -> None:
    assert moved(door).abs().max() > 0.01
    assert torch.equal(moved(door, use_distributed_sampler=False), moved(door, use_distributed_sampler=True))


@row
def profiler(door: int) -> None:
    trainer, _ = play(door, profiler="simple")
    assert len(trainer.profiler.recorded_durations["run_training_batch"]) == 3
    assert len(trainer.profiler.recorded_durations["run_training_epoch"]) == 3
    assert "run_training_batch" in trainer.profiler.summary()
    play(door, profiler=AdvancedProfiler(dirpath=".", filename="advanced"))
    assert "run_round" in Path("fit-advanced.txt").read_text()
    with warnings.catch_warnings():
        # Lightning's advice that five steps are better, which it gives once a process.
        warnings.filterwarnings("ignore", "The PyTorch Profiler default schedule will be overridden")
        trainer, _ = play(door, profiler="pytorch")
    names = [event.name for event in trainer.profiler.function_events]
    assert names.count("[pl][profile]run_training_batch") >= 1
    assert "aten::addmm" in names


@row
def detect_anomaly(door: int) -> None:
    class Broken(Watched):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (0 * self.net[0].weight).sum().sqrt()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The traceback of the forward pass, and the clients that are left out.
        with pytest.raises(RuntimeError, match="Function 'MulBackward0' returned nan"):
            play(door, Broken(), detect_anomaly=True)
        with pytest.raises(FloatingPointError, match="Every client of round 0"):
            play(door, Broken())


@row
def barebones(door: int) -> None:
    refuses(door, "barebones=True", barebones=True)


@row
def plugins(door: int) -> None:
    class Noted(Precision):
        inputs = 0

        def convert_input(self, data):
            self.inputs += 1
            return data

    class NotedIO(TorchCheckpointIO):
        paths: list[str] = []  # noqa: RUF012

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.paths.append(Path(path).name)
            super().save_checkpoint(checkpoint, path, storage_options)

    noted, io = Noted(), NotedIO()
    _, module = play(door, plugins=[noted, io], enable_checkpointing=True)
    assert noted.inputs == len(module.steps) == 3 * CLIENTS * BATCHES
    assert io.paths == [f"epoch={i}-step={i + 1}.ckpt" for i in range(3)]
    assert torch.equal(flat(module) - flat(Watched()), moved(door))


@row
def sync_batchnorm(door: int) -> None:
    refuses(door, "sync_batchnorm=True.*`buffers=`", sync_batchnorm=True)


@row
def reload_dataloaders_every_n_epochs(door: int) -> None:
    refuses(door, "reload_dataloaders_every_n_epochs=2.*Remove it", reload_dataloaders_every_n_epochs=2)


@row
def default_root_dir(door: int) -> None:
    play(door, default_root_dir="elsewhere", logger=True, enable_checkpointing=True)
    assert [Path(f).parts[0] for f in files(".ckpt")] == ["elsewhere"]
    assert {path.name for path in Path().iterdir()} == {"elsewhere"}


@row
def enable_autolog_hparams(door: int) -> None:
    class WithParameters(Watched):
        def __init__(self, width=11):
            super().__init__()
            self.save_hyperparameters()

    play(door, WithParameters(), logger=CSVLogger("without"), enable_autolog_hparams=False)
    play(door, WithParameters(), logger=CSVLogger("with"))
    (path,) = files(".yaml")
    assert Path(path).parts[0] == "with"
    kept = Path(path).read_text()
    assert "width: 11" in kept
    assert "rule: FedAvgCallback" in kept


@row
def model_registry(door: int) -> None:
    if importlib.util.find_spec("litmodels"):
        pytest.skip("would upload")
    trainer, _ = play(door, model_registry="mine:v2", enable_checkpointing=True)
    assert trainer._model_registry == "mine"
    assert len(files(".ckpt")) == 1


ROWS = table("Arguments of the trainer")


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("argument", ROWS)
def test_argument(argument, door):
    CHECKS[argument](door)


def test_the_table_has_exactly_the_arguments_of_the_installed_trainer():
    assert set(ROWS) == set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert set(CHECKS) == set(ROWS)
    assert set(ROWS.values()) == {"kept", "per round", "refused"}


# ---------------------------------------------------------------------- attributes


@pytest.mark.parametrize("door", [1, 2])
def test_estimated_stepping_batches_are_the_rounds(door):
    class Asks(Watched):
        def configure_optimizers(self):
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    for arguments, expected in (
        ({"rounds": 4}, 4),
        ({"rounds": 4, "accumulate_grad_batches": 3}, 4),
        ({"rounds": 4, "limit_train_batches": 2}, 4),
        ({"rounds": 4, "max_steps": 2}, 2),
        ({"rounds": -1, "max_steps": 2}, 2),
        ({"rounds": -1, "callbacks": [stop_at_once()]}, math.inf),
        ({"rounds": 4, "fast_dev_run": True}, 2),
    ):
        assert play(door, Asks(), **arguments)[1].estimate == expected, arguments


@pytest.mark.parametrize("door", [1, 2])
def test_counters_count_rounds(door):
    class Counts(pl.Callback):
        def __init__(self):
            self.rows = []

        def on_train_epoch_start(self, trainer, pl_module):
            self.rows.append(("start", trainer.current_epoch, trainer.global_step))

        def on_train_epoch_end(self, trainer, pl_module):
            assert trainer.is_last_batch
            assert trainer.num_training_batches == 1
            self.rows.append(("end", trainer.current_epoch, trainer.global_step))

    counts = Counts()
    trainer, _ = play(door, rounds=2, callbacks=[counts])
    assert counts.rows == [("start", 0, 0), ("end", 0, 1), ("start", 1, 1), ("end", 1, 2)]
    assert isinstance(trainer.train_dataloader, DataLoader)


@pytest.mark.parametrize("door", [1, 2])
def test_a_resumed_run_that_steps_limit_counts_its_rounds_on(door):
    play(door, rounds=-1, max_steps=2, enable_checkpointing=True)
    (path,) = files(".ckpt")
    for validation, every, rounds in ((None, 1, []), (val_loader(), 2, [4])):
        module = Watched()
        trainer = build(door, rounds=-1, max_steps=4, enable_checkpointing=True, check_val_every_n_epoch=every)
        trainer.fit(module, train_loader(), validation, ckpt_path=path, weights_only=True)
        assert len(module.steps) == 2 * CLIENTS * BATCHES
        assert trainer.current_epoch == trainer.global_step == 4
        assert module.validated == rounds


@pytest.mark.parametrize("door", [1, 2])
def test_callback_metrics_come_from_clients_rule_and_validation(door):
    trainer, _ = play(door, rule=FedHAWCallback, val=True)
    assert {"train_loss", "scale", "clients_received", "val_loss", "val_acc"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["clients_received"] == CLIENTS


# ---------------------------------------------------------------------- learning-rate schedules


class Scheduled(Watched):
    """Halves its rate as told, and notes the rate that each client starts with."""

    def __init__(self, optimizer: Any, **config: Any) -> None:
        super().__init__(optimizer)
        self.config, self.rates = config, []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        make = self.config.pop("make", lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **self.config}}

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


SGD = lambda p: torch.optim.SGD(p, lr=0.8)  # noqa: E731
ADAM = lambda p: torch.optim.Adam(p, lr=0.8)  # noqa: E731


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_schedules_advance_by_rounds(door, interval, optimizer):
    for frequency, rates in ((1, [0.8, 0.4, 0.2, 0.1]), (2, [0.8, 0.8, 0.4, 0.4])):
        for window in (1, 2):
            module = Scheduled(optimizer, interval=interval, frequency=frequency)
            play(door, module, rounds=4, accumulate_grad_batches=window)
            assert module.rates == pytest.approx([rate for rate in rates for _ in range(CLIENTS)]), (frequency, window)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("monitor", ["train_loss", "val_loss", "clients_received"])
def test_plateaus_are_seen_in_any_metric(interval, monitor):
    def make(optimizer):
        # Nothing counts as an improvement, so the rate halves every round.
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)

    module = Scheduled(SGD, make=make, monitor=monitor, interval=interval)
    play(1, module, val=True, rounds=4)
    assert module.rates[::CLIENTS] == [0.8, 0.4, 0.2, 0.1]


@pytest.mark.parametrize("door", [1, 2])
def test_schedules_of_manual_optimization_go_on_from_the_furthest_client(door):
    class Manual(Watched):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.began: list[int] = []

        def training_step(self, batch, batch_idx):
            schedule, optimizer = self.lr_schedulers(), self.optimizers()
            if batch_idx == 0:
                self.began.append(schedule.last_epoch)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            schedule.step()

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)]

    federation = {"partitioner": IndexPartitioner([range(8), range(8, 32), range(32, 48)]), "client_eval": False}
    module = Manual()  # 1, 3 and 2 local steps
    if door == 1:
        trainer: pl.Trainer = FederatedTrainer(rounds=3, callbacks=[FedAvgCallback()], **federation, **QUIET)
    else:
        trainer = pl.Trainer(max_epochs=3, callbacks=[FedAvgCallback(**federation)], **QUIET)
    trainer.fit(module, DataLoader(samples(48), batch_size=8))
    assert module.began == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 9
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(RATE * 0.9**9)


def test_every_argument_of_the_federation_has_a_row():
    own = set(inspect.signature(FederatedTrainer).parameters) - {"kwargs"}
    assert own == set(table("Arguments of the federation"))
    assert own - {"rounds", "checkpoint_every_n_rounds"} == {f.name for f in fields(FederationOptions)}


def descriptions(kind: type, section: str) -> dict[str, str]:
    """What a docstring says of each argument."""
    text = str(inspect.getdoc(kind)).split(f"\n{section}:\n")[1]
    entries = re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", re.split(r"\n\S", text)[0], re.MULTILINE)
    return {entry[1]: " ".join(entry[2].split()) for entry in entries}


def test_every_option_of_the_federation_is_described_once_and_in_the_same_words():
    options = descriptions(FederationOptions, "Attributes")
    assert set(options) == {f.name for f in fields(FederationOptions)}
    of_trainer = descriptions(FederatedTrainer, "Args")
    docs = DOCS.read_text(encoding="utf-8")
    for name, text in options.items():
        assert of_trainer[name] == text
        row = re.search(rf"^\| `{name}` \|.*?\| (.*) \|$", docs, re.MULTILINE)
        assert row is not None
        assert row[1].endswith(text.replace("``docs/speed.md``", "[Speed](speed.md)").replace("``", "`")), name
