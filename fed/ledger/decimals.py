"""Many numbers as JSON has them, each the text of ``float.__repr__``: the shortest decimal that reads back the same.

That text costs a server more than all else it does in a round. A scalar is an fp32 number, and of those all is exact in
64 bits: with ``x = m 2^q`` (m of 24 bits), ``P = 8 m 5^k`` and ``s = 3 - q - k``, the 17-digit number ``x 10^k`` is
``P / 2^s``. A decimal reads back as x if it is off by no more than half the spacing of float64 there, which is
``5^k / 2^27`` on P's scale. Where n digits do, more do as well: so drop one after the other for as long as they do.
"""

import numpy as np

_CHUNK = 1 << 15  # numbers at a time, so that what is between lies in the cache
_LOW, _HIGH = 1e-4, 1e4  # sizes between which this is done; others, and what is no normal fp32 number, go to Python
_WHOLE, _FRACTION = 4, 20  # digits before and behind the point: all that a size between the two can need
_ROW = np.dtype(
    [("sign", "S1"), ("whole", "<u4"), ("point", "S1"), ("first", "<u4"), ("rest", "<u4", 4), ("comma", "S1")]
)
_POWERS = 10 ** np.arange(20, dtype=np.uint64)
_FIVES = 5 ** np.arange(27, dtype=np.uint64)
_FOUR_DIGITS = np.array([f"{i:04d}".encode() for i in range(10_000)]).view("<u4")


def texts(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The texts of some numbers, a comma behind each; ``null`` for NaN.

    Args:
        values: float64 [n].

    Returns:
        The texts, ASCII, and where each ends, its comma included: int64 [n].
    """
    parts, lengths = [], [np.zeros(0, dtype=np.int64)]
    for begin in range(0, len(values), _CHUNK):
        chars, kept = _rows(values[begin : begin + _CHUNK])
        parts.append(chars[kept].tobytes())
        lengths.append(np.count_nonzero(kept, axis=1))
    return b"".join(parts), np.concatenate(lengths).cumsum()


def _rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row of characters for each number, uint8 [n, width], and which of them belong to its text."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    sizes = np.abs(values)
    # Below a power of two the spacing of float64 is half; the few in this range come out right as well.
    easy = (single == values) & (sizes >= _LOW) & (sizes < _HIGH)
    digits, k = _shortest(np.where(easy, single, np.float32(1.5)))
    rows = np.empty(len(values), dtype=_ROW)
    kept = _fill(rows, digits, k, values < 0)
    chars = rows.view(np.uint8).reshape(len(values), _ROW.itemsize)
    hard = np.flatnonzero(~easy)
    if len(hard):
        others = [b"null," if x != x else f"{x!r},".encode() for x in values[hard].tolist()]
        width = _ROW.itemsize
        chars[hard] = np.array(others, dtype=f"S{width}").view(np.uint8).reshape(len(hard), width)
        kept[hard] = np.arange(width) < np.fromiter(map(len, others), dtype=np.int64)[:, None]
    return chars, kept


def _shortest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shortest decimal ``D / 10^k`` of each number: D, of 17 digits with zeros at the end, and k; uint64 [n].

    Args:
        x: float32 [n], sizes from ``_LOW`` to ``_HIGH``.
    """
    bits = x.view(np.uint32)
    k = np.full(len(x), 20, dtype=np.uint64)
    for power in range(-3, 4):
        k -= np.abs(x).astype(np.float64) >= 10.0**power
    m = ((bits & 0x7FFFFF | 0x800000) << 3).astype(np.uint64)
    s = (153 - (bits >> 23 & 0xFF).astype(np.int64) - k.astype(np.int64)).astype(np.uint64)
    five = _FIVES[k]
    P = m * five  # its lower 64 bits
    low = m * (five & 0xFFFFFFFF)
    high = m * (five >> 32) + (low >> 32)
    floor = (high << (32 - s)) | ((low & 0xFFFFFFFF) >> s)
    digits = _nearest(floor, P, s, np.uint64(1))
    left = np.arange(len(x))
    for power in _POWERS[1:17]:
        found = _nearest(floor[left], P[left], s[left], power)
        off = np.abs(((found << s[left]) - P[left]).view(np.int64))
        fits = off <= (five[left] >> 27).astype(np.int64)
        left = left[fits]
        if not len(left):
            break
        digits[left] = found[fits]
    return digits, k


def _nearest(floor: np.ndarray, P: np.ndarray, s: np.ndarray, unit: np.uint64) -> np.ndarray:
    """The multiple of a power of ten that is nearest to ``P / 2^s``, of two the even one.

    Args:
        floor: ``P / 2^s`` rounded down, uint64 [n].
        P: its lower 64 bits, uint64 [n].
        s: uint64 [n].
        unit: the power.
    """
    count = floor // unit
    below = count * unit
    # The lower bits decide: what is between is less than 2^63.
    twice = (P - (below << s)) << 1
    whole = unit << s
    up = (twice > whole) | ((twice == whole) & (count & 1 == 1))
    return np.asarray(below + up * unit)


def _fill(rows: np.ndarray, digits: np.ndarray, k: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Writes ``digits / 10^k``; which characters of the rows belong to it, bool [n, width]."""
    whole, fraction = np.divmod(digits, _POWERS[np.minimum(k, 19)])  # 10^20 has more than 64 bits
    first, rest = np.divmod(fraction, _POWERS[k - 4])
    rest *= _POWERS[20 - k]
    rows["sign"], rows["point"], rows["comma"] = b"-", b".", b","
    rows["whole"], rows["first"] = _FOUR_DIGITS[whole], _FOUR_DIGITS[first]
    for group in (3, 2, 1, 0):
        rest, four = np.divmod(rest, 10_000)
        rows["rest"][:, group] = _FOUR_DIGITS[four]
    length = np.maximum(k.astype(np.int64) - _zeros(digits), 1)
    size = 1 + sum((whole >= power).astype(np.int64) for power in _POWERS[1:_WHOLE])
    shape = (negative * _WHOLE + size - 1) * _FRACTION + length - 1
    return np.asarray(np.take(_KEPT, shape, axis=0))


def _zeros(digits: np.ndarray) -> np.ndarray:
    """How many zeros some numbers end in, all positive: int64 [n]."""
    zeros, left = np.zeros(len(digits), dtype=np.int64), np.arange(len(digits))
    for power in _POWERS[1:18]:
        left = left[digits[left] % power == 0]
        if not len(left):
            break
        zeros[left] += 1
    return zeros


def _kept() -> np.ndarray:
    """Which characters of a row are kept, by sign, digits before the point and digits behind it."""
    column = np.arange(_ROW.itemsize)
    negative, whole, fraction = (axis.reshape(-1, 1) for axis in np.indices((2, _WHOLE, _FRACTION)))
    point = 1 + _WHOLE
    kept: np.ndarray = (
        ((column == 0) & (negative == 1))
        | ((column < point) & (column >= point - 1 - whole))
        | ((column >= point) & (column <= point + 1 + fraction))
        | (column == _ROW.itemsize - 1)
    )
    return kept


_KEPT = _kept()

__all__ = ["texts"]
