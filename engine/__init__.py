"""The method: perturbation stream, mask, estimator, optimizer, replay; any torch module."""
