"""The command ``meerkat-engine evaluate``."""

import json
import os
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from ...engine.errors import ConfigError
from ...engine.lm.data import file_rows, hub_rows
from ...engine.lm.evaluation import Evaluation
from ...engine.lm.evaluation import evaluate as evaluate_model
from ...engine.lm.example_set import Examples
from ...engine.lm.free_text.encoded import EncodedText
from ...engine.lm.scores import LOSS, SCORES, shown
from ...engine.lm.text_metrics import Metric, check_metrics, named_metrics
from ..config.options import GroupedCommand, example, settings
from ..config.run_config import RunConfig
from ..partition import Partition
from ..run.jsonl import finite_or_none
from ..setup.data import check_files, encode_rows, read_rows, sample_rows
from .columns import printable, table
from .held_out import held_out
from .options import check_new, given_settings, of_target, write_new
from .target import Target, holds_run_files, open_target


@click.command(cls=GroupedCommand, epilog=example("meerkat-engine evaluate runs/mine --output scores.json"))
@of_target
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE",
              help="file with examples, all of which are evaluated [default: the held-out ones]")  # fmt: skip
@click.option("--metric-function", "functions", multiple=True, metavar="MODULE:FUNCTION",
              help="function of generated answers and the acceptable answers of each; may be repeated")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="new JSON file for the scores")
@settings("task", "data_dir", "dataset", "dataset_config", "dataset_revision", "dataset_split", "template", "labels",
          "label_field", "answer", "prompt_format", "chat_template", "cut", "max_length", "seed", "device", "dtype",
          "eval_examples", "metrics", "max_new_tokens")  # fmt: skip
def evaluate(
    name: str,
    data: Path | None,
    functions: tuple[str, ...],
    output: Path | None,
    round: int | None,
    base_model: str | None,
    trust_remote_code: bool,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Evaluates a model: its held-out loss, and the scores that the task has.

    TARGET is a run directory, which is evaluated before and after training, on its own held-out examples unless others
    are given; or a checkpoint, a Hugging Face id or a GGUF file, with --task, --dataset or --data.
    """
    check_new(output)
    given = given_settings(config_file, options)
    of_user = [_function(text) for text in functions]
    named_metrics([*check_metrics(given.get("metrics", "")), *of_user])
    target, config = _open(name, given, data, round, base_model, trust_remote_code)
    examples, where = _examples(target, config, data)
    metrics: list[str | Metric] = [*check_metrics(config.evaluation.metrics), *of_user]
    if of_user and not isinstance(examples, EncodedText):
        raise ConfigError(
            f"--metric-function compares generated answers, and {config.task.name!r} chooses between label words; "
            f"leave it out"
        )
    for note in examples.notes:
        click.echo(printable(note))
    if examples.truncated and not examples.notes:
        click.echo(f"{examples.truncated} prompts were cut to fit")
    if metrics:
        click.echo(f"generating answers to {len(examples)} examples")
    found = {}
    for version, weights in target.versions.items():
        with weights as lm:
            found[version] = evaluate_model(
                lm.model, examples, metrics=metrics, max_new_tokens=config.evaluation.max_new_tokens
            )
    _show(found, examples, where)
    if output is not None:
        about = {"target": name, "round": None if target.replayed is None else target.replayed.round}
        about |= {"task": config.task.name, "data": where, "examples": len(examples)}
        scores = {version: _values(evaluation) for version, evaluation in found.items()}
        write_new(output, json.dumps({**about, "scores": scores}, indent=1) + "\n")
        click.echo(f"wrote {output}")


def _function(text: str) -> Metric:
    """The function that ``--metric-function`` names. Modules in this directory are found too.

    Raises:
        ConfigError: if it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if text.count(":") != 1:
        raise ConfigError(f"--metric-function {text!r} must be MODULE:FUNCTION, such as my_metrics:brevity")
    try:
        function = pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"--metric-function {text}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"--metric-function {text} is no function, but {type(function).__name__}")
    return cast(Metric, function)


def _open(
    name: str, given: dict[str, Any], data: Path | None, round: int | None, base_model: str | None, trust: bool
) -> tuple[Target, RunConfig]:
    """The target, and the settings of its evaluation."""
    is_run = holds_run_files(Path(name))
    if not is_run and data is None and not given.keys() & {"task", "dataset"}:
        raise ConfigError(f"{name} is no run, so it has no held-out examples; give --task, --dataset or --data FILE")
    if data is not None and "dataset" in given:
        raise ConfigError("give --dataset NAME or --data FILE, not both")
    task = given.pop("task", None) if is_run else None
    target = open_target(name, given, round=round, base_model=base_model, trust_remote_code=trust)
    config = target.config
    if task is not None:
        config = _on_task(config, task, keep_metrics="metrics" in given)
    if data is not None:  # the run's own number is for its own examples
        config = config.replace(eval_examples=given.get("eval_examples", 0))
    return target, config


def _on_task(config: RunConfig, task: str, *, keep_metrics: bool) -> RunConfig:
    """A run's settings with another task, to evaluate its model on that."""
    if config.data.is_own or task == config.task.name:
        return config.on_task(task)
    metrics = config.evaluation.metrics if keep_metrics else ""
    return config.replace(task=task, partition=Partition.IID, client_field=None, objective=None, metrics=metrics)


def _examples(target: Target, config: RunConfig, data: Path | None) -> tuple[Examples, str]:
    """The examples to evaluate, and where they are from in words."""
    task = config.task
    if data is None and target.replayed is not None:
        check_files(config)
        return held_out(target.replayed, target.lm, config), f"{task.name}, held-out examples"
    if data is not None:
        rows, where = sample_rows(config, task, file_rows(task, data)), str(data)
    elif config.data.dataset is not None and task.hub is not None:
        rows, where = sample_rows(config, task, hub_rows(task, task.hub, "train")), str(task.hub)
    else:
        check_files(config)
        _, _, rows = read_rows(config)
        where = f"{task.name}, held-out examples"
    examples = encode_rows(config, target.lm, rows, where)
    examples.resolve_layout(config.step.layout, target.lm.model)
    return examples, where


def _show(found: Mapping[str, Evaluation], examples: Examples, where: str) -> None:
    click.echo(f"{where}: {len(examples)} examples")
    for version, evaluation in found.items():
        if evaluation.nonfinite:
            click.echo(f"{version}: {evaluation.nonfinite} examples have scores that are not finite")
    names = shown(list(next(iter(found.values())).scores))
    names += [] if LOSS in names else [LOSS]
    values = {version: _values(evaluation) for version, evaluation in found.items()}
    rows = [[_title(name), *(_text(name, values[version][name]) for version in found)] for name in names]
    click.echo(table(["", *found], rows))


def _title(name: str) -> str:
    return SCORES[name].title if name in SCORES else name


def _text(name: str, value: float | None) -> str:
    if name in SCORES:
        return SCORES[name].text(value)
    return "not finite" if value is None else f"{value:.4f}"


def _values(evaluation: Evaluation) -> dict[str, float | None]:
    """The loss and the scores, for JSON."""
    values = {LOSS: evaluation.loss, **evaluation.scores}
    return {name: finite_or_none(value) for name, value in values.items()}


__all__ = ["evaluate"]
