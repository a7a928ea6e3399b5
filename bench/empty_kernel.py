"""A kernel that does nothing, to measure the cost of a launch."""

from typing import Any

import triton


@triton.jit  # type: ignore[untyped-decorator]
def empty_kernel(x_ptr: Any) -> None:
    """Does nothing; it takes an argument, as every kernel does."""


__all__ = ["empty_kernel"]
