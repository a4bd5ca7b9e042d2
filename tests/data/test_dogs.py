"""Stanford Dogs: what is read from disk, unpacked, fetched, and refused."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from lightning_fedhaw.data import StanfordDogs, dogs, find_labels

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three breeds of four and two images, as the official archives hold them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import demo_dogs

        return demo_dogs.write_demo_dogs(tmp_path_factory.mktemp("drawn"), classes=3, train=4, test=2, size=32)


@pytest.fixture
def site(drawn, tmp_path, monkeypatch):
    """Archives like the official ones, at an address of their own."""
    folder = tmp_path / "site"
    folder.mkdir()
    archives = {}
    for name, (contents, _) in dogs.ARCHIVES.items():
        with tarfile.open(folder / name, "w") as tar:
            for item in contents:
                tar.add(drawn / item, item)
        archives[name] = (contents, hashlib.md5((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(dogs, "ARCHIVES", archives)
    monkeypatch.setattr(dogs, "SITE", folder.as_uri())
    return folder


def test_the_two_lists_are_the_split(drawn):
    train, test = StanfordDogs(drawn), StanfordDogs(drawn, "test")
    assert (len(train), len(test)) == (12, 6)
    assert train.classes == test.classes == ["golden", "midnight", "dalmatian"]
    assert train.targets == [0] * 4 + [1] * 4 + [2] * 4
    assert not set(train.files) & set(test.files)
    image, target = train[5]
    assert (image.size, image.mode, target) == ((32, 32), "RGB", 1)
    assert "12 images of 3 breeds" in repr(train)


def test_transforms_and_labels(drawn):
    dataset = StanfordDogs(drawn, transform=np.asarray, target_transform=lambda target: 10 * target)
    image, target = dataset[11]
    assert image.shape == (32, 32, 3)
    assert target == 20
    copy = pickle.loads(pickle.dumps(StanfordDogs(drawn)))
    assert find_labels(copy).tolist() == copy.targets


def test_labels_are_found_without_opening_an_image(drawn, monkeypatch):
    monkeypatch.setattr(StanfordDogs, "__getitem__", None)
    assert find_labels(StanfordDogs(drawn)).bincount().tolist() == [4, 4, 4]


def test_a_download_is_checked_unpacked_and_not_repeated(site, tmp_path, capfd):
    assert len(StanfordDogs(tmp_path / "data", download=True)) == 12
    assert "100%" in capfd.readouterr().err
    shutil.rmtree(site)
    assert len(StanfordDogs(tmp_path / "data", download=True)) == 12
    assert not list((tmp_path / "data").glob(".*"))


def test_archives_that_lie_there_are_unpacked(site, tmp_path):
    assert len(StanfordDogs(site, "test")) == 6


def test_a_truncated_archive(site):
    whole = (site / "images.tar").read_bytes()
    (site / "images.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match=r"images\.tar is corrupt or truncated .* Delete it and run again with"):
        StanfordDogs(site)
    assert not (site / "Images").exists()


def test_a_connection_that_breaks_off_leaves_nothing_behind(site, tmp_path):
    whole = (site / "images.tar").read_bytes()
    (site / "images.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConnectionError, match=r"images\.tar could not be downloaded: the file is incomplete"):
        StanfordDogs(tmp_path / "data", download=True)
    assert not list((tmp_path / "data").iterdir())
    (site / "images.tar").write_bytes(whole)
    assert len(StanfordDogs(tmp_path / "data", download=True)) == 12


def test_no_data_and_no_network(tmp_path, site):
    with pytest.raises(FileNotFoundError, match=r"neither `Images` .* Put `images\.tar` and `lists\.tar` from .* into"):
        StanfordDogs(tmp_path / "nothing")
    shutil.rmtree(site)
    with pytest.raises(ConnectionError, match=r"could not be downloaded: .* Put `images\.tar` and `lists\.tar` from"):
        StanfordDogs(tmp_path / "nothing", download=True)


def test_a_folder_without_the_expected_classes(drawn, tmp_path):
    root = shutil.copytree(drawn, tmp_path / "copy")
    shutil.rmtree(root / "Images" / "n00000001-midnight")
    with pytest.raises(
        FileNotFoundError, match=r"lacks 4 of the 12 images .* and 1 of the 3 classes' folders.*images.t"
    ):
        StanfordDogs(root)
    shutil.rmtree(root / "Images")
    (root / "Images" / "cats").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="lacks 12 of the 12 images"):
        StanfordDogs(root)


def test_a_list_that_is_none(drawn, tmp_path):
    root = shutil.copytree(drawn, tmp_path / "copy")
    (root / "train_list.mat").write_bytes(b"<html>404</html>")
    with pytest.raises(RuntimeError, match=r"train_list\.mat is not a list of Stanford Dogs .* put `lists\.tar` from"):
        StanfordDogs(root)
    savemat(root / "train_list.mat", {"file_list": np.zeros((0, 1), dtype=object), "labels": np.zeros((0, 1))})
    with pytest.raises(RuntimeError, match="is not a list"):
        StanfordDogs(root)


def test_an_unknown_split(drawn):
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'test', got 'val'"):
        StanfordDogs(drawn, "val")
