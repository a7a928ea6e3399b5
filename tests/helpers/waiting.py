"""Finds operations that make the host wait for a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_host_waits(device: torch.device) -> Iterator[None]:
    """Context in which, on a GPU, any operation that makes the host wait for it raises an error."""
    if device.type != "cuda":
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
