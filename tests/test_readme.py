"""Every code block of the README and of the guide runs as it stands."""

import functools
import re
from pathlib import Path

import lightning as L
import pytest
import torch

from federations import QUIET, Classifier, loader, samples

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(f"docs/{page}.md" for page in ("channels", "extending", "objectives", "pictures", "rules", "write_a_rule")),
]


def blocks(page):
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return loader(400)


@pytest.mark.parametrize(("page", "index"), [(p, i) for p in PAGES for i in range(len(blocks(p)))])
def test_code_block(page, index, monkeypatch):
    """The block runs unchanged; trainers are kept short and silent from outside."""
    stock = L.Trainer.__init__

    @functools.wraps(stock)
    def short(self, **kwargs):
        stock(self, **{**kwargs, **QUIET, "max_epochs": min(kwargs.get("max_epochs") or 2, 2)})

    monkeypatch.setattr(L.Trainer, "__init__", short)
    names = {
        "model": Classifier(classes=10),
        "dataset": samples(60_000, classes=10),
        "val_dataset": samples(200, classes=10),
        "datamodule": Module(),
        "loader": loader(800),
        "speakers": ["Romeo", "Juliet"] * 30_000,
    }
    exec(compile(blocks(page)[index], f"{page}, block {index}", "exec"), names)
    if (trainer := names.get("trainer")) is not None:
        assert trainer.global_step == 2
        assert trainer.federation_summary["rounds"] == 2
    for value in list(names.values()):
        if isinstance(value, type) and value.__module__ == "builtins" and issubclass(value, L.Callback):
            check_extension(value)


def check_extension(kind):
    """What the guide defines takes part in a real federation."""
    from lightning_fedhaw import AggregationRule, FedAvgCallback, FederatedTrainer

    extra = [kind()] if issubclass(kind, AggregationRule) else [FedAvgCallback(), kind()]
    module = Classifier()
    FederatedTrainer(rounds=2, num_clients=4, callbacks=extra).fit(module, loader())
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_the_readme_names_its_two_commands():
    text = (ROOT / "README.md").read_text()
    assert 'pip install ".[examples]" && python examples/digits.py' in text
    assert 'pip install ".[dev]" && pytest' in text


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
