"""The method for any torch module: perturbation stream, mask, estimator, optimizer, replay."""
