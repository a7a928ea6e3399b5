"""Benchmarks: the costs of the engine and of its alternatives, measured in one process."""
