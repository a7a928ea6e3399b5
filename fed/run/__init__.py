"""Runs: start, resume, metrics, replay, and the run directory."""
