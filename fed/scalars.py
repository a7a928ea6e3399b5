"""The scalars of a round's clients as arrays, for servers with a hundred thousand clients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np


@dataclass(frozen=True, eq=False)
class ByClient:
    """Base of mappings from client ids to rows of arrays.

    Args:
        ids: ids of the clients, int64 [n], ascending. Client ``ids[j]`` has row j.
        counts: number of values in each client's row, int64 [n]. The rest of the row is padding.
    """

    ids: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {client: row for row, client in enumerate(self.ids.tolist())}

    def _row_of(self, values: np.ndarray, client: int) -> list[float]:
        """Returns a client's values from an array [n, width]."""
        row = self._rows[client]
        own: list[float] = values[row, : self.counts[row]].tolist()
        return own


@dataclass(frozen=True, eq=False)
class ClientScalars(ByClient, Mapping[int, list[float]]):
    """The scalars of some clients: a mapping from a client's id to the list of its scalars.

    Args:
        ids: see ``ByClient``.
        counts: see ``ByClient``.
        matrix: the scalars, float64 [n, width]; NaN for a skipped query and in the padding.
    """

    matrix: np.ndarray

    @classmethod
    def from_lists(cls, scalars: Mapping[int, Sequence[float | None]]) -> "ClientScalars":
        """Makes it from each client's list, in any order. NaN or None: the query was skipped."""
        if isinstance(scalars, cls):
            return scalars
        ids = sorted(scalars)
        rows = [scalars[i] for i in ids]
        counts = _integers(map(len, rows), len(rows))
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.float64, count=int(counts.sum()))
        return cls(_integers(ids, len(ids)), counts, _padded(flat, counts))

    @classmethod
    def from_bytes(cls, sent: Mapping[int, bytes]) -> "ClientScalars":
        """Makes it from the bytes of each client's fp32 values, in any order."""
        ids = sorted(sent)
        rows = [sent[i] for i in ids]
        counts = _integers(map(len, rows), len(rows)) // 4
        flat = np.frombuffer(b"".join(rows), dtype=np.float32).astype(np.float64)
        return cls(_integers(ids, len(ids)), counts, _padded(flat, counts))

    def __getitem__(self, client: int) -> list[float]:
        return self._row_of(self.matrix, client)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClientScalars):
            return NotImplemented
        return (
            np.array_equal(self.ids, other.ids)
            and np.array_equal(self.counts, other.counts)
            and np.array_equal(self.matrix, other.matrix, equal_nan=True)
        )

    @property
    def skipped(self) -> int:
        """Number of skipped queries of all clients."""
        return int(self.counts.sum() - np.count_nonzero(~np.isnan(self.matrix)))


def _integers(values: Iterator[int] | Sequence[int], count: int) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64, count=count)


def _padded(flat: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Turns consecutive rows of different lengths into an array [n, longest], padded with NaN."""
    width = int(counts.max(initial=0))
    if len(flat) == len(counts) * width:
        return flat.reshape(len(counts), width)
    matrix = np.full((len(counts), width), np.nan)
    matrix[np.arange(width) < counts[:, None]] = flat
    return matrix


__all__ = ["ByClient", "ClientScalars"]
