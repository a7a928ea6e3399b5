"""Held-out loss, perplexity and metrics of generated answers, on free text."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm.evaluation import evaluate
from meerkat_engine.engine.lm.free_text.encoded import EncodedText
from meerkat_engine.engine.lm.free_text.rendering import Renderer
from meerkat_engine.engine.lm.free_text.task import TextTask
from meerkat_engine.engine.lm.layout import Layout
from meerkat_engine.engine.lm.objective import Objective, task_loss

from helpers.constants import CPU
from helpers.models import make_model, make_tokenizer
from helpers.prompts import encode_task

WORDS = "say red green blue black and white then twice once"
ROWS = [
    {"prompt": "say red", "completion": " red"},
    {"prompt": "say green and blue then black", "completion": " green and blue then black"},
    {"prompt": "twice", "completion": " red green"},
    {"prompt": "say white then once", "completion": " white"},
    {"prompt": "blue", "completion": " black and white then red"},
]


def encode(max_length: int = 32, task: TextTask | None = None, rows: Sequence[dict[str, object]] = ROWS) -> EncodedText:
    places = [f"row {i}" for i in range(1, len(rows) + 1)]
    return EncodedText(task or TextTask(name="say"), rows, places, Renderer(make_tokenizer(WORDS)), max_length, "say")


def summed_loss(model: nn.Module, data: EncodedText, i: int) -> float:
    """The loss that transformers computes for an example, times the number of its answer's tokens."""
    ids, begin = torch.from_numpy(data.texts[i].ids)[None], len(data.prompt_ids(i))
    labels = ids.clone()
    labels[:, :begin] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * (ids.shape[1] - begin)


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.SORTED, Layout.PADDED])
def test_the_loss_is_the_mean_over_all_answer_tokens(architecture: str, layout: Layout) -> None:
    model, data = make_model(architecture), encode()
    data.resolve_layout(layout, model)
    assert data.answer_tokens == 2 + 6 + 3 + 2 + 6
    expected = sum(summed_loss(model, data, i) for i in range(len(data))) / data.answer_tokens
    for batch_size in (1, 2, None):
        result = evaluate(model, data, batch_size)
        assert result.loss == pytest.approx(expected, abs=1e-6)
        assert result.scores == {"perplexity": math.exp(result.loss)}
        assert result.main == ("validation_loss", result.loss)
        assert (result.examples, result.nonfinite) == (5, 0)


def test_examples_without_a_finite_loss_are_counted(llama: nn.Module) -> None:
    data = encode()
    number = data.tokenizer.convert_tokens_to_ids("twice")  # in one example
    llama.get_input_embeddings().weight.data[number] = math.nan  # type: ignore[operator]
    result = evaluate(llama, data, 2)
    assert result.nonfinite == 5  # the embedding is also the head, so no loss is finite
    llama = make_model("gemma2")
    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight.detach().clone())  # type: ignore[union-attr]
    llama.get_input_embeddings().weight.data[number] = math.nan  # type: ignore[operator]
    result = evaluate(llama, data, 2)
    assert result.nonfinite == 1
    assert math.isnan(result.loss)
    assert math.isnan(result.scores["perplexity"])


def test_a_perplexity_that_is_too_large_for_a_number_is_infinite(llama: nn.Module) -> None:
    llama.get_submodule("model.norm").weight.data *= 1e6
    result = evaluate(llama, encode())
    assert 1000 < result.loss < math.inf
    assert result.scores["perplexity"] == math.inf


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A model that has learned the rows by heart, by backpropagation."""
    model, data = make_model(), encode()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        batch = data.batch(range(len(data)), answers="gold", device=CPU)
        task_loss(model, batch, Objective.LANGUAGE_MODEL).backward()
        optimizer.step()
    return model


def test_answers_are_generated_and_compared(learned: nn.Module, llama: nn.Module) -> None:
    data, metrics = encode(), ["exact-match", "token-f1", "rouge-l"]
    answers = [str(row["completion"]).strip() for row in ROWS]
    seen: list[str] = []

    def record(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        seen.extend(predictions)
        assert [list(texts) for texts in references] == [[answer] for answer in answers]
        return 0.25

    result = evaluate(learned, data, metrics=[*metrics, record], max_new_tokens=8)
    assert seen == answers
    assert result.loss < 0.05
    assert result.scores == {
        "perplexity": math.exp(result.loss), "exact_match": 1.0, "token_f1": 1.0, "rouge_l": 1.0, "record": 0.25
    }  # fmt: skip
    cut = evaluate(learned, data, metrics=metrics, max_new_tokens=1)
    assert cut.scores["exact_match"] == 2 / 5  # those whose answer is one word
    before = evaluate(llama, data, metrics=metrics, max_new_tokens=8)
    assert max(before.scores[name] for name in ("exact_match", "token_f1", "rouge_l")) < 0.5
    assert before.loss > 3


def test_any_of_several_references_is_right(learned: nn.Module) -> None:
    rows = [{**row, "accepted": ["wrong", str(row["completion"]).strip().upper()]} for row in ROWS]
    task = TextTask(name="say", template="{prompt}", answer=" {completion}", references="accepted")
    data = encode(task=task, rows=rows)
    assert evaluate(learned, data, metrics=["exact-match"]).scores["exact_match"] == 1.0


def test_metrics_are_checked_before_the_model_computes() -> None:
    model = make_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model computed"))
    with pytest.raises(ConfigError, match="no metric 'bleu'"):
        evaluate(model, encode(), metrics=["bleu"])
    with pytest.raises(ConfigError, match="metrics are for free text, and sst2 is a choice between label words"):
        evaluate(model, encode_task(), metrics=["exact-match"])
