"""``meerkat-engine chat``: conversations and single prompts, both versions of a run, answers that are stopped."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_engine.engine.errors import DataError
from meerkat_engine.engine.lm.free_text.rendering import Renderer
from meerkat_engine.engine.lm.free_text.shapes import Conversation, Message
from meerkat_engine.engine.lm.generation import generate
from meerkat_engine.engine.lm.models import LanguageModel
from meerkat_engine.fed.inference.columns import printable
from meerkat_engine.fed.inference.dialogue import Dialogue, dialogue_of
from meerkat_engine.fed.inference.target import Target, open_target

from helpers.command import call
from helpers.free_text import CHATML, say


def expected(lm: LanguageModel, messages: list[Message], new: int) -> str:
    """The answer to a conversation, all at once."""
    renderer = Renderer(lm.tokenizer)
    prompt = renderer.prompt(Conversation(tuple(messages)), "here")
    (ids,) = generate(lm.model, [prompt], pad=lm.tokenizer.pad_token_id, end=renderer.end_tokens, max_new_tokens=new)
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def ask(dialogue: Dialogue, target: Target, line: str) -> tuple[str, list[str]]:
    """The answer to a line, and what was noted."""
    parts: list[str] = []
    notes: list[str] = []
    dialogue.answer(line, target.lm, parts.append, notes.append)
    return "".join(parts), notes


def talk(*arguments: object, typed: str) -> str:
    result = call("chat", *arguments, typed=typed)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def target(chat_model: Path) -> Target:
    return open_target(str(chat_model), {"max_new_tokens": 10})


def test_an_answer_depends_on_all_turns_before(target: Target) -> None:
    dialogue, how = dialogue_of(target, None, "Be brief.")
    assert how == "a conversation in the chat template"
    turns: list[Message] = [say("system", "Be brief.")]
    for line in ("Hi", "So?"):
        turns.append(say("user", line))
        answer, notes = ask(dialogue, target, line)
        assert answer.strip() == expected(target.lm, turns, 10)
        assert notes == []
        turns.append(say("assistant", answer.strip()))
    dialogue.reset()
    assert ask(dialogue, target, "So?")[0].strip() == expected(target.lm, [turns[0], say("user", "So?")], 10)


def test_whole_turns_are_forgotten_when_the_conversation_is_too_long(target: Target) -> None:
    dialogue, _ = dialogue_of(target, None, "Be brief.")
    turns: list[Message] = []
    noted = []
    for i in range(5):  # a turn has about 40 tokens, and the model 128 positions
        answer, notes = ask(dialogue, target, f"{i} say it")
        noted += notes
        turns += [say("user", f"{i} say it"), say("assistant", answer.strip())]
    assert noted == ["the conversation is too long for the model: from now on it forgets the first turns"]
    system = say("system", "Be brief.")
    renderer = Renderer(target.lm.tokenizer)
    kept = next(
        part
        for part in ([system, *turns[start:-1]] for start in range(0, len(turns), 2))
        if len(renderer.prompt(Conversation(tuple(part)), "here")) <= 128 - 10
    )
    assert 2 < len(kept) < len(turns)
    assert turns[-1]["content"] == expected(target.lm, kept, 10)


def test_a_line_that_is_too_long_is_refused_and_forgotten(target: Target) -> None:
    dialogue, _ = dialogue_of(target, None, None)
    first, _ = ask(dialogue, target, "Hi")
    with pytest.raises(DataError, match=r"the line is too long: its prompt has \d+ tokens, and 118 fit"):
        ask(dialogue, target, "a" * 200)
    messages: list[Message] = [say("user", "Hi"), say("assistant", first.strip()), say("user", "So?")]
    assert ask(dialogue, target, "So?")[0].strip() == expected(target.lm, messages, 10)


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(target: Target) -> None:
    dialogue, _ = dialogue_of(target, None, None)
    whole = expected(target.lm, [say("user", "Hi")], 10)
    parts: list[str] = []

    def stop(part: str) -> None:
        parts.append(part)
        if len(parts) == 3:
            raise KeyboardInterrupt

    dialogue.answer("Hi", target.lm, stop, parts.append)
    said = "".join(parts[:3])
    assert whole.startswith(said.strip())
    assert len(said.strip()) < len(whole)
    messages: list[Message] = [say("user", "Hi"), say("assistant", said.strip()), say("user", "So?")]
    assert ask(dialogue, target, "So?")[0].strip() == expected(target.lm, messages, 10)


def test_characters_of_several_tokens_are_written_whole(target: Target) -> None:
    tokens = iter(target.lm.tokenizer("né 🦦 so")["input_ids"])

    def say_it(*_: object, on_token: Callable[[int], None], **__: object) -> None:
        for token in tokens:
            on_token(token)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meerkat_engine.fed.inference.dialogue.generate", say_it)
        parts: list[str] = []
        dialogue, _ = dialogue_of(target, None, None)
        dialogue.answer("Hi", target.lm, parts.append, parts.append)
    assert "".join(parts) == "né 🦦 so"
    assert "🦦" in parts


def test_both_versions_of_a_run_answer(talked: Path) -> None:
    target = open_target(str(talked), {})
    with target.base() as lm:
        before = expected(lm, [say("user", "7?")], 10)
    after = expected(target.lm, [say("user", "7?")], 10)
    assert before != after
    output = talk(talked, "--max-new-tokens", 10, typed="7?\n/base\n/reset\n7?\n/tuned\n/reset\n7?\n/quit\n7?\n")
    answers = [part.split("\n> ")[0].strip() for part in output.split("> 7?\n")[1:]]
    assert answers == [printable(after), printable(before), printable(after)]
    assert "was before training" in output
    begins = talk(talked, "--max-new-tokens", 10, "--base", typed="7?\n")
    assert begins.split("> 7?\n")[1].strip() == printable(before)


def test_a_run_on_prompts_answers_lines_one_by_one(answered: Path) -> None:
    line = "the film was dull . my answer is"
    output = talk(answered, "--max-new-tokens", 4, typed=f"{line}\n\n{line}\n")
    assert "each line is a prompt of its own (for a conversation, give --chat-template FILE)" in output
    first, second = (part.split("\n> ")[0].strip() for part in output.split(f"> {line}\n")[1:])
    predicted = call("predict", answered, "--text", line, "--max-new-tokens", 4).output.splitlines()[-1]
    assert first == second
    assert predicted.endswith(first)


def test_a_chat_template_makes_conversations_of_prompts(answered: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    output = talk(answered, "--chat-template", tmp_path / "chat.jinja", "--max-new-tokens", 2, typed="a film\n")
    assert output.startswith("a conversation in the chat template\n")


def test_commands_that_have_no_effect_are_explained(chat_model: Path) -> None:
    output = talk(chat_model, "--max-new-tokens", 2, typed="/base\n/hello\n" + "a" * 300 + "\nHi\n")
    assert "is no run: there is only one version of the model" in output
    assert "there is no command /hello; the commands are /base, /tuned, /reset, /quit" in output
    assert "Error: the line is too long" in output
    assert "> Hi\n" in output


def test_answers_are_drawn_anew_each_time(chat_model: Path) -> None:
    def draw(*arguments: object) -> list[str]:
        output = talk(chat_model, "--max-new-tokens", 8, "--temperature", 3, *arguments, typed="Hi\n/reset\nHi\n")
        return output.split("> Hi\n")[1:]

    first, second = draw()
    assert first.split("\n> ")[0] != second.strip()
    assert draw() == draw("--seed", 0)
    assert draw() != draw("--seed", 1)


def test_no_escape_sequence_reaches_the_terminal(monkeypatch: pytest.MonkeyPatch, chat_model: Path) -> None:
    def say_it(lm: LanguageModel, *_: object, on_token: Callable[[int], None], **__: object) -> None:
        for token in ids:
            on_token(token)

    ids = open_target(str(chat_model), {}).lm.tokenizer("a\x1b[2Jb")["input_ids"]
    monkeypatch.setattr("meerkat_engine.fed.inference.dialogue.generate", say_it)
    assert "a\\x1b[2Jb" in talk(chat_model, typed="Hi\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no chat template; give --chat-template FILE, or --prompt-format text"),
        (["--base"], "--base is for runs, and embedded is a model alone"),
        (["--prompt-format", "text", "--system", "a"], "--system is for conversations"),
        (["--prompt-format", "text", "--seed", "1"], "--seed is for drawing tokens"),
        (["--chat-template", "no.jinja"], "cannot read the chat template no.jinja"),
    ],
)
def test_bad_input(arguments: list[str], message: str, fails: Callable[..., str]) -> None:
    assert message in fails("chat", "embedded", *arguments)


def test_a_run_that_chooses_between_words_does_not_talk(classified: Path, fails: Callable[..., str]) -> None:
    assert "chooses between label words and does not talk; use `meerkat-engine predict`" in fails("chat", classified)


def test_ctrl_c_at_the_prompt_does_not_end_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from meerkat_engine.fed.inference import chat

    answers = iter([KeyboardInterrupt(), "a line", EOFError()])

    def typed(_: str) -> str:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    assert list(chat._lines()) == ["a line"]
