"""Damaged copies of a file, for the formats that promise to notice."""

from collections.abc import Iterable, Iterator

from hypothesis import strategies as st


def flips(good: bytes, values: Iterable[int]) -> Iterator[bytes]:
    """A file with each of its bytes changed by each of some values (exclusive or)."""
    for position in range(len(good)):
        for value in values:
            yield good[:position] + bytes([good[position] ^ value]) + good[position + 1 :]


def blanks(good: bytes) -> int:
    """Blanks at the end of a safetensors file's header: all that may change unnoticed."""
    header = good[: header_of(good)]
    return len(header) - len(header.rstrip(b" "))


def header_of(good: bytes) -> int:
    """Length of a safetensors file's header and of the number before it."""
    return 8 + int.from_bytes(good[:8], "little")


def other_byte(data: st.DataObject, good: bytes) -> tuple[bytes, int]:
    """A safetensors file with one other byte, in header and content equally often; and where it is."""
    position = data.draw(st.integers(0, header_of(good) - 1) | st.integers(header_of(good), len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != good[position]))
    return good[:position] + bytes([value]) + good[position + 1 :], position
