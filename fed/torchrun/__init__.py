"""Runs over several processes, which torchrun starts."""
