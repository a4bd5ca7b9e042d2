"""What loggers get at the end of a run, and what can be read and drawn from what a run left behind."""

from __future__ import annotations

import csv
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, Dataset

from federations import QUIET, Classifier, flat, loader, samples, trainer, val_loader
from lightning_fedhaw import FedAvgCallback, FedHAWCallback, IIDPartitioner
from lightning_fedhaw.plotting import draw_bands, draw_clients, draw_labels, draw_weights
from lightning_fedhaw.report.history import RunHistory, find_history, read_run, read_runs
from lightning_fedhaw.report.metric_names import names_of_results
from lightning_fedhaw.report.plot_command import main
from lightning_fedhaw.report.run_report import RunRecord, best_values, summary_of
from lightning_fedhaw.report.summary import flat_numbers, format_summary

LOST = "The numbers of the run summary, the table of the clients and the picture"


def learned_weights() -> FedHAWCallback:
    return FedHAWCallback(lr_lambda=0.3)


def play(rule: Any = learned_weights, rounds: int = 3, **arguments: Any) -> tuple[Any, RunHistory]:
    runner = trainer(rounds=rounds, rule=rule(), alpha=arguments.pop("alpha", 1.0), seed=1, **arguments)
    runner.fit(Classifier(), loader(), val_loader())
    return runner, find_history(runner.callbacks)


# ---------------------------------------------------------------------- what is kept


def test_a_history_holds_what_the_run_logged():
    runner, history = play()
    assert len(history.metrics) == 3
    assert history.curve("val_acc")[-1] == float(runner.callback_metrics["val_acc"])
    assert history.curve("scale")[-1] == float(runner.callback_metrics["scale"])
    assert history.curve("nobody")[0] != history.curve("nobody")[0]
    assert not any("/client_" in name for name in history.names)
    assert history.weights.shape == (3, 4)
    torch.testing.assert_close(history.weights.sum(1), torch.ones(3))
    assert history.weights[-1, 2] == float(runner.callback_metrics["weight/client_2"])
    sizes = runner.fit_loop.federation.data.num_examples
    assert history.sizes == sizes.tolist()
    assert history.labels.sum(1).tolist() == sizes.tolist()
    assert history.labels.sum(0).tolist() == samples(120).tensors[1].bincount().tolist()
    assert sum(history.clients["val_acc"]) / 4 == pytest.approx(
        runner.federation_summary["client_metrics"]["val_acc"]["mean"], rel=1e-5
    )
    learned = history.weight_changes()
    torch.testing.assert_close(learned[0], torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert learned[-1].abs().max() > 1e-3


def test_in_a_part_of_the_clients_a_weight_is_compared_with_the_share_of_those_who_were_heard():
    _, history = play(FedAvgCallback, clients_per_round=2)
    assert (history.weights.isnan().sum(1) == 2).all()
    assert history.weight_changes() is None  # FedAvg's weights are the shares
    _, history = play(lambda: FedAvgCallback(weighting="uniform"), clients_per_round=2)
    changes, sizes = history.weight_changes(), torch.tensor(history.sizes, dtype=torch.float64)
    for row in changes:
        received = ~row.isnan()
        torch.testing.assert_close(row[received] + 1, 0.5 * sizes[received].sum() / sizes[received])


@pytest.mark.parametrize("door", [1, 2])
def test_there_is_one_history_before_the_checkpoints_and_a_given_one_is_taken(door):
    def build(*callbacks: Any) -> pl.Trainer:
        if door == 1:
            return trainer(callbacks=callbacks, enable_checkpointing=True)
        quiet = {**QUIET, "enable_checkpointing": True}
        return pl.Trainer(max_epochs=3, callbacks=[FedAvgCallback(num_clients=4), *callbacks], **quiet)

    own = RunHistory()
    for callbacks in ([], [own], [ModelCheckpoint()]):
        runner = build(*callbacks)
        for _ in range(2):
            runner.fit(Classifier(), loader())
        kinds = [type(each) for each in runner.callbacks]
        assert kinds.count(RunHistory) == 1
        assert kinds.index(RunHistory) < kinds.index(ModelCheckpoint)
        assert (find_history(runner.callbacks) is own) == (own in callbacks)
        assert len(find_history(runner.callbacks).metrics) == 3


def test_a_run_that_goes_on_has_all_of_its_history():
    whole, history = play(rounds=4)
    keeper = ModelCheckpoint(dirpath="kept", save_top_k=-1)
    play(rounds=2, callbacks=[keeper], enable_checkpointing=True)
    quiet = {"alpha": 1.0, "seed": 1, "callbacks": [ModelCheckpoint(dirpath="kept")], "enable_checkpointing": True}
    again = trainer(rounds=4, rule=learned_weights(), **quiet)
    module = Classifier()
    again.fit(module, loader(), val_loader(), ckpt_path=keeper.best_model_path, weights_only=True)
    assert torch.equal(flat(module), flat(whole.lightning_module))
    assert torch.equal(find_history(again.callbacks).weights, history.weights)
    assert find_history(again.callbacks).metrics == history.metrics
    again.fit_loop.max_epochs = 5
    again.fit(module, loader(), val_loader())
    assert len(find_history(again.callbacks).metrics) == len(find_history(again.callbacks).weights) == 5


class Named(Dataset):
    """Samples whose classes have names."""

    def __init__(self):
        self.rows = samples(120)
        self.targets = ["north, far" if label else "south" for label in self.rows.tensors[1].tolist()]

    def __len__(self):
        return 120

    def __getitem__(self, index):
        return self.rows[index]


def test_names_of_classes_are_kept_in_a_history_and_its_pictures():
    runner = trainer(rounds=1, alpha=1.0, logger=CSVLogger("logs", name="named"), enable_checkpointing=True)
    runner.fit(Classifier(), DataLoader(Named(), batch_size=8))
    history = find_history(runner.callbacks)
    folder = Path(runner.logger.log_dir)
    for kept in (history, read_run(folder), read_run(folder / "checkpoints")):
        assert kept.class_names == ("north, far", "south")
        assert torch.equal(kept.labels, history.labels)
        (legend,) = draw_labels(kept).legends
        assert [text.get_text() for text in legend.get_texts()] == ["north, far", "south"]


def test_a_history_is_read_back_from_a_log_and_from_a_checkpoint():
    runner, history = play(logger=CSVLogger("logs", name="haw"), enable_checkpointing=True)
    folder = Path(runner.logger.log_dir)
    for path in (folder, folder / "metrics.csv", Path("logs"), folder / "checkpoints"):
        read = read_run(path)
        assert read.sizes == history.sizes
        assert torch.equal(read.labels, history.labels)
        torch.testing.assert_close(read.weights, history.weights)
        for name in ("val_acc", "val_loss", "train_loss", "scale", "agreement"):
            assert read.curve(name) == pytest.approx(history.curve(name), rel=1e-6), name
        assert read.clients == ({} if path.name == "checkpoints" else history.clients)
    with (folder / "per_client.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["client"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["weight"]) for row in rows] == pytest.approx(history.weights[-1].tolist())


def test_what_is_no_run_is_named():
    with pytest.raises(FileNotFoundError, match="there is no 'nowhere'"):
        read_run("nowhere")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="'empty' has neither a `metrics.csv` nor a checkpoint in it, but nothing"):
        read_runs("empty")
    (Path("empty") / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"but notes.txt. Log with a `CSVLogger`"):
        read_runs("empty")
    with pytest.raises(ValueError, match=r"'empty/notes.txt' is no checkpoint"):
        read_runs("empty/notes.txt")
    torch.save({"state_dict": {}}, "other.ckpt")
    with pytest.raises(ValueError, match="was not written by a federation"):
        read_runs("other.ckpt")
    (Path("empty") / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(ValueError, match="holds no metrics"):
        read_runs("empty")
    for name in "ab":
        (Path("two") / name).mkdir(parents=True)
        (Path("two") / name / "metrics.csv").write_text("step,loss\n0,1.5\n")
    with pytest.raises(ValueError, match="holds 2 runs"):
        read_run("two")


def test_a_run_that_was_cut_off_is_read_as_far_as_it_goes():
    play(logger=CSVLogger("."))
    (folder,) = (log.parent for log in Path().rglob("metrics.csv"))
    whole = read_run(folder)
    for name in ("metrics.csv", "per_client.csv", "weights.csv"):
        text = (folder / name).read_text()
        for length in (0, 3, 3 * len(text) // 4, len(text) - 2):
            (folder / name).write_text(text[:length])
            if name == "metrics.csv" and length < 4:
                with pytest.raises(ValueError, match="holds no metrics"):
                    read_run(folder)
                continue
            part = read_run(folder)
            for n, row in enumerate(part.metrics):  # no number that lost its last digits
                assert row.items() <= whole.metrics[n].items()
            assert part.sizes == whole.sizes[: len(part.sizes)]
            assert all(torch.equal(a[: len(part.sizes)], b) for a, b in zip(whole.weights, part.weights, strict=False))
        (folder / name).write_text(text)
    (folder / "metrics.csv").write_text("step,loss\nnan,1.5\n")
    with pytest.raises(ValueError, match=r"The tables in .* are damaged .* Give a checkpoint"):
        read_run(folder)


@pytest.mark.parametrize("table", ["metrics.csv", "per_client.csv"])
def test_a_huge_cell_is_damage(table):
    Path("run").mkdir()
    Path("run/metrics.csv").write_text("step,loss\n0,1.5\n")
    Path("run", table).write_text("step,samples\n0,1\n1," + "9" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"The tables in 'run' are damaged \(.*Give a checkpoint"):
        read_run("run")
    with pytest.raises(SystemExit):
        main(["run"])


@pytest.mark.parametrize("step", ["1000000000", "-1", "inf"])
def test_a_spoilt_round_number_does_not_fill_the_memory(step):
    Path("metrics.csv").write_text(f"step,loss\n0,1.5\n{step},1.4\n2,1.3\n")
    with pytest.raises(ValueError, match=r"The tables in '.' are damaged .* Give a checkpoint"):
        read_run("metrics.csv")


def test_a_damaged_checkpoint_is_not_drawn():
    play(enable_checkpointing=True)
    (path,) = Path("checkpoints").glob("*.ckpt")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"History") + 1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is damaged: its record .* Give another `.ckpt` file, or the folder"):
        read_run(path)


def test_a_spoilt_checkpoint_is_named():
    with ZipFile("other.ckpt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"'other.ckpt' is no checkpoint"):
        read_run("other.ckpt")


def test_a_history_without_a_federation_says_so():
    with pytest.raises(ValueError, match="`RunHistory` has an effect in federated training only"):
        pl.Trainer(max_epochs=1, callbacks=[RunHistory()], **QUIET).fit(Classifier(), loader())


# ---------------------------------------------------------------------- loggers


def test_tensorboard():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner, history = play(logger=TensorBoardLogger("."))
    events = EventAccumulator(runner.logger.log_dir, size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {"gamma", "scale", "weight/client_0", "val_acc"} <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("scale")] == [0, 1, 2]
    assert tags["images"] == ["federation/weights"]
    (image,) = events.Images("federation/weights")
    assert image.step == 2
    assert image.width > image.height > 200
    (text,) = events.Tensors("federation/per_client/text_summary")
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| client | samples | weight | val_loss | val_acc |"
    assert [int(line.split("|")[2]) for line in table[2:]] == history.sizes


def test_wandb_offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    began = []
    init = wandb.init

    def counted(**arguments: Any) -> Any:
        began.append(sys._getframe(1).f_globals["__name__"])
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", counted)
    logger = WandbLogger(save_dir=str(tmp_path), project="p")
    try:
        _, history = play(logger=logger)
        run = logger.experiment
        summary = dict(run.summary)
        config = dict(run.config)
        media = Path(run.dir) / "media"
    finally:
        wandb.finish()
    assert (config["rule"], config["rule.lr_lambda"], config["federation.alpha"]) == ("FedHAWCallback", 0.3, 1.0)
    assert began == ["lightning.pytorch.loggers.wandb"]  # by the user's logger, and once
    assert summary["scale"] == pytest.approx(history.curve("scale")[-1])
    (file,) = media.rglob("*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["client", "samples", "weight", "val_loss", "val_acc"]
    assert [row[1] for row in table["data"]] == history.sizes
    assert len(list(media.rglob("*.png"))) == 1


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=(tmp_path / "mlruns").as_uri())
    play(logger=logger)
    (folder,) = (tmp_path / "mlruns").rglob("artifacts/federation")
    assert sorted(p.name for p in folder.iterdir()) == ["per_client.csv", "weights.png"]
    assert (folder / "per_client.csv").read_text().startswith("client,samples,weight,val_loss,val_acc\n")
    assert len(logger.experiment.get_metric_history(logger.run_id, "scale")) == 3


class Images:
    """A TensorBoard writer that keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.calls.append(name)


class Recorded(TensorBoardLogger):
    seen = None

    @property
    def experiment(self):
        self.seen = self.seen or Images()
        return self.seen

    def log_graph(self, *_: Any, **__: Any) -> None:
        """Not here."""


def given(**arguments: Any) -> list[str]:
    logger = Recorded(".")
    play(logger=logger, **arguments)
    return [name for name in logger.seen.calls if name in ("add_text", "add_image")]


def test_a_picture_needs_learned_weights_and_matplotlib_and_a_table_needs_neither(monkeypatch):
    pytest.importorskip("tensorboard")
    assert given() == ["add_text", "add_image"]
    assert given(rule=FedAvgCallback) == ["add_text"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert given() == ["add_text"]


def test_nobodys_run_fails_for_a_report(monkeypatch):
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_fedhaw.report.loggers._write", full)
    with pytest.warns(UserWarning, match=LOST + r".* CSVLogger \(OSError: No space left on device\)"):
        runner, _ = play(logger=CSVLogger("."))
    assert runner.federation_summary["rounds"] == 3


def test_a_logger_that_fails_at_the_end_keeps_no_other_from_its_report(monkeypatch, capsys):
    class Full(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("summary/") for name in metrics):
                raise OSError("No space left on device")

    with pytest.warns(UserWarning, match=LOST + r".* Full \(OSError: No space left on device\)"):
        play(logger=[Full("."), CSVLogger("other")])
    assert list(Path("other").rglob("per_client.csv"))
    assert "FedHAWCallback" in capsys.readouterr().out


# ---------------------------------------------------------------------- pictures


@pytest.fixture
def logs():
    for name, rule in (("FedAvg", FedAvgCallback), ("FedHAW", partial(FedHAWCallback, lr_lambda=0.3))):
        for version in range(2):
            arguments = {"alpha": None, "partitioner": IIDPartitioner()} if version else {}
            play(rule, rounds=2 + version, logger=CSVLogger("logs", name=name, version=version), **arguments)
    return Path("logs")


def test_fedhaw_plot(logs, capsys):
    pictures = main(["logs/FedAvg", "logs/FedHAW", "--output", "pictures"])
    assert [p.name for p in pictures] == [
        "val_acc.png",
        "scale.png",
        "hypergradients.png",
        "val_acc_of_clients.png",
        "labels.png",
        "FedHAW_weights.png",
    ]
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert capsys.readouterr().out.split("\n")[-7:-1] == [str(p) for p in pictures]
    named = main(["a=logs/FedHAW/version_0", "logs/FedHAW/version_1", "--metric", "val_loss", "--output", "pictures"])
    assert [p.name for p in named][-4:] == [
        "a_labels.png",
        "FedHAW_version_1_labels.png",
        "a_weights.png",
        "FedHAW_version_1_weights.png",
    ]
    for wrong, match in (
        (["logs", "--metric", "val_ac"], "`--metric` must be one that the runs logged .*`val_acc`.*, got 'val_ac'"),
        (["logz"], "there is no 'logz'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
        assert re.search(match, capsys.readouterr().err.replace("\n", " "))


def test_bands_are_means_and_deviations_over_runs_of_any_length(logs):
    runs = read_runs("logs/FedHAW")
    axes = draw_bands({"FedHAW": runs}, ["val_loss"]).axes[0]
    (line,) = axes.get_lines()
    a, b = (run.curve("val_loss") for run in runs)
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == pytest.approx([(a[0] + b[0]) / 2, (a[1] + b[1]) / 2, b[2]])
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices
    # The deviation of two numbers, with n - 1, is their distance over the root of two; a single run has no band.
    upper = [(x + y) / 2 + abs(x - y) / 2**0.5 for x, y in zip(a, b, strict=False)]
    assert np.nanmax(edge[:, 1]) == pytest.approx(max(upper))


def test_the_heat_map_shows_changes_of_the_largest_client_on_top(logs):
    run = read_run("logs/FedHAW/version_0")
    axes = draw_weights(run).axes[0]
    largest = run.sizes.index(max(run.sizes))
    shown = axes.get_images()[0].get_array()
    assert shown[0].tolist() == pytest.approx((100 * run.weight_changes()[:, largest]).tolist())
    assert axes.get_yticklabels()[0].get_text() == f"client {largest}  ({max(run.sizes):,})"
    with pytest.raises(ValueError, match="kept no weights"):
        draw_weights(RunHistory())


def test_clients_are_drawn_by_name_and_by_rank(logs):
    run = read_run("logs/FedHAW/version_0")
    each, ranked = draw_clients({"FedHAW": [run]}, "val_acc").axes
    assert each.get_lines()[0].get_xdata().tolist() == pytest.approx(run.clients["val_acc"])
    assert ranked.get_lines()[0].get_ydata().tolist() == pytest.approx(sorted(run.clients["val_acc"]))
    run.clients["val_acc"][1] = float("nan")
    _, ranked = draw_clients({"FedHAW": [run]}, "val_acc").axes
    defined = [value for client, value in enumerate(run.clients["val_acc"]) if client != 1]
    assert ranked.get_lines()[0].get_ydata().tolist() == pytest.approx(sorted(defined))
    with pytest.raises(ValueError, match=r"measured on the clients \(`val_acc`, `val_loss`\), got 'acc'"):
        draw_clients({"FedHAW": [run]}, "acc")


# ---------------------------------------------------------------------- the run summary


def record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "rule": "FedHAWCallback",
        "channels": [],
        "objectives": [],
        "rounds": 4,
        "num_clients": 10,
        "num_received": 30,
        "num_parameters": 1234,
        "metrics": {"val_acc": 0.5},
        "learned": {"scale": 0.9},
        "channel_numbers": {},
        "client_metrics": {},
        "measured_on": "training data",
        "bytes_down": 1500,
        "bytes_up": 0,
        "lost_messages": 0,
        "nonfinite_updates": 0,
        "skipped_rounds": 0,
        "skipped_steps": 0,
        "seconds": {"local training": 3.0, "aggregation": 1.0},
    }
    return RunRecord(**{**values, **changes})


def test_the_summary_of_a_record():
    summary = summary_of(record())
    assert (summary["clients_per_round"], summary["scale"], summary["learned"]) == (7.5, 0.9, ["scale"])
    assert summary["clients_measured_on"] == "training data"
    assert summary_of(record(rounds=0, num_received=0))["clients_per_round"] == 0
    assert flat_numbers(summary)["summary/seconds/local_training"] == 3.0


def test_the_table_of_a_record():
    lines = [line.split() for line in format_summary(summary_of(record())).splitlines()]
    assert ["clients", "10,", "7.5", "received", "a", "round"] in lines
    assert ["sent", "down", "/", "up", "1.5", "kB", "/", "0", "B"] in lines
    assert ["local", "training", "3.00", "75%"] in lines
    assert not any(line[0] in ("channels", "incidents", "privacy", "over") for line in lines)
    statistics = {
        "val_acc": {
            "validation": 0.6,
            "mean": 0.5,
            "weighted_mean": 0.55,
            "std": 0.1,
            "worst_decile": 0.25,
            "undefined": 2,
        },
        "auc": {"undefined": 10},
    }
    table = format_summary(
        summary_of(
            record(
                channels=["ErasureChannel (uplink)"],
                channel_numbers={"epsilon": 2.0, "delta": 1e-3},
                client_metrics=statistics,
                measured_on="held-out data, through the training transform",
                lost_messages=3,
                skipped_rounds=1,
            )
        )
    )
    lines = [line.split() for line in table.splitlines()]
    assert ["channels", "ErasureChannel", "(uplink)"] in lines
    assert ["incidents", "3", "lost", "messages,", "1", "skipped", "rounds"] in lines
    assert ["privacy", "of", "a", "client", "epsilon", "2", "at", "delta", "0.001"] in lines
    assert "over 10 clients, their held-out data" in table
    assert ["val_acc", "60%", "50%", "55%", "10%", "25%"] in lines
    assert ["auc", "-", "-", "-", "-", "-"] in lines
    assert " measured through the training transform\n val_acc: 2 of 10 clients undefined\n auc: 10 of 10" in table


def test_the_summary_has_each_metric_once_and_none_of_the_rules_internal_ones():
    names = ["loss", "loss_step", "loss_epoch", "gamma", "time_step", "lr", "lr-SGD", "SGD/momentum", "solver"]
    monitor = LearningRateMonitor()
    monitor.lrs = {"lr-SGD": [0.1]}
    monitor.last_momentum_values = {"SGD/momentum": 0.9}
    assert names_of_results(names, {"gamma"}, [monitor]) == ["loss", "time_step", "solver"]


def test_the_best_value_of_a_metric_has_the_number_of_its_round():
    history = RunHistory()
    history.metrics = [{"val_acc": 0.5, "val_loss": 3.0}, {"val_acc": 0.75}, {"val_acc": 0.75, "val_loss": 2.0}]
    assert best_values(history, ["val_acc", "val_loss", "other"]) == {
        "val_acc": {"value": 0.75, "round": 2},
        "val_loss": {"value": 2.0, "round": 3},
    }


def test_the_summary_names_settings_extremes_time_and_files(capsys):
    module = Classifier()
    settings = {"alpha": 1.0, "seed": 1, "local_epochs": 2, "enable_checkpointing": True, "logger": CSVLogger(".")}
    runner = trainer(rounds=2, **settings)
    runner.fit(module, loader(), val_loader())
    summary = runner.federation_summary
    accuracies = find_history(runner.callbacks).clients["val_acc"]
    assert accuracies[summary["best_client"]["val_acc"]["client"]] == max(accuracies)
    assert accuracies[summary["worst_client"]["val_acc"]["client"]] == min(accuracies)
    assert summary["run"]["wall_seconds"] > sum(summary["seconds"].values())
    assert summary["run"]["peak_memory_bytes"] > 2**20
    assert Path(summary["run"]["checkpoint"]).is_file()
    printed = capsys.readouterr().out
    for said in (
        "DirichletPartitioner(alpha=1), seed 1",
        "2 local epochs, SGD at learning rate 0.1",
        f"best client {summary['best_client']['val_acc']['client']} ({100 * max(accuracies):.4g}%)",
        f"(best {100 * summary['best']['val_acc']['value']:.4g}%, round",
        "rounds a second",
        summary["run"]["checkpoint"],
        "fedhaw plot lightning_logs/version_0",
    ):
        assert said in printed, said
    settings_in_log = (Path(runner.logger.log_dir) / "hparams.yaml").read_text()
    assert "rule: FedAvgCallback" in settings_in_log
    assert "federation.local_epochs: 2" in settings_in_log
    runner = trainer(rounds=1, seed=1, run_summary=False)
    runner.fit(module, loader())
    assert runner.federation_summary["rounds"] == 1
    assert "wall time" not in capsys.readouterr().out
