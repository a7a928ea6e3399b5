"""Scores and losses on prompts and text, and the number of logits they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.lm.objective import Objective, candidate_scores, language_model_loss, task_loss
from meerkat_engine.engine.lm.tasks import SST2, Task

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
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    expected_gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    labels[1, 5:9] = -100
    with_labels = language_model_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    expected_with_labels = model(input_ids=ids, attention_mask=mask, labels=labels).loss
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
    with pytest.raises(ModelError, match="Linear is no transformers causal LM; pass your own loss function"):
        language_model_loss(nn.Linear(2, 2), torch.ones(1, 3))


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
        assert shapes == [(3, 1 if loss == "candidates" else 4, 96)]
