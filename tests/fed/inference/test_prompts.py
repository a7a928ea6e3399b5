"""Rows without answers, of every shape and of the built-in tasks: prompts are those of training."""

from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.errors import DataError
from meerkat_engine.engine.lm.free_text.shapes import Instruction, Plain
from meerkat_engine.engine.lm.free_text.task import TextTask, text_task
from meerkat_engine.engine.lm.free_text.tasks import TEXT_TASKS
from meerkat_engine.engine.lm.row_files import LocatedRows
from meerkat_engine.fed.inference.prompts import contents, typed_row
from meerkat_engine.fed.inference.questions import Choice, questions_of
from meerkat_engine.fed.inference.target import Target, open_target

from helpers.free_text import SHAPES, encode_shape, encode_text, make_chat_tokenizer

_ANSWERS = {"completion", "output", "a", "by"}


def without_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The row as somebody has it who asks: it ends before its last answer."""
    asked = {name: value for name, value in row.items() if name not in _ANSWERS}
    return asked | {name: asked[name][:-1] for name in ("messages", "conversations") if name in asked}


def prompts(task: TextTask, rows: list[dict[str, Any]], *, typed: bool = False) -> list[list[int]]:
    renderer = encode_shape("messages")._renderer
    places = [f"line {i}" for i in range(1, len(rows) + 1)]
    return [renderer.prompt(content, "here") for content in contents(task, rows, places, typed=typed)]


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_are_those_of_training_whether_rows_have_answers_or_not(shape: str) -> None:
    rows, settings = SHAPES[shape]
    trained = encode_shape(shape)
    task = text_task("t", settings.get("template"), settings.get("answer"))
    expected = [trained.prompt_ids(i) for i in range(len(rows))]
    assert prompts(task, rows) == expected
    assert prompts(task, [without_answer(row) for row in rows]) == expected


def test_rows_of_built_in_tasks_need_no_answers() -> None:
    squad = {"context": "It is blue.", "question": "What?"}
    dolly = {"instruction": "Say it.", "context": "It is blue.", "category": "a"}
    drop = {"passage": "It is blue.", "question": "What?"}
    for name, row, answer in (
        ("squad", squad, {"answers": {"text": ["blue", "Blue"]}}),
        ("dolly", dolly, {"response": "blue"}),
        ("drop", drop, {"answers_spans": {"spans": ["blue"]}}),
    ):
        expected = encode_text([row | answer], TEXT_TASKS[name]).prompt_ids(0)
        assert prompts(TEXT_TASKS[name], [row]) == [expected]
        with pytest.raises(DataError, match=r"line 1: .*context|line 1: .*passage"):
            prompts(TEXT_TASKS[name], [{key: value for key, value in row.items() if key not in ("context", "passage")}])


@pytest.fixture(scope="module")
def alpaca(chat_model: Path) -> Target:
    return open_target(str(chat_model), {"task": "alpaca"})


def test_an_instruction_is_typed_with_or_without_its_input(alpaca: Target) -> None:
    for row, text, fields in (
        ({"instruction": "Add."}, "Add.", {}),
        ({"instruction": "Add.", "input": "2, 2"}, "Add.", {"input": "2, 2"}),
        ({"instruction": "Add.", "input": "2, 2"}, None, {"instruction": "Add.", "input": "2, 2"}),
    ):
        assert typed_row(alpaca, text, fields) == row
        expected = encode_text([{**row, "output": "4"}], tokenizer=make_chat_tokenizer()).prompt_ids(0)
        assert prompts(TEXT_TASKS["alpaca"], [row], typed=True) == [expected]


def test_a_prompt_without_tokens_is_named(chat_model: Path) -> None:
    target = open_target(str(chat_model), {})
    with pytest.raises(DataError, match="rows, line 2: its prompt has no tokens"):
        questions_of(target, LocatedRows([{"prompt": "a"}, {"prompt": ""}], ["rows, line 1", "rows, line 2"]), "rows")


def test_scores_that_are_not_finite_choose_nothing() -> None:
    assert Choice({"no": float("nan"), "yes": float("nan")}).best is None
    assert Choice({"no": 0.25, "yes": 0.75}).best == "yes"


def test_a_row_with_more_fields_than_its_shape_needs_is_read_as_in_training() -> None:
    task = text_task("t", None, None)
    row = {"instruction": "Add.", "output": "4", "prompt": "unused"}
    (content,) = contents(task, [row], ["here"], typed=False)
    assert isinstance(content, Instruction)
    (content,) = contents(task, [{"prompt": "2+2=", "completion": "4", "instruction": "unused"}], ["here"], typed=False)
    assert isinstance(content, Plain)
