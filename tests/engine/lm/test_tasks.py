"""Tasks as prompts: templates, label words, labels."""

from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.errors import ConfigError, DataError
from meerkat_engine.engine.lm.tasks import SST2, TASKS, Task, custom_task

from helpers.prompts import ROWS


def test_sst2_has_the_prompt_of_mezo() -> None:
    assert SST2.prompt(ROWS[0]) == "a fine film It was"
    assert SST2.label_words == (" terrible", " great")


def test_labels_can_be_numbers_booleans_or_label_words() -> None:
    boolq = TASKS["boolq"]
    assert [boolq.class_of({"answer": value}) for value in (False, True, 0, 1)] == [0, 1, 0, 1]
    assert [SST2.class_of({"label": word}) for word in ("terrible", " great", "great ")] == [0, 1, 1]
    spaced = custom_task("t", "{text} It is", "not so good,  good")
    assert spaced.label_words == (" not so good", " good")
    assert spaced.class_of({"label": " not  so good"}) == 0


def test_digits_are_the_number_of_a_class_unless_label_words_are_numbers() -> None:
    assert [SST2.class_of({"label": digits}) for digits in ("0", "1", " 1")] == [0, 1, 1]
    stars = custom_task("t", "{text} Stars:", "2,1")
    assert [stars.class_of({"label": word}) for word in ("2", "1")] == [0, 1]
    with pytest.raises(DataError, match="label '0' is outside"):
        stars.class_of({"label": "0"})


@pytest.mark.parametrize(
    ("label", "labels"), [(1, "1,2,3"), (True, "true,false"), (0, "1,0")], ids=["number", "boolean", "swapped"]
)
def test_ambiguous_label_raises(label: Any, labels: str) -> None:
    task = custom_task("t", "{text} It is", labels)
    with pytest.raises(DataError, match="is the number of one class and the label word of another"):
        task.class_of({"label": label})
    assert task.class_of({"label": str(label).lower()}) == labels.split(",").index(str(label).lower())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text It was", "expected '}'"),
        ("text} It was", "Single '}'"),
        ("{text:>10} It was", r"\{text:>10\} has a format, which templates do not support; write \{text\}"),
        ("{text!r} It was", r"\{text!r\} has a format"),
        ("{} It was", r"\{\} does not name a field"),
        ("{0} It was", r"\{0\} does not name a field"),
        ("{text.x} It was", r"\{text\.x\} does not name a field"),
        ("{text[0]} It was", "does not name a field"),
        ("It was", "has no field"),
    ],
)
def test_malformed_template_raises(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_task("t", template, "bad,good")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("good", "needs at least two label words, none of them empty; got 'good'"),
        ("", "at least two"),
        ("bad,,good", "none of them empty"),
        ("bad, bad", "needs different label words; got 'bad', 'bad'"),
    ],
)
def test_empty_or_equal_label_words_raise(labels: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_task("t", "{text} It was", labels)


def test_custom_task() -> None:
    task = custom_task("mail", "{subject}: {body} {subject} So this is ", " spam,fine", label="kind")
    assert task.fields == ("subject", "body")
    assert task.cut == "subject"
    assert task.label_words == (" spam", " fine")
    row = {"subject": "Hello ", "body": "Win {now}", "kind": "spam"}
    assert task.prompt(row) == "Hello: Win {now} Hello So this is"  # the label word starts with the space
    assert task.class_of(row) == 0
    with pytest.raises(ConfigError, match="cut 'text' is not a field of the template, whose fields are subject, body"):
        custom_task("mail", "{subject}: {body}", "a,b", cut="text")


@pytest.mark.parametrize(
    ("template", "labels", "prompt_and_words"),
    [
        ("{t} It was", "bad, good", ("{t} It was", " bad", " good")),
        ("{t} It was  ", "bad,good", ("{t} It was", " bad", " good")),
        ("{t}\nassistant\n", "bad, good", ("{t}\nassistant\n", "bad", "good")),
        ("{t}\t", "bad,good", ("{t}\t", "bad", "good")),
        ("{t}\n ", "bad,good", ("{t}\n", " bad", " good")),
        ("{t} (", '"bad)", "so, good)"', ("{t} (", "bad)", "so, good)")),
        ("{t}\n", '" bad","good"', ("{t}\n", " bad", "good")),
    ],
)
def test_label_words_follow_the_prompt(template: str, labels: str, prompt_and_words: tuple[str, ...]) -> None:
    task = custom_task("t", template, labels)
    assert (task.template, *task.label_words) == prompt_and_words


@pytest.mark.parametrize("labels", ['"bad",good', '"bad,good', '"bad"good,"x"'])
def test_label_words_that_are_partly_quoted_raise(labels: str) -> None:
    with pytest.raises(ConfigError, match="either all label words are in double quotes or none"):
        custom_task("t", "{text}", labels)


@pytest.mark.parametrize(("template", "labels"), [("{t} \ud83d", "bad,good"), ("{t}", "bad,\udc00")])
def test_half_of_a_surrogate_pair_in_template_or_label_words_raises(template: str, labels: str) -> None:
    with pytest.raises(ConfigError, match="has half of a surrogate pair"):
        custom_task("t", template, labels)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompts_end_without_space_and_label_words_start_with_one(task: Task) -> None:
    assert task.template == task.template.rstrip()
    assert all(word == f" {word.strip()}" for word in task.label_words)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_table_in_docs_lists_every_task(task: Task) -> None:
    words = ", ".join(f"`{word.strip()}`" for word in task.label_words)
    hub = "none" if task.hub is None else f"`{task.hub}`; `{task.hub.validation}`"
    prompt = task.template.replace("\n", "⏎")
    line = f"| `{task.name}` | `{prompt}` | `{task.cut}` | `{task.label}`: {words} | {hub} |"
    assert line in (Path(__file__).parents[3] / "docs" / "tasks.md").read_text().splitlines()
