"""Ready-made modules: image classifiers on timm's backbones, low-rank adapters, and files of weights."""
