"""Prompts and answers as tokens: which tokens are answers, what is cut or left out, and what is refused."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from meerkat_engine.engine.errors import ConfigError, DataError, ModelError
from meerkat_engine.engine.lm.free_text.rendering import PromptFormat, Renderer
from meerkat_engine.engine.lm.free_text.shapes import Plain, Shape, content_of
from meerkat_engine.engine.lm.free_text.task import TextTask, text_task
from meerkat_engine.engine.lm.free_text.tasks import TEXT_TASKS

from helpers.free_text import (
    CHATML,
    FORGETFUL,
    MARKED,
    SHAPES,
    encode_shape,
    encode_text,
    make_chat_tokenizer,
    marked,
    say,
)
from helpers.models import make_byte_tokenizer, make_tokenizer

CONVERSATION = SHAPES["messages"][0][0]["messages"]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("prompt and completion", ["2+2=[4</s>]", "Say: [hello, all</s>]"]),
        (
            "messages in prompt and completion",  # answers in the prompt are not learned
            ["<|user|>2+2?</s>\n<|assistant|>[4</s>]",
             "<|user|>Hi</s>\n<|assistant|>Yes?</s>\n<|user|>2+3?</s>\n<|assistant|>[5</s>]"],
        ),
        (
            "messages",
            ["<|system|>Be brief.</s>\n<|user|>2+2?</s>\n<|assistant|>[4</s>]\n<|user|>+1?</s>\n<|assistant|>"
             "[It is 5.</s>]",
             "<|user|>Hi</s>\n<|assistant|>[Hello</s>]"],
        ),
        ("conversations", ["<|user|>Hi</s>\n<|assistant|>[Hello</s>]", "<|user|>2+2?</s>\n<|assistant|>[4</s>]"]),
        (
            "instruction",
            ["<|user|>Add.\n\n2, 2</s>\n<|assistant|>[4</s>]", "<|user|>Say hi.</s>\n<|assistant|>[hi</s>]"],
        ),
        ("template", ["Q: 2+2\nA:[ 4 (x)</s>]", "Q: 1+1\nA:[ two (y)</s>]"]),
    ],
)  # fmt: skip
def test_the_tokens_of_the_answers_are_marked(shape: str, wanted: list[str]) -> None:
    data = encode_shape(shape)
    assert [marked(data, i) for i in range(2)] == wanted
    for i in range(2):
        prompt = wanted[i].rpartition("[")[0].replace("[", "").replace("]", "")
        assert data.tokenizer.decode(data.prompt_ids(i)) == prompt


def test_instructions_are_text_where_there_is_no_chat_template() -> None:
    for tokenizer, form in ((make_byte_tokenizer(), PromptFormat.AUTO), (make_chat_tokenizer(), PromptFormat.TEXT)):
        data = encode_shape("instruction", tokenizer=tokenizer, prompt_format=form)
        assert [marked(data, i) for i in range(2)] == [
            "Task: Add.\n\nMaterial: 2, 2\n\nResult:[ 4</s>]",
            "Task: Say hi.\n\nResult:[ hi</s>]",
        ]


def test_plain_prompts_become_a_chat_on_request() -> None:
    data = encode_shape("prompt and completion", prompt_format=PromptFormat.CHAT)
    assert marked(data, 1) == "<|user|>Say:</s>\n<|assistant|>[hello, all</s>]"
    with pytest.raises(ConfigError, match="prompt_format is chat, and the tokenizer has no chat template"):
        encode_shape("prompt and completion", prompt_format=PromptFormat.CHAT, tokenizer=make_byte_tokenizer())


def test_a_token_over_the_boundary_belongs_to_the_answer_and_is_counted() -> None:
    """Tokens begin with the space before a word: a prompt that ends with a space shares it with the answer."""
    tokenizer = make_byte_tokenizer()
    tokenizer.add_tokens([AddedToken(" yes", normalized=False)])
    data = encode_text(
        [{"prompt": "ok? ", "completion": "yes"}, {"prompt": "ok?", "completion": " yes"}], tokenizer=tokenizer
    )
    assert [marked(data, i) for i in range(2)] == ["ok?[ yes</s>]"] * 2
    assert data.prompt_ids(0) == data.prompt_ids(1)
    assert "in 1 examples the first token of an answer begins in the prompt" in data.notes


def test_an_end_that_is_there_is_not_repeated() -> None:
    assert marked(encode_text([{"prompt": "a", "completion": "b</s>"}]), 0) == "a[b</s>]"


def test_without_an_end_token_the_notes_say_so() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.eos_token = None
    data = encode_text([{"prompt": "a", "completion": "b"}], tokenizer=tokenizer)
    assert marked(data, 0) == "a[b]"
    assert data.end_tokens == []
    assert "the tokenizer has no end-of-text token: the model does not learn where an answer ends" in data.overview


def test_the_end_of_a_turn_may_be_another_token_than_that_of_a_text() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    data = encode_text([{"messages": CONVERSATION}], tokenizer=tokenizer, chat_template=CHATML.replace("</s>", "<end>"))
    assert marked(data, 0).endswith("[It is 5.<end>]")
    assert data.end_tokens == tokenizer.convert_tokens_to_ids(["</s>", "<end>"])


def test_a_template_that_writes_turns_differently_is_found_out() -> None:
    with pytest.raises(DataError, match=r"f.jsonl, line 1, message 3: the chat template writes a message differently"):
        encode_text([{"messages": CONVERSATION}], chat_template=FORGETFUL)
    single = encode_text([{"messages": CONVERSATION[1:3]}], chat_template=FORGETFUL)
    assert marked(single, 0) == "<|user|>2+2?</s>\n<|assistant|>[(hm) 4</s>]"


def test_a_template_that_marks_answers_itself_is_believed() -> None:
    data = encode_text([{"messages": CONVERSATION}], chat_template=MARKED)
    assert marked(data, 0).split("\n", 1)[1] == (
        "<|user|>2+2?</s>\n<|assistant|>[4</s>]\n<|user|>+1?</s>\n<|assistant|>(hm) [It is 5.</s>]"
    )


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    data = encode_text([{"messages": CONVERSATION}], chat_template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    assert marked(data, 0).startswith("2024-07-26<|system|>")


def test_a_template_that_refuses_a_conversation_is_an_error_that_names_the_row() -> None:
    with pytest.raises(
        DataError, match=r"f.jsonl, line 1: the chat template does not accept the conversation: no system"
    ):
        encode_text(
            [{"messages": CONVERSATION}],
            chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + CHATML,
        )


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(
        ConfigError, match=r"conversations, and the model's tokenizer has no chat template; .* --chat-template"
    ):
        encode_text([{"messages": CONVERSATION}], tokenizer=make_byte_tokenizer())


def test_a_tokenizer_that_cannot_mark_answers_is_refused() -> None:
    tokenizer = make_byte_tokenizer()
    with pytest.raises(ModelError, match="does not say which characters a token stands for"):
        Renderer(type("Slow", (), {"is_fast": False})())
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    with pytest.raises(ModelError, match="ends every prompt with a special token"):
        Renderer(tokenizer)


def test_prompts_are_cut_at_their_beginning_and_answers_never() -> None:
    rows = [
        {"prompt": "a" * 30, "completion": "bcd"},
        {"prompt": "x", "completion": "y" * 30},
        {"prompt": "x", "completion": "y"},
    ]
    data = encode_text(rows, max_length=10)
    assert [marked(data, i) for i in range(2)] == ["aaaaaa[bcd</s>]", "x[y</s>]"]
    assert (data.truncated, list(data.kept)) == (1, [0, 2])
    assert any(
        note.startswith("left out, an answer too long for 10 tokens (--max-length): 1 rows (f.jsonl, line 2)")
        for note in data.notes
    )
    assert max(len(text.ids) for text in encode_text(rows, positions=10).texts) == 10


def test_the_first_token_of_every_text_stays() -> None:
    tokenizer = make_tokenizer("a b c")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    data = encode_text([{"prompt": "a a a a a", "completion": " b c"}], tokenizer=tokenizer, max_length=5)
    assert marked(data, 0).split() == ["<s>", "a[b", "c", "</s>]"]
    tightest = encode_text([{"prompt": "a a a a a", "completion": " b c"}], tokenizer=tokenizer, max_length=4)
    assert marked(tightest, 0).split() == ["<s>[b", "c", "</s>]"]


def test_a_cut_conversation_loses_its_first_answers() -> None:
    whole = encode_text([{"messages": CONVERSATION}])
    assert whole.answer_tokens == len("4.") + len("It is 5..")  # the end is one token
    length = len(whole.texts[0].ids)
    first_answer = int(whole.texts[0].scored[0])
    for cut, answers in ((first_answer - 1, 2), (first_answer, 1), (first_answer + 1, 1)):
        data = encode_text([{"messages": CONVERSATION}], max_length=length - cut)
        assert len(data.texts[0].ids) == length - cut
        assert marked(data, 0).count("[") == answers
        assert marked(data, 0).endswith("[It is 5.</s>]")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a"},
            "expected the fields messages; conversations; prompt, completion; instruction, output; found text",
        ),
        ({"prompt": "a", "completion": "b", "messages": []}, "the fields of two shapes"),
        ({"prompt": 3, "completion": "b"}, "field 'prompt' must be text, got int"),
        ({"prompt": "a\ud83d", "completion": "b"}, "field 'prompt' has half of a surrogate pair"),
        ({"prompt": "", "completion": "b"}, "its prompt has no tokens"),
        ({"messages": "Hi"}, "messages must be a list, got str"),
        ({"messages": ["Hi"]}, "message 1: expected an object with role and content, got 'Hi'"),
        ({"messages": [say("teacher", "Hi")]}, "message 1: unknown role 'teacher'; known: system"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: field 'content' must be text, got NoneType"),
        (
            {"messages": [say("assistant", "Hi")]},
            "message 1: roles are out of order: assistant begins the conversation",
        ),
        ({"messages": [say("user", "a"), say("user", "b")]}, "message 2: roles are out of order: user follows user"),
        (
            {"messages": [say("user", "a"), say("system", "b")]},
            "message 2: roles are out of order: system follows user",
        ),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1: expected from .* and value; got"),
        ({"conversations": 3}, "conversations must be a list, got int"),
    ],
)
def test_a_row_that_is_no_example_is_an_error_that_names_it(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^f.jsonl, line 1.*{message}"):
        encode_text([row])


def test_all_rows_must_have_the_shape_of_the_first() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    with pytest.raises(
        DataError, match=r"line 2: the field 'prompt' is missing; the rows before have prompt and completion"
    ):
        encode_text(rows)


def test_rows_without_an_answer_are_left_out_and_named() -> None:
    good = {"prompt": "a", "completion": "b"}
    data = encode_text([{"prompt": "a", "completion": " "}, good, {"prompt": "a", "completion": ""}])
    assert list(data.kept) == [1]
    assert "left out, no answer: 2 rows (f.jsonl, line 1; f.jsonl, line 3)" in data.notes
    with pytest.raises(DataError, match="t has no example that can be used; no answer: 1 rows"):
        encode_text([{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="no answer: 1 rows"):
        encode_text([{"messages": [say("user", "a"), say("assistant", " ")]}])


def test_an_answer_without_a_token_is_left_out() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Replace("~", "")
    rows = [{"prompt": "a", "completion": "~"}, {"prompt": "a", "completion": "b"}]
    data = encode_text(rows, tokenizer=tokenizer)
    assert list(data.kept) == [1]
    assert "left out, no answer: 1 rows (f.jsonl, line 1)" in data.notes


def test_templates_take_any_fields_and_name_those_that_are_missing() -> None:
    task = text_task("faq", "Q: {question}\nA: ", "{reply}")
    assert (task.template, task.answer) == ("Q: {question}\nA:", " {reply}")
    data = encode_text([{"question": " Why? ", "reply": " So. "}], task)
    assert marked(data, 0) == "Q: Why?\nA:[ So.</s>]"
    with pytest.raises(DataError, match=r"line 1: ' \{reply\}' needs the field 'reply'; found answer, question"):
        encode_text([{"question": "Why?", "answer": "So."}], task)
    with pytest.raises(ConfigError, match="template and answer go together"):
        TextTask(name="t", template="{a}")
    assert text_task("t", "{a}\n", "{b}").answer == "{b}"
    assert text_task("t", "{a}", "\n{b}").answer == "\n{b}"


def test_classes_are_the_values_of_a_field() -> None:
    rows = [{"prompt": "a", "completion": "b", "kind": kind} for kind in ("y", "x", "y")]
    data = encode_text(rows, text_task("t", None, None, class_field="kind"))
    assert (data.labels.tolist(), list(data.class_names)) == ([1, 0, 1], ["x", "y"])
    with pytest.raises(DataError, match=r"line 1: the field 'sort', by which clients get their share, must be text"):
        encode_text(rows, text_task("t", None, None, class_field="sort"))


def test_the_digest_covers_tokens_and_what_is_learned() -> None:
    one = encode_text([{"prompt": "ab", "completion": "c"}])
    assert one.digest == encode_text([{"prompt": "ab", "completion": "c", "more": 1}]).digest
    assert one.digest != encode_text([{"prompt": "a", "completion": "bc"}]).digest


@pytest.mark.parametrize(
    ("name", "row", "wanted", "references"),
    [
        ("squad", {"context": "It rains.", "question": "What?", "answers": {"text": ["rain", "It rains", "rain"]}},
         "It rains.\n\nAnswer with words of this text. What?\nAnswer:[ rain</s>]", ["rain", "It rains"]),
        ("drop", {"passage": "3 and 4.", "question": "Which?", "answers_spans": {"spans": ["3", "4"]}},
         "3 and 4.\n\nAnswer by counting, comparing or quoting this text. Which?\nAnswer:[ 3, 4</s>]", ["3, 4"]),
        ("xsum", {"document": "It rained.", "summary": "Rain."},
         "It rained.\n\nThis report in one sentence:[ Rain.</s>]", ["Rain."]),
        ("dolly", {"instruction": "Why?", "context": "Rain", "response": "So.", "category": "qa"},
         "<|user|>Why?\n\nRain</s>\n<|assistant|>[So.</s>]", ["So."]),
        ("alpaca", {"instruction": "Why?", "input": "", "output": "So.", "text": "..."},
         "<|user|>Why?</s>\n<|assistant|>[So.</s>]", ["So."]),
    ],
)  # fmt: skip
def test_built_in_tasks(name: str, row: dict[str, Any], wanted: str, references: list[str]) -> None:
    data = encode_text([row], TEXT_TASKS[name])
    assert marked(data, 0) == wanted
    assert data.references(0) == references
    with pytest.raises(DataError, match="line 2"):
        encode_text([row, {"x": 1}], TEXT_TASKS[name])


def test_a_prompt_alone_has_the_tokens_of_the_prompt_of_an_example() -> None:
    for shape, (rows, settings) in SHAPES.items():
        data = encode_shape(shape)
        task = text_task("t", settings.get("template"), settings.get("answer"))
        for i, row in enumerate(rows):
            content = task.content(row, task.shape(row, "here"), "here")
            if shape == "prompt and completion" and i == 1:
                continue  # its trailing space is a token of its own in this tokenizer
            assert data._renderer.prompt(content, "here") == data.prompt_ids(i)
    assert content_of({"prompt": "a", "completion": "b"}, Shape.PROMPT_COMPLETION, "here") == Plain("a", "b")


def make_word_tokenizer(special: str = "") -> Any:
    """A byte-level tokenizer of words with the space before them, whose offsets leave that space out.

    Args:
        special: a token that is special, but that the tokenizer does not name; empty: none.
    """
    tokenizer = make_byte_tokenizer()
    core = Tokenizer(models.BPE({**tokenizer.get_vocab()}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.add_special_tokens(["</s>", *([special] if special else [])])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


BLOCK = "{% generation %}{{ m['content'] }}{% endgeneration %}"
ONLY_CONTENT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    + BLOCK
    + "{% else %}{{ m['content'] }}"
    "{% endif %}</s>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_marked_answers_may_begin_and_end_with_spaces() -> None:
    """A token of a space has no characters of its own in tokenizers that trim offsets."""
    messages = [say("user", "2+2?"), say("assistant", "It is 4. "), say("user", "Hi"), say("assistant", " Good day")]
    data = encode_text([{"messages": messages}], tokenizer=make_word_tokenizer(), chat_template=ONLY_CONTENT)
    assert marked(data, 0) == (
        "<|user|>2+2?</s>\n<|assistant|>[It is 4.] </s>\n<|user|>Hi</s>\n<|assistant|>[ Good day]"
    )
    assert data.references(0) == ["Good day"]
    assert data.overview[-1] == "the answer ends without an end token: the model does not learn where an answer ends"
    assert len(encode_text([{"messages": messages}]).overview) == 2


def test_marked_answers_are_counted_by_message() -> None:
    """An empty answer in the prompt is no answer, and takes none away from the completion."""
    prompt = [say("user", "a"), say("assistant", ""), say("user", "b")]
    rows = [{"prompt": prompt, "completion": [say("assistant", "c")]}]
    assert marked(encode_text(rows, chat_template=ONLY_CONTENT), 0).endswith("<|user|>b</s>\n<|assistant|>[c]")
    first_only = ONLY_CONTENT.replace(BLOCK, "{% if loop.first %}" + BLOCK + "{% else %}{{ m['content'] }}{% endif %}")
    with pytest.raises(DataError, match=r"marks 0 texts with \{% generation %\}, and the assistant has 2 messages"):
        encode_text(rows, chat_template=first_only)


@pytest.mark.parametrize(
    "after", ["", "{% if not add_generation_prompt %}</s>{% endif %}"], ids=["", "and an end of text"]
)
def test_the_end_of_a_turn_may_be_a_token_that_is_only_marked_as_special(after: str) -> None:
    tokenizer = make_word_tokenizer("<end>")
    assert "<end>" not in tokenizer.all_special_tokens
    template = CHATML.replace("</s>", "<end>") + after
    data = encode_text([{"messages": CONVERSATION[1:3]}], tokenizer=tokenizer, chat_template=template)
    assert marked(data, 0) == "<|user|>2+2?<end>\n<|assistant|>[4<end>]"
    assert data.end_tokens == tokenizer.convert_tokens_to_ids(["</s>", "<end>"])


def test_what_a_template_adds_to_an_answer_is_part_of_the_reference() -> None:
    data = encode_text([{"messages": CONVERSATION[1:3]}], chat_template=FORGETFUL)
    assert marked(data, 0).endswith("[(hm) 4</s>]")
    assert data.references(0) == ["(hm) 4"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": None, "messages": None},
    ],
)
def test_an_answer_that_is_null_is_left_out(row: dict[str, Any]) -> None:
    good = {**row, "completion": "b"}
    for rows in ([row, good], [good, row]):
        assert marked(encode_text(rows), 0) == "a[b</s>]"
    chat = [{"messages": None}, {"messages": CONVERSATION}]
    assert list(encode_text(chat).kept) == [1]
    task = text_task("t", "{q}", "{a}")
    assert list(encode_text([{"q": "x", "a": None}, {"q": "x", "a": "y"}], task).kept) == [1]


def test_the_token_that_begins_every_text_is_there_once() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    data = encode_text([{"prompt": "<s>a", "completion": "b"}, {"prompt": "a", "completion": "b"}], tokenizer=tokenizer)
    assert [marked(data, i) for i in range(2)] == ["<s>a[b</s>]"] * 2
    assert data._renderer.prompt(Plain("<s>a", ""), "here") == data.prompt_ids(0)
