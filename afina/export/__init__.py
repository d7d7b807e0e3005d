"""Deployable weights: written, read back, compared with the model, and only then given their name."""
