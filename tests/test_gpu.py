"""The GPU gives the bits of the CPU: single operations, complete steps, and a captured step.

On a machine with a GPU, run ``make test-gpu``. The same tests also run on the CPU, so that
they stay in working order.
"""

import copy
import warnings

import pytest
import torch

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.bench.gpu.words import differing_words
from meerkat_engine.engine import stream
from meerkat_engine.engine.backend import resolve
from meerkat_engine.engine.weights import MaskedWeights
from meerkat_engine.triton_kernels import BLOCK, build_table, reference
from meerkat_engine.triton_kernels.normal import polar

from helpers.models import make_model
from helpers.tensors import same_bits
from helpers.waiting import no_host_waits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SIZES = [BLOCK + 4, 4096, 8]
STEPS = [(2**63 + 5, 0.03), (2**64 - 1, -0.5), (3, 1e-7)]


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def run_all_operations(device: torch.device, backend: str, dtype: torch.dtype, *, dense: bool) -> list[torch.Tensor]:
    """Runs all operations; returns the weights after each, the masters, normals, inner products and coefficients."""
    ops = resolve(backend, device)
    generator = torch.Generator().manual_seed(0)
    live = [(torch.randn(n, generator=generator) * 0.05).to(dtype).to(device) for n in SIZES]
    offsets = None if dense else [torch.arange(0, n, 3) for n in SIZES]
    table = build_table(live, [0, 2**32 - 4, 2**40], offsets)
    master = (torch.randn(table.slots, generator=generator) * 0.05).to(device)
    seeds = torch.cat([reference.seed_tensor(seed, device) for seed, _ in STEPS])
    c = torch.tensor([c for _, c in STEPS], dtype=torch.float32, device=device)
    seen = []

    def record_weights() -> None:
        seen.extend(w.cpu().clone() for w in live)

    ops.perturb_(table, master, seeds[:1], c[:1])
    record_weights()
    ops.update_(table, master, seeds[1:2], c[1:2])
    record_weights()
    ops.update_perturb_(table, master, seeds[:1], c[:1], seeds[2:], c[2:])
    record_weights()
    ops.replay_(table, master, seeds, c)
    record_weights()
    ops.perturb_(table, master, seeds[:1], c[:1])
    ops.restore_(table, master)
    record_weights()
    ids = torch.cat([torch.arange(5000), torch.arange(2**32 - 9, 2**32 + 9), torch.arange(2**62, 2**62 + 9)])
    normals = ops.normal(2**63 + 5, ids.to(device)).cpu()
    products = ops.inner(normals.to(device), ids.to(device), seeds).cpu()
    pair, eps = torch.tensor([0.7637, 0.1878], device=device), torch.tensor([1e-3], dtype=torch.float64, device=device)
    masters = torch.cat([master[low:high].cpu() for _, low, high in table.tensor_slices(0, table.slots)])
    return [*seen, masters, normals, products, ops.coefficients(pair, eps, c.double()).cpu()]


def test_the_search_for_host_waits_is_switched_off_again_although_torch_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if len(modes) == 1:  # torch warns once
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(KeyError), no_host_waits(torch.device("cuda")):
        raise KeyError
    assert modes == ["error", "default"]


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operation_has_the_bits_of_the_cpu(device: torch.device, dtype: torch.dtype, dense: bool) -> None:
    found = run_all_operations(device, "triton", dtype, dense=dense)
    wanted = run_all_operations(torch.device("cpu"), "torch", dtype, dense=dense)
    assert len(found) == len(wanted)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("estimator", "q", "steps"), [("two-point", 1, 3), ("two-point", 3, 1), ("forward-difference", 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_on_the_device_is_replayed_on_the_cpu(
    device: torch.device, dtype: torch.dtype, estimator: str, q: int, steps: int
) -> None:
    model, queue = make_model("llama", dtype), [0.5, 0.25, 1.0, 1.5, 0.125, 0.75]
    base = copy.deepcopy(model)
    mask = SparseMask.random(model, 0.05, 1)
    opt = SparseZO(model.to(device), mask, lr=0.1, seed=4, backend="triton", queries=q, estimator=estimator)
    losses = [torch.tensor(value, device=device) for value in queue]
    with no_host_waits(device):
        opt.step_many([lambda: losses.pop(0)] * steps)
    assert losses == []
    seeds = [stream.step_seed(4, 0, t, j) for t in range(steps) for j in range(q)]
    replay(base, mask, [(seed, 0.1 / q, g) for seed, g in zip(seeds, opt.projected_gradients, strict=True)])
    for a, b in zip(base.parameters(), model.parameters(), strict=True):
        assert same_bits(a, b.cpu())


@pytest.mark.gpu
def test_a_captured_step_can_be_replayed_with_new_values() -> None:
    device = torch.device("cuda")
    model, other = make_model("llama", torch.bfloat16).to(device), make_model("llama", torch.bfloat16).to(device)
    mask = SparseMask.random(model, 0.05, 1)
    weights = MaskedWeights(model, mask)
    ids = torch.arange(60, device=device).view(3, 20) % 90 + 3
    values = weights.values
    seed, lr = values.seeds([1]).clone(), values.numbers([0.1], torch.float64).clone()
    plus, minus = values.numbers([1e-3], torch.float32), values.numbers([-1e-3], torch.float32)
    eps, pair = values.numbers([1e-3], torch.float64), torch.zeros(2, device=device)

    def step() -> torch.Tensor:
        for at, scale in enumerate((plus, minus)):
            weights.perturb_(seed, scale)
            pair[at] = model(input_ids=ids, labels=ids).loss
        record = weights.coefficients(pair, eps, lr)
        weights.update_(seed, record[2:])
        return record

    masters = weights.masters()
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # compiles, and fills the caches
        torch.cuda.current_stream().wait_stream(side)
        weights.set_masters_(masters)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            record = step()
        weights.set_masters_(masters)
        log = []
        for t in range(4):
            seed.copy_(values.seed(100 + t))
            lr.fill_(0.1 / (t + 1))
            graph.replay()
            log.append((100 + t, 0.1 / (t + 1), float(record[1])))
    replay(other, mask, log)
    assert all(g for _, _, g in log)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(a, b)


def test_radius_and_angle_of_every_word_have_the_bits_of_the_cpu(device: torch.device) -> None:
    """All 2**24 on a GPU; a sample in the interpreter."""
    counts = differing_words(device, 1 if device.type == "cuda" else 1001)
    assert counts == {"words": counts["words"], "radius": 0, "sine": 0, "cosine": 0}
    assert counts["words"] == (2**24 if device.type == "cuda" else 16762)


def test_a_wrong_radius_or_angle_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(words: torch.Tensor) -> torch.Tensor:
        found = polar(words)
        found[0, words >> 8 == 2**24 - 1] *= -1  # the radius of the last word is -0
        found[2, 5:7] += 1
        return found

    monkeypatch.setattr("meerkat_engine.bench.gpu.words.polar", wrong)
    assert differing_words(torch.device("cpu"), 2**20) == {"words": 17, "radius": 1, "sine": 0, "cosine": 2}
