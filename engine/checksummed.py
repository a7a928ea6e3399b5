"""Safetensors files under a checksum of everything in them, metadata included: what masks and deltas are kept in.

    checksum = SHA-256(JSON of [[[key, value], ...], [[name, dtype, shape], ...]], a newline, the tensors' bytes)

over all metadata but the checksum in the order of the keys, and the tensors in the order of their names; the JSON is
ASCII without spaces, the dtypes are called as in the file. Strings in a file are only ever read, never taken as paths.
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
    """A kind of file.

    Args:
        name: what messages call it.
        format: its format and version.
        keys: of the metadata beside ``format`` and ``checksum``; a file has them all, and no others.
        tensors: dtype of each, as the file calls it.
        optional: those that a file may lack.
        error: what is raised for a file that is damaged or of another kind.
        remedy: how to come by a good one.
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
    """Writes a file, whole or not at all.

    Args:
        path: of the file.
        kind: of the file.
        tensors: on the CPU.
        metadata: the kind's keys.

    Raises:
        MeerkatError: the kind's, if a string cannot be written; ``RunError`` if the file cannot.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    named = {"format": kind.format, **metadata}
    try:
        data = save(contiguous, named | {_CHECKSUM: _checksum(named, contiguous)})
    except UnicodeEncodeError as error:
        raise kind.error(
            f"cannot write the {kind.name} {os.fspath(path)!r}: {error.object!r} is no text that UTF-8 can hold"
        ) from error
    write_atomic(Path(path), data)


def read_checksummed(path: str | os.PathLike[str], kind: FileKind) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads a file that ``write_checksummed`` wrote: metadata, and tensors with memory of their own.

    Raises:
        MeerkatError: the kind's, naming the file, if it is missing, of another kind or version, or damaged anywhere.
    """
    where = f"the {kind.name} {os.fspath(path)!r}"
    if os.path.isdir(path):
        raise kind.error(f"cannot read {where}: it is a directory")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_names(where, kind, metadata, {name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
            # copied: safetensors maps the file, and what is written to that later would change a tensor already checked
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise kind.error(f"cannot read {where}: {error}") from error
    found = metadata.pop(_CHECKSUM)
    if found != _checksum(metadata, tensors):
        raise kind.error(f"{where} is damaged: its content does not match its checksum; {kind.remedy}")
    return metadata, tensors


def _check_names(where: str, kind: FileKind, metadata: Mapping[str, str], dtypes: Mapping[str, str]) -> None:
    if metadata.get("format") != kind.format:
        raise kind.error(
            f"{where} is not of format {kind.format}, the only one this version reads (found format "
            f"{metadata.get('format')!r}); {kind.remedy}"
        )
    wanted = kind.keys | {"format", _CHECKSUM}
    if difference := _difference(wanted, metadata.keys()):
        raise kind.error(f"{where} is damaged: {difference} in its metadata; {kind.remedy}")
    if difference := _difference(kind.tensors.keys(), dtypes.keys() | kind.optional):
        raise kind.error(f"{where} is damaged: {difference} among its tensors; {kind.remedy}")
    for name, dtype in dtypes.items():
        if dtype != kind.tensors[name]:
            raise kind.error(f"{where} is damaged: {name!r} is {dtype} instead of {kind.tensors[name]}; {kind.remedy}")


def _difference(wanted: Set[str], found: Set[str]) -> str | None:
    words = [f"unknown {name!r}" for name in sorted(found - wanted)]
    words += [f"no {name!r}" for name in sorted(wanted - found)]
    return ", ".join(words) or None


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    rows = [[name, _DTYPES[tensor.dtype], list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), rows], separators=(",", ":")).encode() + b"\n")
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


__all__ = ["FileKind", "read_checksummed", "write_checksummed"]
