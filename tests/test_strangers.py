"""Projects that were not written for this package, run federated unchanged but for one line."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, loader, samples, val_loader
from lightning_fedhaw import FedAvgCallback, FederatedTrainer, FedHAWCallback

ENTRY_POINTS = pytest.mark.parametrize("door", [1, 2])


def play(door: int, module: Any, *data: Any, rounds: int = 3, rule: Any = FedAvgCallback, **federation: Any) -> Any:
    """The stranger's own `fit`, behind one of the two entry points."""
    federation = {"num_clients": 4, "seed": 1, **federation}
    quiet = {**QUIET, "num_sanity_val_steps": 0}
    if door == 1:
        trainer: Any = FederatedTrainer(rounds=rounds, callbacks=[rule()], **federation, **quiet)
    else:
        trainer = pl.Trainer(max_epochs=rounds, callbacks=[rule(**federation)], **quiet)
    trainer.fit(module, *data)
    assert trainer.global_step == trainer.current_epoch == rounds
    return trainer


# ---------------------------------------------------------------------- Lightning's own demos


@ENTRY_POINTS
@pytest.mark.parametrize("source", ["module", "datamodule", "loader"])
def test_boring_model(door, source):
    pl.seed_everything(1, verbose=False)
    module, own = BoringModel(), BoringDataModule()
    before, loss = flat(module), module.step(own.random_full.data).item()
    data = {"module": [], "datamodule": [own], "loader": [DataLoader(own.random_full, batch_size=8)]}[source]
    trainer = play(door, module, *data, rule=FedHAWCallback)
    assert (flat(module) - before).abs().max() > 0.01
    assert torch.isfinite(flat(module)).all()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**3)  # its schedule counts rounds
    if source == "loader":  # its own batches of one sample make it diverge, in a stock trainer too
        assert module.step(own.random_full.data).item() < 0.5 * loss
    else:
        assert trainer.validate(module, *data, verbose=False) == [{}]


class LocalText(WikiText2):
    """Its reader and its vocabulary, on a text that is here already."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder, block_size=12, download=False)


@pytest.fixture
def text(tmp_path):
    words, draw = [f"w{i}" for i in range(12)], random.Random(0)
    lines = []
    for _ in range(60):
        at = draw.randrange(12)
        lines.append(" ".join(words[(at + i) % 12] for i in range(11)))  # each word says which is next
    (tmp_path / "wikitext-2.txt").write_text("\n".join(lines), encoding="utf-8")
    return LocalText(tmp_path)


@ENTRY_POINTS
def test_lightning_transformer_on_a_local_text(door, text):
    class Local(LightningTransformer):
        """Its data, and nothing else, is another."""

        def prepare_data(self):
            """There is nothing to download."""

        def train_dataloader(self):
            return DataLoader(text, batch_size=8)

    def loss() -> float:
        inputs, target = next(iter(DataLoader(text, batch_size=len(text))))
        with torch.no_grad():
            value = float(nn.functional.nll_loss(module.eval()(inputs, target), target.view(-1)))
        module.train()
        return value

    torch.manual_seed(0)
    module = Local(vocab_size=text.vocab_size)
    before = loss()
    trainer = play(door, module, num_clients=3)
    assert trainer.federation_summary["parameters"] == sum(p.numel() for p in module.parameters())
    assert loss() < before - 0.5


# ---------------------------------------------------------------------- torchmetrics everywhere


class Measured(pl.LightningModule):
    """Logs a collection by itself, and computes a confusion matrix at the end of each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        scores = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.classification.MulticlassAccuracy(3, average="micro"),
                "f1": torchmetrics.classification.MulticlassF1Score(3),
                "auroc": torchmetrics.classification.MulticlassAUROC(3, thresholds=20),
            }
        )
        self.train_scores, self.val_scores = scores.clone("train/"), scores.clone("val/")
        self.confusion = torchmetrics.classification.MulticlassConfusionMatrix(3)
        self.loss = torchmetrics.MeanMetric()
        self.tables: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.train_scores.update(logits.detach(), y)
        self.log_dict(self.train_scores, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.val_scores.update(logits, y)
        self.confusion.update(logits, y)
        self.loss.update(nn.functional.cross_entropy(logits, y), len(y))

    def on_validation_epoch_end(self):
        self.log_dict(self.val_scores.compute())
        self.log("val/loss", self.loss.compute())
        self.tables.append(self.confusion.compute())
        for metric in (self.val_scores, self.loss, self.confusion):
            metric.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@ENTRY_POINTS
def test_a_torchmetrics_heavy_classifier(door):
    torch.manual_seed(0)
    module = Measured()
    train, val = samples(240), samples(60, seed=1)
    loaders = DataLoader(train, batch_size=8, shuffle=True), DataLoader(val, batch_size=7)
    trainer = play(door, module, *loaders, rounds=6, rule=FedHAWCallback, alpha=10.0)
    x, y = val.tensors
    with torch.no_grad():
        logits = module.net(x)
    expected = torchmetrics.MetricCollection(
        [
            torchmetrics.classification.MulticlassAccuracy(3, average="micro"),
            torchmetrics.classification.MulticlassF1Score(3),
            torchmetrics.classification.MulticlassAUROC(3, thresholds=20),
        ]
    )(logits, y)
    logged = trainer.callback_metrics
    for name, of in {"acc": "MulticlassAccuracy", "f1": "MulticlassF1Score", "auroc": "MulticlassAUROC"}.items():
        assert float(logged[f"val/{name}"]) == pytest.approx(float(expected[of]), abs=1e-6), name
        assert 0 < float(logged[f"train/{name}"]) <= 1
    assert float(logged["val/loss"]) == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert float(logged["val/acc"]) > 0.7
    assert len(module.tables) == 6
    table = torch.zeros(3, 3, dtype=torch.int64)
    table.index_put_((y, logits.argmax(1)), torch.ones(60, dtype=torch.int64), accumulate=True)
    assert torch.equal(module.tables[-1], table)
    assert module.confusion.confmat.sum() == 0


# ---------------------------------------------------------------------- manual optimization


class GAN(pl.LightningModule):
    """Lightning's GAN example in small: two networks, two optimizers, steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def adversarial_loss(self, verdict, real):
        return nn.functional.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, real))

    def training_step(self, batch, batch_idx):
        (real,) = batch
        first, second = self.optimizers()
        noise = torch.randn(len(real), 4, device=self.device)

        self.toggle_optimizer(first)
        g_loss = self.adversarial_loss(self.discriminator(self.generator(noise)), 1.0)
        first.zero_grad()
        self.manual_backward(g_loss)
        first.step()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        fake = self.generator(noise).detach()
        d_loss = self.adversarial_loss(self.discriminator(real), 1.0) + self.adversarial_loss(
            self.discriminator(fake), 0.0
        )
        second.zero_grad()
        self.manual_backward(d_loss)
        second.step()
        self.untoggle_optimizer(second)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def configure_optimizers(self):
        rates = {"lr": 0.01, "betas": (0.5, 0.999)}
        return [torch.optim.Adam(net.parameters(), **rates) for net in (self.generator, self.discriminator)], []


@ENTRY_POINTS
def test_a_gan_by_manual_optimization(door):
    torch.manual_seed(0)
    module = GAN()
    far = torch.tensor([3.0, -2.0])
    real = far + 0.3 * torch.randn(256, 2)
    before = flat(module)
    noise = torch.randn(500, 4)
    distance = (module.generator(noise).mean(0) - far).norm().item()
    trainer = play(door, module, DataLoader(TensorDataset(real), batch_size=16, shuffle=True), rounds=8)
    assert {"g_loss", "d_loss"} <= set(trainer.callback_metrics)
    assert (flat(module) - before).abs().max() > 0.01
    assert (module.generator(noise).mean(0) - far).norm().item() < 0.5 * distance
    assert all(p.requires_grad for p in module.parameters())  # what was toggled is toggled back


# ---------------------------------------------------------------------- what Lightning users bring along


class Compilable(Classifier):
    """Without torchmetrics, whose tracing takes most of the time and is not this package's matter."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        self.log("val_loss", nn.functional.cross_entropy(z, y))
        self.log("val_acc", (z.argmax(1) == y).float().mean())


@ENTRY_POINTS
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, of its own tracing
@pytest.mark.parametrize("part", ["whole", "net"])
def test_compiled_modules(door, part):
    plain, module = Compilable(), Compilable()
    play(door, plain, loader(), val_loader())
    if part == "net":
        module.net.compile(backend="eager")
        fitted = module
    else:
        fitted = torch.compile(module, backend="eager")
    trainer = play(door, fitted, loader(), val_loader())
    assert (flat(plain) - flat(Classifier())).abs().max() > 0.01
    torch.testing.assert_close(flat(module), flat(plain), rtol=1e-4, atol=1e-6)
    assert "val_acc" in trainer.callback_metrics
    trainer.validate(fitted, val_loader(), verbose=False)


@ENTRY_POINTS
def test_a_submodule_that_was_wrapped_by_compile_keeps_its_names(door):
    class Wrapped(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    plain, module = Classifier(), Wrapped()
    play(door, plain, loader())
    play(door, module, loader())
    torch.testing.assert_close(flat(module), flat(plain), rtol=1e-4, atol=1e-6)
    assert all(name.startswith("net._orig_mod.") for name in module.state_dict())


def test_the_tuner_searches_centrally_and_is_refused_in_a_federation():
    class Tunable(Classifier):
        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD(p, lr=self.lr))
            self.lr, self.batch_size = 0.1, 8

    def stranger() -> Any:
        return pl.Trainer(max_epochs=3, **{**QUIET, "enable_checkpointing": True})

    module = Tunable()
    found = Tuner(stranger()).lr_find(module, loader(), num_training=20)
    assert module.lr == found.suggestion() != 0.1
    before = flat(module)
    federated = pl.Trainer(max_epochs=3, callbacks=[FedAvgCallback(num_clients=4)], **QUIET)
    for trainer in (federated, FederatedTrainer(rounds=3, callbacks=[FedAvgCallback()], **QUIET)):
        with pytest.raises(ValueError, match="LearningRateFinder .*find one with a stock `Trainer`, without the rule"):
            Tuner(trainer).lr_find(module, loader())
        assert torch.equal(flat(module), before)
    play(1, module, loader())
    assert (flat(module) - before).abs().max() > 0.1 * module.lr, "it trained with the rate that was found"


@ENTRY_POINTS
def test_a_hugging_face_model_in_a_module(door):
    transformers = pytest.importorskip("transformers")

    class Bert(pl.LightningModule):
        def __init__(self):
            super().__init__()
            config = transformers.BertConfig(
                vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
            self.bert = transformers.BertForSequenceClassification(config)

        def training_step(self, batch, batch_idx):
            out = self.bert(**batch)
            self.log("train_loss", out.loss)
            return out.loss

        def validation_step(self, batch, batch_idx):
            out = self.bert(**batch)
            self.log("val_acc", (out.logits.argmax(1) == batch["labels"]).float().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    words = torch.randint(2, 20, (160, 6))
    words[:, 0], labels = 1, torch.arange(160) % 2
    words[:, 3] = labels + 5  # the fourth word says it all
    data = [
        {"input_ids": w, "attention_mask": torch.ones_like(w), "labels": y} for w, y in zip(words, labels, strict=True)
    ]
    module = Bert()
    for parameter in module.bert.bert.embeddings.position_embeddings.parameters():
        parameter.requires_grad = False  # what is frozen stays, and does not travel
    frozen = module.bert.bert.embeddings.position_embeddings.weight.clone()
    train, val = DataLoader(data[:120], batch_size=8, shuffle=True), DataLoader(data[120:], batch_size=8)
    trainer = play(door, module, train, val, rounds=6)
    assert float(trainer.callback_metrics["val_acc"]) > 0.9
    assert torch.equal(module.bert.bert.embeddings.position_embeddings.weight, frozen)
    assert trainer.federation_summary["parameters"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
