"""A large batch in micro-batches: same loss and gradient, with the memory of one micro-batch."""

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.bench.measure import peak_bytes
from meerkat_engine.engine.lm.layout import Layout
from meerkat_engine.engine.lm.objective import Objective, task_loss
from meerkat_engine.engine.lm.tasks import SST2, Task
from meerkat_engine.engine.sgd import sgd_steps
from meerkat_engine.engine.weights import MaskedWeights

from helpers.constants import CPU
from helpers.losses import TOLERANCE, micro_batches
from helpers.models import make_model
from helpers.prompts import MULTI_TOKEN_TASK, SEVEN_ROWS, encode_task
from helpers.tensors import same_bits

PARTS = {"ones": [1] * 7, "threes": [3, 3, 1], "uneven": [5, 2]}


@pytest.mark.parametrize("task", [SST2, MULTI_TOKEN_TASK], ids=["one token", "several tokens"])
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
def test_micro_batches_give_the_loss_of_the_batch(
    architecture: str, objective: Objective, task: Task, sizes: list[int]
) -> None:
    model, data = make_model(architecture), encode_task(task, rows=SEVEN_ROWS)
    (batch,) = micro_batches(data, objective, [7])
    parts = micro_batches(data, objective, sizes)
    expected = task_loss(model, batch, objective)
    loss = task_loss(model, parts, objective)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    assert same_bits(task_loss(model, [batch], objective), expected)
    losses = [task_loss(model, part, objective).item() for part in parts]
    if task is MULTI_TOKEN_TASK and sizes != [1] * 7:  # an unweighted mean differs
        assert abs(sum(losses) / len(losses) - expected.item()) > 10 * TOLERANCE


@pytest.mark.parametrize("objective", list(Objective))
def test_micro_batches_give_the_gradient_of_the_batch(llama: nn.Module, objective: Objective) -> None:
    mask, data, ends = SparseMask.dense(llama), encode_task(MULTI_TOKEN_TASK, rows=SEVEN_ROWS), []
    for sizes in ([7], [3, 3, 1]):
        model, parts = make_model(), micro_batches(data, objective, sizes)
        weights = MaskedWeights(model, mask)
        sgd_steps(model, weights, [lambda model=model, parts=parts: task_loss(model, parts, objective)], [1.0])  # type: ignore[misc]
        ends.append(weights.masters())
    before = MaskedWeights(llama, mask).masters()
    assert (ends[0] - before).abs().max() > 1e-2
    torch.testing.assert_close(ends[1] - before, ends[0] - before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", list(Objective))
def test_head_runs_on_one_micro_batch_at_a_time(llama: nn.Module, objective: Objective) -> None:
    rows: list[int] = []
    llama.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))  # type: ignore[operator, union-attr]
    data = encode_task(MULTI_TOKEN_TASK, rows=SEVEN_ROWS)
    data.layout = Layout.PADDED  # one forward pass for each micro-batch
    candidates = 2 if objective is Objective.CANDIDATES else 1
    opt = SparseZO(llama, SparseMask.random(llama, 0.05, 1), lr=0.1)
    opt.step(lambda: task_loss(llama, micro_batches(data, objective, [3, 3, 1]), objective))
    assert rows == [3 * candidates, 3 * candidates, candidates] * 2


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "autograd"])
def test_peak_memory_is_that_of_one_micro_batch(grad: bool) -> None:
    model = make_model(vocabulary=8192).requires_grad_(grad)
    data = encode_task(MULTI_TOKEN_TASK, rows=SEVEN_ROWS * 8)
    parts = {size: micro_batches(data, Objective.CANDIDATES, [size] * (56 // size)) for size in (56, 7)}

    def run(size: int) -> None:
        with torch.set_grad_enabled(grad):
            loss = task_loss(model, parts[size], Objective.CANDIDATES)
            if grad:
                loss.backward()
                model.zero_grad()

    peaks = {size: peak_bytes(lambda size=size: run(size), CPU) for size in (56, 7)}  # type: ignore[misc]
    logits_bytes = 4 * 8192 * 2 * 5  # float32 logits of an example: two candidates, at most five positions
    assert peaks[56] > 56 * logits_bytes / 2
    assert peaks[7] < peaks[56] / 4


def test_empty_list_of_micro_batches_raises(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        task_loss(llama, [], Objective.CANDIDATES)
