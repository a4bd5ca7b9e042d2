"""The package imports and trains where the optional packages are missing."""

import subprocess
import sys

SCRIPT = """
import importlib.metadata, sys
missing = {"torchvision", "timm", "wandb", "matplotlib", "sklearn", "jsonargparse"}
sys.modules.update(dict.fromkeys(missing))  # None there makes an import fail
found = importlib.metadata.distribution
def distribution(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
import lightning.pytorch as pl, torch
from torch import nn
from lightning_fedhaw import FedHAWCallback, FederatedTrainer
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
    def training_step(self, batch, i):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(80, 4), torch.arange(80) % 2)
trainer = FederatedTrainer(rounds=2, num_clients=4, callbacks=[FedHAWCallback()], logger=False, accelerator="cpu",
                           enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
assert not any(sys.modules[name] for name in missing)
from lightning_fedhaw.plotting import RunHistory, draw_comparison
try:
    draw_comparison({"a": RunHistory()}, "a", [1])
except ModuleNotFoundError as error:
    print(error)
from lightning_fedhaw.__main__ import main
print("status", main(["fit"]))
"""


def test_optional_packages_may_be_missing():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pip install matplotlib" in done.stdout
    assert done.stdout.splitlines()[-1] == "status 1"
    said = done.stderr.strip().splitlines()[-1]
    assert said == '`fedhaw` needs jsonargparse: pip install "jsonargparse[signatures]"'
