"""The engine against Lightning itself: one client's local work is a stock fit on that client's data, bit by bit."""

from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from federations import QUIET, Classifier, flat, samples, trainer
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedCallback,
    FederatedTrainer,
    IIDPartitioner,
    PublishedFedHAWCallback,
)


class Watch(FederatedCallback):
    """Keeps what every client did."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def on_client_end(self, trainer, pl_module, update):
        self.updates.append((update, update.displacement.clone()))


class DictBatches(Classifier):
    def training_step(self, batch):
        return {"loss": cross_entropy(self.net(batch["x"]), batch["more"][0]), "extra": 1}


class SkipsSome(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Manual(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()


class TwoOptimizers(Classifier):
    """Two players, as in a GAN: the first layer moves twice as often as the last."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, last = self.optimizers()
        for optimizer in (first, first, last):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("train_loss", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[-1].parameters(), lr=0.01)


class Hooks(Classifier):
    """Counts what is called, in what order."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def on_train_batch_start(self, batch, batch_idx):
        self.calls.append(f"batch start {batch_idx}")

    def on_before_zero_grad(self, optimizer):
        self.calls.append("before zero grad")

    def on_before_backward(self, loss):
        self.calls.append("before backward")

    def on_after_backward(self):
        self.calls.append("after backward")
        self.log("grad_norm", self.net[0].weight.grad.norm())

    def on_before_optimizer_step(self, optimizer):
        self.calls.append("before step")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.calls.append("clip")
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value")

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.calls.append("step")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert set(outputs) == {"loss"}
        self.calls.append(f"batch end {batch_idx}")


class Dicts(Dataset):
    def __init__(self):
        self.x, self.y = samples(40).tensors

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "more": [self.y[i], {"name": str(i)}]}


def sgd(**kwargs):
    return lambda p: torch.optim.SGD(p, **{"lr": 0.1, **kwargs})


CASES = {
    "plain sgd": ({}, {}),
    "sgd without the fast path": ({"optimizer": sgd(foreach=True)}, {"gradient_clip_val": 1e9}),
    "momentum": ({"optimizer": sgd(momentum=0.9, nesterov=True, weight_decay=0.01)}, {}),
    "two groups": (
        {"optimizer": lambda p: torch.optim.SGD([{"params": q, "lr": 0.1 / (i + 1)} for i, q in enumerate(p)], lr=1.0)},
        {},
    ),
    "adam": ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}, {}),
    "adamw": ({"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}, {}),
    "rmsprop": ({"optimizer": lambda p: torch.optim.RMSprop(p, lr=0.01)}, {}),
    "lbfgs": ({"optimizer": lambda p: torch.optim.LBFGS(p, lr=0.1)}, {}),
    "clip by norm": ({}, {"gradient_clip_val": 0.05}),
    "clip by value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate": ({}, {"accumulate_grad_batches": 3}),
    "accumulate adam": ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}, {"accumulate_grad_batches": 2}),
    "64-true": ({}, {"precision": "64-true"}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "batch norm": ({"norm": True}, {}),
    "limited batches": ({}, {"limit_train_batches": 2}),
    "half the batches": ({}, {"limit_train_batches": 0.5}),
    "dict batches": ({"cls": DictBatches}, {}),
    "skipped steps": ({"cls": SkipsSome}, {}),
    "manual": ({"cls": Manual}, {}),
    "manual adam": ({"cls": Manual, "optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}, {}),
    "two optimizers": ({"cls": TwoOptimizers}, {}),
    "every hook": ({"cls": Hooks}, {}),
    "every hook, accumulated": ({"cls": Hooks}, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_clients_local_work_is_a_stock_fit_bit_by_bit(name):
    module_kwargs, trainer_kwargs = CASES[name]
    module_kwargs = dict(module_kwargs)
    make = module_kwargs.pop("cls", Classifier)
    data = DataLoader(Dicts() if make is DictBatches else samples(40), batch_size=8)  # unshuffled: the order is kept

    stock, module = pl.Trainer(max_epochs=2, **QUIET, **trainer_kwargs), make(**module_kwargs)
    before = flat(module)
    stock.fit(module, data)

    watch, federated = Watch(), make(**module_kwargs)
    FederatedTrainer(
        rounds=1,
        num_clients=1,
        partitioner=IIDPartitioner(),
        local_epochs=2,
        client_eval=False,
        callbacks=[FedAvgCallback(), watch],
        **QUIET,
        **trainer_kwargs,
    ).fit(federated, data)

    ((update, displacement),) = watch.updates
    parameters = torch.cat([p.detach().flatten() for p in module.parameters()])
    start = torch.cat([p.detach().flatten() for p in make(**module_kwargs).parameters()]).to(parameters.dtype)
    expected = (parameters.to(displacement.dtype) - start.to(displacement.dtype)).to(displacement.dtype)
    assert torch.equal(displacement, expected)
    assert displacement.abs().max() > 1e-3
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, update.buffers[key]), key
    assert not torch.equal(flat(module), before)
    if isinstance(module, Hooks):
        assert federated.calls == module.calls
    if module.automatic_optimization and name not in ("lbfgs", "skipped steps"):
        assert update.num_steps == stock.global_step


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_skipped_steps_are_counted():
    watch = Watch()
    runner = trainer(rounds=2, num_clients=1, partitioner=IIDPartitioner(), alpha=None, callbacks=[watch])
    runner.fit(SkipsSome(), DataLoader(samples(40), batch_size=8, shuffle=True))
    assert [(u.num_steps, u.num_skipped) for u, _ in watch.updates] == [(4, 1), (4, 1)]
    assert runner.federation_summary["skipped_steps"] == 2
    assert "2 skipped steps" in str(runner.federation_summary) or runner.federation_summary["nonfinite_updates"] == 0


def test_the_busiest_of_several_optimizers_is_counted():
    watch = Watch()
    trainer(rounds=1, num_clients=2, callbacks=[watch]).fit(TwoOptimizers(), DataLoader(samples(32), batch_size=16))
    for update, _ in watch.updates:
        assert update.num_steps == 2 * -(-update.num_examples // 16)


def test_local_steps_are_optimizer_steps_whatever_the_size():
    watch = Watch()
    runner = trainer(rounds=1, local_steps=5, accumulate_grad_batches=3, callbacks=[watch], alpha=0.3, seed=1)
    runner.fit(Classifier(), DataLoader(samples(60), batch_size=4, shuffle=True))
    assert len({u.num_examples for u, _ in watch.updates}) > 1
    assert [u.num_steps for u, _ in watch.updates] == [5] * 4


def test_returning_minus_one_ends_the_pass():
    class Stops(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    watch = Watch()
    trainer(rounds=1, local_epochs=2, num_clients=1, callbacks=[watch]).fit(
        Stops(), DataLoader(samples(40), batch_size=8)
    )
    assert watch.updates[0][0].num_steps == 4


class CountingCallback(pl.Callback):
    def __init__(self):
        self.count = Counter()

    def on_train_epoch_start(self, *_):
        self.count["epoch start"] += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count["batch start"] += 1
        assert len(batch[0]) <= 8

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.count["zero grad"] += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count["batch end"] += 1
        self.log("from_callback", 2.0)

    def on_train_epoch_end(self, *_):
        self.count["epoch end"] += 1


def test_users_callbacks_see_local_steps_and_rounds():
    counting = CountingCallback()
    runner = trainer(rounds=3, callbacks=[counting], num_clients=1)
    runner.fit(Classifier(), DataLoader(samples(40), batch_size=8))
    assert counting.count == {
        "epoch start": 3, "epoch end": 3, "batch start": 15, "batch end": 15, "zero grad": 15,
    }  # fmt: skip
    assert float(runner.callback_metrics["from_callback"]) == 2.0


# ---------------------------------------------------------------------- optimizer state across rounds


def textbook(rounds, kept):
    """Two clients with momentum SGD, written out."""
    x, y = samples(40).tensors
    parts = [range(0, 20), range(20, 40)]
    module = Classifier().net
    server = [p.detach().clone() for p in module.parameters()]
    memory = [None, None]
    for _ in range(rounds):
        results = []
        for k, part in enumerate(parts):
            with torch.no_grad():
                for p, s in zip(module.parameters(), server, strict=True):
                    p.copy_(s)
            velocity = memory[k] if kept and memory[k] else [torch.zeros_like(s) for s in server]
            for i in range(0, 20, 8):
                index = list(part)[i : i + 8]
                grads = torch.autograd.grad(cross_entropy(module(x[index]), y[index]), list(module.parameters()))
                velocity = [0.9 * v + g for v, g in zip(velocity, grads, strict=True)]
                with torch.no_grad():
                    for p, v in zip(module.parameters(), velocity, strict=True):
                        p -= 0.1 * v
            memory[k] = velocity
            results.append([p.detach().clone() for p in module.parameters()])
        server = [(a + b) / 2 for a, b in zip(*results, strict=True)]
    return torch.cat([s.flatten() for s in server]).double()


@pytest.mark.parametrize("kept", [False, True])
def test_optimizer_state_is_fresh_or_kept(kept):
    from lightning_fedhaw import IndexPartitioner

    module = Classifier(sgd(momentum=0.9))
    trainer(
        rounds=3,
        num_clients=2,
        alpha=None,
        partitioner=IndexPartitioner([range(0, 20), range(20, 40)]),
        optimizer_state="kept" if kept else "fresh",
    ).fit(module, DataLoader(samples(40), batch_size=8))
    assert torch.allclose(flat(module), textbook(3, kept), atol=1e-6)
    assert (textbook(3, True) - textbook(3, False)).abs().max() > 1e-2


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_schedules_advance_by_rounds(interval):
    seen = []

    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            assert self.trainer.estimated_stepping_batches == 4
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.current_epoch, self.optimizers().param_groups[0]["lr"]))
            return super().training_step(batch, batch_idx)

    trainer(rounds=4, num_clients=2).fit(Scheduled(), DataLoader(samples(40), batch_size=8))
    assert set(seen) == {(t, 0.5**t) for t in range(4)}


def test_reduce_on_plateau_watches_a_round_metric():
    class Plateau(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.0001)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    runner = trainer(rounds=3)
    runner.fit(Plateau(), DataLoader(samples(40), batch_size=8), DataLoader(samples(40), batch_size=8))
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-7)


def test_schedules_of_manual_optimization_start_every_visit_where_the_round_began():
    seen = []

    class Scheduled(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            seen.append(self.optimizers().param_groups[0]["lr"])
            self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)]

    runner = trainer(rounds=2, num_clients=2, alpha=None, partitioner=IIDPartitioner())
    runner.fit(Scheduled(), DataLoader(samples(32), batch_size=8))
    assert seen == [1.0, 0.5, 1.0, 0.5, 0.25, 0.125, 0.25, 0.125]


# ---------------------------------------------------------------------- precision


def half_precision_plugin():
    from lightning.pytorch.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000))


def test_16_mixed_starts_every_client_from_the_rounds_scale_and_keeps_the_minimum():
    plugin, scales = half_precision_plugin(), []

    class Watched(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                scales.append(plugin.scaler.get_scale())

    watch = Watch()
    runner = trainer(rounds=2, num_clients=3, plugins=[plugin], callbacks=[watch], local_steps=24, alpha=100.0)
    runner.fit(Watched(), DataLoader(samples(60), batch_size=8, shuffle=True))
    skipped = [u.num_skipped for u, _ in watch.updates]
    assert sum(skipped[:3]) > 0, "a scale of 2**40 overflows float16"
    assert runner.federation_summary["nonfinite_updates"] == 0, "skipped steps are no failures"
    assert scales[:3] == [2.0**40] * 3
    assert scales[3:] == [2.0 ** (40 - max(skipped[:3]))] * 3
    assert all(u.num_steps > 0 for u, _ in watch.updates[3:])


def test_16_mixed_on_a_cpu_is_an_error():
    with pytest.raises(ValueError, match="`precision='16-mixed'` is for GPUs"), pytest.warns(UserWarning, match="fp16"):
        trainer(precision="16-mixed")


def test_bf16_true_keeps_small_updates_in_the_servers_vector():
    module = Classifier(sgd(lr=1e-4))
    runner = trainer(rounds=3, precision="bf16-true")
    runner.fit(module, DataLoader(samples(40), batch_size=8))
    assert next(module.parameters()).dtype == torch.bfloat16
    assert runner.fit_loop.federation.server.parameters().dtype == torch.float32


# ---------------------------------------------------------------------- randomness inside the model


def test_dropout_depends_on_client_and_round_alone():
    def run(**kwargs):
        watch = Watch()
        trainer(rounds=2, callbacks=[watch], seed=2, **kwargs).fit(
            Classifier(dropout=0.5), DataLoader(samples(80), batch_size=8, shuffle=True)
        )
        return {(i, u.client): d for i, (u, d) in enumerate(watch.updates)}

    from lightning_fedhaw.data import FixedSequenceSampler

    everyone = run()
    some = run(sampler=FixedSequenceSampler([[1, 3], [0]]))
    assert torch.equal(everyone[(1, 1)], some[(0, 1)])
    assert torch.equal(everyone[(3, 3)], some[(1, 3)])
    torch.manual_seed(1234)
    again = run()
    assert all(torch.equal(everyone[key], again[key]) for key in everyone)


# ---------------------------------------------------------------------- data


class Rows(Dataset):
    """The same samples, fetched one by one."""

    def __init__(self, tensors: TensorDataset):
        self.tensors = tensors
        self.fetched = 0

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, i):
        self.fetched += 1
        return self.tensors[i]


def run_on(dataset, **kwargs):
    module, labels = Classifier(), samples(80).tensors[1]
    runner = trainer(rounds=2, labels=labels, seed=5)
    runner.fit(module, DataLoader(dataset, batch_size=8, shuffle=True, **kwargs))
    return flat(module)


def test_slicing_collating_and_workers_give_the_same_batches():
    sliced = run_on(samples(80))
    rows = Rows(samples(80))
    assert torch.equal(sliced, run_on(rows))
    assert rows.fetched > 0
    assert torch.equal(sliced, run_on(Rows(samples(80)), num_workers=1))
    assert torch.equal(sliced, run_on(torch.utils.data.Subset(samples(80), range(80))))
    halves = [torch.utils.data.Subset(samples(80), range(0, 40)), torch.utils.data.Subset(samples(80), range(40, 80))]
    assert torch.equal(sliced, run_on(torch.utils.data.ConcatDataset(halves)))


def test_tensors_in_memory_are_never_fetched_one_by_one(monkeypatch):
    def refuse(self, index):
        raise AssertionError("fetched sample by sample")

    data = DataLoader(samples(80), batch_size=8, shuffle=True)
    monkeypatch.setattr(TensorDataset, "__getitem__", refuse)
    trainer(rounds=1).fit(Classifier(), data)


def test_a_custom_collate_function_is_kept():
    def collate(rows):
        x, y = torch.utils.data.default_collate(rows)
        return {"x": x, "more": [y]}

    trainer(rounds=1, client_eval=False).fit(DictBatches(), DataLoader(samples(40), batch_size=8, collate_fn=collate))


def test_transfer_hooks_are_called():
    class Doubles(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 2, batch[1]]

    a, b = Doubles(), Classifier()
    trainer(rounds=1).fit(a, DataLoader(samples(40), batch_size=8))
    x, y = samples(40).tensors
    trainer(rounds=1).fit(b, DataLoader(TensorDataset(2 * x, y), batch_size=8))
    assert torch.equal(flat(a), flat(b))


# ---------------------------------------------------------------------- FedHAW reads the rates


def test_each_parameter_needs_exactly_one_optimizer():
    class Forgets(TwoOptimizers):
        def configure_optimizers(self):
            return super().configure_optimizers()[0], torch.optim.SGD([self.net[0].weight], lr=0.1)

    with pytest.raises(ValueError, match=r"`net\.0\.weight` is in 2 optimizers instead of exactly one"):
        trainer(rule=PublishedFedHAWCallback()).fit(Forgets(), DataLoader(samples(40), batch_size=8))
    runner = trainer(rule=PublishedFedHAWCallback(), rounds=2)
    runner.fit(TwoOptimizers(), DataLoader(samples(40), batch_size=8))
    assert "gamma" in runner.callback_metrics
