"""What the stream's public functions accept."""

from typing import Any

import pytest
import torch

from meerkat_engine import stream


@pytest.mark.parametrize(
    "ids",
    [
        torch.arange(4, dtype=torch.int32),
        torch.arange(4, dtype=torch.uint8),
        torch.arange(4.0),
        torch.arange(4).view(2, 2),
        torch.tensor(4),
    ],
    ids=lambda ids: f"{ids.dtype} {list(ids.shape)}",
)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_ids_must_be_int64(ids: torch.Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match=r"ids must be int64 \[n\], got .*; use ids.long\(\)"):
        stream.normal(7, ids, backend)


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_ids_must_not_be_negative(backend: str) -> None:
    with pytest.raises(ValueError, match="ids must not be negative, got -3"):
        stream.normal(7, torch.tensor([5, -3, 0]), backend)
    assert stream.normal(7, torch.tensor([], dtype=torch.int64), backend).shape == (0,)


@pytest.mark.parametrize("blocks", [torch.tensor([-1]), torch.tensor([1], dtype=torch.int32)], ids=str)
def test_block_numbers_must_be_int64_and_not_negative(blocks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="blocks must"):
        stream.bits(7, blocks)


@pytest.mark.parametrize("seed", [1.0, "1", None, torch.tensor(1.0), [1]], ids=str)
def test_seeds_must_be_integers(seed: Any) -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        stream.normal(seed, torch.arange(4))
