"""The GPU gives the bits of the CPU: single operations, complete steps, and a captured step.

On a machine with a GPU, run ``make test-gpu``. The same tests also run on the CPU, so that
they stay in working order.
"""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.bench.gpu.words import differing_words
from meerkat_engine.engine import stream
from meerkat_engine.engine.backend import resolve
from meerkat_engine.engine.captured import BoundLoss
from meerkat_engine.engine.frozen.weight import frozen_weights
from meerkat_engine.engine.lm.quantize import Offload, Quantize, freeze_base
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.weights import MaskedWeights
from meerkat_engine.triton_kernels import BLOCK, build_table, correction, correction_reference, reference
from meerkat_engine.triton_kernels.normal import polar

from helpers.command import call
from helpers.graphs import ImitatedGraphs
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_correction_has_the_bits_of_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn((21, size), generator=generator).to(dtype) for size in (300, 200))
    offsets = torch.cat((torch.arange(0, 300), torch.arange(300, 300 * 200, 97)))  # one long row
    values, base = torch.randn((2, offsets.numel()), generator=generator)
    found, wanted = y.clone().to(device), y.clone()
    rows = correction.correction_rows(offsets.to(device), 300)
    correction.correct_(x.to(device), found, rows, values.to(device), base.to(device))
    correction_reference.correct_(x, wanted, correction_reference.correction_rows(offsets, 300), values, base)
    assert not same_bits(wanted, y)
    assert same_bits(found.cpu(), wanted)


@pytest.mark.parametrize(
    ("estimator", "q", "steps"),
    [("two-point", 1, 3), ("two-point", 3, 1), ("forward-difference", 2, 2), ("normalized-difference", 2, 2)],
    ids=str,
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


class Captured:
    """A tiny Llama whose steps are captured: by a GPU, or by an imitation on the CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        self.device, self.model = device, make_model("llama", dtype).to(device)
        self.base = make_model("llama", dtype)
        self.mask = SparseMask.random(self.base, 0.05, 1)
        self.opt = SparseZO(self.model, self.mask, **{"lr": 0.05, "eps": 1e-2, "seed": 4, **options})  # type: ignore[arg-type]
        if device.type == "cpu":
            ImitatedGraphs(self.opt)

    def loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The loss with a 4-D mask, which transformers does not look into."""
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def inputs(self, i: int, length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
        ids = (torch.arange(3 * length) * (i + 1)).view(3, length) % 90 + 3
        dtype = next(self.model.parameters()).dtype
        mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(3, 1, -1, -1)
        return ids.to(self.device), mask.contiguous().to(self.device)

    def steps(self, *inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.opt.step_many(BoundLoss(self.loss, *each) for each in inputs)

    def check(self) -> None:
        """The log leads to the same weights on the CPU."""
        replay(self.base, self.mask, self.opt.log, "torch")
        for a, b in zip(self.base.parameters(), self.model.parameters(), strict=True):
            assert same_bits(a, b.detach().cpu())


@pytest.mark.parametrize(
    "options",
    [{}, {"queries": 2}, *({"queries": 2, "estimator": f"{kind}-difference"} for kind in ("forward", "normalized"))],
    ids=["one", "two", "forward", "normalized"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_steps_have_the_bits_of_other_steps(
    device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    runs = [Captured(device, dtype, **options, capture=capture) for capture in ("auto", "off")]
    for run in runs:
        run.steps(*[run.inputs(i) for i in range(3)])
        run.opt.param_groups[0]["lr"] = 0.02
        more = [run.inputs(i, length) for i, length in ((3, 20), (4, 12), (5, 12), (6, 20))]
        with no_host_waits(device) if run.opt.capture == "off" else nullcontext():  # a capture and its check wait
            run.steps(*more)
        run.steps(*more)
        run.check()
    captured, plain = runs
    assert captured.opt.not_captured is None
    assert (captured.opt.captured_steps, plain.opt.captured_steps) == (9, 0)
    assert captured.opt.projected_gradients == plain.opt.projected_gradients
    assert len(set(plain.opt.projected_gradients)) > 9


def test_captured_steps_do_not_make_the_host_wait(device: torch.device) -> None:
    run = Captured(device)
    inputs = [run.inputs(i) for i in range(4)]
    run.steps(*inputs)
    with no_host_waits(device):
        run.steps(*inputs)
    assert run.opt.captured_steps == 7
    run.check()


def test_graphs_beyond_the_bound_are_dropped(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_engine.engine.captured.MAX_PROGRAMS", 2)
    run = Captured(device)
    with pytest.warns(UserWarning, match="inputs of more than 2 shapes"):
        run.steps(*[run.inputs(i, length) for length in (8, 10, 12, 8) for i in range(3)])
    assert run.opt.captured_steps == 8
    assert len(run.opt._captured._programs) == 2
    run.check()


def test_a_loss_that_is_not_finite_in_a_captured_step_changes_nothing(device: torch.device) -> None:
    run = Captured(device, nonfinite="skip")
    good, bad = [run.inputs(i) for i in range(3)], run.inputs(3)
    bad[1].fill_(float("nan"))
    run.steps(*good, bad, *good)
    assert [g != g for g in run.opt.projected_gradients] == [False] * 3 + [True] + [False] * 3
    assert run.opt.captured_steps == 6
    run.check()


@pytest.mark.parametrize("launched", [False, True])
def test_an_interrupted_replay_is_completed(device: torch.device, launched: bool) -> None:
    run, other = Captured(device), Captured(device)
    inputs = [run.inputs(i) for i in range(4)]
    run.steps(*inputs)
    (program,) = run.opt._captured._programs.values()
    replay_graph = program.replay
    assert replay_graph is not None

    def interrupted() -> None:
        if launched:
            replay_graph()
        raise KeyboardInterrupt

    program.replay = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.steps(*inputs)
    assert run.opt.steps == 4
    program.replay = replay_graph
    run.steps(*inputs)
    other.steps(*inputs, *inputs)
    run.check()
    assert run.opt.projected_gradients == other.opt.projected_gradients


def test_a_loss_that_cannot_be_captured_is_not_and_says_why(device: torch.device) -> None:
    run = Captured(device)
    inputs = [run.inputs(i) for i in range(4)]

    def reads(*each: torch.Tensor) -> torch.Tensor:
        loss = run.loss(*each)
        assert loss.item() > 0
        return loss

    with pytest.warns(UserWarning, match="not captured as a CUDA graph: recording it raised"):
        run.opt.step_many([BoundLoss(reads, *each) for each in inputs])
    assert run.opt.captured_steps == 0
    run.steps(*inputs)  # the device is as it was: another loss is captured
    assert run.opt.captured_steps == 3
    run.check()


def test_a_run_on_the_device_has_a_ledger_that_the_cpu_replays(device: torch.device, tmp_path: Path) -> None:
    run = tmp_path / "r"
    result = call("run", "--device", device.type, "--rounds", "3", "--calibration-texts", "64", "--output", run)
    assert result.exit_code == 0, result.output
    assert ("local steps are replayed from CUDA graphs" in result.output) == (device.type == "cuda")
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace('device = "cuda"', 'device = "cpu"'))  # though there is a GPU
    replayed = call("replay", run)
    assert replayed.exit_code == 0, replayed.output
    assert "the same bits as at the end of the run" in replayed.output


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


@pytest.mark.parametrize("points", ["separate", "together"])
@pytest.mark.parametrize("kind", ["as-stored", "int8", "nf4"])
def test_steps_over_read_only_weights_are_those_over_plain_ones(device: torch.device, kind: str, points: str) -> None:
    """Bit for bit where the points are separate, and replayed on the CPU from the scalars."""
    model = make_model("llama", torch.bfloat16)
    on_cpu = copy.deepcopy(model)
    freeze_base(model, Quantize(kind), torch.float32, device)
    freeze_base(on_cpu, Quantize(kind), torch.float32, torch.device("cpu"))
    assert fingerprint(model) == fingerprint(on_cpu)
    plain = make_model("llama", torch.float32)
    for name, parameter in plain.named_parameters():
        parameter.data = frozen_weights(on_cpu)[name].dense()
    plain.to(device)
    mask = SparseMask.random(plain, 0.05, 1)
    ids = torch.arange(5, 45, device=device).view(2, 20)
    opts = [
        SparseZO(net, mask, lr=0.1, seed=4, frozen=True, points=at)
        for net, at in ((model, points), (plain, "separate"))
    ]
    for _ in range(3):
        for opt, net in zip(opts, (model, plain), strict=True):
            opt.step(lambda net=net: net(input_ids=ids, labels=ids).loss)
    mine, theirs = (torch.tensor(opt.projected_gradients) for opt in opts)
    assert torch.allclose(mine, theirs, atol=0.02)
    assert points == "together" or torch.equal(mine, theirs)
    replay(on_cpu, mask, opts[0].log)
    assert fingerprint(on_cpu) == fingerprint(model)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_have_the_bits_of_those_on_the_gpu(offload: str) -> None:
    device, scalars = torch.device("cuda"), []
    for where in ("none", offload):
        model = make_model("llama", torch.bfloat16)
        freeze_base(model, Quantize.NF4, torch.bfloat16, device, offload=Offload(where))
        opt = SparseZO(model, SparseMask.random(model, 0.05, 1, frozen=True), lr=0.1, frozen=True)
        ids = torch.arange(5, 45, device=device).view(2, 20)
        opt.step_many([lambda model=model, ids=ids: model(input_ids=ids, labels=ids).loss.float()] * 3)
        scalars.append(opt.projected_gradients)
    assert scalars[0] == scalars[1]
