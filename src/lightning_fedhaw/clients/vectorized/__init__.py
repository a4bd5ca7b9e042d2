"""Many clients at once: the engine, its trial of a module's step, stacked optimizers, compiled steps."""
