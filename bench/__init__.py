"""Benchmarks: what the engine costs, measured beside its alternatives in one process."""
