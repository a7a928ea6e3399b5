"""Device functions of the perturbation stream: Philox words, and the portable Gaussian computed from them.

``reference.py`` is the specification. Launch every kernel that uses these functions with ``enable_fp_fusion=False``: a
fused multiply-add would change the last bits.

References:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    Moshier, Cephes mathematical library (the polynomials of logf, sinf and cosf).
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(k0, k1, c0, c1, c2, c3):
    """Computes Philox4x32-10. All arguments and results are uint32; the key words ``k0`` and ``k1`` are scalars."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, block):
    """Computes the four Philox words of each block.

    Args:
        seed: the seed's 64 bits, int64 scalar.
        block: block numbers, int64 tensor.
    """
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    zero = c0 * 0
    return philox4x32(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), c0, c1, zero, zero)


@triton.jit
def radius(xa):
    """``sqrt(-2 ln u)`` with ``u = ((xa >> 8) + 1) * 2**-24``: fp32 from uint32 words."""
    u = ((xa >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    b = u.to(tl.int32, bitcast=True)
    e = (b - 0x3F3504F3) >> 23
    f = (b - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    s = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    exponent = e.to(tl.float32)
    y = (p * f) * s
    y = y + exponent * -2.12194440e-4
    y = y - s * 0.5
    ln = (f + y) + exponent * 0.693359375
    return tl.sqrt_rn(ln * -2.0)


@triton.jit
def sin_cos(xb):
    """Sine and cosine of ``2 pi (xb >> 8) * 2**-24``: fp32 from uint32 words."""
    t = (xb >> 8).to(tl.int32)
    q = (t + (1 << 21)) >> 22
    a = (t - (q << 22)).to(tl.float32) * 3.7450702828238625e-07
    v = a * a
    sin = (((v * -1.9515295891e-4 + 8.3321608736e-3) * v - 1.6666654611e-1) * v) * a + a
    cos = (((v * 2.443315711809948e-5 - 1.388731625493765e-3) * v + 4.166664568298827e-2) * v) * v
    cos = (cos - v * 0.5) + 1.0
    odd = (q & 1) != 0
    s = tl.where(odd, cos, sin)
    c = tl.where(odd, sin, cos)
    # Multiply instead of negating: Triton's unary minus is 0 - x, which loses the sign of a zero.
    return s * tl.where((q & 2) != 0, -1.0, 1.0), c * tl.where(((q + 1) & 2) != 0, -1.0, 1.0)


@triton.jit
def normal_at(seed, ids):
    """Draws ``z`` for element ids: fp32 from int64 ids."""
    x0, x1, x2, x3 = words(seed, ids >> 2)
    upper = (ids & 2) != 0
    sin, cos = sin_cos(tl.where(upper, x3, x1))
    return radius(tl.where(upper, x2, x0)) * tl.where((ids & 1) != 0, sin, cos)


@triton.jit
def normal_run(seed, first, N: tl.constexpr):
    """Draws ``z`` for the ``N`` element ids from ``first``, a multiple of 4: fp32, four from each Philox block."""
    x0, x1, x2, x3 = words(seed, (first >> 2) + tl.arange(0, N // 4))
    lower, upper = radius(x0), radius(x2)
    sin_lower, cos_lower = sin_cos(x1)
    sin_upper, cos_upper = sin_cos(x3)
    even = tl.join(lower * cos_lower, upper * cos_upper)  # lanes 0 and 2
    odd = tl.join(lower * sin_lower, upper * sin_upper)  # lanes 1 and 3
    return tl.reshape(tl.join(even, odd), [N])


__all__ = ["normal_at", "normal_run", "philox4x32", "radius", "sin_cos", "words"]
