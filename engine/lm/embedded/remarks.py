"""Free text in the words of the embedded model: ``python -m meerkat_engine.engine.lm.embedded.remarks DIR``.

A prompt is a review and the question of ``corpus.TASK``; the answer recommends what the review is about, or warns of
it. Pre-training text has such remarks, but not after the question, which it answers with yes or no. So the
pre-trained model can tell what to recommend, but does not know that it is asked to.

The files in ``examples/data`` were written with the defaults below.
"""

import json
from pathlib import Path

import click

from ... import stream
from . import corpus

# No full stop at the end: it is the tokenizer's end-of-text token.
_COMPLETIONS = {True: " you should try this {}", False: " you should avoid this {}"}


def remark_rows(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Generates prompts with their answers: distinct prompts, with recommendations and warnings in turn.

    Args:
        count: number of rows.
        seed: seed of the reviews, in [0, 2**64).
        exclude: prompts to leave out.

    Returns:
        Rows with the fields ``prompt`` and ``completion``. The prompt names what the review is about, so that one
        completion is right.
    """
    draws = corpus.Draws(stream.derived_seed(seed, "rema"))
    completion_of: dict[str, str] = {}
    while len(completion_of) < count:
        good = len(completion_of) % 2 == 1
        review, thing = corpus.draw_review(draws, good)
        prompt = corpus.TASK.prompt({"review": review})
        if thing in review.split() and prompt not in exclude:
            completion_of.setdefault(prompt, _COMPLETIONS[good].format(thing))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in completion_of.items()]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    click.echo(f"{len(rows)} rows written to {path}")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--train", default=600, show_default=True, help="number of training rows")
@click.option("--held-out", default=200, show_default=True, help="number of held-out rows")
@click.option("--seed", default=1, show_default=True)
def main(directory: Path, train: int, held_out: int, seed: int) -> None:
    """Writes remarks.jsonl and remarks-held-out.jsonl to DIRECTORY; no prompt is in both."""
    rows = remark_rows(train, seed)
    directory.mkdir(parents=True, exist_ok=True)
    prompts = frozenset(row["prompt"] for row in rows)
    try:
        _write(directory / "remarks.jsonl", rows)
        _write(directory / "remarks-held-out.jsonl", remark_rows(held_out, seed + 1, prompts))
    except FileExistsError as error:
        raise click.ClickException(f"{error.filename} exists; nothing is overwritten") from error


if __name__ == "__main__":
    main()
