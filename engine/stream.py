"""The perturbation stream, version 1: ``z`` depends on seed and element id only, with the same bits on any device.

``triton_kernels.reference`` defines it. All randomness of the project comes from this module: perturbations, step
seeds, the order of the data, random masks. Nothing uses a global random generator.
"""

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from ..triton_kernels import reference
from . import backend as backends

VERSION = 1

_STEP_DOMAIN = 0x4D4B5631
_DERIVED_DOMAIN = 0x4D4B5632
# Numbers that ``distinct`` draws at a time.
_WINDOW = 1 << 16


def check_seed(seed: SupportsIndex) -> int:
    """Checks that a seed is valid and returns it as an int.

    Raises:
        TypeError: if it is not an integer, of Python, NumPy or torch.
        ValueError: if it is not in [0, 2**64).
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}") from None
    if not 0 <= number < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {number}")
    return number


def _check_numbers(name: str, numbers: Tensor) -> Tensor:
    """Returns element ids or block numbers; raises ``ValueError`` unless they are int64 and not negative."""
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise ValueError(f"{name} must be int64 [n], got {numbers.dtype} {list(numbers.shape)}; use {name}.long()")
    if numbers.numel() and int(numbers.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {int(numbers.min())}")
    return numbers


def bits(seed: int, blocks: Tensor) -> Tensor:
    """Computes the Philox4x32-10 words of blocks. Block ``b`` serves the element ids ``4 b`` to ``4 b + 3``.

    Args:
        seed: seed in [0, 2**64).
        blocks: block numbers, int64 [n], not negative.

    Returns:
        int64 [n, 4], values in [0, 2**32).

    Raises:
        ValueError: if the seed is out of range, or the block numbers are not as described.

    Example:
        >>> [hex(word) for word in bits(0, torch.tensor([0]))[0].tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    return reference.bits(check_seed(seed), _check_numbers("blocks", blocks))


def normal(seed: int, ids: Tensor, backend: str = "auto") -> Tensor:
    """Draws standard normals for element ids.

    Args:
        seed: seed in [0, 2**64).
        ids: element ids, int64 [n], not negative, in any order.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Returns:
        float32 [n] on the device of ``ids``. Each value depends only on the seed and the element id.

    Raises:
        ValueError: if the seed is out of range, or the ids are not as described. Checking them waits for the device.

    Example:
        >>> normal(7, torch.tensor([0, 1, 2**40])).tolist() == [
        ...     normal(7, torch.tensor([i])).item() for i in (0, 1, 2**40)]
        True
    """
    return backends.resolve(backend, ids.device).normal(check_seed(seed), _check_numbers("ids", ids))


def step_seed(root: int, round: int, step: int, query: int = 0) -> int:
    """Derives the seed of one perturbation, in [0, 2**64). The root seed is the only seed that is ever sent.

    Args:
        root: root seed of the run, in [0, 2**64).
        round: round of the federation, in [0, 2**32).
        step: step within the round, in [0, 2**32).
        query: query within the step, in [0, 2**32).
    """
    return _seed_from(root, (step, round, query, _STEP_DOMAIN))


def derived_seed(root: int, purpose: str, first: int = 0, second: int = 0) -> int:
    """Derives a seed for any purpose other than perturbations, in [0, 2**64).

    Args:
        root: root seed of the run, in [0, 2**64).
        purpose: four ASCII letters that name the purpose; different purposes get different seeds.
        first: first index in [0, 2**32), for example a client.
        second: second index in [0, 2**32), for example an epoch.
    """
    letters = int.from_bytes(purpose.encode("ascii"), "big")
    return _seed_from(root, (first, second, letters, _DERIVED_DOMAIN))


def permutation(seed: int, n: int) -> Tensor:
    """Draws a random permutation of ``range(n)``: int64 [n]."""
    return torch.argsort(_numbers(seed, 0, (n + 1) // 2)[:n], stable=True)


def poisson_sample(seed: int, n: int, expected: int) -> Tensor:
    """Draws a subset of ``range(n)``: each number independently with probability ``expected / n``.

    Args:
        seed: seed in [0, 2**64).
        n: number of candidates, at least 1.
        expected: expected size of the sample, in [1, n]. The probability is rounded down to a multiple of 2**-63.

    Returns:
        The drawn numbers in ascending order, int64 [sample size].

    Raises:
        ValueError: if ``expected`` is not in [1, n].
    """
    if not 1 <= expected <= n:
        raise ValueError(f"a sample of range({n}) must have an expected size from 1 to {n}, got {expected}")
    return (_numbers(seed, 0, (n + 1) // 2)[:n] <= (expected << 63) // n - 1).nonzero().flatten()


def distinct(seed: int, k: int, size: int) -> Tensor:
    """Draws k distinct numbers below ``size``, ascending: int64 [k].

    They are the first k distinct numbers of the stream, so the result for a smaller k is a subset. Memory: about 18
    bytes a number.
    """
    parts: list[Tensor] = [torch.empty(0, dtype=torch.int64, device="cpu")]
    position, missing = 0, k
    while missing:  # as many as are missing are drawn, so there are never more than k
        numbers = _sorted(_numbers_below(size, seed, position, missing)).unique_consecutive()
        position += missing
        for part in filter(Tensor.numel, parts):
            place = torch.searchsorted(part, numbers).clamp_(max=part.numel() - 1)
            numbers = numbers[part[place] != numbers]
        parts.append(numbers)
        missing -= numbers.numel()
    return _sorted(torch.cat(parts))


def _sorted(numbers: Tensor) -> Tensor:
    """Sorts in place; ``torch.sort`` would also make the indices."""
    numbers.numpy().sort()
    return numbers


def _numbers_below(size: int, seed: int, start: int, count: int) -> Tensor:
    """Draws numbers below ``size``, from number ``start`` of the stream on, in windows: int64 [count]."""
    drawn = torch.empty(count, dtype=torch.int64, device="cpu")
    for first in range(0, count, _WINDOW):
        part = drawn[first : first + _WINDOW]
        begin, end = start + first, start + first + part.numel()
        numbers = _numbers(seed, begin // 2, (end + 1) // 2)[begin % 2 :][: part.numel()]
        part.copy_(numbers % size)  # the bias is below 2**-20 for any model
    return drawn


def _numbers(seed: int, start: int, stop: int) -> Tensor:
    """Draws numbers in [0, 2**63), two from each of the blocks [start, stop): int64 [2 * (stop - start)]."""
    words = bits(seed, torch.arange(start, stop, device="cpu"))
    return ((words[:, 0::2] << 31) ^ words[:, 1::2]).reshape(-1)


def _seed_from(root: int, counter: tuple[int, int, int, int]) -> int:
    """Makes a seed from the first two Philox words of a counter, with the root seed as the key."""
    root = check_seed(root)
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
