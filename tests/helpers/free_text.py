"""Rows of free text in every shape, chat templates, and examples made of them."""

from typing import Any

from meerkat_engine.engine.lm.free_text.encoded import EncodedText
from meerkat_engine.engine.lm.free_text.rendering import PromptFormat, Renderer
from meerkat_engine.engine.lm.free_text.task import TextTask, text_task

from helpers.models import make_byte_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As CHATML, but a thought stands before the last answer alone: what comes before is no prefix of the whole.
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' and loop.last %}(hm) {% endif %}{{ m['content'] }}"
)
MARKED = FORGETFUL.replace(
    "{{ m['content'] }}</s>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}",
)


def say(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


# By name: rows, and the settings of their task.
SHAPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "prompt and completion": (
        [{"prompt": "2+2=", "completion": "4"}, {"prompt": "Say: ", "completion": "hello, all"}],
        {},
    ),
    "messages in prompt and completion": (
        [{"prompt": [say("user", "2+2?")], "completion": [say("assistant", "4")]},
         {"prompt": [say("user", "Hi"), say("assistant", "Yes?"), say("user", "2+3?")],
          "completion": [say("assistant", "5")]}],
        {},
    ),
    "messages": (
        [{"messages": [say("system", "Be brief."), say("user", "2+2?"), say("assistant", "4"), say("user", "+1?"),
                       say("assistant", "It is 5.")]},
         {"messages": [say("user", "Hi"), say("assistant", "Hello")]}],
        {},
    ),
    "conversations": (
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
         {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}],
        {},
    ),
    "instruction": (
        [{"instruction": "Add.", "input": "2, 2", "output": "4"}, {"instruction": "Say hi.", "output": "hi"}],
        {},
    ),
    "template": (
        [{"q": "2+2", "a": "4", "by": "x"}, {"q": "1+1", "a": "two", "by": "y"}],
        {"template": "Q: {q}\nA:", "answer": "{a} ({by})"},
    ),
}  # fmt: skip


def make_chat_tokenizer(template: str | None = CHATML) -> Any:
    """A tokenizer with one token per byte and a chat template."""
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encode_text(
    rows: list[dict[str, Any]],
    task: TextTask | None = None,
    *,
    tokenizer: Any = None,
    max_length: int = 200,
    chat_template: str | None = None,
    prompt_format: PromptFormat = PromptFormat.AUTO,
    positions: int | None = None,
) -> EncodedText:
    """Tokenizes rows of free text, which stand in lines of a file."""
    renderer = Renderer(make_chat_tokenizer() if tokenizer is None else tokenizer, chat_template, prompt_format)
    places = [f"f.jsonl, line {i}" for i in range(1, len(rows) + 1)]
    return EncodedText(task or text_task("t", None, None), rows, places, renderer, max_length, "t", positions)


def encode_shape(shape: str, **options: Any) -> EncodedText:
    """Tokenizes the rows of a shape."""
    rows, settings = SHAPES[shape]
    return encode_text(rows, text_task("t", settings.get("template"), settings.get("answer")), **options)


def marked(data: EncodedText, i: int) -> str:
    """The text of an example, its answers in brackets."""
    text, parts, at = data.texts[i], [], 0
    scored = set(text.scored.tolist())
    while at < len(text.ids):
        end = at
        while end < len(text.ids) and (end in scored) == (at in scored):
            end += 1
        decoded = data.tokenizer.decode(text.ids[at:end])
        parts.append(f"[{decoded}]" if at in scored else decoded)
        at = end
    return "".join(parts)
