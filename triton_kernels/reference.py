"""The kernels in plain torch: the specification, and the implementation that runs without a GPU.

Each operation here has a Triton kernel of the same name and signature, which must produce the same bits.
The normals are those of the perturbation stream, version 1:

    b = id // 4, lane = id % 4
    (x0, x1, x2, x3) = Philox4x32-10(key = seed, counter = (b, 0, 0))            64-bit key and block
    (xa, xb) = (x0, x1) for lanes 0 and 1, (x2, x3) for lanes 2 and 3
    z = r(xa) * cos(theta(xb)) on even lanes, r(xa) * sin(theta(xb)) on odd lanes

Every floating-point operation below is a single, separately rounded IEEE fp32 operation. torch functions that
fuse or approximate (``add(alpha=)``, ``addcmul``, ``sqrt`` in fp32, ``log``, ``sin``, ``cos``) must not be used.

References:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    Moshier, Cephes mathematical library (the polynomials of logf, sinf and cosf).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .elements import ElementTable, Layout

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

_MASK32 = 0xFFFFFFFF
_Words = TypeVar("_Words", Tensor, int)
# Maximum number of normals drawn at a time: enough for torch to use its threads, few enough for a shared cache
# (1.7 times faster than 2**15, as fast as 2**18, at 1.2 M elements; 2 cores, torch 2.13, 2026-11-24).
_CHUNK = 1 << 17
# Maximum number of slots perturbed or updated at a time. It bounds the temporaries (about 30 bytes per element) for
# masks of any size.
_WINDOW = 1 << 22

_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def philox4x32(key: tuple[int, int], counter: tuple[_Words, ...]) -> tuple[_Words, ...]:
    """Computes Philox4x32-10.

    Args:
        key: two words, each in [0, 2**32).
        counter: four words: int64 tensors of one shape, or ints; values in [0, 2**32).

    Returns:
        Four words of the same type and shape as the counter, values in [0, 2**32).
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(PHILOX_ROUNDS):
        # 64-bit products, whose sign bit may be set. c1 and c3 carry their upper halves along until a mask drops them.
        p0 = c0 * PHILOX_M0
        p1 = c2 * PHILOX_M1
        c0 = p1 >> 32
        c0 ^= c1
        c0 ^= k0
        c0 &= _MASK32
        c2 = p0 >> 32
        c2 ^= c3
        c2 ^= k1
        c2 &= _MASK32
        c1, c3 = p1, p0
        k0 = (k0 + PHILOX_W0) & _MASK32
        k1 = (k1 + PHILOX_W1) & _MASK32
    c1 &= _MASK32
    c3 &= _MASK32
    return c0, c1, c2, c3


def bits(seed: int, blocks: Tensor) -> Tensor:
    """Computes the four Philox words of each 64-bit block number.

    Args:
        seed: seed in [0, 2**64).
        blocks: block numbers, int64 [n].

    Returns:
        int64 [n, 4], values in [0, 2**32).
    """
    zero = torch.zeros_like(blocks)
    counter = (blocks & _MASK32, (blocks >> 32) & _MASK32, zero, zero)
    return torch.stack(philox4x32((seed & _MASK32, seed >> 32), counter), dim=-1)


def radius(xa: Tensor) -> Tensor:
    """``sqrt(-2 ln u)`` with ``u = ((xa >> 8) + 1) * 2**-24``, in portable fp32.

    Args:
        xa: Philox words, int64 [n], values in [0, 2**32).

    Returns:
        float32 [n] in [0, 5.77].
    """
    u = ((xa >> 8) + 1).to(torch.float32) * 2.0**-24
    b = u.view(torch.int32)
    e = (b - 0x3F3504F3) >> 23
    f = (b - (e << 23)).view(torch.float32) - 1.0
    s = f * f
    p = torch.full_like(f, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        p = p.mul_(f).add_(coefficient)
    exponent = e.to(torch.float32)
    y = p.mul_(f).mul_(s)
    y = y + exponent * -2.12194440e-4
    y = y - s * 0.5
    ln = (f + y) + exponent * 0.693359375
    # torch's fp32 sqrt on CPU is an approximation; computed in float64, it is correctly rounded.
    return (ln * -2.0).to(torch.float64).sqrt_().to(torch.float32)


def sin_cos(xb: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of ``2 pi (xb >> 8) * 2**-24``, in portable fp32.

    Args:
        xb: Philox words, int64 [n], values in [0, 2**32).

    Returns:
        Two float32 tensors [n] in [-1, 1].
    """
    t = (xb >> 8).to(torch.int32)
    q = (t + (1 << 21)) >> 22
    a = (t - (q << 22)).to(torch.float32) * 3.7450702828238625e-07
    v = a * a
    sin = (((v * -1.9515295891e-4 + 8.3321608736e-3) * v - 1.6666654611e-1) * v) * a + a
    cos = (((v * 2.443315711809948e-5 - 1.388731625493765e-3) * v + 4.166664568298827e-2) * v) * v
    cos = (cos - v * 0.5) + 1.0
    odd = (q & 1) != 0
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    cos = torch.where(((q + 1) & 2) != 0, -cos, cos)
    sin = torch.where((q & 2) != 0, -sin, sin)
    return sin, cos


def _normal_chunk(seed: int, ids: Tensor) -> Tensor:
    """Computes ``normal`` without chunks: float32 [n] for int64 ids [n]."""
    blocks = ids >> 2
    zero = torch.zeros_like(ids)
    x0, x1, x2, x3 = philox4x32((seed & _MASK32, seed >> 32), (blocks & _MASK32, (blocks >> 32) & _MASK32, zero, zero))
    upper = (ids & 2) != 0
    sin, cos = sin_cos(torch.where(upper, x3, x1))
    return radius(torch.where(upper, x2, x0)) * torch.where((ids & 1) != 0, sin, cos)


def _normal_run_chunk(seed: int, blocks: Tensor) -> Tensor:
    """Computes the four normals of each Philox block: float32 [4 * n] for int64 blocks [n]."""
    zero = torch.zeros_like(blocks)
    x0, x1, x2, x3 = philox4x32((seed & _MASK32, seed >> 32), (blocks & _MASK32, (blocks >> 32) & _MASK32, zero, zero))
    z = torch.empty(blocks.numel(), 4, dtype=torch.float32, device=blocks.device)
    for lane, xa, xb in ((0, x0, x1), (2, x2, x3)):
        r, (sin, cos) = radius(xa), sin_cos(xb)
        torch.mul(r, cos, out=z[:, lane])
        torch.mul(r, sin, out=z[:, lane + 1])
    return z.view(-1)


def normal_run(seed: int, first: int, out: Tensor) -> None:
    """Draws ``z`` for consecutive element ids: four normals from each Philox block.

    Args:
        seed: seed in [0, 2**64).
        first: first element id, a multiple of 4.
        out: float32 [n], receives ``z`` at ``first`` to ``first + n - 1``.
    """
    for start in range(0, out.numel(), _CHUNK):
        part = out[start : start + _CHUNK]
        blocks = torch.arange((first + start) // 4, (first + start + part.numel() + 3) // 4, device=out.device)
        part.copy_(_normal_run_chunk(seed, blocks)[: part.numel()])


def normal(seed: int, ids: Tensor) -> Tensor:
    """Draws ``z`` for element ids.

    Args:
        seed: seed in [0, 2**64).
        ids: element ids, int64 [n], not negative, in any order.

    Returns:
        ``z`` at the ids, float32 [n].
    """
    z = torch.empty(ids.numel(), dtype=torch.float32, device=ids.device)
    chunks = max(1, -(-ids.numel() // _CHUNK))
    for out, chunk in zip(z.tensor_split(chunks), ids.tensor_split(chunks), strict=True):
        out.copy_(_normal_chunk(seed, chunk))
    return z


def wrap_seed(seed: int) -> int:
    """Converts a seed in [0, 2**64) to the int64 value with the same 64 bits."""
    return seed - (seed >> 63 << 64)


def seed_tensor(seed: int, device: torch.device) -> Tensor:
    """Makes the int64 [1] tensor with the 64 bits of a seed in [0, 2**64); does not wait for the device."""
    return torch.full((1,), wrap_seed(seed), dtype=torch.int64, device=device)


def seed_of(seed: Tensor) -> int:
    """Converts an int64 [1] tensor back to the seed in [0, 2**64)."""
    return int(seed) & 0xFFFF_FFFF_FFFF_FFFF


class NormalSource(NamedTuple):
    """An implementation of ``normal`` and ``normal_run``; all implementations give the same bits."""

    normal: Callable[[int, Tensor], Tensor]
    normal_run: Callable[[int, int, Tensor], None]


TORCH_SOURCE = NormalSource(normal, normal_run)


def part(values: Tensor, start: int, stop: int) -> Tensor:
    """Returns ``values[start:stop]``. If that is all, as for most tables, it takes no operation."""
    return values if stop - start == values.numel() else values[start:stop]


def scatter_(table: ElementTable, start: int, values: Tensor) -> None:
    """Writes values of slots ``start`` onwards, [n] in the weights' dtype, to the live weights."""
    window = table.window(start, start + values.numel())
    if table.offsets is None or table.layout is not Layout.SCATTERED:
        for weight, piece in zip(window.weights, window.split(values), strict=True):
            weight.copy_(piece)
        return
    offsets = window.split(part(table.offsets, start, start + values.numel()).long())
    for weight, at, piece in zip(window.weights, offsets, window.split(values), strict=True):
        weight.index_copy_(0, at, piece)


def gather(table: ElementTable, start: int, out: Tensor) -> None:
    """Reads the live weights of slots ``start`` onwards into ``out``, [n] in their dtype; skips slots without one."""
    window = table.window(start, start + out.numel())
    if table.offsets is None or table.layout is not Layout.SCATTERED:
        for weight, piece in zip(window.weights, window.split(out), strict=True):
            piece.copy_(weight)
        return
    offsets = window.split(table.offsets[start : start + out.numel()])
    for weight, at, piece in zip(window.weights, offsets, window.split(out), strict=True):
        torch.index_select(weight, 0, at, out=piece)


class WeightAccess(NamedTuple):
    """An implementation of ``scatter_`` and ``gather``."""

    scatter_: Callable[[ElementTable, int, Tensor], None]
    gather: Callable[[ElementTable, int, Tensor], None]


TORCH_ACCESS = WeightAccess(scatter_, gather)

# Draws the normals for the slots [start, stop) of a table: (table, seed, start, stop) -> float32 [stop - start].
# Values in slots without an element are arbitrary.
DrawNormals = Callable[[ElementTable, Tensor, int, int], Tensor]


def table_normals(
    table: ElementTable, seed: Tensor, start: int, stop: int, source: NormalSource = TORCH_SOURCE
) -> Tensor:
    """Draws ``z`` for the slots [start, stop) of a table (a ``DrawNormals``).

    Args:
        table: the table of masked elements.
        seed: seed of ``z``, int64 [1].
        start: first slot.
        stop: end of the slots, exclusive.
        source: implementation that draws the normals.

    Returns:
        float32 [stop - start]; values in slots without an element are arbitrary.
    """
    if table.offsets is not None:
        return source.normal(seed_of(seed), table.ids(start, stop))
    z = torch.zeros(stop - start, dtype=torch.float32, device=table.blocks.device)
    for tensor, low, high in table.tensor_slices(start, stop):
        first = table.bases[tensor] + low - table.starts[tensor]
        source.normal_run(seed_of(seed), first, z[low - start : high - start])
    return z


def windows(table: ElementTable) -> Iterator[tuple[int, int]]:
    """Cuts the slots of a table into windows [start, stop) of bounded size."""
    for start in range(0, table.slots, _WINDOW):
        yield start, min(start + _WINDOW, table.slots)


def _write_weights(table: ElementTable, start: int, values: Tensor, access: WeightAccess) -> None:
    """Casts float32 values to the weights' dtype and writes them to the live weights of slots ``start`` onwards."""
    dtype = table.weights[0].dtype
    access.scatter_(table, start, values if values.dtype == dtype else values.to(dtype))


def restore_(table: ElementTable, master: Tensor, access: WeightAccess = TORCH_ACCESS) -> None:
    """Sets ``w <- cast(master)`` on the masked elements: exact, so nothing drifts.

    Args:
        table: table of the masked elements; their weights are written.
        master: masters, float32 [slots].
        access: writes the weights.
    """
    for start, stop in windows(table):
        _write_weights(table, start, part(master, start, stop), access)


def perturb_(
    table: ElementTable,
    master: Tensor,
    seed: Tensor,
    scale: Tensor,
    draw: DrawNormals = table_normals,
    access: WeightAccess = TORCH_ACCESS,
) -> None:
    """Sets ``w <- cast(master + scale * z)`` on the masked elements.

    Args:
        table: table of the masked elements; their weights are written.
        master: masters, float32 [slots].
        seed: seed of ``z``, int64 [1] with its 64 bits.
        scale: scale of the perturbation, float32 [1]: ``+eps`` or ``-eps``.
        draw: draws the normals.
        access: writes the weights.
    """
    for start, stop in windows(table):
        _write_weights(table, start, part(master, start, stop) + draw(table, seed, start, stop) * scale, access)


def coefficients(losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
    """Computes projected gradient and coefficients from two losses, on their device and without waiting for the host.

    Args:
        losses: losses at ``+eps`` and ``-eps``, float32 [2].
        eps: perturbation scale, float64 [1].
        lr: learning rate of each group, float64 [groups].

    Returns:
        float32 [2 + groups]: mean of the losses; projected gradient ``g = (loss+ - loss-) / (2 eps)``; then ``lr * g``
        for each group. Each value is computed in float64 and rounded once.
    """
    plus, minus = losses.double().split(1)
    g = ((plus - minus) / (2 * eps)).float()
    return torch.cat((((plus + minus) * 0.5).float(), g, (lr * g.double()).float()))


def half_deviation(losses: Tensor) -> Tensor:
    """Computes half the standard deviation of a step's losses, on their device and without waiting for the host.

        m = (l_1 + ... + l_q) / q      v = fp32(((l_1 - m)^2 + ... + (l_q - m)^2) / (q - 1))      s = fp32(sqrt(v))

    in float64 except where fp32 is named, one IEEE operation at a time, the sums from left to right: so the bits are
    those of any device. A scalar is a difference of losses over ``2 * (s / 2)``, by ``coefficients``. Only clients
    compute it: their scalars are recorded, so no replay depends on it.

    Args:
        losses: losses of the queries, float32 [q], q at least 2.

    Returns:
        ``s / 2``, float64 [1]. Infinite where ``s`` is 0, as it is if all losses are equal, so that the scalars are 0;
        NaN where a loss or ``v`` is not finite.
    """
    values = losses.double().split(1)
    mean = values[0]
    for value in values[1:]:
        mean = mean + value
    mean = mean / len(values)
    squares = [(value - mean) * (value - mean) for value in values]
    square = squares[0]
    for other in squares[1:]:
        square = square + other
    variance = (square / (len(values) - 1)).float()
    # torch's sqrt on CPU is an approximation in the last bit; of an fp32 number in float64, it rounds to the right one.
    half = variance.double().sqrt().float().double() * 0.5
    return torch.where(half == 0, torch.inf, torch.where(half.isfinite(), half, torch.nan))


def compare(table: ElementTable, master: Tensor, counts: Tensor, access: WeightAccess = TORCH_ACCESS) -> None:
    """Counts the live weights that something else has written, and the masters that the weights cannot hold.

    Nothing is written to weights or masters. NaN counts as equal to NaN.

    Args:
        table: table of the masked elements.
        master: masters, float32 [slots].
        counts: int64 [2], added to: the number of weights that differ from ``cast(master)``; the number of finite
            masters for which ``cast(master)`` is infinite.
        access: reads the weights.
    """
    for start, stop in windows(table):
        masters = part(master, start, stop)
        wanted = masters.to(table.weights[0].dtype)
        live = wanted.clone()  # slots without an element are equal
        access.gather(table, start, live)
        counts[0] += ((live != wanted) & ~(live.isnan() & wanted.isnan())).sum()
        counts[1] += (wanted.isinf() & masters.isfinite()).sum()


def update_(
    table: ElementTable,
    master: Tensor,
    seed: Tensor,
    c: Tensor,
    draw: DrawNormals = table_normals,
    access: WeightAccess = TORCH_ACCESS,
    *,
    applied: Tensor | None = None,
    number: int = 0,
) -> None:
    """Applies ``master <- master - c * z``, then ``w <- cast(master)``.

    A coefficient that is not finite marks a skipped query: the masters do not change.

    Each window of the table (see ``windows``) counts its updates, in the call that changes its masters, so that no
    exception can separate the two. An operation that was interrupted can be called again with the same arguments: a
    window that already has the update is only written to the weights.

    Args:
        table: table of the masked elements; their weights are written.
        master: masters, float32 [slots]; written.
        seed: seed of ``z``, int64 [1] with its 64 bits.
        c: coefficient, learning rate times projected gradient, float32 [1].
        draw: draws the normals.
        access: writes the weights.
        applied: number of updates that each window has, int32 [windows]; written. None counts nothing.
        number: number of updates before this one.
    """
    for i, (start, stop) in enumerate(windows(table)):
        _update_window(table, master, seed, c, (start, stop), draw, _count(applied, i), number)
        _write_weights(table, start, part(master, start, stop), access)


def update_perturb_(
    table: ElementTable,
    master: Tensor,
    seed: Tensor,
    c: Tensor,
    next_seed: Tensor,
    scale: Tensor,
    draw: DrawNormals = table_normals,
    access: WeightAccess = TORCH_ACCESS,
    *,
    applied: Tensor | None = None,
    number: int = 0,
) -> None:
    """Does ``update_`` and the next ``perturb_`` in one pass: ``w <- cast((master - c * z) + scale * next z)``.

    Args:
        table: table of the masked elements; their weights are written.
        master: masters, float32 [slots]; written.
        seed: seed of ``z``, int64 [1].
        c: coefficient, learning rate times projected gradient, float32 [1].
        next_seed: seed of the next perturbation's ``z``, int64 [1].
        scale: scale of the next perturbation, float32 [1].
        draw: draws the normals.
        access: writes the weights.
        applied: see ``update_``.
        number: see ``update_``.
    """
    for i, (start, stop) in enumerate(windows(table)):
        _update_window(table, master, seed, c, (start, stop), draw, _count(applied, i), number)
        _write_weights(table, start, part(master, start, stop) + draw(table, next_seed, start, stop) * scale, access)


def replay_(
    table: ElementTable,
    master: Tensor,
    seeds: Tensor,
    c: Tensor,
    draw: DrawNormals = table_normals,
    access: WeightAccess = TORCH_ACCESS,
    *,
    applied: Tensor | None = None,
    number: int = 0,
) -> None:
    """Applies many updates in one pass over the elements: the bits of ``update_`` for each (seed, c) in order.

    Args:
        table: table of the masked elements; their weights are written.
        master: masters, float32 [slots]; written.
        seeds: seed of each update, int64 [n].
        c: coefficient of each update, float32 [n].
        draw: draws the normals.
        access: writes the weights.
        applied: see ``update_``.
        number: number of updates before the first one.
    """
    for i, (start, stop) in enumerate(windows(table)):
        for j, (seed, coefficient) in enumerate(zip(seeds, c, strict=True)):
            _update_window(table, master, seed, coefficient, (start, stop), draw, _count(applied, i), number + j)
        _write_weights(table, start, part(master, start, stop), access)


def _count(applied: Tensor | None, window: int) -> Tensor | None:
    """Selects a window's number of updates, int32 [1]."""
    return None if applied is None else part(applied, window, window + 1)


def _update_window(
    table: ElementTable,
    master: Tensor,
    seed: Tensor,
    c: Tensor,
    window: tuple[int, int],
    draw: DrawNormals,
    count: Tensor | None,
    number: int,
) -> None:
    """Updates the masters of one window and its number of updates, unless it has this update already.

    Args:
        table: table of the masked elements.
        master: masters, float32 [slots]; written.
        seed: seed of ``z``, int64 [1].
        c: coefficient, float32 scalar.
        window: first slot and end of the slots.
        draw: draws the normals.
        count: the window's number of updates, int32 [1]; written. None counts nothing.
        number: number of updates before this one.
    """
    if count is not None and int(count) > number:
        return
    targets, changes = [], []
    if math.isfinite(c):
        targets, changes = [part(master, *window)], [draw(table, seed, *window) * c]
    if count is not None:
        targets.append(count)
        changes.append(torch.full_like(count, -1))
    if targets:
        torch._foreach_sub_(targets, changes)  # one call: an exception comes before both or after both


def inner(gradient: Tensor, ids: Tensor, seeds: Tensor, normal: Callable[[int, Tensor], Tensor] = normal) -> Tensor:
    """Computes ``<gradient, z>`` and ``<z, z>`` over elements, for many seeds.

    Each product is exact in float64. Each sum is a binary tree over the elements in order, padded with zeros to a
    power of two: neighbours are added, then neighbouring sums, and so on. So it has the same bits on every device.

    Args:
        gradient: gradient at the elements, float32 [k].
        ids: element ids, int64 [k].
        seeds: seeds of ``z``, int64 [n].
        normal: draws ``z`` for element ids.

    Returns:
        float64 [n, 2]: ``<gradient, z>``, then ``<z, z>`` for each seed.
    """
    g = gradient.double()
    sums = g.new_empty(seeds.numel(), 2)
    for row, seed in zip(sums, seeds, strict=True):
        z = normal(seed_of(seed), ids).double()
        row[0] = tree_sum(g * z)
        row[1] = tree_sum(z * z)
    return sums


def tree_sum(values: Tensor) -> Tensor:
    """Sums along the last dimension in the order of a binary tree (see ``inner``)."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., 0::2] + values[..., 1::2]
    return values.sum(-1) + 0.0  # one value or none is left; + 0.0 makes a zero positive, as padding does


__all__ = [
    "TORCH_ACCESS",
    "TORCH_SOURCE",
    "DrawNormals",
    "NormalSource",
    "WeightAccess",
    "bits",
    "coefficients",
    "compare",
    "gather",
    "half_deviation",
    "inner",
    "normal",
    "normal_run",
    "part",
    "perturb_",
    "philox4x32",
    "radius",
    "replay_",
    "restore_",
    "scatter_",
    "seed_of",
    "seed_tensor",
    "sin_cos",
    "table_normals",
    "tree_sum",
    "update_",
    "update_perturb_",
    "windows",
]
