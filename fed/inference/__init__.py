"""Trying a model: predictions, evaluations and conversations of a run, a checkpoint or a base model."""
