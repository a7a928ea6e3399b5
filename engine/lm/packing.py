"""How sequences of different lengths are laid out in the rows of a batch, so that few positions are padding."""

import heapq
from collections.abc import Sequence

# Row width at which attention costs as much as the rest of a position's forward pass. Attention grows with the width.
_ATTENTION = 2000
# Share of real tokens that is good enough: no wider rows are tried.
_ENOUGH = 0.97
# Number of parts that a batch is cut into at most, and the positions that another forward pass costs as much as.
_PARTS, _FORWARD = 4, 16


def pack(lengths: Sequence[int], multiple: int = 1, limit: int | None = None) -> tuple[int, list[list[int]]]:
    """Distributes sequences over rows that hold several of them each, such that a forward pass of the rows is cheap.

    For each number of rows, the longest remaining sequence goes to the row with the fewest tokens. Of these layouts the
    one is taken that costs least, its attention included. It never has more positions than one row per sequence.

    Args:
        lengths: number of tokens of each sequence, at least 1 each; at least one sequence.
        multiple: the width is a multiple of this number, so that fewer different widths occur.
        limit: largest width, unless a single sequence is longer; None: no limit.

    Returns:
        The width of the rows, and the sequences in each row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total, most = sum(lengths), -(-sum(lengths) // lengths[order[0]]) + 1
    best: tuple[float, int, list[list[int]]] | None = None
    for number in [len(lengths), *_numbers_of_rows(min(most, len(lengths)))]:
        longest, rows = _spread(lengths, order, number)
        width = -(-longest // multiple) * multiple
        if limit is not None and width > limit:
            width = max(limit, longest)
            if longest > limit and best is not None:
                break  # so are all wider rows
        cost = number * width * (1 + width / _ATTENTION)
        if best is None or cost < best[0]:
            best = cost, width, rows
        if total >= _ENOUGH * number * width:
            break
    assert best is not None
    return best[1:]


def _numbers_of_rows(most: int) -> list[int]:
    """Numbers of rows to try, descending: all small ones, and every eighth or so of the large ones."""
    numbers = []
    while most >= 1:
        numbers.append(most)
        most -= max(1, most // 8)
    return numbers


def _spread(lengths: Sequence[int], order: Sequence[int], number: int) -> tuple[int, list[list[int]]]:
    """Puts each sequence, in the given order, into the row with the fewest tokens.

    Returns:
        The number of tokens of the fullest row, and the sequences in each row.
    """
    rows: list[list[int]] = [[] for _ in range(number)]
    loads = [(0, row) for row in range(number)]
    for i in order:
        load, row = loads[0]
        rows[row].append(i)
        heapq.heapreplace(loads, (load + lengths[i], row))
    return max(loads)[0], rows


def parts_of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Cuts a batch into at most four parts of sequences of like length, such that padding each part costs least.

    Another part is worth it only if it saves more positions than another forward pass costs.

    Args:
        lengths: number of tokens of each sequence; at least one sequence.

    Returns:
        The sequences in each part, ascending.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    # cheapest[n]: cost and cuts of the first n sequences, with the number of parts so far.
    cheapest: list[tuple[int, list[int]]] = [(0, [])] + [
        (n * lengths[order[n - 1]], [n]) for n in range(1, len(order) + 1)
    ]
    for _ in range(_PARTS - 1):
        longer = list(cheapest)
        for end in range(1, len(order) + 1):
            for cut in range(1, end):
                cost = cheapest[cut][0] + (end - cut) * lengths[order[end - 1]] + _FORWARD
                if cost < longer[end][0]:
                    longer[end] = cost, [*cheapest[cut][1], end]
        cheapest = longer
    cuts = cheapest[-1][1]
    return [sorted(order[start:end]) for start, end in zip([0, *cuts], cuts, strict=False)]


__all__ = ["pack", "parts_of_like_length"]
