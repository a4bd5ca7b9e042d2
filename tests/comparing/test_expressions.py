"""Expressions are what they would be in Python, and nothing else runs."""

import re

import pytest
import torch

import comparison_task
from lightning_fedhaw import FedAvgMCallback, FedProx
from lightning_fedhaw.comparing.expressions import build, build_or_text, split_label


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("FedAvg", ("FedAvg", "FedAvg")),
        ("FedAvg()", ("FedAvg", "FedAvg()")),
        ("FedAvgM(lr=0.5)", ("FedAvgM(lr=0.5)", "FedAvgM(lr=0.5)")),
        ("my rule = FedAvgM(lr=0.5)", ("my rule", "FedAvgM(lr=0.5)")),
        ("a=npz('x=1.npz')", ("a", "npz('x=1.npz')")),
        ("npz('x=1.npz')", ("npz('x=1.npz')", "npz('x=1.npz')")),
    ],
)
def test_labels(text, parts):
    assert split_label(text) == parts


def test_values():
    assert build("FedAvgM(lr=0.25, momentum=0.5)").momentum == 0.5
    assert build("FedAvgMCallback") is FedAvgMCallback
    assert build("comparison_task.Half(share=0.25)").share == 0.25
    assert build("comparison_task.Half(share=0.25)", share=0.75).share == 0.75
    assert build("torch.optim.Adam") is torch.optim.Adam
    assert build("[1, -2.5, {'a': None}]") == [1, -2.5, {"a": None}]
    rule, objective = build("comparison_task.Half + FedProx(mu=0.5)")
    assert isinstance(rule, comparison_task.Half)
    assert isinstance(objective, FedProx)
    assert build("FedOpt(optimizer=torch.optim.Adam, lr=0.5)").key == "FedOptCallback"
    assert build_or_text("host") == "host"
    assert build_or_text("None") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FedAvgg(lr=1)", "There is no `FedAvgg`, in `FedAvgg(lr=1)`. Did you mean `FedAvg`?"),
        ("nowhere.Rule()", "There is no module `nowhere`, in `nowhere.Rule()`."),
        ("comparison_task.Halff()", "`comparison_task` has no `Halff`. Did you mean `Half`?"),
        ("FedAvgM(lr=", "is no value, name, import path or call"),
        ("FedAvgM(lr=0.5 if 1 else 2)", "belongs into a function of your own"),
        ("FedAvgM(**{})", "write each argument out"),
        ("[x for x in (1, 2)]", "belongs into a function of your own"),
    ],
)
def test_what_is_no_expression_is_told_in_one_sentence(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(text)


def test_an_error_in_an_imported_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        build("needs_more.Rule()")
