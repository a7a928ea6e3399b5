"""Accuracy, macro-F1 and loss over a task's examples."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from meerkat_engine.engine.lm.evaluation import confusion_matrix, evaluate, macro_f1, predictions
from meerkat_engine.engine.lm.objective import candidate_scores

from helpers.constants import CPU
from helpers.prompts import encode_task


def test_accuracy_and_loss_match_the_scores(llama: nn.Module) -> None:
    data = encode_task()
    scores = candidate_scores(llama, data.batch([0, 1, 2], answers="all", device=CPU))
    right = (scores.argmax(-1) == data.labels).float().mean().item()
    for batch_size in (1, 2, 32):
        result = evaluate(llama, data, batch_size)
        assert result.scores["accuracy"] == pytest.approx(right)
        assert result.loss == pytest.approx(functional.cross_entropy(scores, data.labels).item(), abs=1e-5)


def test_macro_f1_matches_a_calculation_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0])
    confusion = confusion_matrix(labels, predicted, 4)
    assert confusion.tolist() == [[2, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    # class 0: precision 2/4, recall 2/3; class 1: 1/2 and 1/2; class 2 is never predicted; class 3 does not occur
    assert macro_f1(confusion) == pytest.approx((4 / 7 + 1 / 2 + 0) / 3, abs=1e-12)


def test_class_that_is_only_predicted_counts() -> None:
    confusion = confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, 1]), 3)
    assert macro_f1(confusion) == pytest.approx((2 / 3 + 0) / 2, abs=1e-12)


def test_evaluation_reports_macro_f1_and_recalls_of_its_predictions(llama: nn.Module) -> None:
    data = encode_task()
    predicted = candidate_scores(llama, data.batch([0, 1, 2], answers="all", device=CPU)).argmax(-1)
    expected = macro_f1(confusion_matrix(data.labels, predicted, 2))
    recalls = [float((predicted == label)[data.labels == label].double().mean()) for label in (0, 1)]
    for batch_size in (1, 2, 32):
        result = evaluate(llama, data, batch_size)
        assert result.scores["macro_f1"] == expected
        assert result.recalls == recalls


def test_examples_without_finite_scores_are_wrong_and_counted(llama: nn.Module) -> None:
    """NaN is the largest number to ``argmax``: without care, all examples count as class 0."""
    scores = torch.tensor([[0.1, 0.2], [float("nan"), 0.0], [0.0, float("inf")], [-1.0, float("-inf")], [2.0, 1.0]])
    assert predictions(scores).tolist() == [1, 2, 2, 2, 0]
    # two of class 0, of which one is right; three of class 1, of which one is right
    confusion = confusion_matrix(torch.tensor([1, 0, 1, 1, 0]), predictions(scores), 2)
    assert confusion.tolist() == [[1, 0, 1], [0, 1, 2]]
    assert macro_f1(confusion) == pytest.approx((2 / (1 + 2) + 2 / (1 + 3)) / 2, abs=1e-12)
    llama.get_input_embeddings().weight.data.fill_(float("nan"))  # type: ignore[operator]
    result = evaluate(llama, encode_task())
    assert (result.scores, result.nonfinite, result.examples) == ({"accuracy": 0.0, "macro_f1": 0.0}, 3, 3)


def test_finite_scores_have_no_example_without_a_prediction(llama: nn.Module) -> None:
    assert evaluate(llama, encode_task()).nonfinite == 0
