"""Ready-made modules."""
