"""`pytorch_lightning` as another name of `lightning.pytorch`."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

PROGRAM = """
import lightning_fedhaw.alias_pytorch_lightning
import pickle
import lightning.pytorch
import pytorch_lightning as theirs
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.demos.boring_classes import BoringModel
from lightning_fedhaw import FedAvgCallback
import lightning_fabric.utilities, lightning.fabric.utilities

assert theirs is lightning.pytorch
assert theirs.Trainer is lightning.pytorch.Trainer
assert EarlyStopping is lightning.pytorch.callbacks.EarlyStopping
assert lightning_fabric.utilities is lightning.fabric.utilities
assert sys.modules["pytorch_lightning.callbacks"].__spec__.name == "lightning.pytorch.callbacks"
assert pickle.loads(pickle.dumps(EarlyStopping)) is EarlyStopping
trainer = theirs.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[FedAvgCallback(num_clients=3)],
)
trainer.fit(BoringModel())
assert trainer.federation_summary["rounds"] == 2
print("done")
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed"
)


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)


def test_a_project_on_pytorch_lightning_trains_by_rounds():
    done = run("import sys\n" + PROGRAM)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr


def test_an_alias_that_comes_too_late_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    with pytest.raises(ImportError, match="`pytorch_lightning` was imported before"):
        importlib.import_module("lightning_fedhaw.alias_pytorch_lightning")
