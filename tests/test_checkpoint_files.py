"""Checkpoints of runs that are killed, resumed, moved, damaged, shared and hostile."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from federations import QUIET, Classifier, flat, loader, trainer, val_loader
from lightning_fedhaw import (
    ErasureChannel,
    FedAvgCallback,
    FedProx,
)
from lightning_fedhaw.adapter.checkpoint import RoundCheckpoint
from lightning_fedhaw.adapter.checkpoint_folder import run_of

FOLDER = Path("checkpoints")
LAST = FOLDER / "last.ckpt"
ENTRY = ("loops", "fit_loop", "state_dict", "federation")

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def fit(rounds, ckpt_path=None, every=1, **kwargs):
    runner = trainer(
        rounds=rounds, enable_checkpointing=True, checkpoint_every_n_rounds=every, client_eval=False, **kwargs
    )
    module = Classifier()
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return runner, module


def rounds_in_files() -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in sorted(FOLDER.iterdir())}


def edited(change, source=LAST, target="edited.ckpt") -> str:
    """Write a copy of a checkpoint after a change of its content."""
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def entry_of(content):
    for key in ENTRY:
        content = content[key]
    return content


# --------------------------------------------------------------------------------------------- the latest is the latest


@pytest.mark.parametrize("source", ["last.ckpt", "round={n}.ckpt", "last"])
@pytest.mark.parametrize("kind", ["federated", "stock"])
def test_last_is_the_latest_whatever_the_run_is_resumed_from(source, kind):
    def go(rounds, path):
        if kind == "federated":
            return fit(rounds, path)
        options = {**QUIET, "enable_checkpointing": True}
        rule = FedAvgCallback(num_clients=4, alpha=10.0, client_eval=False)
        runner = pl.Trainer(max_epochs=rounds, callbacks=[rule, RoundCheckpoint(1)], **options)
        runner.fit(Classifier(), loader(), ckpt_path=path)
        return runner

    go(1, None)
    for rounds in (2, 3):
        path = source
        if source != "last":
            path = str(FOLDER / source.format(n=rounds - 1))
        go(rounds, path)
        assert rounds_in_files() == {"last.ckpt": rounds, f"round={rounds}.ckpt": rounds}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_several_processes_agree_on_the_files():
    place = {"devices": 2, "strategy": "federated_notebook"}
    fit(1, **place)
    fit(2, str(FOLDER / "round=1.ckpt"), **place)
    fit(3, str(LAST))
    assert rounds_in_files() == {"last.ckpt": 3, "round=3.ckpt": 3}


def test_a_run_from_an_older_file_goes_on_beside_the_newer_one_until_it_has_passed_it():
    fit(2)
    shutil.copy(FOLDER / "round=2.ckpt", "two.ckpt")
    fit(4, "two.ckpt")
    fit(3, "two.ckpt")
    assert rounds_in_files() == {"last.ckpt": 3, "round=3.ckpt": 3, "round=4.ckpt": 4}
    _, resumed = fit(5, str(LAST))
    assert rounds_in_files() == {"last.ckpt": 5, "round=5.ckpt": 5}
    shutil.rmtree(FOLDER)
    _, straight = fit(5)
    assert torch.equal(flat(resumed), flat(straight))


def test_a_run_that_was_killed_between_its_two_files_leaves_none_behind():
    fit(2)
    shutil.copy(LAST, "before.ckpt")
    fit(3, str(LAST))
    # Round 3 was written, and `last.ckpt` not yet.
    shutil.copy("before.ckpt", LAST)
    dead = FOLDER / f".fedhaw-{'0' * 8}-1-{'0' * 32}.part"
    dead.write_text("half")
    os.utime(dead, (0, 0))
    fit(3, str(LAST))
    assert rounds_in_files() == {"last.ckpt": 3, "round=3.ckpt": 3}


# --------------------------------------------------------------------------------------------------- several runs


def test_the_files_of_another_run_stay_and_going_on_with_its_last_is_said():
    fit(1)
    first = run_of(LAST)
    fit(2)
    second = run_of(LAST)
    assert len({first, second, None}) == 3
    assert rounds_in_files() == {"last.ckpt": 2, "round=1.ckpt": 1, "round=2.ckpt": 2}
    with pytest.warns(UserWarning, match=f"is of the run that began at {second}, .* 'round=1.ckpt' of .* at {first}"):
        fit(3, "last")
    assert run_of(LAST) == second
    assert rounds_in_files() == {"last.ckpt": 3, "round=1.ckpt": 1, "round=3.ckpt": 3}


def test_a_second_fit_is_the_same_run():
    runner, module = fit(1)
    before = run_of(LAST)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader())
    assert run_of(LAST) == before
    assert rounds_in_files() == {"last.ckpt": 2, "round=2.ckpt": 2}


def test_the_file_of_what_is_no_checkpoint_tells_no_run():
    Path("empty.ckpt").touch()
    torch.save([1, 2], "list.ckpt")
    torch.save({"loops": {"fit_loop": {}}}, "other.ckpt")
    for name in ("empty.ckpt", "list.ckpt", "other.ckpt", "missing.ckpt"):
        assert run_of(Path(name)) is None


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("kind", ["federated", "stock"])
def test_a_damaged_checkpoint_is_refused_by_name(stage, kind):
    _, module = fit(1)
    damaged = bytearray(LAST.read_bytes())
    weights = next(iter(module.state_dict().values())).numpy().tobytes()
    damaged[damaged.index(weights) + 7] ^= 4
    Path("damaged.ckpt").write_bytes(damaged)
    Path("cut.ckpt").write_bytes(damaged[:3000])
    runner = trainer(rounds=2)
    if kind == "stock":
        runner = pl.Trainer(max_epochs=2, callbacks=[FedAvgCallback(num_clients=4, alpha=10.0)], **QUIET)
    Classifier.test_step = Classifier.validation_step
    data = loader() if stage == "fit" else val_loader()
    with pytest.raises(ValueError, match=r"'damaged.ckpt' is damaged: its record '.*' does not match its checksum"):
        getattr(runner, stage)(Classifier(), data, ckpt_path="damaged.ckpt")
    with pytest.raises(ValueError, match=r"'cut.ckpt' is cut off or damaged"):
        getattr(runner, stage)(Classifier(), data, ckpt_path="cut.ckpt")


class Touch:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def address():
    """The address of a server of the present folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.getcwd())
    handler.func.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("place", ["local", "http", "memory"])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_no_checkpoint_runs_code_wherever_it_is(place, stage, address):
    import fsspec

    fit(1)
    edited(lambda content: content.update(more=Touch()))
    good, bad = str(LAST), "edited.ckpt"
    if place == "http":
        good, bad = f"{address}/{good}", f"{address}/{bad}"
    if place == "memory":
        memory = fsspec.filesystem("memory")
        for name in (good, bad):
            memory.pipe(f"/fedhaw/{name}", Path(name).read_bytes())
        good, bad = f"memory://fedhaw/{good}", f"memory://fedhaw/{bad}"
    data = loader() if stage == "fit" else val_loader()
    for runner in (
        trainer(rounds=2),
        pl.Trainer(max_epochs=2, callbacks=[FedAvgCallback(num_clients=4, alpha=10.0, seed=0)], **QUIET),
    ):
        with pytest.raises(ValueError, match=r"edited.ckpt' holds more than tensors and plain values"):
            getattr(runner, stage)(Classifier(), data, ckpt_path=bad)
        assert not Path("pwned").exists()
    runner = trainer(rounds=2)
    getattr(runner, stage)(Classifier(), data, ckpt_path=good)
    assert stage != "fit" or runner.global_step == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("state_dict"), r"'edited.ckpt' lacks `state_dict`"),
        (lambda content: [content.pop("loops"), content.pop("callbacks")], r"'edited.ckpt' lacks `loops`, `callbacks`"),
        (
            lambda content: entry_of(content).pop("scheme"),
            r"checkpoint 'edited.ckpt' lacks `scheme`, which a run needs",
        ),
        (
            lambda content: [entry_of(content).pop(key) for key in ("optimizers", "tally")],
            r"checkpoint 'edited.ckpt' lacks `optimizers`, `tally`",
        ),
        (lambda content: entry_of(content).update(format=2), r"'edited.ckpt' has format 2 .* version reads format 1"),
    ],
    ids=["model", "loops", "scheme", "several", "format"],
)
def test_what_is_missing_is_named(change, said):
    fit(1)
    with pytest.raises(ValueError, match=said):
        fit(2, edited(change))


def test_a_file_that_holds_something_else_is_named():
    torch.save([1, 2], "list.ckpt")
    with pytest.raises(ValueError, match="'list.ckpt' is no checkpoint: it holds a list"):
        fit(2, "list.ckpt")
    Path("text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"'text.ckpt' is no checkpoint\."):
        fit(2, "text.ckpt")
    with pytest.raises(FileNotFoundError, match="not found: none.ckpt"):
        fit(2, "none.ckpt")


def test_weights_alone_are_enough_to_validate():
    runner, module = fit(1)
    runner.save_checkpoint("weights.ckpt", weights_only=True)
    (result,) = trainer().validate(Classifier(), val_loader(), ckpt_path="weights.ckpt", verbose=False)
    (expected,) = trainer().validate(module, val_loader(), verbose=False)
    assert result == expected
    with pytest.raises(
        ValueError, match=r"'weights.ckpt' lacks `callbacks`, .* weights only \(`save_weights_only=True`"
    ):
        fit(2, "weights.ckpt")


def test_a_checkpoint_without_a_number_of_its_format_is_read():
    fit(1)

    def older(content):
        for key in ("format", "run_id", "channels_and_objectives"):
            entry_of(content).pop(key)

    _, resumed = fit(2, edited(older))
    _, straight = fit(2)
    assert torch.equal(flat(resumed), flat(straight))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            [ErasureChannel(0.1)],
            [],
            r"without ErasureChannel/uplink, whose state in .* \(if any\) is dropped",
        ),
        ([], [FedProx(0.1)], "with FedProx, which the checkpoint was written without"),
        (
            [FedProx(0.1)],
            [ErasureChannel(0.1)],
            "without FedProx, .* dropped, and with ErasureChannel/uplink, which .* without: it starts afresh",
        ),
    ],
)
def test_channels_and_objectives_that_come_and_go_are_said(before, now, said):
    fit(1, callbacks=before)
    with pytest.warns(UserWarning, match=f"The checkpoint 'checkpoints/last.ckpt': the run is resumed {said}"):
        fit(2, str(LAST), callbacks=now)


def test_fewer_rounds_than_were_run_are_refused():
    fit(3)
    for rounds in (1, 2):
        with pytest.raises(ValueError, match=f"last.ckpt' has run 3 rounds, and `rounds` is {rounds}. It counts those"):
            fit(rounds, str(LAST))
    runner, _ = fit(3, str(LAST))
    assert runner.global_step == 3


def test_a_writer_of_the_users_own_is_left_alone():
    plugin = AsyncCheckpointIO()
    runner, _ = fit(1, plugins=[plugin])
    assert runner.strategy.checkpoint_io is plugin
