"""``SparseZO``: the arithmetic of a step, the interface of torch optimizers, and rejected arguments."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.bench.measure import peak_bytes
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError, MaskError, ModelChangedError, NonFiniteLossError
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.weights import MaskedWeights, round_fp32

from helpers.constants import DTYPES
from helpers.losses import BATCH
from helpers.models import make_model
from helpers.tensors import ForbidHostReads, flat_weights, same_bits


def closure_of(model: nn.Module) -> Callable[[], torch.Tensor]:
    return lambda: language_model_loss(model, BATCH)


@pytest.fixture(params=["torch", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_its_formula(architecture: str, dtype: torch.dtype, backend: str) -> None:
    model = make_model(architecture, dtype)
    mask = SparseMask.random(model, 0.05, 1)
    master = flat_weights(model)[mask.ids].float()
    z = stream.normal(stream.step_seed(9, 0, 0), mask.ids)
    seen: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        seen.append(flat_weights(model))
        return torch.tensor([0.75, 0.625][len(seen) - 1])

    untouched = flat_weights(model)
    opt = SparseZO(model, mask, lr=0.01, eps=1e-2, seed=9, backend=backend)
    loss = opt.step(closure)
    assert loss.item() == 0.6875
    g = round_fp32(0.125 / 2e-2)
    assert opt.projected_gradients == [g]
    for live, scale in zip(seen, (1e-2, -1e-2), strict=True):
        assert same_bits(live[mask.ids], (master + z * torch.tensor(scale)).to(dtype))
    c = torch.tensor(0.01 * g, dtype=torch.float32)
    after = master - z * c
    assert same_bits(opt.weights.masters(), after)
    assert same_bits(flat_weights(model)[mask.ids], after.to(dtype))
    changed = torch.zeros(untouched.numel(), dtype=torch.bool)
    changed[mask.ids] = True
    for live in (*seen, flat_weights(model)):
        assert same_bits(live[~changed], untouched[~changed])


def test_all_backends_give_the_same_bits(architecture: str) -> None:
    ends = []
    for backend in ("torch", "numba", "triton"):
        model = make_model(architecture, torch.bfloat16)
        opt = SparseZO(model, SparseMask.random(model, 0.05, 1), lr=1e-2, backend=backend)
        for _ in range(5):
            opt.step(closure_of(model))
        ends.append(flat_weights(model))
    assert all(same_bits(ends[0], other) for other in ends[1:])


def test_the_loss_decreases(llama: nn.Module) -> None:
    opt = SparseZO(llama, SparseMask.from_gradients(llama, [BATCH], 0.05), lr=1e-2)
    losses = [opt.step(closure_of(llama)).item() for _ in range(60)]
    assert losses[-1] < losses[0] - 0.1


def test_the_projected_gradient_is_the_directional_derivative(llama: nn.Module) -> None:
    mask = SparseMask.random(llama, 0.1, 3)
    opt = SparseZO(llama, mask, lr=0.0, eps=1e-3)
    opt.step(closure_of(llama))
    llama.requires_grad_(True)
    language_model_loss(llama, BATCH).backward()
    gradient = torch.cat([p.grad.view(-1) for p in llama.parameters()])[mask.ids]  # type: ignore[union-attr]
    expected = float(gradient.double() @ stream.normal(stream.step_seed(0, 0, 0), mask.ids).double())
    assert opt.projected_gradients[0] == pytest.approx(expected, rel=1e-2)


def trained(model: nn.Module, closures: list[Callable[[], object]], *, many: bool, backend: str) -> SparseZO:
    """Makes an optimizer with two groups and takes one step per closure, halving the learning rate before each."""
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.3}, {"params": rest}]
    opt = SparseZO(model, SparseMask.random(model, 0.05, 1), lr=0.1, seed=4, backend=backend, params=groups)

    def closures_with_halved_lr() -> Iterator[Callable[[], object]]:
        for closure in closures:
            for group in opt.param_groups:
                group["lr"] /= 2
            yield closure

    opt.losses = (
        opt.step_many(closures_with_halved_lr())
        if many
        else [opt.step(closure) for closure in closures_with_halved_lr()]
    )
    return opt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_many_has_the_bits_of_single_steps(dtype: torch.dtype, backend: str) -> None:
    models = [make_model("llama", dtype) for _ in range(2)]
    a, b = (
        trained(model, [closure_of(model)] * 4, many=many, backend=backend)
        for model, many in zip(models, (True, False), strict=True)
    )
    assert a.steps == b.steps == 4
    assert a.projected_gradients == b.projected_gradients
    assert same_bits(torch.stack(a.losses), torch.stack(b.losses))
    assert same_bits(a.weights.masters(), b.weights.masters())
    assert same_bits(flat_weights(models[0]), flat_weights(models[1]))


def test_steps_before_a_failed_step_stay_applied() -> None:
    model, other = make_model(), make_model()
    opt = SparseZO(model, SparseMask.random(model, 0.05, 1), lr=0.1)
    with pytest.raises(NonFiniteLossError, match=r"the loss at \+eps is nan"):
        opt.step_many([closure_of(model), closure_of(model), lambda: float("nan")])
    replayed = SparseZO(other, SparseMask.random(other, 0.05, 1), lr=0.1)
    replayed.step_many([closure_of(other)] * 2)
    assert opt.steps == 2
    assert opt.projected_gradients == replayed.projected_gradients
    assert same_bits(flat_weights(model), flat_weights(other))


def test_a_step_that_overflows_is_not_applied(llama: nn.Module) -> None:
    before, queue = flat_weights(llama), [3e38, -3e38]
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.1)
    with pytest.raises(NonFiniteLossError, match=r"step 0 was not applied: mean loss 0\.0, projected gradient inf"):
        opt.step(lambda: queue.pop(0))
    assert same_bits(flat_weights(llama), before)
    assert (opt.steps, opt.projected_gradients) == (0, [])


def test_on_a_gpu_the_host_does_not_wait_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the steps as on a GPU, in the interpreter: the bits are the same and the host reads no value."""
    models = [make_model("llama", torch.bfloat16) for _ in range(2)]
    wanted = trained(models[0], [closure_of(models[0])] * 3, many=True, backend="triton")
    original_init = SparseZO.__init__

    def init_as_on_a_gpu(self: SparseZO, *arguments: object, **keywords: object) -> None:
        original_init(self, *arguments, **keywords)  # type: ignore[arg-type]
        self._check_immediately = False

    monkeypatch.setattr(SparseZO, "__init__", init_as_on_a_gpu)
    step_many, seeds = SparseZO.step_many, [stream.step_seed(4, 0, t) for t in range(3)]

    def step_many_without_host_reads(self: SparseZO, closures: object) -> list[torch.Tensor]:
        with ForbidHostReads():
            return step_many(self, closures, seeds)  # type: ignore[arg-type]

    monkeypatch.setattr(SparseZO, "step_many", step_many_without_host_reads)
    opt = trained(models[1], [closure_of(models[1])] * 3, many=True, backend="triton")
    assert same_bits(flat_weights(models[0]), flat_weights(models[1]))
    assert opt.projected_gradients == wanted.projected_gradients
    with pytest.raises(AssertionError, match="the host read a value"), ForbidHostReads():
        torch.ones(1).item()


def test_on_a_gpu_a_non_finite_loss_is_reported_when_the_scalars_are_read(backend: str) -> None:
    model, other = make_model(), make_model()
    opt, clean = (SparseZO(m, SparseMask.random(m, 0.05, 1), lr=0.1, backend=backend) for m in (model, other))
    opt._check_immediately = False
    opt.step_many([closure_of(model), lambda: torch.tensor(float("nan")), closure_of(model)])
    clean.step(closure_of(other))
    clean.step(closure_of(other), seed=stream.step_seed(0, 0, 2))
    assert same_bits(flat_weights(model), flat_weights(other))
    with pytest.raises(NonFiniteLossError, match="step 1 was not applied: mean loss nan"):
        _ = opt.projected_gradients
    found = opt.projected_gradients
    assert [found[0], found[2]] == clean.projected_gradients
    assert found[1] != found[1]


def test_a_closure_may_return_the_same_tensor_twice(llama: nn.Module) -> None:
    out = torch.zeros(())
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.0, eps=0.5)
    opt._check_immediately = False
    opt.step(lambda: out.add_(1))
    assert opt.projected_gradients == [-1.0]


def test_a_loss_of_several_numbers_is_rejected(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"one loss, got a tensor of shape \[3\]"):
        SparseZO(llama, SparseMask.dense(llama), lr=0.1).step(lambda: torch.zeros(3))


@pytest.mark.parametrize(("lr", "g"), [(0.1, float("nan")), (0.1, float("inf")), (1e10, 1e30)], ids=str)
def test_an_update_that_fp32_cannot_hold_is_rejected(llama: nn.Module, lr: float, g: float) -> None:
    before, mask = flat_weights(llama), SparseMask.dense(llama)
    with pytest.raises(ValueError, match="finite"):
        SparseZO(llama, mask, lr=lr).apply(1, g)
    if g == g:  # NaN in a log marks a skipped query
        with pytest.raises(ValueError, match=r"finite|which fp32 cannot hold"):
            replay(llama, mask, [(1, lr, g)])
    assert same_bits(flat_weights(llama), before)


def test_lr_zero_changes_nothing(llama: nn.Module) -> None:
    before = flat_weights(llama)
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.0)
    for _ in range(3):
        opt.step(closure_of(llama))
    assert same_bits(flat_weights(llama), before)


def test_replay_gives_the_same_bits(architecture: str, backend: str) -> None:
    model = make_model(architecture, torch.bfloat16)
    base = copy.deepcopy(model)
    mask = SparseMask.random(model, 0.05, 1)
    opt = SparseZO(model, mask, lr=0.1, seed=4)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=6)
    log = []
    for step in range(6):
        lr = opt.param_groups[0]["lr"]
        opt.step(closure_of(model))
        log.append((stream.step_seed(4, 0, step), lr, opt.projected_gradients[-1]))
        schedule.step()
    assert log[0][1] > log[-1][1]
    replay(base, mask, log, backend=backend)
    assert same_bits(flat_weights(base), flat_weights(model))


def test_perturb_restore_and_apply_are_their_formulas(llama: nn.Module) -> None:
    before, mask = flat_weights(llama), SparseMask.random(llama, 0.1, 1)
    opt = SparseZO(llama, mask, lr=0.5)
    opt.perturb(77, 0.25)
    assert same_bits(flat_weights(llama)[mask.ids], before[mask.ids] + stream.normal(77, mask.ids) * 0.25)
    opt.restore()
    assert same_bits(flat_weights(llama), before)
    opt.apply(77, 2.0)
    assert same_bits(flat_weights(llama)[mask.ids], before[mask.ids] - stream.normal(77, mask.ids))
    assert opt.projected_gradients == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_resumes_from_a_state_dict_with_the_same_bits(dtype: torch.dtype) -> None:
    def fresh() -> tuple[nn.Module, SparseZO, torch.optim.lr_scheduler.StepLR]:
        model = make_model(dtype=dtype)
        opt = SparseZO(model, SparseMask.random(model, 0.1, 1), lr=0.1, seed=3)
        return model, opt, torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)

    def steps(model: nn.Module, opt: SparseZO, schedule: torch.optim.lr_scheduler.StepLR, n: int) -> None:
        for _ in range(n):
            opt.step(closure_of(model))
            schedule.step()

    straight = fresh()
    steps(*straight, 8)
    first = fresh()
    steps(*first, 5)
    saved = io.BytesIO()
    torch.save({"opt": first[1].state_dict(), "schedule": first[2].state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second = fresh()
    second[1].load_state_dict(state["opt"])
    second[2].load_state_dict(state["schedule"])
    assert same_bits(flat_weights(second[0]), flat_weights(first[0]))
    assert state["opt"]["state"]["masters"].dtype == torch.float32
    steps(*second, 3)
    assert same_bits(flat_weights(second[0]), flat_weights(straight[0]))
    assert same_bits(second[1].weights.masters(), straight[1].weights.masters())


def test_a_state_of_another_mask_is_rejected(llama: nn.Module) -> None:
    state = SparseZO(llama, SparseMask.random(llama, 0.1, 1), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="the state's mask_digest"):
        SparseZO(llama, SparseMask.random(llama, 0.1, 2), lr=0.1).load_state_dict(state)


def test_parameter_groups_have_their_own_lr(llama: nn.Module, backend: str) -> None:
    before, mask = flat_weights(llama), SparseMask.random(llama, 0.2, 1)
    norms = [p for name, p in llama.named_parameters() if "norm" in name]
    others = [p for name, p in llama.named_parameters() if "norm" not in name]
    opt = SparseZO(llama, mask, lr=0.5, backend=backend, params=[{"params": others}, {"params": norms, "lr": 0.125}])
    opt.apply(5, 2.0)
    rates = torch.cat([torch.full((p.numel(),), 0.125 if "norm" in n else 0.5) for n, p in llama.named_parameters()])
    expected = before[mask.ids] - stream.normal(5, mask.ids) * (rates[mask.ids] * 2.0)
    assert same_bits(flat_weights(llama)[mask.ids], expected)
    assert same_bits(opt.weights.masters(), expected)


def test_groups_must_cover_the_mask(llama: nn.Module) -> None:
    mask = SparseMask.dense(llama)
    with pytest.raises(ValueError, match="has masked elements and is in no parameter group"):
        SparseZO(llama, mask, lr=0.1, params=[{"params": [llama.model.norm.weight]}])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"has a tensor .* that the model does not have"):
        SparseZO(llama, mask, lr=0.1, params=[{"params": [nn.Parameter(torch.zeros(3))]}])
    with pytest.raises(ValueError, match="groups are fixed"):
        SparseZO(llama, mask, lr=0.1).add_param_group({"params": []})


def test_a_model_may_have_mixed_dtypes(llama: nn.Module, backend: str) -> None:
    llama.model.layers[0].mlp.to(torch.bfloat16)  # type: ignore[union-attr, index]
    mask = SparseMask.random(llama, 0.2, 1)
    masters = torch.cat([p.detach().float().view(-1) for p in llama.parameters()])[mask.ids]
    opt = SparseZO(llama, mask, lr=0.5, backend=backend)
    opt.apply(5, 2.0)
    assert same_bits(opt.weights.masters(), masters - stream.normal(5, mask.ids))


@pytest.mark.parametrize("change", ["cast", "move", "replace", "resize"])
def test_a_step_on_a_changed_model_names_the_parameter(llama: nn.Module, change: str) -> None:
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.1)
    if change == "cast":
        llama.to(torch.bfloat16)
        message = (
            r"'model\.embed_tokens\.weight' was moved or cast: it was torch\.float32 on cpu, now it is torch\.bfloat16"
        )
    elif change == "move":
        weight = llama.model.layers[1].mlp.up_proj.weight  # type: ignore[union-attr, index]
        weight.data = weight.data.clone()
        message = r"'model\.layers\.1\.mlp\.up_proj\.weight' was moved .* at another address"
    elif change == "replace":
        llama.model.norm.weight = nn.Parameter(torch.ones(32))  # type: ignore[union-attr]
        message = r"'model\.norm\.weight' was replaced"
    else:
        llama.resize_token_embeddings(120)  # type: ignore[operator]
        message = r"'model\.embed_tokens\.weight' was (replaced|moved)"
    before = flat_weights(llama)
    with pytest.raises(ModelChangedError, match=message):
        opt.step(closure_of(llama))
    assert same_bits(flat_weights(llama), before)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_in_the_closure_leaves_the_weights_restored(llama: nn.Module, error: type[BaseException]) -> None:
    before = flat_weights(llama)
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.1)

    def broken() -> torch.Tensor:
        raise error("x")

    with pytest.raises(error):
        opt.step(broken)
    assert same_bits(flat_weights(llama), before)
    assert opt.steps == 0


@pytest.mark.parametrize("losses", [[float("nan"), 1.0], [1.0, float("inf")]], ids=str)
def test_a_non_finite_loss_leaves_the_weights_restored(llama: nn.Module, losses: list[float]) -> None:
    before = flat_weights(llama)
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.1)
    queue = list(losses)
    with pytest.raises(NonFiniteLossError, match=r"the loss at [+-]eps is (nan|inf)"):
        opt.step(lambda: queue.pop(0))
    assert same_bits(flat_weights(llama), before)
    assert opt.projected_gradients == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": 0.1, "eps": 0.0}, "eps must be finite and positive"),
        ({"lr": 0.1, "seed": -1}, "seed must be in"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_rejected(llama: nn.Module, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseZO(llama, SparseMask.dense(llama), **arguments)  # type: ignore[arg-type]


def test_a_mask_of_another_model_is_rejected(llama: nn.Module) -> None:
    with pytest.raises(MaskError, match="another model"):
        SparseZO(llama, SparseMask.random(make_model("opt"), 0.1, 0), lr=0.1)


def test_an_unknown_backend_is_rejected(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'cuda'"):
        SparseZO(llama, SparseMask.dense(llama), lr=0.1, backend="cuda")


def test_non_contiguous_weights_are_named() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.randn(4, 3).T)
    with pytest.raises(ValueError, match="parameter 'weight' has masked elements and is not contiguous"):
        SparseZO(model, SparseMask.dense(model), lr=0.1)


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_temporaries_take_few_bytes_per_masked_element(name: str) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(4)])
    weights = MaskedWeights(model, SparseMask.random(model, 0.3, 0), name)
    seed, eps = weights.values.seed(1), weights.values.numbers([1e-3], torch.float32)

    def step() -> None:
        for scale in (eps, -eps):
            weights.perturb_(seed, scale)
        weights.update_(seed, eps)

    assert len(weights.mask) == 1_258_291
    assert 4 <= peak_bytes(step, torch.device("cpu")) / len(weights.mask) <= 40


def test_no_temporary_is_as_large_as_the_model() -> None:
    """A step on a model of 8 million elements allocates only a few bytes per masked element besides its forwards."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)])
    opt = SparseZO(model, SparseMask.random(model, 1e-3, 0), lr=0.1)
    opt.step(lambda: 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        opt.step(lambda: 0.0)
    allocations = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    k = len(opt.weights.mask)
    assert allocations
    assert max(allocations) <= 8 * (1 << 15)  # one 64-bit temporary of one chunk
    assert max(allocations) < 8 * 1024 * 1024 * 4 / 100
    assert k == 8389
