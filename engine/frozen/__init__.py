"""Weights that a run never changes, kept in fewer bytes, with the masked elements beside them."""
