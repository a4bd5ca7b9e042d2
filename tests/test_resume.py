"""Stop at any round, go on, and nothing shows."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from federations import Classifier, flat, loader, trainer, val_loader
from lightning_fedhaw import (
    DirichletPartitioner,
    FedAdamCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FedDynCallback,
    FederatedTrainer,
    FedHAWCallback,
    FedHyperCallback,
    FedOptCallback,
    IIDPartitioner,
    PublishedFedHAWCallback,
)
from lightning_fedhaw.data import LongTailPartitioner, NaturalIdPartitioner

ROUNDS = 5


def rule():
    return FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, hyper_optimizer=torch.optim.Adam)


def fit(rounds, ckpt_path=None, save=None, make_rule=rule, module=None, **kwargs):
    checkpoint = save or ModelCheckpoint(dirpath="kept", save_top_k=-1, save_last=True, filename="{epoch}")
    options = {
        "clients_per_round": 2,
        "optimizer_state": "kept",
        "enable_checkpointing": True,
        "buffers": "local",
        **kwargs,
    }
    chosen = make_rule()
    runner = trainer(rounds=rounds, rule=chosen, callbacks=[checkpoint], **options)
    module = module or Classifier(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), norm=True, dropout=0.2)
    runner.fit(module, loader(), val_loader(), ckpt_path=ckpt_path)
    return runner, module, chosen


def same_states(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name, value in a.items():
            same_states(value, b[name])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def same(a, b):
    assert torch.equal(flat(a[1]), flat(b[1]))
    same_states(a[2].state_dict(), b[2].state_dict())
    assert a[0].fit_loop.federation.cohort(ROUNDS) == b[0].fit_loop.federation.cohort(ROUNDS)
    kept = [r[0].fit_loop.federation.engine.optimizer_states for r in (a, b)]
    assert kept[0].keys() == kept[1].keys()
    for client in kept[0]:
        for index, state in kept[0][client][0].items():
            assert torch.equal(state["momentum_buffer"], kept[1][client][0][index]["momentum_buffer"])


@pytest.mark.parametrize("stop", range(1, ROUNDS))
def test_resuming_after_any_round_is_bit_identical(stop):
    straight = fit(ROUNDS)
    same(straight, fit(ROUNDS, ckpt_path=f"kept/epoch={stop - 1}.ckpt"))


@pytest.mark.parametrize(
    "make_rule",
    [
        FedHAWCallback,
        partial(FedHAWCallback, lr_lambda=0.3),
        partial(PublishedFedHAWCallback, 1e-3, 0.1, normalize_by="lr*steps"),
        partial(PublishedFedHAWCallback, 1e-3, 0.1, jacobian="exact", hyper_optimizer=torch.optim.Adam, memory="host"),
    ],
    ids=["without units", "without units, weights", "published, by steps", "published, exact"],
)
def test_both_kinds_of_fedhaw_resume_bit_identically(make_rule):
    straight = fit(3, make_rule=make_rule)
    same(straight, fit(3, make_rule=make_rule, ckpt_path="kept/epoch=1.ckpt"))


def test_last_resumes_a_shorter_run():
    straight = fit(ROUNDS)
    for path in Path("kept").iterdir():
        path.unlink()
    fit(2)
    same(straight, fit(ROUNDS, ckpt_path="last"))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_every_n_rounds_and_the_last_one(tmp_path):
    def run(rounds, ckpt_path=None):
        module = Classifier(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        runner = FederatedTrainer(
            rounds=rounds, num_clients=3, alpha=1.0, callbacks=[rule()], checkpoint_every_n_rounds=2, logger=False,
            enable_progress_bar=False, accelerator="cpu", devices=1, default_root_dir=tmp_path, seed=1,
        )  # fmt: skip
        runner.fit(module, loader(), ckpt_path=ckpt_path)
        return runner, flat(module)

    _, straight = run(5)
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"round=5.ckpt", "last.ckpt"}
    for path in folder.iterdir():
        path.unlink()
    run(3)
    runner, vector = run(5, "last")
    assert runner.federation_summary["rounds"] == 5
    assert torch.equal(vector, straight)


@pytest.mark.parametrize(
    "save",
    [
        {"monitor": "val_loss", "save_top_k": -1},
        {"every_n_train_steps": 1, "save_top_k": -1},
        {"save_on_train_epoch_end": True, "save_top_k": -1},
    ],
    ids=["after validation", "after a step", "after an epoch"],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
def test_whenever_lightning_saves(save):
    straight = fit(ROUNDS, save=ModelCheckpoint(dirpath="all", filename="{step}", **save))
    path = Path("all/step=3.ckpt")
    assert path.exists(), list(Path("all").iterdir())
    again = fit(ROUNDS, ckpt_path=path, save=ModelCheckpoint(dirpath="other"))
    same(straight, again)
    assert again[0].global_step == again[0].current_epoch == ROUNDS


def test_one_checkpoint_a_round():
    fit(ROUNDS)
    assert {p.name for p in Path("kept").glob("epoch*.ckpt")} == {f"epoch={i}.ckpt" for i in range(ROUNDS)}


def test_checkpoints_load_with_weights_only_and_open_in_a_process_without_this_package():
    _, module, _ = fit(3)
    checkpoint = torch.load("kept/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    script = Path("plain.py")
    script.write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.startswith('lightning_fedhaw'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import lightning.pytorch as pl, torch\n"
        "from torch import nn\n"
        "class Plain(pl.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        norm = nn.BatchNorm1d(8)\n"
        "        self.net = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))\n"
        "    def training_step(self, b, i): return self.net(b[0]).sum()\n"
        "    def test_step(self, b, i): pass\n"
        "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)\n"
        "data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 6)), batch_size=4)\n"
        "m = Plain.load_from_checkpoint('kept/last.ckpt')\n"
        "t = pl.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, accelerator='cpu')\n"
        "t.test(m, data, ckpt_path='kept/last.ckpt')\n"
        "t.fit(m, data, ckpt_path='kept/last.ckpt')\n"
        "print('sum', sum(float(p.sum()) for p in Plain.load_from_checkpoint('kept/last.ckpt').parameters()))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total = float(done.stdout.split("sum")[-1])
    assert total == pytest.approx(sum(p.detach().sum().item() for p in module.parameters()), abs=1e-5)


def test_validating_the_best_checkpoint_returns_the_logged_number_exactly():
    checkpoint = ModelCheckpoint(dirpath="best", monitor="val_acc", mode="max")
    runner, _, _ = fit(ROUNDS, save=checkpoint)
    (result,) = runner.validate(ckpt_path="best", dataloaders=val_loader(), verbose=False)
    assert result["val_acc"] == float(checkpoint.best_model_score)


def test_low_precision_models_resume_the_servers_float32_vector():
    def run(**kwargs):
        return fit(4, precision="bf16-true", optimizer_state="fresh", **kwargs)

    straight = run()
    again = run(ckpt_path="kept/epoch=1.ckpt")
    servers = [r[0].fit_loop.federation.server.parameters() for r in (straight, again)]
    assert servers[0].dtype == torch.float32
    assert torch.equal(*servers)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"num_clients": 5}, "`num_clients` was 4 there and is 5 here"),
        (
            {"make_rule": FedAvgCallback},
            r"the rule was 'FedHAWCallback\(lr_lambda>0, hyper_optimizer=Adam\)' there and is"
            " 'FedAvgCallback' here",
        ),
        ({"seed": 9}, r"`seed` \(or that of `seed_everything`\) was \d+ there and is 9 here\. Resume"),
        (
            {"module": Classifier(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), norm=True, hidden=9)},
            "size mismatch",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_another_federation_is_refused(kwargs, said):
    fit(2)
    with pytest.raises((ValueError, RuntimeError), match=said):
        fit(4, ckpt_path="kept/last.ckpt", **kwargs)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            {"alpha": 1.0},
            {"alpha": 5.0},
            r"the split was Dirichlet.*\(alpha=1, .*\) there and is DirichletPartitioner\(alpha=5, .*\) here\.",
        ),
        (
            {"partitioner": LongTailPartitioner(2, DirichletPartitioner(1))},
            {"partitioner": LongTailPartitioner(2, DirichletPartitioner(5))},
            r"was LongTailPartitioner\(rho=2, base=Di.*alpha=1, .* is LongTailPartitioner\(rho=2, base=Di.*alpha=5, ",
        ),
        (
            {"alpha": 1.0, "seed": 1},
            {"partitioner": IIDPartitioner(), "seed": 2},
            r"`seed` .* was 1 there and is 2 here; the split was DirichletPartitioner.* is IIDPartitioner\(\) here\.",
        ),
        (
            {"partitioner": NaturalIdPartitioner([n % 3 for n in range(120)])},
            {"partitioner": NaturalIdPartitioner([n // 40 for n in range(120)])},
            r"the split, NaturalIdPartitioner\(\) here and there, gives clients other samples: the training data,",
        ),
    ],
    ids=["alpha", "base", "several", "keys"],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_changed_of_the_split_is_named(before, now, said):
    few = {"num_clients": 3, "alpha": None, "buffers": "average", "optimizer_state": "fresh"}
    few["module"] = Classifier(lambda p: torch.optim.SGD(p, lr=0.05))
    fit(1, **{**few, **before})
    with pytest.raises(ValueError, match=said):
        fit(2, ckpt_path="kept/last.ckpt", **{**few, **now})


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (FedHAWCallback, PublishedFedHAWCallback),
        (PublishedFedHAWCallback, partial(PublishedFedHAWCallback, normalize_by="lr*steps")),
        (FedHAWCallback, partial(FedHAWCallback, lr_lambda=0.3)),
        (partial(FedAdamCallback, lr=0.1), partial(FedAdamCallback, lr=0.01)),
        (partial(FedAvgMCallback, momentum=0.9), partial(FedAvgMCallback, momentum=0.5)),
        (lambda: FedOptCallback(rule=FedHAWCallback()), FedOptCallback),
        (lambda: FedOptCallback(rule=FedHAWCallback()), lambda: FedOptCallback(rule=FedHAWCallback(lr_lambda=0.3))),
        (partial(FedHyperCallback, "G"), partial(FedHyperCallback, "G+SL")),
        (partial(FedDynCallback, regularization=0.1), partial(FedDynCallback, regularization=0.5)),
    ],
    ids=[
        "other rule",
        "units",
        "weights",
        "server rate",
        "momentum",
        "inner rule",
        "inner settings",
        "rates",
        "regularization",
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_settings_that_the_rules_state_depends_on_may_not_change(before, now):
    options = {"module": Classifier(lambda p: torch.optim.SGD(p, lr=0.05)), "optimizer_state": "fresh"}
    fit(2, make_rule=before, **options)
    with pytest.raises(ValueError, match="the rule was .* there and is .* here. Resume with the arguments"):
        fit(4, make_rule=now, ckpt_path="kept/last.ckpt", **options)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("kind", [FedHAWCallback, PublishedFedHAWCallback])
def test_step_sizes_may_change(kind):
    makes = [partial(kind, g, 0.1, hyper_optimizer=torch.optim.Adam) for g in (0.01, 0.1)]
    fit(2, make_rule=makes[0])
    runs = [fit(4, make_rule=make, ckpt_path="kept/epoch=1.ckpt") for make in makes]
    assert not torch.equal(*(flat(runner.lightning_module) for runner, *_ in runs))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_checkpoint_of_a_central_run_is_refused():
    central = pl.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir="central", accelerator="cpu"
    )
    module = Classifier(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), norm=True)
    central.fit(module, loader())
    central.save_checkpoint("central.ckpt")
    with pytest.raises(ValueError, match="was not written by a federation"):
        fit(4, ckpt_path="central.ckpt")


def test_buffers_that_no_longer_travel_are_left_out_of_an_older_checkpoint():
    def frozen():
        module = Classifier(norm=True)
        module.net[1].requires_grad_(False).eval()
        return module

    runner, module, _ = fit(1, module=frozen())
    runner.save_checkpoint("new.ckpt")
    checkpoint = torch.load("new.ckpt")
    clients = checkpoint["loops"]["fit_loop"]["state_dict"]["federation"]["buffers"]
    assert clients
    for buffers in clients.values():
        buffers.update({name: buffer.clone() for name, buffer in module.named_buffers() if name.startswith("net.1.")})
    torch.save(checkpoint, "old.ckpt")
    same(fit(2, "old.ckpt", module=frozen()), fit(2, "new.ckpt", module=frozen()))


def test_going_on_with_other_rounds_is_said():
    fit(2)
    with pytest.warns(UserWarning, match="`local_epochs` from None to 2"):
        fit(3, ckpt_path="kept/last.ckpt", local_epochs=2)


def test_the_closing_table_says_nothing_twice():
    class Both(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("both", 1.0, on_step=True, on_epoch=True)
            return loss

    runner = trainer(rounds=1)
    runner.fit(Both(), loader())
    assert set(runner.federation_summary["metrics"]) == {"train_loss", "both"}


class Phases(pl.Callback):
    """Notes when rounds begin."""

    def __init__(self):
        self.rounds = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.rounds += 1


def without_times(trainer):
    return {name: value for name, value in trainer.federation_summary.items() if name not in ("seconds", "run")}


def test_a_run_that_ended_before_its_summary_reports_when_it_is_resumed(tmp_path):
    def run(rounds, ckpt_path=None):
        phases = Phases()
        runner = trainer(rounds=rounds, rule=rule(), callbacks=[phases])
        module = Classifier()
        runner.fit(module, loader(), val_loader(), ckpt_path=ckpt_path)
        return runner, module, phases

    whole, module, _ = run(2)
    file = str(tmp_path / "finished.ckpt")
    whole.save_checkpoint(file)
    resumed, again, phases = run(2, file)
    assert phases.rounds == 0
    assert resumed.current_epoch == resumed.global_step == 2
    assert torch.equal(flat(again), flat(module))
    assert without_times(resumed) == without_times(whole)
    assert "val_acc" in resumed.federation_summary["client_metrics"]
    # A second `fit` has nothing to do either, and keeps the summary.
    resumed.fit(again, loader(), val_loader())
    assert phases.rounds == 0
    assert without_times(resumed) == without_times(whole)
    # And what was written or counted meanwhile does not change the rounds that follow.
    resumed.save_checkpoint(file)
    assert torch.equal(flat(run(3, file)[1]), flat(run(3)[1]))


def test_another_optimizer_is_refused_by_the_name_of_its_settings(tmp_path):
    first = trainer(rounds=1)
    first.fit(Classifier(partial(torch.optim.SGD, lr=0.05)), loader())
    file = str(tmp_path / "sgd.ckpt")
    first.save_checkpoint(file)
    resumed = trainer(rounds=2)
    with pytest.raises(
        ValueError, match=r"sgd.ckpt' was written with another optimizer: it lacks `betas`, `eps` of Adam"
    ):
        resumed.fit(Classifier(partial(torch.optim.Adam, lr=0.05)), loader(), ckpt_path=file)


def test_other_rates_of_clients_are_said():
    fit(2, client_lr_scale=0.5)
    with pytest.warns(UserWarning, match=r"other settings of a round: `client_lr_scale` from 0.5 to 2.0"):
        fit(3, "kept/last.ckpt", client_lr_scale=2.0)
