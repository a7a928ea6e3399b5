"""Safetensors files with a checksum over tensors and metadata: the container of masks, deltas and snapshots.

    checksum = SHA-256(JSON of [[[key, value], ...], [[name, dtype, shape], ...]], a newline, the tensors' bytes)

It covers all metadata except the checksum, sorted by key, and all tensors, sorted by name. The JSON is ASCII without
spaces; dtypes have the names used in the file. Strings in a file are only data and never used as paths.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic_files import write_atomic
from .errors import MeerkatError

_CHECKSUM = "checksum"
_DTYPES = {torch.int64: "I64", torch.float32: "F32"}


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """Description of one kind of file.

    Args:
        name: name of the kind in messages.
        format: format name and version.
        keys: metadata keys besides ``format`` and ``checksum``. A file must have all of them and no others.
        tensors: dtype of each tensor by name; dtypes have the names used in the file.
        optional: names of the tensors that a file may lack.
        error: error class raised for a file that is damaged or of another kind.
        remedy: advice for error messages: how to get a good file.
    """

    name: str
    format: str
    keys: frozenset[str]
    tensors: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    error: type[MeerkatError]
    remedy: str


def write_checksummed(
    path: str | os.PathLike[str], kind: FileKind, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a file atomically. An existing file is replaced if it is of the same kind, in any version, or empty.

    Args:
        path: path of the file.
        kind: kind of the file.
        tensors: tensors by name, on the CPU.
        metadata: value of each of the kind's keys.

    Raises:
        MeerkatError: of the kind's error class, if a metadata string cannot be encoded; ``RunError`` if the file cannot
            be written, or the path is that of another file, a directory, a device or the like.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata_and_format = {"format": kind.format, **metadata}
    try:
        data = save(contiguous, metadata_and_format | {_CHECKSUM: _checksum(metadata_and_format, contiguous)})
    except UnicodeEncodeError as error:
        raise kind.error(
            f"cannot write the {kind.name} {os.fspath(path)!r}: {error.object!r} cannot be encoded as UTF-8"
        ) from error
    write_atomic(Path(path), data, replaces=lambda existing: _is_of_kind(existing, kind))


def _is_of_kind(path: Path, kind: FileKind) -> bool:
    """Tells whether a file is of a kind, in any version of its format."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format", "")
    except (OSError, SafetensorError):
        return False
    return str(found).partition("/")[0] == kind.format.partition("/")[0]


def read_checksummed(path: str | os.PathLike[str], kind: FileKind) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads a file written by ``write_checksummed``.

    Args:
        path: path of the file.
        kind: expected kind of the file.

    Returns:
        metadata: the metadata without the checksum.
        tensors: the tensors by name, in their own memory (not mapped from the file).

    Raises:
        MeerkatError: of the kind's error class, with the file's path, if the file is missing, of another kind or
            version, or damaged anywhere.
    """
    where = f"the {kind.name} {os.fspath(path)!r}"
    if os.path.isdir(path):
        raise kind.error(f"cannot read {where}: it is a directory")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_names(where, kind, metadata, {name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
            # clone: safetensors maps the file, so a later write to the file would change a tensor already checked
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise kind.error(f"cannot read {where}: {error}") from error
    expected = metadata.pop(_CHECKSUM)
    if _checksum(metadata, tensors) != expected:
        raise kind.error(f"{where} is damaged: its content does not match its checksum; {kind.remedy}")
    return metadata, tensors


def _check_names(where: str, kind: FileKind, metadata: Mapping[str, str], dtypes: Mapping[str, str]) -> None:
    if metadata.get("format") != kind.format:
        raise kind.error(
            f"{where} is not of format {kind.format}, the only one this version reads (found format "
            f"{metadata.get('format')!r}); {kind.remedy}"
        )
    expected_keys = kind.keys | {"format", _CHECKSUM}
    if difference := _difference(expected_keys, metadata.keys()):
        raise kind.error(f"{where} is damaged: {difference} in its metadata; {kind.remedy}")
    if difference := _difference(kind.tensors.keys(), dtypes.keys() | kind.optional):
        raise kind.error(f"{where} is damaged: {difference} among its tensors; {kind.remedy}")
    for name, dtype in dtypes.items():
        if dtype != kind.tensors[name]:
            raise kind.error(f"{where} is damaged: {name!r} is {dtype} instead of {kind.tensors[name]}; {kind.remedy}")


def _difference(expected: Set[str], found: Set[str]) -> str | None:
    """Describes unexpected and missing names, or returns None if there are none."""
    parts = [f"unknown {name!r}" for name in sorted(found - expected)]
    parts += [f"no {name!r}" for name in sorted(expected - found)]
    return ", ".join(parts) or None


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    rows = [[name, _DTYPES[tensor.dtype], list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), rows], separators=(",", ":")).encode() + b"\n")
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


__all__ = ["FileKind", "read_checksummed", "write_checksummed"]
