"""The digits federation on Flower."""
