"""The perturbation stream, version 1: ``z`` as a function of seed and element id alone, the same bits on any device.

The definition is in ``triton_kernels.reference``. All randomness of the project comes from here, so that nothing
depends on a global generator: perturbations, step seeds, the order of the data, random masks.
"""

import torch
from torch import Tensor

from ..triton_kernels import reference
from . import backend as backends

VERSION = 1

_STEP_DOMAIN = 0x4D4B5631
_DERIVED_DOMAIN = 0x4D4B5632


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is not in [0, 2**64).
    """
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return seed


def bits(seed: int, blocks: Tensor) -> Tensor:
    """The Philox4x32-10 words of some blocks; block ``b`` serves the element ids ``4 b`` to ``4 b + 3``.

    Args:
        seed: in [0, 2**64).
        blocks: int64 [n], not negative.

    Returns:
        int64 [n, 4], values in [0, 2**32).

    Example:
        >>> [hex(word) for word in bits(0, torch.tensor([0]))[0].tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    return reference.bits(check_seed(seed), blocks)


def normal(seed: int, ids: Tensor, backend: str = "auto") -> Tensor:
    """Standard normals at some element ids.

    Args:
        seed: in [0, 2**64).
        ids: int64 [n], element ids, not negative, in any order.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Returns:
        float32 [n] on the device of ``ids``; each value depends on the seed and its own id only.

    Example:
        >>> normal(7, torch.tensor([0, 1, 2**40])).tolist() == [
        ...     normal(7, torch.tensor([i])).item() for i in (0, 1, 2**40)]
        True
    """
    return backends.resolve(backend, ids.device).normal(check_seed(seed), ids)


def step_seed(root: int, round: int, step: int, query: int = 0) -> int:
    """Seed of one perturbation, in [0, 2**64): the root seed is the only seed that ever travels.

    Args:
        root: root seed of the run, in [0, 2**64).
        round: of the federation, in [0, 2**32).
        step: within the round, in [0, 2**32).
        query: within the step, in [0, 2**32).
    """
    return _seed_from(root, (step, round, query, _STEP_DOMAIN))


def derived_seed(root: int, purpose: str, first: int = 0, second: int = 0) -> int:
    """A seed for anything but perturbations, in [0, 2**64).

    Args:
        root: root seed of the run, in [0, 2**64).
        purpose: four ASCII letters that keep the uses apart.
        first: in [0, 2**32), for instance a client.
        second: in [0, 2**32), for instance an epoch.
    """
    letters = int.from_bytes(purpose.encode("ascii"), "big")
    return _seed_from(root, (first, second, letters, _DERIVED_DOMAIN))


def permutation(seed: int, n: int) -> Tensor:
    """A random order of ``range(n)``: int64 [n]."""
    return torch.argsort(_numbers(seed, 0, (n + 1) // 2)[:n], stable=True)


def poisson_sample(seed: int, n: int, expected: int) -> Tensor:
    """Numbers below ``n``, each drawn independently with probability ``expected / n``, ascending: int64 [any size].

    Args:
        seed: in [0, 2**64).
        n: at least 1.
        expected: mean size of a sample, in [1, n]. The probability is rounded down to a multiple of 2**-63.
    """
    if not 1 <= expected <= n:
        raise ValueError(f"a sample of range({n}) has an expected size from 1 to {n}, got {expected}")
    return (_numbers(seed, 0, (n + 1) // 2)[:n] <= (expected << 63) // n - 1).nonzero().flatten()


def distinct(seed: int, k: int, size: int) -> Tensor:
    """The first k distinct numbers below ``size`` that the stream draws, ascending: int64 [k]."""
    drawn = torch.empty(0, dtype=torch.int64)
    blocks = 0
    while True:
        stop = blocks + max(64, k)
        numbers = _numbers(seed, blocks, stop) % size  # the bias is below 2**-20 for any model
        blocks = stop
        drawn = torch.cat([drawn, numbers])
        distinct, index = torch.unique(drawn, return_inverse=True)
        if distinct.numel() >= k:
            first = torch.full_like(distinct, drawn.numel()).scatter_reduce_(
                0, index, torch.arange(drawn.numel()), "amin"
            )
            chosen: Tensor = distinct[torch.argsort(first)[:k]]
            return chosen.sort().values


def _numbers(seed: int, start: int, stop: int) -> Tensor:
    """Numbers in [0, 2**63), two from each of the blocks [start, stop): int64 [2 * blocks]."""
    words = bits(seed, torch.arange(start, stop))
    return ((words[:, 0::2] << 31) ^ words[:, 1::2]).reshape(-1)


def _seed_from(root: int, counter: tuple[int, int, int, int]) -> int:
    check_seed(root)
    for value in counter:
        if not 0 <= value < 1 << 32:
            raise ValueError(f"round, step and query must be in [0, 2**32), got {value}")
    words = reference.philox4x32((root & 0xFFFFFFFF, root >> 32), counter)
    return words[0] | words[1] << 32


__all__ = [
    "VERSION",
    "bits",
    "check_seed",
    "derived_seed",
    "distinct",
    "normal",
    "permutation",
    "poisson_sample",
    "step_seed",
]
