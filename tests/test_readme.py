"""Every code block of the README and of the documentation runs as it stands."""

import functools
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from federations import QUIET, Classifier, loader, samples

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))]


def blocks(page):
    """What runs of a page: its Python, and both sides of its diffs."""
    found = []
    for kind, text in re.findall(r"```(python|diff)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        if kind == "python":
            found.append(text)
        else:
            found += ["\n".join(line[1:] for line in text.splitlines() if line[:1] != sign) for sign in "+-"]
    return found


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return loader(400)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_blocks(page, monkeypatch, tmp_path):
    """A page's blocks run unchanged, one after the other; trainers are kept short and silent from outside."""
    stock = L.Trainer.__init__

    @functools.wraps(stock)
    def short(self, **kwargs):
        saves = any(isinstance(callback, ModelCheckpoint) for callback in kwargs.get("callbacks") or ())
        forced = {**QUIET, "enable_checkpointing": saves, "devices": 1, "strategy": "auto"}
        rounds = 3 if (kwargs.get("max_epochs") or 0) > 50 else 2  # longer than the run that it goes on from
        stock(self, **{**kwargs, **forced, "max_epochs": rounds})

    monkeypatch.setattr(L.Trainer, "__init__", short)
    monkeypatch.chdir(tmp_path)
    names = {
        "model": Classifier(classes=10),
        "dataset": samples(60_000, classes=10),
        "val_dataset": samples(200, classes=10),
        "datamodule": Module(),
        "loader": loader(800),
        "speakers": ["Romeo", "Juliet"] * 30_000,
    }
    for index, block in enumerate(blocks(page)):
        before = dict(names)
        exec(compile(block, f"{page}, block {index}", "exec"), names)
        fresh = [value for name, value in names.items() if before.get(name) is not value]
        for value in fresh:
            if isinstance(value, L.Trainer):
                assert value.current_epoch == value.max_epochs
                assert getattr(value, "federation_summary", {"rounds": value.max_epochs})["rounds"] == value.max_epochs
            if isinstance(value, type) and value.__module__ == "builtins" and issubclass(value, L.Callback):
                check_extension(value)


def check_extension(kind):
    """What the guide defines takes part in a real federation."""
    from lightning_fedhaw import FedAvgCallback, FederatedTrainer
    from lightning_fedhaw.extending import AggregationRule

    extra = [kind()] if issubclass(kind, AggregationRule) else [FedAvgCallback(), kind()]
    module = Classifier()
    FederatedTrainer(rounds=2, num_clients=4, callbacks=extra).fit(module, loader())
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_the_readme_names_its_two_commands():
    text = (ROOT / "README.md").read_text()
    assert 'pip install ".[examples]" && python examples/digits.py' in text
    assert 'pip install ".[dev]" && pytest' in text


def test_only_other_libraries_code_is_not_run():
    """It is marked as ``py``, which is highlighted like ``python``; so is what needs an engine of a deployment."""
    for page in PAGES:
        aliases = re.findall(
            r"```(py|py3|python3|pycon|\{.*python.*\})$", (ROOT / page).read_text(), flags=re.MULTILINE
        )
        allowed = ("docs/compatibility.md", "docs/deployment.md", "docs/migration.md", "docs/recipes.md")
        assert not aliases or page in allowed, page


def test_links_lead_somewhere():
    for page in [ROOT / name for name in PAGES]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
