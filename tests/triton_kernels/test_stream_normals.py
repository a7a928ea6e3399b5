"""The Gaussian of the stream: specified bits for every argument, the right distribution, no correlations."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from meerkat_engine.engine import stream
from meerkat_engine.triton_kernels import normal as kernels
from meerkat_engine.triton_kernels import numba_normal as compiled
from meerkat_engine.triton_kernels import philox, reference

from helpers.tensors import same_bits

F = np.float32
ALL_ARGUMENTS = 1 << 24  # number of values of each of the Gaussian's two 24-bit arguments


def spec_radius(k: np.ndarray) -> np.ndarray:
    """Computes the radius as specified, in NumPy, with one rounding per operation."""
    u = (k + 1).astype(F) * F(2.0**-24)
    b = u.view(np.int32)
    e = (b - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (b - (e << np.int32(23))).view(F) - F(1)
    s = f * f
    p = np.full_like(f, F(7.0376836292e-2))
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + F(c)
    e = e.astype(F)
    y = (p * f) * s
    y = y + e * F(-2.12194440e-4)
    y = y - F(0.5) * s
    return np.sqrt(F(-2) * ((f + y) + e * F(0.693359375)))


def spec_sin_cos(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = (t + (1 << 21)) >> 22
    a = (t - (q << 22)).astype(F) * F(3.7450702828238625e-07)
    v = a * a
    sin = (((F(-1.9515295891e-4) * v + F(8.3321608736e-3)) * v - F(1.6666654611e-1)) * v) * a + a
    cos = (((F(2.443315711809948e-5) * v - F(1.388731625493765e-3)) * v + F(4.166664568298827e-2)) * v) * v
    cos = (cos - F(0.5) * v) + F(1)
    s, c = np.where(q & 1, cos, sin), np.where(q & 1, sin, cos)
    return np.where(q & 2, -s, s), np.where((q + 1) & 2, -c, c)


@triton.jit
def _gaussian_kernel(r_ptr, s_ptr, c_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = at.to(tl.uint32) << 8
    sin, cos = philox.sin_cos(word)
    tl.store(r_ptr + at, philox.radius(word))
    tl.store(s_ptr + at, sin)
    tl.store(c_ptr + at, cos)


@numba.njit
def gaussian_compiled(n: int, r: np.ndarray, s: np.ndarray, c: np.ndarray) -> None:
    for i in range(n):
        word = numba.uint32(i << 8)
        bits = np.array([compiled._uniform(word)]).view(np.int32)
        e, bits[0] = compiled._split(bits[0])
        r[i] = compiled._radius(bits.view(np.float32)[0], e)
        s[i], c[i] = compiled._sin_cos(word)


def test_radius_and_angle_have_the_specified_bits_for_every_argument() -> None:
    numbers = np.arange(ALL_ARGUMENTS)
    expected = [spec_radius(numbers), *spec_sin_cos(numbers)]
    words = torch.arange(ALL_ARGUMENTS) << 8
    from_reference = [reference.radius(words), *reference.sin_cos(words)]
    from_kernel = [torch.empty(ALL_ARGUMENTS) for _ in range(3)]
    _gaussian_kernel[(ALL_ARGUMENTS >> 18,)](*from_kernel, BLOCK=1 << 18)
    from_numba = [torch.empty(ALL_ARGUMENTS) for _ in range(3)]
    gaussian_compiled(ALL_ARGUMENTS, *[x.numpy() for x in from_numba])
    for wanted, *found in zip(expected, from_reference, from_kernel, from_numba, strict=True):
        assert all(same_bits(bits, torch.from_numpy(wanted.astype(F))) for bits in found)


def test_radius_and_angle_are_accurate_for_every_argument() -> None:
    words = torch.arange(ALL_ARGUMENTS) << 8
    exact = np.sqrt(-2 * np.log((np.arange(ALL_ARGUMENTS) + 1) / ALL_ARGUMENTS))
    assert np.abs(reference.radius(words).numpy() - exact).max() <= 3.6e-7
    theta = 2 * np.pi * np.arange(ALL_ARGUMENTS) / ALL_ARGUMENTS
    sin, cos = reference.sin_cos(words)
    assert np.abs(sin.numpy() - np.sin(theta)).max() <= 9.1e-8
    assert np.abs(cos.numpy() - np.cos(theta)).max() <= 9.1e-8


def test_low_bits_of_the_words_do_not_matter() -> None:
    words = torch.tensor([0x12345600, 0xFFFFFF00])
    assert same_bits(reference.radius(words), reference.radius(words + 255))
    assert same_bits(reference.sin_cos(words)[0], reference.sin_cos(words + 255)[0])


IDS = torch.cat([torch.arange(3000), torch.arange(2**33 - 5, 2**33 + 2000), torch.tensor([2**40, 2**62])])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_kernel_and_reference_give_the_same_bits(seed: int) -> None:
    wanted = stream.normal(seed, IDS, backend="torch")
    assert same_bits(stream.normal(seed, IDS, backend="triton"), wanted)
    assert same_bits(stream.normal(seed, IDS, backend="numba"), wanted)


@pytest.mark.parametrize("first", [0, 8, 2**32 - 8, 2**62])
@pytest.mark.parametrize("n", [1, 3, 4, 2047, 2048, 5001])
def test_normal_run_in_numba_has_the_bits_of_the_reference(first: int, n: int) -> None:
    runs = [torch.full((n,), float("nan")) for _ in range(2)]
    for out, source in zip(runs, (compiled, reference), strict=True):
        source.normal_run(2**63 + 11, first, out)  # type: ignore[attr-defined]
    assert same_bits(*runs)
    assert same_bits(runs[0], reference.normal(2**63 + 11, torch.arange(n) + first))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits depend neither on the threads of one call nor on the number of concurrent calls."""
    monkeypatch.setattr(compiled, "_PER_THREAD", 1 << 16)
    ids = torch.arange(0, 3 * (1 << 18), 3) + 5
    wanted, before = reference.normal(77, ids), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: compiled.normal(77, ids), range(4)))
        run = torch.empty(ids.numel() + 3)
        compiled.normal_run(77, 4, run)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(z, wanted) for z in found)
    assert same_bits(run, reference.normal(77, torch.arange(run.numel()) + 4))


def test_values_equal_recorded_bits() -> None:
    """The bits were recorded from the NumPy version above, to detect a change of all versions together."""
    words = stream.bits(42, torch.tensor([0, 1 << 32]))
    r = spec_radius((words[:, [0, 0, 2, 2]] >> 8).numpy())
    sin, cos = spec_sin_cos((words[:, [1, 1, 3, 3]] >> 8).numpy())
    expected = np.where([True, False, True, False], r * cos, r * sin).astype(F).reshape(-1)
    ids = torch.cat([torch.arange(4), torch.arange(4) + 2**34])
    assert same_bits(stream.normal(42, ids), torch.from_numpy(expected))
    assert [hex(b) for b in expected.view(np.uint32).tolist()] == GOLDEN


GOLDEN = [
    *("0xbf785e5a", "0x3e46aced", "0xbf9e28cd", "0x3ff6433e"),
    *("0xbfd167b8", "0x3db96b10", "0xbfcb0008", "0x3f6a2dcd"),
]


@pytest.mark.parametrize("block", [64, 256, 1024])
def test_kernel_does_not_depend_on_block_or_grid(block: int) -> None:
    z = torch.full((IDS.numel(),), float("nan"))
    kernels._normal_kernel[(triton.cdiv(IDS.numel(), block),)](
        z, IDS, reference.seed_tensor(7, IDS.device), IDS.numel(), BLOCK=block
    )
    assert same_bits(z, stream.normal(7, IDS))


def test_a_value_depends_only_on_its_id(generator: torch.Generator) -> None:
    all_values = stream.normal(9, IDS)
    order = torch.randperm(IDS.numel(), generator=generator)
    assert same_bits(stream.normal(9, IDS[order]), all_values[order])
    assert same_bits(stream.normal(9, IDS[::17]), all_values[::17])
    assert stream.normal(9, IDS[:0]).numel() == 0


def test_the_global_generator_is_not_used() -> None:
    torch.manual_seed(1)
    state, a = torch.get_rng_state(), stream.normal(3, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same_bits(stream.normal(3, IDS), a)


N = 1 << 20


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return stream.normal(12345, torch.arange(N)).double().numpy()


def test_moments_are_those_of_a_normal(z: np.ndarray) -> None:
    # the bound is four standard errors of mean, variance, skewness and kurtosis of N normals
    for value, truth, deviation in (
        (z.mean(), 0, 1), (z.var(), 1, 2**0.5), (stats.skew(z), 0, 6**0.5), (stats.kurtosis(z), 0, 24**0.5),
    ):  # fmt: skip
        assert abs(value - truth) < 4 * deviation / N**0.5
    assert 4.4 < np.abs(z).max() <= 5.77


@pytest.mark.parametrize("lane", [slice(None), *(slice(i, None, 4) for i in range(4))], ids=["all", *"0123"])
def test_distribution_passes_kolmogorov_smirnov(z: np.ndarray, lane: slice) -> None:
    assert stats.kstest(z[lane], "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64])
def test_neighbouring_ids_are_uncorrelated(z: np.ndarray, lag: int) -> None:
    for a in (z, z**2, np.abs(z)):
        assert abs(np.corrcoef(a[:-lag], a[lag:])[0, 1]) < 4 / N**0.5


@pytest.mark.parametrize("lanes", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], ids=str)
def test_lanes_are_uncorrelated(z: np.ndarray, lanes: tuple[int, int]) -> None:
    a, b = z[lanes[0] :: 4], z[lanes[1] :: 4]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / a.size**0.5
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 4 / a.size**0.5


@pytest.mark.parametrize("other", [12344, 12346, 12345 + 2**32, 12345 ^ 2**63])
def test_seeds_are_uncorrelated(z: np.ndarray, other: int) -> None:
    b = stream.normal(other, torch.arange(N)).double().numpy()
    assert abs(np.corrcoef(z, b)[0, 1]) < 4 / N**0.5
    assert abs(np.corrcoef(z**2, b**2)[0, 1]) < 4 / N**0.5


def test_ids_2_to_the_32_apart_are_uncorrelated(z: np.ndarray) -> None:
    b = stream.normal(12345, torch.arange(N) + 2**32).double().numpy()
    assert abs(np.corrcoef(z, b)[0, 1]) < 4 / N**0.5
    assert abs(b.mean()) < 4 / N**0.5
