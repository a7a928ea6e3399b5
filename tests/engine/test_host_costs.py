"""What the host does beside the forwards, as counts: of torch's operations, draws, copies, digests, rankings."""

import copy
import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine import backend as backends
from meerkat_engine.engine import mask as mask_module
from meerkat_engine.engine import sensitivity
from meerkat_engine.engine.backend import resolve
from meerkat_engine.triton_kernels import reference

from helpers.regression import cast_masters, live_weights
from helpers.tensors import flat_weights, same_bits


class CountOperations(TorchDispatchMode):
    """Counts torch's operations, those of a closure excepted if it returns a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def make_optimizer(backend: str, layers: int, **options: Any) -> SparseZO:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).eval()
    return SparseZO(model, SparseMask.random(model, 0.5, seed=1), lr=0.1, backend=backend, nonfinite="skip", **options)


def losses(n: int) -> list[Callable[[], float]]:
    """n closures that compute nothing."""
    numbers = itertools.cycle([0.5, 0.25, 0.75])
    return [lambda: next(numbers)] * n


def count_of(action: Callable[[], object]) -> int:
    with CountOperations() as operations:
        action()
    return operations.count


def operations_of_a_step(backend: str, layers: int) -> float:
    """Mean over the steps of ``step_many``, whose own cost is left out, after a first one that fills the caches."""
    opt = make_optimizer(backend, layers)
    opt.step_many(losses(4))
    few, many = (count_of(lambda n=n: opt.step_many(losses(n))) for n in (2, 10))
    return (many - few) / 8


def test_a_step_takes_few_operations_and_none_for_each_tensor() -> None:
    few, many = operations_of_a_step("numba", 2), operations_of_a_step("numba", 40)
    assert few == many
    assert few <= 34


def test_without_compiled_code_a_step_takes_one_write_a_tensor_and_pass() -> None:
    """And one more a pass to cut values and offsets into tensors: ``split`` is one operation."""
    few, many = operations_of_a_step("torch", 2), operations_of_a_step("torch", 40)
    assert (many - few) / (80 - 4) == pytest.approx(2, abs=0.01)  # weight and bias of each layer, two passes a step


@pytest.mark.parametrize("operation", ["check", "saved", "put_back_"])
def test_what_a_client_does_before_and_after_its_steps_does_not_depend_on_the_number_of_tensors(operation: str) -> None:
    counts = []
    for layers in (2, 40):
        weights = make_optimizer("numba", layers).weights
        saved = weights.saved()
        actions: dict[str, Callable[[], object]] = {
            "check": weights.check_not_overwritten,
            "saved": weights.saved,
            "put_back_": lambda weights=weights, saved=saved: weights.put_back_(saved),  # type: ignore[misc]
        }
        actions[operation]()
        counts.append(count_of(actions[operation]))
    assert counts[0] == counts[1] <= 25


def test_put_back_masters_have_their_bits_and_the_saved_ones_stay() -> None:
    opt = make_optimizer("torch", 2)
    opt.step(*losses(1))
    masters, saved = opt.weights.masters(), opt.weights.saved()
    for _ in range(2):
        opt.weights.update_(opt.weights.values.seed(5), torch.tensor([0.3]))
        assert not same_bits(opt.weights.masters(), masters)
        opt.weights.put_back_(saved)
        assert same_bits(opt.weights.masters(), masters)
        opt.weights.check_not_overwritten()


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the source of normals; returns the list of the seeds that are drawn from now on."""
    seeds: list[int] = []

    def normal(seed: int, ids: torch.Tensor) -> torch.Tensor:
        seeds.append(seed)
        return reference.normal(seed, ids)

    monkeypatch.setattr(reference, "TORCH_SOURCE", reference.NormalSource(normal, reference.normal_run))
    return seeds


def test_clients_of_a_round_and_its_replay_draw_each_seed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = count_draws(monkeypatch)
    opt = make_optimizer("torch", 2)
    saved, seeds = opt.weights.saved(), [11, 12, 13]
    for _ in range(4):
        opt.step_many(losses(3), seeds)
        opt.weights.put_back_(saved)
    opt.weights.replay_(seeds, [0.5, -0.25, 0.125])
    assert drawn == seeds


def test_normals_are_kept_within_a_bound_and_the_bits_do_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for bound in (0, 1000, 1 << 21):
        monkeypatch.setattr(backends, "_KEPT_FOR_LATER", bound)
        opt = make_optimizer("torch", 3)
        (group,) = opt.weights._launch_groups
        for _ in range(2):
            live = opt.weights.live
            opt.step_many([lambda live=live: live().sum().item()] * 12, list(range(12)))  # type: ignore[misc]
        kept = group.backend._kept[id(group.table)][1]  # type: ignore[attr-defined]
        assert len(kept) == max(1, min(12, bound // group.table.slots))
        ends.append(opt.weights.masters())
    assert all(same_bits(end, ends[0]) for end in ends)


def test_a_replay_of_nothing_writes_nothing() -> None:
    opt = make_optimizer("torch", 2)
    with CountOperations() as operations:
        opt.weights.replay_([], [])
    assert operations.count == 0
    opt.weights.perturb_(opt.weights.values.seed(3), torch.tensor([1e-2]))
    assert not same_bits(live_weights(opt), cast_masters(opt))
    opt.weights.replay_([], [])
    assert same_bits(live_weights(opt), cast_masters(opt))


def test_the_ids_of_a_mask_are_hashed_once_and_again_when_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(8, 8)
    mask, hashed = SparseMask.random(model, 0.2, seed=1), []

    class Counting:
        def sha256(self, *of: Any) -> Any:
            hashed.append(1)
            return hashlib.sha256(*of)

    monkeypatch.setattr(mask_module, "hashlib", Counting())
    first = mask.digest
    opt = SparseZO(model, mask, lr=0.1, backend="torch")
    base = copy.deepcopy(model)
    opt.step_many(losses(2))
    replay(base, mask, opt.log, "torch")
    assert mask.digest == first
    assert len(hashed) == 1
    mask.ids[-1] = mask.table.size - 1 if mask.ids[-1] < mask.table.size - 1 else mask.table.size - 2
    assert mask.digest != first
    assert len(hashed) == 2


def test_the_digest_of_ids_made_in_inference_mode_is_right() -> None:
    with torch.inference_mode():
        mask = SparseMask.random(nn.Linear(8, 8), 0.2, seed=1)
    assert mask.digest == mask.digest == SparseMask.random(nn.Linear(8, 8), 0.2, seed=1).digest


@pytest.mark.parametrize("levels", [40, 900])
def test_the_largest_scores_of_many_tensors_are_ranked_a_few_times(
    monkeypatch: pytest.MonkeyPatch, levels: int
) -> None:
    monkeypatch.setattr(sensitivity, "_PIECE", 500)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = [torch.randint(0, levels, (10, 30)).float() for _ in range(146)]  # with ties
    rankings, topk = [], torch.topk
    monkeypatch.setattr(torch, "topk", lambda *of, **options: rankings.append(1) or topk(*of, **options))
    ids, best = sensitivity.select_largest(tensors, 400)
    values = torch.cat([tensor.flatten() for tensor in tensors])
    order = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))
    assert ids.tolist() == sorted(order[:400])
    assert torch.equal(best, values[ids])
    assert len(rankings) <= 12


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_coefficients_have_the_bits_of_the_reference(backend: str) -> None:
    special = [0.0, -0.0, 1.0, -2.5, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 0.6931472]
    ops = resolve(backend, torch.device("cpu"))
    for eps in (1e-3, 2.0**-149, 3.0):
        for plus in special:
            for minus in special:
                losses = torch.tensor([plus, minus], dtype=torch.float32)
                arguments = (
                    losses,
                    torch.tensor([eps], dtype=torch.float64),
                    torch.tensor([1e-2, 0.0, 1e300, 7.0], dtype=torch.float64),
                )
                record, expected = ops.coefficients(*arguments), reference.coefficients(*arguments)
                assert torch.equal(record.isnan(), expected.isnan())
                assert same_bits(
                    record.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf")),
                    expected.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf")),
                )


def test_steps_that_numba_writes_are_noticed_by_autograd() -> None:
    """As steps that torch writes: backpropagation through weights that changed meanwhile is an error."""
    opt = make_optimizer("numba", 2)
    model = opt._model
    before = flat_weights(model)
    loss = model(torch.ones(1, 8, requires_grad=True)).square().sum()
    opt.apply(3, 0.5)
    assert not same_bits(flat_weights(model), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
