"""Scores and losses on prompts and text, and the number of logits they compute."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from meerkat_engine.engine.errors import DataError, ModelError
from meerkat_engine.engine.lm.objective import Objective, candidate_scores, task_loss
from meerkat_engine.engine.lm.tasks import SST2, Task
from meerkat_engine.engine.lm.text_loss import language_model_loss

from helpers.constants import CPU
from helpers.losses import candidate_log_likelihoods
from helpers.models import make_model
from helpers.prompts import MULTI_TOKEN_TASK, ROWS, encode_task


@pytest.mark.parametrize("task", [SST2, MULTI_TOKEN_TASK], ids=["one token", "several tokens"])
def test_candidate_scores_are_mean_log_likelihoods(architecture: str, task: Task) -> None:
    model, data = make_model(architecture), encode_task(task)
    scores = candidate_scores(model, data.batch([0, 1, 2], answers="all", device=CPU))
    assert scores.shape == (3, 2)
    for example in range(3):
        means = [sum(t) / len(t) for t in candidate_log_likelihoods(model, data, example)]
        # equal up to a constant per example
        assert (scores[example, 1] - scores[example, 0]).item() == pytest.approx(means[1] - means[0], abs=2e-5)


@pytest.mark.parametrize("task", [SST2, MULTI_TOKEN_TASK], ids=["one token", "several tokens"])
def test_task_loss_matches_log_likelihoods_of_single_sequences(architecture: str, task: Task) -> None:
    model, data = make_model(architecture), encode_task(task)
    log_likelihoods = [candidate_log_likelihoods(model, data, i) for i in range(3)]
    means = torch.tensor([[sum(t) / len(t) for t in row] for row in log_likelihoods])
    labels = torch.tensor([row["label"] for row in ROWS])
    candidates = task_loss(model, data.batch([0, 1, 2], answers="all", device=CPU), Objective.CANDIDATES)
    assert candidates.item() == pytest.approx(functional.cross_entropy(means, labels).item(), abs=2e-5)
    gold = [t for row, label in zip(log_likelihoods, labels.tolist(), strict=True) for t in row[label]]
    answer = task_loss(model, data.batch([0, 1, 2], answers="gold", device=CPU), Objective.LANGUAGE_MODEL)
    assert answer.item() == pytest.approx(-sum(gold) / len(gold), abs=2e-5)


def test_language_model_loss_matches_transformers(architecture: str) -> None:
    model = make_model(architecture).requires_grad_(True)
    ids = torch.arange(3, 63).view(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # the token before it is padding
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    expected.backward()
    expected_gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    labels[1, 5:9] = -100
    with_labels = language_model_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    expected_with_labels = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    assert with_labels.item() == pytest.approx(expected_with_labels.item(), abs=1e-5)
    loss = language_model_loss(model, {"input_ids": ids, "attention_mask": mask})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert sum(w.abs().sum() for w in expected_gradients) > 0
    for p, gradient in zip(model.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_text_loss_rejects_other_batches_and_models(llama: nn.Module) -> None:
    with pytest.raises(
        ModelError, match="a text batch needs input_ids, and may have attention_mask and labels; got ids"
    ):
        language_model_loss(llama, {"ids": torch.ones(1, 3)})
    with pytest.raises(DataError, match=r"must be \[batch, length\], got \[3\]"):
        language_model_loss(llama, torch.tensor([3, 4, 5]))


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor([[3], [4]]),
        {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, -100]])},
        {"input_ids": torch.tensor([[0, 3], [0, 4]]), "attention_mask": torch.tensor([[0, 1], [0, 1]])},
    ],
    ids=["one token", "labels", "one token each"],
)
def test_a_text_batch_without_a_token_to_predict_is_rejected(llama: nn.Module, batch: Any) -> None:
    with pytest.raises(DataError, match="no token to predict: each text is a single token, or all its labels are -100"):
        language_model_loss(llama, batch)


def test_padding_does_not_change_the_gradient_of_texts(architecture: str) -> None:
    """The reference is a loop over single texts in plain torch."""
    texts = [torch.arange(3, 3 + length).view(1, -1) for length in (3, 12, 7, 2)]
    model, other = make_model(architecture), make_model(architecture)
    total = sum(len(text[0]) - 1 for text in texts)
    for text in texts:
        log_p = other(input_ids=text).logits.log_softmax(-1)
        (-log_p[0, :-1].gather(-1, text[0, 1:, None]).sum() / total).backward()
    input_ids, mask = torch.zeros(4, 12, dtype=torch.int64), torch.zeros(4, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        input_ids[row, -text.shape[1] :] = text[0]
        mask[row, -text.shape[1] :] = 1
    language_model_loss(model, {"input_ids": input_ids, "attention_mask": mask}).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_forward_that_a_library_put_into_the_decoder_stays(llama: nn.Module) -> None:
    decoder = llama.model
    original, calls = decoder.forward, []  # type: ignore[union-attr]
    decoder.forward = lambda *args, **kwargs: [calls.append(1), original(*args, **kwargs)][1]  # type: ignore
    language_model_loss(llama, torch.ones(1, 3, dtype=torch.int64)).backward()
    assert len(calls) == 1
    llama(input_ids=torch.ones(1, 3, dtype=torch.int64))
    assert len(calls) == 2


@pytest.mark.parametrize("loss", ["candidates", "language-model", "text"])
def test_head_runs_only_on_positions_whose_logits_are_needed(architecture: str, loss: str) -> None:
    model, data = make_model(architecture), encode_task(MULTI_TOKEN_TASK if loss == "language-model" else SST2)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))  # type: ignore[operator]
    if loss == "text":
        language_model_loss(model, torch.ones(8, 60, dtype=torch.int64))
        assert max(shape[0] * shape[1] for shape in shapes) <= 128 < 8 * 60
    else:
        objective = Objective(loss)
        answers = "all" if objective is Objective.CANDIDATES else "gold"
        task_loss(model, data.batch([0, 1, 2], answers=answers, device=CPU), objective)
        assert shapes == [(3, 1 if loss == "candidates" else 3, 96)]
