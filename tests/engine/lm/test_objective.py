"""What is computed from prompts and text: scores, losses, and how many logits they take."""

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
from helpers.prompts import LONG, ROWS, encoded


@pytest.mark.parametrize("task", [SST2, LONG], ids=["one token", "several tokens"])
def test_scores_are_candidate_likelihoods(architecture: str, task: Task) -> None:
    model, data = make_model(architecture), encoded(task)
    scores = candidate_scores(model, data.batch([0, 1, 2], answers="all", device=CPU))
    assert scores.shape == (3, 2)
    for example in range(3):
        means = [sum(t) / len(t) for t in candidate_log_likelihoods(model, data, example)]
        # equal up to a constant per example
        assert (scores[example, 1] - scores[example, 0]).item() == pytest.approx(means[1] - means[0], abs=2e-5)


@pytest.mark.parametrize("task", [SST2, LONG], ids=["one token", "several tokens"])
def test_both_losses(architecture: str, task: Task) -> None:
    model, data = make_model(architecture), encoded(task)
    hand = [candidate_log_likelihoods(model, data, i) for i in range(3)]
    means = torch.tensor([[sum(t) / len(t) for t in row] for row in hand])
    labels = torch.tensor([row["label"] for row in ROWS])
    candidates = task_loss(model, data.batch([0, 1, 2], answers="all", device=CPU), Objective.CANDIDATES)
    assert candidates.item() == pytest.approx(functional.cross_entropy(means, labels).item(), abs=2e-5)
    gold = [t for row, label in zip(hand, labels.tolist(), strict=True) for t in row[label]]
    answer = task_loss(model, data.batch([0, 1, 2], answers="gold", device=CPU), Objective.LANGUAGE_MODEL)
    assert answer.item() == pytest.approx(-sum(gold) / len(gold), abs=2e-5)


def test_language_model_loss_is_transformers(architecture: str) -> None:
    model = make_model(architecture).requires_grad_(True)
    ids = torch.arange(3, 63).view(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # its predecessor is padding
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    wanted = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    labels[1, 5:9] = -100
    with_labels = language_model_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    wanted_loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert with_labels.item() == pytest.approx(wanted_loss.item(), abs=1e-5)
    loss = language_model_loss(model, {"input_ids": ids, "attention_mask": mask})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert sum(w.abs().sum() for w in wanted) > 0
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_batches_and_models_that_are_not_for_the_text_loss(llama: nn.Module) -> None:
    with pytest.raises(ModelError, match="a text batch holds input_ids, attention_mask and labels; got ids"):
        language_model_loss(llama, {"ids": torch.ones(1, 3)})
    with pytest.raises(ModelError, match="Linear is no transformers causal LM; give a loss of your own"):
        language_model_loss(nn.Linear(2, 2), torch.ones(1, 3))


@pytest.mark.parametrize("what", ["candidates", "language-model", "text"])
def test_no_tensor_over_batch_length_and_vocabulary(architecture: str, what: str) -> None:
    """The head sees only the positions whose logits are needed."""
    model, data = make_model(architecture), encoded(LONG if what == "language-model" else SST2)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))  # type: ignore[operator]
    if what == "text":
        language_model_loss(model, torch.ones(8, 60, dtype=torch.int64))
        assert max(shape[0] * shape[1] for shape in seen) <= 128 < 8 * 60
    else:
        objective = Objective(what)
        answers = "all" if objective is Objective.CANDIDATES else "gold"
        task_loss(model, data.batch([0, 1, 2], answers=answers, device=CPU), objective)
        assert seen == [(3, 1 if what == "candidates" else 4, 96)]
