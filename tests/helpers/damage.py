"""Damaged copies of files, to test formats that detect damage."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from hypothesis import strategies as st
from torch import Tensor

from meerkat_engine.engine.checksummed import FileKind, read_checksummed, write_checksummed

Loaded = TypeVar("Loaded")
# Bits of a byte, one after the other, and all of them.
BYTE_CHANGES = (0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xFF)


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


def is_rejected(
    path: Path, load: Callable[[Path], Loaded], error: type[Exception], is_original: Callable[[Loaded], bool]
) -> bool:
    """Whether loading a file raises an error that names it; a file that loads must equal the original."""
    try:
        loaded = load(path)
    except error as raised:
        message = str(raised)
    else:
        assert is_original(loaded)
        return False
    assert str(path) in message
    return True


def assert_changed_bytes_are_rejected(path: Path, rejected: Callable[[], bool], changes: Iterable[int]) -> None:
    """Changes every byte of a safetensors file in several ways; only changed padding of the header may be accepted."""
    data, changes = path.read_bytes(), list(changes)
    count = 0
    for damaged in flips(data, changes):
        path.write_bytes(damaged)
        count += rejected()
    assert count >= (len(data) - header_padding(data)) * len(changes)


def rewrite(
    source: Path, target: Path, kind: FileKind, change: Callable[[dict[str, str], dict[str, Tensor]], object]
) -> None:
    """Copies a file with changed metadata or tensors under a valid checksum."""
    metadata, tensors = read_checksummed(source, kind)
    metadata.pop("format")
    change(metadata, tensors)
    write_checksummed(target, kind, tensors, metadata)
