"""Ready-made modules: image classifiers on timm's backbones, low-rank adapters, weight files."""
