"""Fast conversion of many numbers to the text of ``float.__repr__``: the shortest decimal that reads back the same.

This text is the most expensive part of a server's round, so it is computed with NumPy for all scalars together.

The algorithm: a scalar is an fp32 number ``x = m 2^q`` (m of 24 bits), for which everything is exact in 64 bits. With
``P = 8 m 5^k`` and ``s = 3 - q - k``, the 17-digit number ``x 10^k`` is ``P / 2^s``. A decimal reads back as x if its
error is at most half the spacing of float64 there, which is ``5^k / 2^27`` on the scale of P. If n digits suffice,
then so does any larger number of digits. So the algorithm removes one digit after the other for as long as the decimal
still reads back as x.
"""

import numpy as np

_CHUNK = 1 << 15  # numbers converted together, so that intermediate arrays fit into the cache
# Range of absolute values for this algorithm. Python converts all other numbers, and those that are not fp32 numbers.
_LOW, _HIGH = 1e-4, 1e4
_INTEGER_DIGITS, _FRACTION_DIGITS = 4, 20  # maximum number of digits before and after the point in that range
_ROW = np.dtype(
    [("sign", "S1"), ("integer", "<u4"), ("point", "S1"), ("first", "<u4"), ("rest", "<u4", 4), ("comma", "S1")]
)
_POWERS = 10 ** np.arange(20, dtype=np.uint64)
_FIVES = 5 ** np.arange(27, dtype=np.uint64)
_FOUR_DIGITS = np.array([f"{i:04d}".encode() for i in range(10_000)]).view("<u4")


def numbers_to_text(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Converts numbers to text, each followed by a comma; ``null`` for NaN.

    Args:
        values: the numbers, float64 [n].

    Returns:
        All texts, ASCII, one after the other; and the position at which each ends, after its comma, int64 [n].
    """
    parts, lengths = [], [np.zeros(0, dtype=np.int64)]
    for begin in range(0, len(values), _CHUNK):
        chars, kept = _rows(values[begin : begin + _CHUNK])
        parts.append(chars[kept].tobytes())
        lengths.append(np.count_nonzero(kept, axis=1))
    return b"".join(parts), np.concatenate(lengths).cumsum()


def _rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row of characters for each number, uint8 [n, width], and which of them belong to its text, bool."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    sizes = np.abs(values)
    # Below a power of two the spacing of float64 is only half as large; the few in this range are still correct.
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
    """Finds the shortest decimal ``D / 10^k`` of each number.

    Args:
        x: float32 [n], absolute values in [``_LOW``, ``_HIGH``).

    Returns:
        D, with 17 digits (padded with zeros at the end), and k, both uint64 [n].
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
        shorter = _nearest(floor[left], P[left], s[left], power)
        error = np.abs(((shorter << s[left]) - P[left]).view(np.int64))
        reads_back = error <= (five[left] >> 27).astype(np.int64)
        left = left[reads_back]
        if not len(left):
            break
        digits[left] = shorter[reads_back]
    return digits, k


def _nearest(floor: np.ndarray, P: np.ndarray, s: np.ndarray, unit: np.uint64) -> np.ndarray:
    """Rounds ``P / 2^s`` to the nearest multiple of a power of ten, ties to the even multiple.

    Args:
        floor: ``P / 2^s`` rounded down, uint64 [n].
        P: lower 64 bits of P, uint64 [n].
        s: exponents, uint64 [n].
        unit: the power of ten.
    """
    count = floor // unit
    below = count * unit
    # The lower 64 bits suffice, because the differences are below 2^63.
    twice = (P - (below << s)) << 1
    scaled_unit = unit << s
    up = (twice > scaled_unit) | ((twice == scaled_unit) & (count & 1 == 1))
    return np.asarray(below + up * unit)


def _fill(rows: np.ndarray, digits: np.ndarray, k: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Writes ``digits / 10^k`` into the rows.

    Returns:
        Which characters of the rows belong to the text, bool [n, width].
    """
    integer, fraction = np.divmod(digits, _POWERS[np.minimum(k, 19)])  # 10^20 has more than 64 bits
    first, rest = np.divmod(fraction, _POWERS[k - 4])
    rest *= _POWERS[20 - k]
    rows["sign"], rows["point"], rows["comma"] = b"-", b".", b","
    rows["integer"], rows["first"] = _FOUR_DIGITS[integer], _FOUR_DIGITS[first]
    for group in (3, 2, 1, 0):
        rest, four = np.divmod(rest, 10_000)
        rows["rest"][:, group] = _FOUR_DIGITS[four]
    length = np.maximum(k.astype(np.int64) - _zeros(digits), 1)
    size = 1 + sum((integer >= power).astype(np.int64) for power in _POWERS[1:_INTEGER_DIGITS])
    shape = (negative * _INTEGER_DIGITS + size - 1) * _FRACTION_DIGITS + length - 1
    return np.asarray(np.take(_KEPT, shape, axis=0))


def _zeros(digits: np.ndarray) -> np.ndarray:
    """Counts the decimal zeros at the end of each number, int64 [n]. The numbers are positive."""
    zeros, left = np.zeros(len(digits), dtype=np.int64), np.arange(len(digits))
    for power in _POWERS[1:18]:
        left = left[digits[left] % power == 0]
        if not len(left):
            break
        zeros[left] += 1
    return zeros


def _kept() -> np.ndarray:
    """Table of the characters of a row that are kept, by sign, digits before and digits after the point."""
    column = np.arange(_ROW.itemsize)
    negative, integer, fraction = (axis.reshape(-1, 1) for axis in np.indices((2, _INTEGER_DIGITS, _FRACTION_DIGITS)))
    point = 1 + _INTEGER_DIGITS
    kept: np.ndarray = (
        ((column == 0) & (negative == 1))
        | ((column < point) & (column >= point - 1 - integer))
        | ((column >= point) & (column <= point + 1 + fraction))
        | (column == _ROW.itemsize - 1)
    )
    return kept


_KEPT = _kept()

__all__ = ["numbers_to_text"]
