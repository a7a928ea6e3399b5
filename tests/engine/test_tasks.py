"""Tasks as prompts, and what is computed from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from meerkat_engine.data import calibration_texts, read_jsonl, task_rows, token_batches
from meerkat_engine.errors import ConfigError, DataError, ModelError
from meerkat_engine.evaluation import evaluate
from meerkat_engine.objective import Objective, candidate_scores, language_model_loss, task_loss
from meerkat_engine.tasks import SST2, EncodedTask, Task, get_task
from tests.conftest import make_model, make_tokenizer

ROWS = [
    {"sentence": "a fine film ", "label": 1},
    {"sentence": "dull", "label": 0},
    {"sentence": "not a fine and funny film at all", "label": 0},
]
WORDS = "a fine film dull not and funny at all It was terrible great so good indeed"
LONG = Task(
    name="long", hub=(), template="{sentence} It was", cut="sentence", label_words=(" terrible", " so good indeed")
)
CPU = torch.device("cpu")


def encoded(task: Task = SST2, max_length: int = 32, rows: list[dict[str, Any]] = ROWS) -> EncodedTask:
    return EncodedTask(task, rows, make_tokenizer(WORDS), max_length, "test")


def by_hand(model: nn.Module, data: EncodedTask, example: int) -> list[list[float]]:
    """Log-likelihood of each token of each candidate, one unpadded sequence at a time, all logits."""
    found = []
    for answer in data.candidates:
        ids = torch.tensor([data.prompts[example] + answer])
        log_p = model(input_ids=ids).logits.float().log_softmax(-1)[0]
        start = len(data.prompts[example])
        found.append([log_p[start + j - 1, token].item() for j, token in enumerate(answer)])
    return found


def test_the_sst2_prompt_is_mezos() -> None:
    assert SST2.prompt(ROWS[0]) == "a fine film It was"
    assert SST2.label_words == (" terrible", " great")


@pytest.mark.parametrize("task", [SST2, LONG], ids=["one token", "several tokens"])
def test_scores_are_candidate_likelihoods(architecture: str, task: Task) -> None:
    model, data = make_model(architecture), encoded(task)
    scores = candidate_scores(model, data.batch([0, 1, 2], answers="all", device=CPU))
    assert scores.shape == (3, 2)
    for example in range(3):
        means = [sum(t) / len(t) for t in by_hand(model, data, example)]
        # equal up to a constant per example
        assert (scores[example, 1] - scores[example, 0]).item() == pytest.approx(means[1] - means[0], abs=2e-5)


@pytest.mark.parametrize("task", [SST2, LONG], ids=["one token", "several tokens"])
def test_both_losses(architecture: str, task: Task) -> None:
    model, data = make_model(architecture), encoded(task)
    hand = [by_hand(model, data, i) for i in range(3)]
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


def test_evaluation_counts_right_answers(llama: nn.Module) -> None:
    data = encoded()
    scores = candidate_scores(llama, data.batch([0, 1, 2], answers="all", device=CPU))
    right = (scores.argmax(-1) == data.labels).float().mean().item()
    for batch_size in (1, 2, 32):
        result = evaluate(llama, data, batch_size)
        assert result.accuracy == pytest.approx(right)
        assert result.loss == pytest.approx(functional.cross_entropy(scores, data.labels).item(), abs=1e-5)


def test_long_prompts_lose_the_end_of_the_field_and_keep_the_question() -> None:
    data = encoded(max_length=7)
    tokenizer = make_tokenizer(WORDS)
    assert data.truncated == 1
    assert tokenizer.decode(data.prompts[2]) == "not a fine and It was"
    assert tokenizer.decode(data.prompts[0]) == "a fine film It was"
    with pytest.raises(DataError, match="longer than 2 tokens even without the field 'sentence'"):
        encoded(max_length=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "x", "label": 2}, "example 4: label 2 is outside task 'sst2', whose labels are 0 to 1"),
        ({"sentence": "x", "label": -1}, "label -1 is outside"),
        ({"sentence": "x", "label": "1"}, "label '1' is outside"),
        ({"text": "x", "label": 1}, r"needs the field 'sentence'; found \['label', 'text'\]"),
        ({"sentence": 5, "label": 1}, "field 'sentence' must be text, got int"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoded(rows=[*ROWS, row])


def test_label_words_the_tokenizer_cannot_tell_apart() -> None:
    task = Task(name="t", hub=(), template="{sentence} It was", cut="sentence", label_words=(" unheard", " unseen"))
    with pytest.raises(ModelError, match="the same tokens"):
        encoded(task)


def test_unknown_task() -> None:
    with pytest.raises(ConfigError, match="unknown task 'sst3'; known: sst2"):
        get_task("sst3")


def test_rows_from_a_directory(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    path = write_jsonl("sst2/train.jsonl", ['{"sentence": "good", "label": 1}', "", '{"sentence": "bad", "label": 0}'])
    assert [row["label"] for row in task_rows(SST2, "train", path.parent.parent)] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"sentence": "good", "label": 1}', '{"sentence": '], r"train\.jsonl, line 2: not JSON"),
        (["[1]"], "line 1: expected an object, got list"),
        (['{"sentence": "a", "label": 7}'], "example 1: label 7 is outside"),
        ([], "holds no examples"),
    ],
    ids=["broken line", "no object", "label", "empty"],
)
def test_broken_data_is_named(write_jsonl: Callable[[str, list[str]], Path], lines: list[str], message: str) -> None:
    path = write_jsonl("sst2/train.jsonl", lines)
    with pytest.raises(DataError, match=message):
        task_rows(SST2, "train", path.parent.parent)


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*sst2/train\.jsonl"):
        task_rows(SST2, "train", tmp_path)


def test_the_hub_out_of_reach_says_what_to_give() -> None:
    with pytest.raises(DataError, match=r"from the hub: .*; give --data-dir"):
        task_rows(SST2, "validation", None)
    with pytest.raises(DataError, match=r"no calibration text: give --calibration FILE\.jsonl"):
        calibration_texts(None, None, 3)


def test_calibration_text_is_found(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    path = write_jsonl("c4_sample/train.jsonl", ['{"text": "a"}', '{"text": "b"}', '{"text": "c"}'])
    assert calibration_texts(None, path.parent.parent, 2) == (["a", "b"], "c4_sample/train.jsonl, first 2 texts")
    assert calibration_texts(path, None, 9)[0] == ["a", "b", "c"]
    bad = write_jsonl("bad.jsonl", ['{"content": "a"}'])
    with pytest.raises(DataError, match="needs the field 'text'"):
        calibration_texts(bad, None, 1)


def test_token_batches_cut_and_pad() -> None:
    batches = list(token_batches(["a fine film", "dull", "a film and a film"], make_tokenizer(WORDS), 2, 4))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 3), (1, 4)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_read_jsonl_of_real_data(shared_data: Path) -> None:
    assert len(read_jsonl(shared_data / "sst2" / "validation.jsonl")) == 872
    rows = task_rows(SST2, "validation", shared_data)
    assert sum(row["label"] for row in rows) == 444
