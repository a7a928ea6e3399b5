"""The command ``meerkat-engine predict``."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ...engine.errors import ConfigError, DataError
from ...engine.lm.free_text.shapes import Shape
from ...engine.lm.row_files import LocatedRows, read_rows
from ..config.options import GroupedCommand, example, settings
from ..run.jsonl import finite_or_none
from .columns import printable, side_by_side, table, terminal_width, wrapped
from .options import check_new, given_settings, of_sampling, of_target, sampling, write_new
from .prompts import shape_of, typed_row
from .questions import Answer, Choice, Prediction, Questions, questions_of
from .target import Target, open_target

_SHOWN = 3  # rows of a file
_SHOWN_CHARACTERS = 400  # of their prompts
# By version of the target: the name of a row's field with the prediction.
_FIELDS = {"model": "predicted", "before": "predicted_before", "after": "predicted_after"}


def _fields(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """The values of ``--field`` by name."""
    pairs = [value.partition("=") for value in values]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise click.BadParameter(f"{name!r} is not NAME=VALUE")
        if [other for other, _, _ in pairs].count(name) > 1:
            raise click.BadParameter(f"the field {name!r} is given twice")
    return {name: value for name, _, value in pairs}


@click.command(cls=GroupedCommand, epilog=example('meerkat-engine predict runs/mine --text "a fine film ."'))
@of_target
@click.option("--text", help="the prompt's only field, the prompt, the instruction, or the user's message")
@click.option("--field", "fields", multiple=True, metavar="NAME=VALUE", callback=_fields,
              help="value of one of the prompt's fields; may be repeated")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE",
              help="file with rows to predict; answers in it are not read")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE",
              help="new JSON Lines file for the rows of --data and their predictions")  # fmt: skip
@of_sampling
@settings("task", "template", "labels", "answer", "prompt_format", "chat_template", "cut", "max_length", "device",
          "dtype", "max_new_tokens")  # fmt: skip
def predict(
    name: str,
    text: str | None,
    fields: dict[str, str],
    data: Path | None,
    output: Path | None,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    round: int | None,
    base_model: str | None,
    trust_remote_code: bool,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Shows what a model predicts: label probabilities, or the text that it generates.

    TARGET is a run directory, which shows the model before and after training; or a checkpoint, a Hugging Face id or a
    GGUF file. A run knows its task. Another target gets one with the settings below; without them, it continues text.
    """
    check_new(output)
    _check_input(text, fields, data, output)
    given, drawn = given_settings(config_file, options), sampling(temperature, top_p, seed)
    if "template" in given and not given.keys() & {"labels", "answer"}:
        given["answer"] = "{_}"  # a prompt alone: free text
    rows = None if data is None else read_rows(data)
    if rows is not None and output is not None:
        _check_names(rows)
    target = open_target(name, given, round=round, base_model=base_model, trust_remote_code=trust_remote_code)
    typed = rows is None
    if rows is None:
        rows = LocatedRows([dict(typed_row(target, text, fields))], ["the prompt"])
    questions = questions_of(target, rows, str(data or "the prompt"), typed=typed, sampling=drawn)
    _say_how(target, questions, len(rows), typed=typed)
    predictions = {}
    for version, weights in target.versions.items():
        with weights as lm:
            predictions[version] = questions.predict(lm)
    for i in range(min(len(rows), _SHOWN)):
        click.echo(f"\n{_shown(questions.prompt(i))}\n\n{_side_by_side({v: p[i] for v, p in predictions.items()})}")
    if not typed:
        _sum_up(len(rows), predictions)
    if output is not None:
        write_new(output, _lines(rows, predictions))
        click.echo(f"wrote {output}")


def _check_input(text: str | None, fields: Mapping[str, str], data: Path | None, output: Path | None) -> None:
    """Raises ``ConfigError`` unless there is one input, and an output for it."""
    if data is None and text is None and not fields:
        raise ConfigError("give --text TEXT, --field NAME=VALUE, or --data FILE")
    if data is not None and (text is not None or fields):
        raise ConfigError("give --data FILE, or --text and --field, not both")
    if output is not None and data is None:
        raise ConfigError("--output is for the rows of --data; leave it out")


def _check_names(rows: LocatedRows) -> None:
    """Raises ``DataError`` if a row has a field with the name of a prediction."""
    for row, where in zip(rows, rows.places, strict=True):
        for field in _FIELDS.values():
            if field in row:
                raise DataError(f"{where}: the field {field!r} would be replaced by the prediction; rename it")


def _say_how(target: Target, questions: Questions, count: int, *, typed: bool) -> None:
    """Says what has been made of the rows."""
    if not target.has_task and typed:
        how = "the text is the prompt, as it is"
        if shape_of(target) is Shape.MESSAGES:
            how = "the text is a user's message, in the chat template"
        click.echo(f"no task is given: {how}")
    if questions.cut:
        of = "the prompt was" if typed else f"{questions.cut} of {count} prompts were"
        click.echo(f"{of} too long, and cut as in training")


def _shown(prompt: str) -> str:
    """A prompt as it is shown: the middle of a long one is left out."""
    half = _SHOWN_CHARACTERS // 2
    short = prompt if len(prompt) <= _SHOWN_CHARACTERS else f"{prompt[:half]} [...] {prompt[-half:]}"
    return "\n".join(wrapped(printable(short), terminal_width()))


def _side_by_side(by_version: Mapping[str, Prediction]) -> str:
    """The predictions of all versions for one prompt."""
    answers = {version: p.text or "(nothing)" for version, p in by_version.items() if isinstance(p, Answer)}
    if answers:
        return side_by_side(answers)
    choices = {version: p for version, p in by_version.items() if isinstance(p, Choice)}
    words = list(next(iter(choices.values())).probabilities)
    rows = [[word, *(_probability(choice, word) for choice in choices.values())] for word in words]
    return table(["label", *(f"{version}  " for version in choices)], rows)


def _probability(choice: Choice, word: str) -> str:
    return f"{choice.probabilities[word]:.4f} {'*' if word == choice.best else ' '}"


def _sum_up(count: int, predictions: Mapping[str, Sequence[Prediction]]) -> None:
    """Says how many rows there are, and how often each label word is the most likely."""
    click.echo(f"\n{count} rows" + (f", of which these are the first {_SHOWN}" if count > _SHOWN else ""))
    choices = {version: [p for p in found if isinstance(p, Choice)] for version, found in predictions.items()}
    if any(choices.values()):
        counts = {version: Counter(choice.best for choice in found) for version, found in choices.items()}
        words = list(next(iter(choices.values()))[0].probabilities)
        rows = [[word, *(str(counts[version][word]) for version in counts)] for word in words]
        click.echo(table(["most likely", *counts], rows))


def _lines(rows: LocatedRows, predictions: Mapping[str, Sequence[Prediction]]) -> str:
    """The rows with their predictions as JSON Lines."""
    return "".join(
        json.dumps({**row, **{_FIELDS[v]: _json(p[i]) for v, p in predictions.items()}}, default=str) + "\n"
        for i, row in enumerate(rows)
    )


def _json(prediction: Prediction) -> Any:
    if isinstance(prediction, Answer):
        return prediction.text
    probabilities = {word: finite_or_none(value) for word, value in prediction.probabilities.items()}
    return {"label": prediction.best, "probabilities": probabilities}


__all__ = ["predict"]
