"""Chemprop: a message-passing network that regresses a property of molecules, as in its "Training" notebook."""

from __future__ import annotations

import numpy as np
from chemprop import data, featurizers, models, nn
from common import Setting, Trained, fitted, hold

SMILES = [("C" * length) + tail for length in range(1, 13) for tail in ("O", "N", "Cl", "C(=O)O", "c1ccccc1")]


def train(setting: Setting) -> Trained:
    generator = np.random.default_rng(0)
    points = [data.MoleculeDatapoint.from_smi(smiles, generator.normal(size=1)) for smiles in SMILES]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    train_set = data.MoleculeDataset(points[:48], featurizer)
    scaler = train_set.normalize_targets()
    val_set = data.MoleculeDataset(points[48:], featurizer)
    val_set.normalize_targets(scaler)
    predictor = nn.RegressionFFN(output_transform=nn.UnscaleTransform.from_standard_scaler(scaler))
    # Its schedule counts steps, and a round is one step: constant where weights are compared.
    rates = {"init_lr": 1e-3, "max_lr": 1e-3, "final_lr": 1e-3} if setting.comparable else {}
    model = models.MPNN(
        nn.BondMessagePassing(), nn.MeanAggregation(), predictor, warmup_epochs=1, batch_norm=True, **rates
    )
    train_loader = data.build_dataloader(train_set, batch_size=8, shuffle=False)
    val_loader = data.build_dataloader(val_set, batch_size=8, shuffle=False)
    return fitted(setting, model, train_loader, val_loader)


if __name__ == "__main__":
    hold("chemprop", train)
