"""The integers of the stream: Philox4x32-10 against published answers and an independent implementation."""

import pytest
import torch

from meerkat_engine.engine import stream
from meerkat_engine.triton_kernels import normal as kernels
from meerkat_engine.triton_kernels import reference

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 0xDEADBEEFCAFEBABE, 2**64 - 1]
BLOCKS = [0, 1, 2, 1023, 2**30 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**61 - 1]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 after Salmon et al. 2011, figure 2, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [right >> 32 ^ c[1] ^ k[0], right % 2**32, left >> 32 ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox(counter, key) == answer
    words = reference.philox4x32((key[0], key[1]), tuple(torch.tensor([c]) for c in counter))
    assert [int(word) for word in words] == answer


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_philox_of_block_and_seed(seed: int) -> None:
    expected = [philox([b % 2**32, b >> 32, 0, 0], [seed % 2**32, seed >> 32]) for b in BLOCKS]
    assert stream.bits(seed, torch.tensor(BLOCKS)).tolist() == expected
    assert kernels.bits(seed, torch.tensor(BLOCKS)).tolist() == expected


def test_step_seeds_are_philox_of_round_step_and_query() -> None:
    root, round, step, query = 0x0123456789ABCDEF, 5, 9, 2
    words = philox([step, round, query, 0x4D4B5631], [root % 2**32, root >> 32])
    assert stream.step_seed(root, round, step, query) == words[0] | words[1] << 32


def test_step_seeds_depend_on_every_argument() -> None:
    seeds = {
        stream.step_seed(root, round, step, query)
        for root in (0, 1, 2**32)
        for round in range(5)
        for step in range(5)
        for query in range(3)
    }
    assert len(seeds) == 3 * 5 * 5 * 3


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_rejected(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\)"):
        stream.normal(seed, torch.tensor([0]))


def test_a_seed_of_wrong_type_is_rejected() -> None:
    with pytest.raises(TypeError, match="seed must be an integer, got float"):
        stream.bits(1.0, torch.tensor([0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_contains_every_number_once(n: int) -> None:
    order = stream.permutation(3, n)
    assert order.sort().values.tolist() == list(range(n))
    assert n < 1000 or order.tolist() != list(range(n))
