"""A large batch in parts: the same loss, the same gradient, and the memory of one part."""

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.bench.measure import peak_bytes
from meerkat_engine.examples import Batch, EncodedTask
from meerkat_engine.firstorder import sgd_steps
from meerkat_engine.objective import Objective, task_loss
from meerkat_engine.tasks import SST2, Task
from meerkat_engine.weights import MaskedWeights
from tests.conftest import make_model, same_bits
from tests.engine.prompts import CPU, LONG, encoded

LINES = [
    "a fine film",
    "dull",
    "not a fine and funny film at all",
    "funny",
    "a dull film and not funny",
    "fine",
    "not so",
]
ROWS = [{"sentence": line, "label": i % 2} for i, line in enumerate(LINES)]
PARTS = {"ones": [1] * 7, "threes": [3, 3, 1], "uneven": [5, 2]}
# Rows of another width and number are summed in another order: some units of 2**-24 in logits of the order of 1.
TOLERANCE = 2e-6


def batches(data: EncodedTask, objective: Objective, sizes: list[int]) -> list[Batch]:
    answers = "all" if objective is Objective.CANDIDATES else "gold"
    parts = torch.arange(sum(sizes)).split(sizes)
    return [data.batch(part.tolist(), answers=answers, device=CPU) for part in parts]


@pytest.mark.parametrize("task", [SST2, LONG], ids=["one token", "several tokens"])
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
def test_parts_have_the_loss_of_the_whole(
    architecture: str, objective: Objective, task: Task, sizes: list[int]
) -> None:
    model, data = make_model(architecture), encoded(task, rows=ROWS)
    (whole,) = batches(data, objective, [7])
    parts = batches(data, objective, sizes)
    wanted = task_loss(model, whole, objective)
    found = task_loss(model, parts, objective)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(wanted.item(), abs=TOLERANCE)
    assert same_bits(task_loss(model, [whole], objective), wanted)
    alone = [task_loss(model, part, objective).item() for part in parts]
    if task is LONG and sizes != [1] * 7:  # a plain mean over parts is another number
        assert abs(sum(alone) / len(alone) - wanted.item()) > 10 * TOLERANCE


@pytest.mark.parametrize("objective", list(Objective))
def test_parts_have_the_gradient_of_the_whole(llama: nn.Module, objective: Objective) -> None:
    mask, data, ends = SparseMask.dense(llama), encoded(LONG, rows=ROWS), []
    for sizes in ([7], [3, 3, 1]):
        model, parts = make_model(), batches(data, objective, sizes)
        weights = MaskedWeights(model, mask)
        sgd_steps(model, weights, [lambda model=model, parts=parts: task_loss(model, parts, objective)], [1.0])  # type: ignore[misc]
        ends.append(weights.masters())
    before = MaskedWeights(llama, mask).masters()
    assert (ends[0] - before).abs().max() > 1e-2
    torch.testing.assert_close(ends[1] - before, ends[0] - before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", list(Objective))
def test_the_head_sees_the_rows_of_one_part(llama: nn.Module, objective: Objective) -> None:
    rows: list[int] = []
    llama.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))  # type: ignore[operator, union-attr]
    data = encoded(LONG, rows=ROWS)
    candidates = 2 if objective is Objective.CANDIDATES else 1
    opt = SparseZO(llama, SparseMask.random(llama, 0.05, 1), lr=0.1)
    opt.step(lambda: task_loss(llama, batches(data, objective, [3, 3, 1]), objective))
    assert rows == [3 * candidates, 3 * candidates, candidates] * 2


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "autograd"])
def test_memory_is_that_of_one_part(grad: bool) -> None:
    model = make_model(vocabulary=8192).requires_grad_(grad)
    data = encoded(LONG, rows=ROWS * 8)
    data_of = {size: batches(data, Objective.CANDIDATES, [size] * (56 // size)) for size in (56, 7)}

    def run(size: int) -> None:
        with torch.set_grad_enabled(grad):
            loss = task_loss(model, data_of[size], Objective.CANDIDATES)
            if grad:
                loss.backward()
                model.zero_grad()

    peaks = {size: peak_bytes(lambda size=size: run(size), CPU) for size in (56, 7)}  # type: ignore[misc]
    head = 4 * 8192 * 2 * 5  # float32 logits of an example: two candidates, at most five positions
    assert peaks[56] > 56 * head / 2
    assert peaks[7] < peaks[56] / 4


def test_no_part_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        task_loss(llama, [], Objective.CANDIDATES)
