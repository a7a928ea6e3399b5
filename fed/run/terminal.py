"""``show_run``: shows the progress bar of a run, then its summary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ...engine.lm.scores import LOSS, SCORES, scores_in, shown
from .rounds import Log, Progress, Report


def show_run(output: Path, start: Callable[[Report, Log], dict[str, Any]]) -> dict[str, Any]:
    """Runs something like ``execute`` and shows its progress and its summary.

    Args:
        output: path of the run directory, as the user gave it.
        start: performs the run and returns its summary. Its arguments are those of ``execute``: a function that is
            called with the progress after each round, and one that is called with each line of the log.

    Returns:
        The summary.
    """
    with tqdm(unit="round", disable=None) as bar:

        def report(progress: Progress) -> None:
            bar.total, bar.n = progress.rounds, progress.round
            fields = {"loss": "unknown" if progress.loss is None else f"{progress.loss:.4f}"}
            if progress.score is not None:
                title, value = progress.score
                last_score[title] = f"{value:.4f}"
            fields |= last_score | {"steps/s": f"{progress.steps_per_second:.2f}", "bytes": amount(progress.bytes)}
            bar.set_postfix(fields)

        last_score: dict[str, str] = {}  # stays in the bar until the next evaluation
        summary = start(report, click.echo if bar.disable else bar.write)
    _print_summary(summary, output)
    return summary


def _print_summary(s: dict[str, Any], output: Path) -> None:
    full = s["bytes_each_way_if_weights_were_sent"]
    _print_scores(s)
    if "nonfinite_after" in s:
        main = SCORES[shown(scores_in(s, "_before"))[0]]
        click.echo(f"not scored      {s['nonfinite_before']} held-out examples before, {s['nonfinite_after']} after: "
                   f"their scores were not finite; {main.if_not_finite}")  # fmt: skip
    if s["truncated_train"] or s["truncated_validation"]:
        click.echo(f"cut to fit      {s['truncated_train']} training examples, "
                   f"{s['truncated_validation']} held-out examples (--max-length)")  # fmt: skip
    click.echo(f"trained         {s['masked_elements']:,} of {s['elements']:,} elements in {s['steps']:,} local steps")
    if s["queries_skipped"]:
        click.echo(f"skipped         {s['queries_skipped']:,} queries, whose loss was not finite")
    for way in ("up", "down"):
        sent = s[f"bytes_{way}"]
        click.echo(f"bytes {way:<9} {amount(sent)}; sending the weights would have cost {amount(full)} "
                   f"({full / max(sent, 1):,.0f} times as much)")  # fmt: skip
    if s["mask_bytes"]:
        click.echo(
            f"mask            {amount(s['mask_bytes'])} of ids to each client once, unless it calibrates for itself"
        )
    if s["seconds_per_step"] is not None:
        share = s["forward_share_of_step"]
        parts = "replayed from CUDA graphs"
        if share is not None:
            parts = f"forward {share:.1%}, everything else {1 - share:.1%}"
        click.echo(f"time per step   {s['seconds_per_step'] * 1e3:.1f} ms: {parts}")
    if "stopped" in s:
        comparison = ""
        if "single_label_clients" in s:
            comparison = f" (single-label clients: {_ids(s['single_label_clients'], 'none')}{_quality(s)})"
        click.echo(f"stopped early   {_ids(s['stopped'], 'no client')}{comparison}")
    if "client_accuracy_stopped" in s:
        values = (f"{of} {SCORES['accuracy'].text(s[f'client_accuracy_{of}'])}" for of in ("mean", "worst", "stopped"))
        click.echo(f"own accuracy    of the clients: {', '.join(values)} (held-out examples in their shares of labels)")
    if "attackers" in s:
        click.echo(f"hostile         {_ids(s['attackers'], 'none')} ({s['attack']})")
    if "epsilon" in s:
        click.echo(f"privacy         epsilon {s['epsilon']:.3g} at delta {s['delta']:g} "
                   f"(simulated: the noise follows from the seed)")  # fmt: skip
    click.echo(f"run directory   {output}")


def _print_scores(s: dict[str, Any]) -> None:
    """Prints the scores before and after: the main one, then the others that need no generated text, then the rest."""
    main, *others = shown(scores_in(s, "_before"))
    examples = f"{s['validation_examples']} held-out examples"
    if main == LOSS:
        examples += f", {s['validation_tokens']:,} answer tokens"
    parts = [f"{SCORES[main].title:<15} {_before_and_after(s, main, ' before', ' after')} ({examples})"]
    parts += [_with_title(s, name) for name in others if not SCORES[name].generated]
    click.echo("; ".join(parts))
    generated = [_with_title(s, name) for name in others if SCORES[name].generated]
    if generated:
        click.echo(f"generated       {'; '.join(generated)}")


def _with_title(s: dict[str, Any], name: str) -> str:
    return f"{SCORES[name].title} {_before_and_after(s, name)}"


def _before_and_after(s: dict[str, Any], name: str, before: str = "", after: str = "") -> str:
    """A score's two values in words, each followed by a word."""
    score = SCORES[name]
    return f"{score.text(s[f'{name}_before'])}{before}, {score.text(s[f'{name}_after'])}{after}"


def _ids(clients: list[int], none: str) -> str:
    """Ids in words; ``none`` if there are none."""
    return ", ".join(map(str, clients)) or none


def _quality(s: dict[str, Any]) -> str:
    """Precision and recall in words, where they are defined."""
    return "".join(f"; {name} {s[name]:.2f}" for name in ("precision", "recall") if s[name] is not None)


def amount(count: float) -> str:
    """A number of bytes in words, with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


__all__ = ["amount", "show_run"]
