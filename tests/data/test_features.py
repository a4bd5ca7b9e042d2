"""Features that are computed once: the same numbers, nothing computed twice, nothing corrupt believed."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from federations import QUIET
from lightning_fedhaw import FederatedDataModule, FederatedTrainer, FedHAWCallback
from lightning_fedhaw.data import cache_features, find_labels
from lightning_fedhaw.data.tensors import tensors_of


class Images(Dataset):
    """Small images with labels; counts how often one is read."""

    def __init__(self, count=50, transform=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.targets = (self.images.mean((1, 2, 3)) > 0).long().tolist()
        self.transform = transform
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.targets[index]


class Network(nn.Module):
    """A network whose features differ between training and evaluation; counts its images."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        return self.net(images)


def cached(network, data, folder, **kwargs):
    return cache_features(network, data, folder, **{"key": "net", "shard_size": 16, "progress": False, **kwargs})


def shards(folder):
    return sorted(folder.rglob("*.pt"))


def test_features_are_those_of_the_network_in_eval_mode(tmp_path):
    network, data = Network(), Images()
    network.net[2].eval()
    features = cached(network, data, tmp_path, batch_size=5)
    assert network.training
    assert not network.net[2].training, "each part is as it was"
    rows = torch.stack([row for row, _ in features])
    assert torch.allclose(rows, network.eval()(data.images), atol=1e-6)
    assert not rows.requires_grad
    assert [int(label) for _, label in features] == data.targets
    assert len(shards(tmp_path)) == 4


def test_a_second_time_nothing_is_computed(tmp_path, recwarn):
    network, data = Network(), Images()
    state = torch.get_rng_state()
    first = cached(network, data, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    again = cached(network, data, tmp_path)
    assert network.images == 50
    assert torch.equal(tensors_of(first)[0], tensors_of(again)[0])
    assert not recwarn.list


def test_a_federation_slices_them_and_leaves_the_files_alone(tmp_path):
    def never(images):
        raise AssertionError("the features are in files")

    features = cached(Network(), Images(), tmp_path)
    tensors = tensors_of(features)
    assert tensors[0].shape == (50, 4 * 6 * 6)
    assert torch.equal(find_labels(features), tensors[1])
    features.datasets[0].tensors[0].zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(tensors_of(cached(never, Images(), tmp_path))[0][0], torch.zeros(144)), "and not corrupt"


def test_an_address_in_a_transforms_name_means_nothing(tmp_path):
    network = Network()
    for _ in range(2):
        cached(network, Images(transform=lambda image: image + 1), tmp_path)
    assert network.images == 50


@pytest.mark.parametrize(
    "change",
    [
        {"key": "other"},
        {"data": Images(transform=nn.ReLU())},
        {"data": Images(seed=1)},
        {"data": Images(49)},
        {"dtype": torch.float16},
    ],
    ids=["key", "transform", "content", "length", "dtype"],
)
def test_another_network_transform_or_data_set_is_another_cache(tmp_path, change):
    network = Network()
    cached(network, Images(), tmp_path)
    before, options = network.images, dict(change)
    features = cached(network, options.pop("data", Images()), tmp_path, **options)
    assert network.images > before
    assert tensors_of(features)[0].dtype == change.get("dtype", torch.float32)
    abouts = [json.loads(path.read_text()) for path in tmp_path.rglob("about.json")]
    assert len(abouts) == 2


def test_an_interrupted_run_goes_on_at_the_next_shard(tmp_path):
    class Interrupted(Network):
        def forward(self, images):
            if self.images == 32:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        cached(Interrupted(), Images(), tmp_path, batch_size=16)
    assert len(shards(tmp_path)) == 2
    network = Network()
    features = cached(network, Images(), tmp_path, batch_size=16)
    assert network.images == 18
    assert torch.equal(tensors_of(features)[0], tensors_of(cached(Network(), Images(), tmp_path / "whole"))[0])


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:3000] + b"\0\0\0\0" + b[3004:], lambda b: b""]
)
def test_a_damaged_shard_is_computed_again(tmp_path, damage):
    whole = tensors_of(cached(Network(), Images(), tmp_path))[0].clone()
    path = shards(tmp_path)[1]
    content = path.read_bytes()
    path.unlink()  # the mapping above keeps the old file
    path.write_bytes(damage(content))
    network = Network()
    with pytest.warns(UserWarning, match=r"000000016-.*corrupt or truncated; its features are computed again"):
        features = cached(network, Images(), tmp_path)
    assert network.images == 16
    assert torch.equal(tensors_of(features)[0], whole)


def test_two_at_a_time(tmp_path):
    """A process that finds half of the shards missing while another writes them."""

    class Slow(Network):
        def forward(self, images):
            if not self.images:
                cached(Network(), Images(), tmp_path)
            return super().forward(images)

    features = cached(Slow(), Images(), tmp_path)
    assert len(features) == 50
    assert len(shards(tmp_path)) == 4
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.startswith(".")]


def test_what_cannot_be_cached_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must not draw at random"):
        cached(Network(), Images(transform=lambda image: image + torch.rand(())), tmp_path)
    with pytest.raises(
        TypeError, match=r"pairs of an image, as a tensor, and a label, got ndarray. Set its `transform`"
    ):
        cached(Network(), Images(transform=lambda image: image.numpy()), tmp_path)
    with pytest.raises(TypeError, match="pairs of an image"):
        cached(Network(), TensorDataset(torch.zeros(4, 3, 8, 8)), tmp_path)
    with pytest.raises(ValueError, match="at least one sample"):
        cached(Network(), Images(0), tmp_path)
    with pytest.raises(ValueError, match=r"a row of features for each of 16 images, got \[\]"):
        cached(torch.sum, Images(), tmp_path)
    with pytest.raises(ValueError, match="`shard_size` must be a whole number of at least 1, got 0"):
        cached(Network(), Images(), tmp_path, shard_size=0)


@pytest.mark.parametrize("label", ["a breed", None, (1, 2)])
def test_labels_that_cannot_be_kept_are_refused(tmp_path, label):
    data = Images()
    data.targets = [label] * len(data)
    with pytest.raises(TypeError, match=r"a number or a tensor as label, got .*\. Set its `target_transform`"):
        cached(Network(), data, tmp_path)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_fedhaw.files.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cached(Network(), Images(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_cached_and_uncached_federations_agree(tmp_path):
    """A frozen network in front of a trained head, fed with images and with features."""
    from lightning_fedhaw.models.timm_classifier import TimmClassifier

    results = {}
    for name in ("start", "images", "features"):
        torch.manual_seed(0)
        module = TimmClassifier(
            "test_vit", 2, trainable="head", head_widths=(8,), lr=1e-2, model_kwargs={"img_size": 8, "patch_size": 4}
        )
        seen = Images(90)
        if name == "features":
            seen = cache_features(
                module.features, seen, tmp_path, key=module.feature_key(), shard_size=32, progress=False
            )
        if name != "start":
            trainer = FederatedTrainer(
                rounds=3, num_clients=4, alpha=1.0, callbacks=[FedHAWCallback()], seed=1, **QUIET
            )
            trainer.fit(module, FederatedDataModule(seen, batch_size=8))
        results[name] = torch.cat([p.detach().flatten() for p in module.head.parameters()])
    moved = (results["images"] - results["start"]).norm()
    assert moved > 0.1
    assert (results["images"] - results["features"]).norm() < 1e-5 * moved
