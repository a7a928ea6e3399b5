"""Tokenized examples: where prompts are cut, label words, and the tasks' real data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers, processors

from meerkat_engine.engine.errors import DataError, ModelError
from meerkat_engine.engine.lm.data import task_rows
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.tasks import SST2, TASKS, Task, custom_task

from helpers.constants import CPU
from helpers.models import make_byte_tokenizer, make_tokenizer
from helpers.prompts import ROWS, WORDS, encode_task


def test_long_prompts_are_cut_at_the_end_of_the_field() -> None:
    data = encode_task(max_length=7)
    tokenizer = make_tokenizer(WORDS)
    assert data.truncated == 1
    assert tokenizer.decode(data.prompts[2]) == "not a fine and It was"
    assert tokenizer.decode(data.prompts[0]) == "a fine film It was"
    with pytest.raises(DataError, match="longer than 2 tokens even without the field 'sentence'"):
        encode_task(max_length=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "x", "label": 2}, "example 4: label 2 is outside task 'sst2', whose labels are 0 to 1"),
        ({"sentence": "x", "label": -1}, "label -1 is outside"),
        ({"sentence": "x", "label": "2"}, "label '2' is outside"),
        ({"sentence": "x", "label": "01"}, "label '01' is outside"),
        ({"text": "x", "label": 1}, r"needs the field 'sentence'; found \['label', 'text'\]"),
        ({"sentence": 5, "label": 1}, "field 'sentence' must be text, got int"),
    ],
    ids=str,
)
def test_invalid_rows_raise(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_task(rows=[*ROWS, row])


def test_label_words_with_the_same_tokens_raise() -> None:
    task = Task(name="t", template="{sentence} It was", cut="sentence", label_words=(" unheard", " unseen"))
    with pytest.raises(ModelError, match="the same tokens"):
        encode_task(task)


def test_special_token_after_the_prompt_raises_but_unknown_word_does_not() -> None:
    tokenizer = make_tokenizer("<s> </s> It great terrible")  # has no token for "was"
    assert EncodedTask(SST2, ROWS, tokenizer, 32, "test").prompts[0][-1] == tokenizer.unk_token_id
    for template, message in (("<s> $A", None), ("<s> $A </s>", "ends every prompt with a special token")):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        )
        if message is None:
            assert EncodedTask(SST2, ROWS, tokenizer, 32, "test").prompts[0][0] == tokenizer.bos_token_id
        else:
            with pytest.raises(ModelError, match=message):
                EncodedTask(SST2, ROWS, tokenizer, 32, "test")


def test_a_template_that_begins_with_the_first_token_does_not_double_it() -> None:
    """Chat templates begin with it, and many tokenizers put it in front of every text."""
    tokenizer = make_tokenizer(f"{WORDS} assistant")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first = tokenizer.bos_token_id

    def encoded(template: str, adds_first: bool) -> EncodedTask:
        single = "<s> $A" if adds_first else "$A"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", first)]
        )
        return EncodedTask(custom_task("t", template, "terrible,great", label="label"), ROWS, tokenizer, 9, "test")

    expected = encoded("{sentence} assistant\n", True)
    for adds_first in (True, False):
        data = encoded("<s> {sentence} assistant\n", adds_first)
        assert data.prompts == expected.prompts
        assert data.candidates == expected.candidates
    assert [ids[:2].count(first) for ids in expected.prompts] == [1, 1, 1]
    assert expected.truncated == 1


def test_prompts_beyond_the_positions_of_the_model_raise() -> None:
    for positions in (11, None):
        assert EncodedTask(SST2, ROWS, make_tokenizer(WORDS), 32, "test", positions).truncated == 0
    message = "test: the longest prompt and answer have 11 tokens, and the model has 10 positions; give --max-length 10"
    with pytest.raises(DataError, match=message):
        EncodedTask(SST2, ROWS, make_tokenizer(WORDS), 32, "test", 10)
    assert EncodedTask(SST2, ROWS, make_tokenizer(WORDS), 10, "test", 10).truncated == 1


def test_a_prompt_without_tokens_raises() -> None:
    task = custom_task("t", "{sentence}\n", "terrible,great")
    with pytest.raises(DataError, match="test, example 4: its prompt has no tokens"):
        EncodedTask(task, [*ROWS, {"sentence": " ", "label": 0}], make_tokenizer(WORDS), 32, "test")


def test_tensors_do_not_follow_the_default_device_and_dtype() -> None:
    expected = encode_task().batch([0, 1], answers="all", device=CPU)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        batch = encode_task().batch([0, 1], answers="all", device=CPU)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for part, other in ((expected, batch), (expected.rows, batch.rows)):
        tensors = {name: value for name, value in vars(part).items() if isinstance(value, torch.Tensor)}
        assert len(tensors) >= 2
        for name, tensor in tensors.items():
            assert torch.equal(getattr(other, name), tensor), name


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def real(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Task, list[Any]]:
    """A task and its first 50 real examples."""
    return request.param, task_rows(request.param, "train", shared_data)[:50]


def test_real_rows_are_valid(real: tuple[Task, list[Any]]) -> None:
    task, rows = real
    data = EncodedTask(task, rows, make_byte_tokenizer(), 10_000, task.name)
    assert data.truncated == 0
    assert len(set(data.labels.tolist())) == len(task.label_words) or task.name == "trec"  # abbreviations are rare
    for ids, row in zip(data.prompts, rows, strict=True):
        assert make_byte_tokenizer().decode(ids) == task.prompt(row)


def test_real_prompts_are_cut_in_the_cut_field_only(real: tuple[Task, list[Any]]) -> None:
    task, rows = real
    tokenizer = make_byte_tokenizer()
    row = max(rows, key=lambda row: len(row[task.cut]))
    answer = max(len(word) for word in task.label_words)
    length = len(tokenizer(task.prompt(row))["input_ids"]) + answer - 10
    data = EncodedTask(task, [row], tokenizer, length, task.name)
    assert data.truncated == 1
    assert len(data.prompts[0]) + answer <= length
    before, after = (part.format_map({**row}) for part in task.template.split(f"{{{task.cut}}}"))
    prompt = tokenizer.decode(data.prompts[0])
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    kept, complete = prompt[len(before) : len(prompt) - len(after)], row[task.cut].strip()
    assert complete.startswith(kept)
    assert 10 <= len(complete.encode()) - len(kept.encode()) < 20


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_cut_field_is_not_the_question(task: Task) -> None:
    assert task.cut not in {"question", "hypothesis", "word", "span1_text", "span2_text"}
