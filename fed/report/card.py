"""Model cards for a run's model or an applied delta: front matter for the Hugging Face hub, and how it was made."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ... import __version__
from ...engine.delta import Delta
from ...engine.lm.data import AnyTask
from ...engine.lm.models import LanguageModel
from ...engine.lm.scores import LOSS, SCORES, scores_in, shown
from ...engine.parameters import fingerprint
from ..config.run_config import RunConfig, make_config
from ..run.jsonl import is_number
from ..run.replay import Replayed

_TAGS = ["meerkat-engine", "zeroth-order-optimization"]
# Kinds of tasks on the hub, by their main score.
_HUB_TASKS = {"accuracy": "text-classification", LOSS: "text-generation"}


def run_card(replayed: Replayed, name: str, weights: str) -> str:
    """The model card of a run's model.

    Args:
        replayed: the run, replayed to some round.
        name: name of the model.
        weights: fingerprint of the saved weights. With merged adapters it differs from ``replayed.weights``.

    Returns:
        The card as Markdown with front matter.
    """
    config, header, mask = replayed.config, replayed.ledger.header, replayed.masked.mask
    task = config.task
    before, after = _metrics_line(replayed, 0), _metrics_line(replayed, replayed.round)
    rows = {
        "base model": _code(config.model.source),
        "base weights": _kept(config.model.kept),
        "method": f"{config.method}, {len(mask):,} of {mask.table.size:,} elements",
        "task": f"{task.name}; {_data(config, task)}",
        "clients": f"{header.clients}, {config.clients.partition.describe(config.clients.alpha)}",
        "rounds": f"{replayed.round} of {len(replayed.ledger.rounds)} in the ledger",
        "local steps": _steps(replayed),
        "bytes sent": _bytes(replayed),
        **_privacy(replayed),
        **_scores(before, after),
        **_nonfinite(before, after),
        "base fingerprint": _code(header.base),
        "mask digest": _code(header.terms.mask_digest),
        "ledger SHA-256": _code(replayed.ledger.digest),
        "weights fingerprint": _code(weights),
    }
    again = f"meerkat-engine replay RUN{'' if replayed.is_last_round else f' --round {replayed.round}'} --output DIR"
    body = (
        f"# {name}\n\n"
        "A fine-tuned language model. Base model, mask and ledger reproduce its weights bit for bit.\n\n"
        f"{_table(rows)}\n\n"
        f"To reproduce it with meerkat-engine {__version__} (the method: [arXiv 2506.03337](https://arxiv.org/abs/2506.03337)):\n\n"
        f"```sh\n{run_command(config)} --output RUN\n{again}\n```\n"
    )
    return _card(replayed.lm, name, body, _eval_results(task, after), [str(config.method), "federated-learning"])


def delta_card(delta: Delta, lm: LanguageModel, name: str, base: str, base_fingerprint: str) -> str:
    """The model card of a base model with a delta applied to it.

    Args:
        delta: the delta.
        lm: the model after the delta.
        name: name of the model.
        base: value of ``--model``, which names the base model.
        base_fingerprint: fingerprint of that model. It may be another one than the delta's base.

    Returns:
        The card as Markdown with front matter.
    """
    onto_other = base_fingerprint != delta.base
    rows = {
        "base model": _code(base),
        "method": f"{_plain(delta.method) or 'unknown'}, round {delta.round}, {len(delta.mask):,} of "
        f"{delta.mask.table.size:,} elements",
        "base weights": _kept(delta.kept, onto_other=onto_other),
        "base fingerprint": _code(base_fingerprint),
        "mask digest": _code(delta.mask.digest),
        "weights fingerprint": _code(fingerprint(lm.model, rounded=True)),
    }
    onto = ["--onto-plain"] if onto_other else []
    again = shlex.join(["meerkat-engine", "apply", "DELTA", "--model", base, *onto, "--output", "DIR"])
    body = (
        f"# {name}\n\n"
        "A base model to which a delta was applied: the masked weights of a fine-tuned model.\n\n"
        f"{_table(rows)}\n\n"
        f"To reproduce it with meerkat-engine {__version__}:\n\n```sh\n{again}\n```\n"
    )
    return _card(lm, name, body, [], [])


def _kept(kept: str, *, onto_other: bool = False) -> str:
    if kept == "none":
        return "plain"
    if onto_other:
        return f"plain; the run's were kept as {kept}, so this is another model than that of the run"
    return f"dequantized, kept as {kept} in the run"


def run_command(config: RunConfig) -> str:
    """The command that starts a run with these settings. Settings that have their default value are left out."""
    values = config.flat()
    task_settings = ("data", "dataset", "template", "labels", "answer") if config.data.is_own else ("task",)
    always = {name: values[name] for name in ("model", *task_settings, "method") if values[name] is not None}
    defaults = make_config(always).flat()
    options = [*always, *(name for name in values if name not in always and values[name] != defaults[name])]
    words = [word for name in options for word in ("--" + name.replace("_", "-"), str(values[name]))]
    return shlex.join(["meerkat-engine", "run", *words])


def _card(lm: LanguageModel, name: str, body: str, results: list[EvalResult], tags: list[str]) -> str:
    # a source that is no local path is a name on the hub
    base = None if Path(lm.source).exists() else lm.source
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS + tags,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _eval_results(task: AnyTask, after: Mapping[str, Any]) -> list[EvalResult]:
    """The scores in a line of the metrics, for the front matter."""
    hub, scores = task.hub, shown(scores_in(after))
    return [
        EvalResult(
            task_type=_HUB_TASKS[scores[0]],
            dataset_type=hub.path if hub else task.name,
            dataset_name=task.name,
            dataset_config=hub.config if hub else None,
            dataset_split=hub.validation if hub else None,
            metric_type=SCORES[name].hub_type,
            metric_name=SCORES[name].title,
            metric_value=after[name],
        )
        for name in scores
        if is_number(after.get(name))
    ]


def _metrics_line(replayed: Replayed, round: int) -> dict[str, Any]:
    """The metrics of a round; empty if they are missing."""
    return next((line for line in replayed.metrics if line.get("round") == round), {})


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """A row for each score; one row that says so if the metrics are missing."""
    if not before and not after:
        return {"evaluation": "none: the metrics are missing"}
    return {SCORES[name].title: _change(before, after, name) for name in shown(scores_in({**before, **after}))}


def _change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """A score before and after training, in words."""
    values = [
        SCORES[key].text(line[key]) if key in line and (line[key] is None or is_number(line[key])) else "not evaluated"
        for line in (before, after)
    ]
    return f"{values[0]} before, {values[1]} after"


def _nonfinite(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """A row with the numbers of held-out examples without finite scores; none if all have finite scores."""
    counts = [line.get("nonfinite", 0) for line in (before, after)]
    if not any(counts):
        return {}
    return {"not scored": f"{counts[0]} held-out examples before, {counts[1]} after: their scores were not finite"}


def _privacy(replayed: Replayed) -> dict[str, str]:
    terms, lines = replayed.ledger.header.terms, replayed.ledger.rounds[: replayed.round]
    if terms.privacy is None or not lines:
        return {}
    spent = f"epsilon {lines[-1].epsilon:.3g} at delta {terms.privacy.delta:g}"
    return {"privacy": f"{spent}, simulated: the noise follows from the seed"}


def _steps(replayed: Replayed) -> str:
    terms, rounds = replayed.ledger.header.terms, replayed.ledger.rounds[: replayed.round]
    if terms.sends_weights:  # then the ledger does not record each client's number of steps
        return f"at most {terms.local_steps} of each client a round"
    steps = sum(len(scalars) // terms.queries for line in rounds for scalars in line.clients.values())
    return f"{steps:,} in these rounds"


def _bytes(replayed: Replayed) -> str:
    lines = [line for line in replayed.metrics if is_number(line.get("bytes_up")) and is_number(line.get("bytes_down"))]
    if len(lines) != replayed.round + 1:  # one a round, and round 0 with the bytes of the calibration
        return "unknown"
    up, down = (sum(line[key] for line in lines) for key in ("bytes_up", "bytes_down"))
    return f"{up:,} by the clients, {down:,} to them"


def _data(config: RunConfig, task: AnyTask) -> str:
    if config.data.file is not None:
        return f"the user's own data, {_code(str(config.data.file))}"
    if config.data.directory is not None and config.data.dataset is None:
        return f"data from {_code(str(config.data.directory))}"
    return f"data from the hub, {task.hub}" if task.hub else "data generated by the package"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _plain(text: str) -> str:
    """Text from a file as one line without characters that are markup or end a table cell."""
    return " ".join("".join(" " if c in "`|<>[]" else c for c in text).split())


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


__all__ = ["delta_card", "run_card", "run_command"]
