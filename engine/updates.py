"""``UpdateLog``: the updates of a training, and what they were applied to. Base model and log give the trained model.

File: JSON Lines. Line 1 is a header, an object; every other line is one update, ``[seed, lr, g]``, in order (see
``docs/formats.md``).
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .atomic_files import write_atomic
from .errors import LedgerError, RunError
from .stream import VERSION

FORMAT = "meerkat-updates/2"
_HEADER = ("format", "stream_version", "mask", "start", "end", "groups", "updates", "checksum")

# Seed of the perturbation, learning rate of the query (lr / queries), projected gradient; see ``UpdateLog``.
Update = tuple[int, float | tuple[float, ...], float]


@dataclass(frozen=True)
class UpdateLog:
    """Updates in order, with the identity of the masked weights before and after them.

    Args:
        mask: digest of the mask.
        start: ``MaskedWeights.digest()`` before the first update.
        updates: (seed, lr, g) of each update. ``seed``: in [0, 2**64). ``lr``: the learning rate of the query, that of
            the step over the number of queries; a finite float with one parameter group, else a tuple with one for each
            group. ``g``: projected gradient, NaN for a skipped query; ``g`` and ``lr * g`` are finite in fp32.
        groups: names of the masked parameters in each parameter group; empty with one group.
        stream_version: version of the perturbation stream.
        end: ``MaskedWeights.digest()`` after the last update; empty where it is not known.

    Raises:
        ValueError: if an update or a group is not as described. The message has the number of the update, from 0.
    """

    mask: str
    start: str
    updates: Sequence[Update]
    groups: tuple[tuple[str, ...], ...] = ()
    stream_version: int = VERSION
    end: str = ""

    def __post_init__(self) -> None:
        _check_groups(self.groups)
        checked = []
        for number, update in enumerate(self.updates):
            try:
                checked.append(_checked(update, len(self.groups)))
            except ValueError as error:
                raise ValueError(f"update {number}: {error}") from error
        object.__setattr__(self, "updates", tuple(checked))
        object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))

    def __add__(self, following: "UpdateLog") -> "UpdateLog":
        """Joins the log of a training and the log of its continuation, such as after a resume.

        Raises:
            LedgerError: if ``following`` has another mask, stream version or other groups, or does not start from the
                weights at which this log ends.
        """
        for what in ("mask", "stream_version", "groups"):
            mine, theirs = getattr(self, what), getattr(following, what)
            if mine != theirs:
                raise LedgerError(f"the log to join has {what} {theirs!r}, the log before it {mine!r}")
        if self.end != following.start:
            raise LedgerError(
                f"the log to join starts from masked weights {following.start[:12]}, the log before it ends with "
                f"{self.end[:12] or 'unknown ones'}; join a log with the log of the training that continued from it"
            )
        return replace(self, updates=(*self.updates, *following.updates), end=following.end)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the log to a file atomically. An existing file is replaced if it is a log or empty.

        Args:
            path: path of the file; its directory must exist.

        Raises:
            RunError: if the file cannot be written, or the path is that of another file, a directory, a device or the
                like.
        """
        lines = b"".join(_line(_to_json(update)) for update in self.updates)
        header = {
            "format": FORMAT,
            "stream_version": self.stream_version,
            "mask": self.mask,
            "start": self.start,
            "end": self.end,
            "groups": self.groups,
            "updates": len(self.updates),
        }
        data = _line(header | {"checksum": _checksum(header, lines)}) + lines
        write_atomic(Path(path), data, replaces=_is_log)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UpdateLog":
        """Reads a log; it has exactly the numbers that were saved.

        Raises:
            RunError: if the file cannot be read, is damaged or of another format; it names the line.
        """
        where = os.fspath(path)
        try:
            header_line, *lines = Path(path).read_bytes().splitlines(keepends=True) or [b""]
        except OSError as error:
            raise RunError(f"cannot read the updates {where}: {error.strerror or error}") from error
        header = _parse_header(header_line, f"{where}, line 1")
        groups = len(header["groups"])
        updates = [_parse_update(line, groups, f"{where}, line {number}") for number, line in enumerate(lines, 2)]
        checksum = header.pop("checksum")
        if checksum != _checksum(header, b"".join(lines)):
            raise RunError(
                f"{where}, line 1: {header['updates']} updates with checksum {str(checksum)[:12]} were written, the "
                f"file has {len(updates)} with another one; the file is damaged"
            )
        plain = {key: header[key] for key in ("mask", "start", "end", "groups", "stream_version")}
        return cls(updates=updates, **plain)


def _check_groups(groups: Any) -> None:
    """Raises ``ValueError`` unless these are the names of several groups' parameters, or of none."""
    names = [name for group in groups for name in group]
    if len(groups) == 1 or len(set(names)) < len(names) or any(type(name) is not str for name in names):
        raise ValueError("groups must be empty, or lists of names for two groups or more, without a name twice")


def _checked(update: Any, groups: int) -> Update:
    """Returns an update as plain Python numbers after checking them; ``groups`` is 0 with one parameter group."""
    try:
        seed, lr, g = update
    except (TypeError, ValueError) as error:
        raise ValueError(f"{update!r} is not (seed, lr, g)") from error
    lrs = tuple(lr) if groups and isinstance(lr, tuple | list) else (lr,)
    if len(lrs) != max(1, groups):
        raise ValueError(f"lr is {lr!r}; with {groups} parameter groups it is a tuple of as many")
    number = int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else -1
    if not 0 <= number < 1 << 64:
        raise ValueError(f"the seed must be an integer in [0, 2**64), got {seed!r}")
    rates = tuple(map(_to_float, lrs))
    if not all(map(math.isfinite, rates)):
        raise ValueError(f"lr must be finite, got {lr!r}")
    scalar = math.nan if _is_nan(g) else _to_float(g)
    if not math.isnan(scalar) and not all(_fits_fp32(value) for value in (scalar, *(rate * scalar for rate in rates))):
        raise ValueError(f"g must be NaN, or g and lr * g finite in fp32, got lr {lr!r} and g {g!r}")
    return number, rates if groups else rates[0], scalar


def _to_float(value: Any) -> float:
    """Converts a number; infinite for what is none, or is too large."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.inf
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_nan(value: Any) -> bool:
    return isinstance(value, Real) and bool(value != value)


def _fits_fp32(value: float) -> bool:
    try:
        struct.pack("<f", value)
    except OverflowError:
        return False
    return math.isfinite(value)


def _is_log(path: Path) -> bool:
    """Tells whether a file is a log, in any version of the format that has a header."""
    beginning = _line({"format": FORMAT.partition("/")[0]}).rstrip(b'"}\n')
    with open(path, "rb") as file:
        return file.read(len(beginning)) == beginning


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _to_json(update: Update) -> list[Any]:
    seed, lr, g = update
    return [seed, lr, None if math.isnan(g) else g]


def _checksum(header: dict[str, Any], lines: bytes) -> str:
    """SHA-256 over the header's line without the checksum, and all other lines."""
    return hashlib.sha256(_line(header) + lines).hexdigest()


def _parse_header(line: bytes, where: str) -> dict[str, Any]:
    header = _parse_json(line, where)
    if isinstance(header, list):
        raise RunError(
            f"{where}: no header, so the file does not say which mask and weights its updates belong to; pass the "
            f"updates themselves to `replay`, on the base model and with the mask that you know to be theirs"
        )
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise RunError(f"{where}: not the header of a log of updates in the format {FORMAT}")
    types = {"stream_version": int, "groups": list, "updates": int} | dict.fromkeys(
        ("format", "mask", "start", "end", "checksum"), str
    )
    if tuple(header) != _HEADER or any(type(header[key]) is not kind for key, kind in types.items()):
        raise RunError(f"{where}: the header must have {', '.join(_HEADER)}, in this order; the file is damaged")
    if line != _line(header):
        raise RunError(f"{where}: not as it was written; the file is damaged")
    try:
        _check_groups(header["groups"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{where}: {error}; the file is damaged") from error
    return header


def _parse_update(line: bytes, groups: int, where: str) -> Update:
    values = _parse_json(line, where)
    if isinstance(values, list) and len(values) == 3 and values[2] is None:
        values[2] = math.nan
    try:
        return _checked(values, groups)
    except ValueError as error:
        raise RunError(f"{where}: {error}; the file is damaged") from error


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: not JSON ({error}); the file is damaged") from error


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


__all__ = ["FORMAT", "Update", "UpdateLog"]
