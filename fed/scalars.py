"""What clients sent in a round, as arrays: a server may have a hundred thousand of them to add up, judge and write."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np


@dataclass(frozen=True, eq=False)
class ByClient:
    """Which row of an array is which client's, and how much of the row.

    Args:
        ids: int64 [n], ascending.
        counts: int64 [n], numbers in each client's row; what lies behind them in the row means nothing.
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

    def _own(self, values: np.ndarray, client: int) -> list[float]:
        """A client's numbers in an array [n, width]."""
        row = self._rows[client]
        found: list[float] = values[row, : self.counts[row]].tolist()
        return found


@dataclass(frozen=True, eq=False)
class ClientScalars(ByClient, Mapping[int, list[float]]):
    """The scalars of some clients; a mapping from a client's id to the list of its own, too.

    Args:
        matrix: float64 [n, width], NaN where a step was not taken, and behind a client's last.
    """

    matrix: np.ndarray

    @classmethod
    def of(cls, scalars: Mapping[int, Sequence[float | None]]) -> "ClientScalars":
        """From each client's own, in any order; NaN, or None, for a step that was not taken."""
        if isinstance(scalars, cls):
            return scalars
        ids = sorted(scalars)
        rows = [scalars[i] for i in ids]
        counts = _integers(map(len, rows), len(rows))
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.float64, count=int(counts.sum()))
        return cls(_integers(ids, len(ids)), counts, _padded(flat, counts))

    @classmethod
    def of_bytes(cls, sent: Mapping[int, bytes]) -> "ClientScalars":
        """From each client's own as fp32, in any order."""
        ids = sorted(sent)
        rows = [sent[i] for i in ids]
        counts = _integers(map(len, rows), len(rows)) // 4
        flat = np.frombuffer(b"".join(rows), dtype=np.float32).astype(np.float64)
        return cls(_integers(ids, len(ids)), counts, _padded(flat, counts))

    def __getitem__(self, client: int) -> list[float]:
        return self._own(self.matrix, client)

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
        """Steps, and queries, that the clients were to take and did not."""
        return int(self.counts.sum() - np.count_nonzero(~np.isnan(self.matrix)))


def _integers(values: Iterator[int] | Sequence[int], count: int) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64, count=count)


def _padded(flat: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows that lie one behind the other, [n, longest], NaN behind the end of each."""
    width = int(counts.max(initial=0))
    if len(flat) == len(counts) * width:
        return flat.reshape(len(counts), width)
    matrix = np.full((len(counts), width), np.nan)
    matrix[np.arange(width) < counts[:, None]] = flat
    return matrix


__all__ = ["ByClient", "ClientScalars"]
