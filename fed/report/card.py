"""Model cards of what a run or a delta leads to: front matter for the Hugging Face hub, and what made the model."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ... import __version__
from ...engine.delta import Delta
from ...engine.lm.models import LanguageModel
from ...engine.lm.tasks import Task
from ..config.run_config import RunConfig, make_config
from ..run.jsonl import is_number
from ..run.replay import Replayed

_TAGS = ["meerkat-engine", "zeroth-order-optimization"]


def run_card(done: Replayed, name: str, weights: str) -> str:
    """The card of a run's model.

    Args:
        done: the run, at the end of some round.
        name: of the model.
        weights: fingerprint of what is saved, which merged adapters set apart from ``done.weights``.
    """
    task, header = done.config.task, done.ledger.header
    before, after = _line(done, 0), _line(done, done.round)
    rows = {
        "base model": _code(done.config.model.source),
        "method": f"{done.config.method}, {len(done.masked.mask):,} of {done.masked.mask.table.size:,} elements",
        "task": f"{task.name}; {_data(done.config, task)}",
        "clients": f"{header.clients}, {done.config.clients.partition.describe(done.config.clients.alpha)}",
        "rounds": f"{done.round} of {len(done.ledger.rounds)} in the ledger",
        "local steps": _steps(done),
        "bytes sent": _bytes(done),
        **_privacy(done),
        "accuracy": _change(before, after, "accuracy"),
        "macro-F1": _change(before, after, "macro_f1"),
        "base fingerprint": _code(header.base),
        "mask digest": _code(header.terms.mask_digest),
        "ledger SHA-256": _code(done.ledger.digest),
        "weights fingerprint": _code(weights),
    }
    again = f"meerkat-engine replay RUN{'' if done.last else f' --round {done.round}'} --output DIR"
    body = (
        f"# {name}\n\n"
        "A fine-tuned language model, whose weights base, mask and ledger give again, bit for bit.\n\n"
        f"{_table(rows)}\n\n"
        f"To reproduce it with meerkat-engine {__version__} (the method: [arXiv 2506.03337](https://arxiv.org/abs/2506.03337)):\n\n"
        f"```sh\n{run_command(done.config)} --output RUN\n{again}\n```\n"
    )
    return _card(done.lm, name, body, _evaluated(task, after), [str(done.config.method), "federated-learning"])


def delta_card(delta: Delta, lm: LanguageModel, name: str, base: str) -> str:
    """The card of a base model with a delta put onto it.

    Args:
        delta: what was put on.
        lm: the model.
        name: of the model.
        base: what the base model was called.
    """
    rows = {
        "base model": _code(base),
        "method": f"{_plain(delta.method) or 'not known'}, round {delta.round}, {len(delta.mask):,} of "
        f"{delta.mask.table.size:,} elements",
        "base fingerprint": _code(delta.base),
        "mask digest": _code(delta.mask.digest),
        "weights fingerprint": _code(delta.weights),
    }
    again = shlex.join(["meerkat-engine", "apply", "DELTA", "--model", base, "--output", "DIR"])
    body = (
        f"# {name}\n\nA base model with the masked weights of a fine-tuned one.\n\n{_table(rows)}\n\n"
        f"To reproduce it with meerkat-engine {__version__}:\n\n```sh\n{again}\n```\n"
    )
    return _card(lm, name, body, [], [])


def run_command(config: RunConfig) -> str:
    """The command of a run with these settings, without those that it would have anyway."""
    plain = config.flat()
    own = ("data", "template", "labels") if config.data.file is not None else ("task",)
    named = {name: plain[name] for name in ("model", *own, "method")}
    usual = make_config(named).flat()
    given = [*named, *(name for name in plain if name not in named and plain[name] != usual[name])]
    words = [word for name in given for word in ("--" + name.replace("_", "-"), str(plain[name]))]
    return shlex.join(["meerkat-engine", "run", *words])


def _card(lm: LanguageModel, name: str, body: str, results: list[EvalResult], tags: list[str]) -> str:
    # what was loaded and lies nowhere here came from the hub
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


def _evaluated(task: Task, after: Mapping[str, Any]) -> list[EvalResult]:
    hub = task.hub
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=hub.path if hub else task.name,
            dataset_name=task.name,
            dataset_config=hub.config if hub else None,
            dataset_split=hub.validation if hub else None,
            metric_type=kind,
            metric_name=name,
            metric_value=after[key],
        )
        for key, kind, name in (("accuracy", "accuracy", "accuracy"), ("macro_f1", "f1", "macro-F1"))
        if is_number(after.get(key))
    ]


def _line(done: Replayed, round: int) -> dict[str, Any]:
    return next((line for line in done.metrics if line.get("round") == round), {})


def _change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    found = [f"{line[key]:.4f}" if is_number(line.get(key)) else "not evaluated" for line in (before, after)]
    return f"{found[0]} before, {found[1]} after"


def _privacy(done: Replayed) -> dict[str, str]:
    terms, lines = done.ledger.header.terms, done.ledger.rounds[: done.round]
    if terms.privacy is None or not lines:
        return {}
    spent = f"epsilon {lines[-1].epsilon:.3g} at delta {terms.privacy.delta:g}"
    return {"privacy": f"{spent}, simulated: the noise follows from the seed"}


def _steps(done: Replayed) -> str:
    terms, rounds = done.ledger.header.terms, done.ledger.rounds[: done.round]
    if terms.sends_weights:  # whose rounds do not say who took how many
        return f"at most {terms.local_steps} of each client a round"
    taken = sum(len(scalars) // terms.queries for line in rounds for scalars in line.clients.values())
    return f"{taken:,} in these rounds"


def _bytes(done: Replayed) -> str:
    known = [line for line in done.metrics if is_number(line.get("bytes_up")) and is_number(line.get("bytes_down"))]
    if len(known) != done.round + 1:  # round 0 has those of the calibration
        return "not known"
    up, down = (sum(line[key] for line in known) for key in ("bytes_up", "bytes_down"))
    return f"{up:,} by the clients, {down:,} to them"


def _data(config: RunConfig, task: Task) -> str:
    if config.data.file is not None:
        return f"data of the user's own, {_code(str(config.data.file))}"
    if config.data.directory is not None:
        return f"data from {_code(str(config.data.directory))}"
    return f"data from the hub, {task.hub}" if task.hub else "data that the package makes"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _plain(text: str) -> str:
    """Text from a file as one line that is neither markup nor the end of a cell."""
    return " ".join("".join(" " if c in "`|<>[]" else c for c in text).split())


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


__all__ = ["delta_card", "run_card", "run_command"]
