"""Damaged copies of files, to test formats that detect damage."""

from collections.abc import Iterable, Iterator

from hypothesis import strategies as st


def flips(good: bytes, values: Iterable[int]) -> Iterator[bytes]:
    """Yields copies of a file in which one byte is XORed with one of the values: all bytes with all values."""
    for position in range(len(good)):
        for value in values:
            yield good[:position] + bytes([good[position] ^ value]) + good[position + 1 :]


def header_padding(good: bytes) -> int:
    """Number of spaces at the end of a safetensors header: the only bytes that may change without being detected."""
    header = good[: header_size(good)]
    return len(header) - len(header.rstrip(b" "))


def header_size(good: bytes) -> int:
    """Size of a safetensors header including the 8-byte length before it."""
    return 8 + int.from_bytes(good[:8], "little")


def with_damaged_byte(data: st.DataObject, good: bytes) -> tuple[bytes, int]:
    """Changes one byte of a safetensors file, in header or content equally often; returns file and position."""
    position = data.draw(st.integers(0, header_size(good) - 1) | st.integers(header_size(good), len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != good[position]))
    return good[:position] + bytes([value]) + good[position + 1 :], position
