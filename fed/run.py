"""``execute``: a run from its settings to its run directory."""

import dataclasses
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backend import resolve
from ..evaluation import Evaluation, evaluate
from ..models import check_device
from ..parameters import fingerprint, floating_parameters
from . import setup
from .attack import attack_of
from .config import RunConfig
from .federation import Federation, Selection, check_selection, terms_of
from .ledger import Header
from .masks import make_mask
from .partition import histogram, split
from .rundir import RunDirectory, check_free
from .simulation import SimulatedRound, Traffic, simulate
from .task_choice import chosen_task
from .terms import CALIBRATION


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run reports after each round (round 0: before training)."""

    round: int
    loss: float
    accuracy: float | None
    bytes: int
    steps_per_second: float


def execute(
    config: RunConfig, output: Path, report: Callable[[Progress], None], say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs a federation and writes its run directory.

    Args:
        config: the settings.
        output: a directory that is empty or does not exist.
        report: called after every round.
        say: called with a line before each slow preparation, and about the data.

    Returns:
        The summary, as in the last line of ``metrics.jsonl``.

    Raises:
        MeerkatError: for any input that does not fit; what was complete on disk stays.
    """
    check_free(output)
    setup.check_files(config)
    if config.backend != "auto":
        resolve(config.backend, check_device(config.device))  # an unfit one is told before anything slow begins
    say(f"loading the model {config.model} and the task {chosen_task(config).name}")
    say(f"{config.method}: {config.rounds} rounds of {config.local_steps} local steps, learning rate {config.lr:g}")
    lm = setup.load_language_model(config)
    data = setup.encode(config, lm.tokenizer)
    shares = split(
        data.train.labels,
        config.clients,
        config.partition,
        config.seed,
        alpha=config.alpha,
        at_least=config.batch_size,
        groups=data.groups,
    )
    names = sorted(set(data.groups or ()))
    labels = histogram(data.train.labels, shares, len(data.train.task.label_words))
    for i, row in enumerate(labels[:8]):
        called = f" ({names[i]})" if names else ""
        say(f"client {i}{called}: {sum(row)} examples, {row} by label")
    if len(labels) > 8:
        say(f"... {len(labels) - 8} more clients; `meerkat-engine report` draws them")
    base = fingerprint(lm.model)
    say(f"choosing the mask ({config.mask or config.method.recipe.elements})")
    mask = make_mask(config, lm, data.train)
    check_selection(config, mask, data)
    if config.mask is not None:
        config = dataclasses.replace(config, density=mask.density)  # what is written down is what was used
    header = Header(
        terms=terms_of(config, mask),
        base=base,
        method=config.method,
        clients=config.clients,
        weighting=config.weighting,
    )
    directory = RunDirectory(output)
    with directory.begin(config, mask, header) as ledger:
        federation = Federation(config, lm.model, mask, data, shares, ledger)
        run = _Run(federation, directory, report, say)
        run.rounds()
    summary = run.summary() | _selected(federation.selection, labels)
    summary |= {
        "partition": config.partition.describe(config.alpha),
        "labels": [word.strip() for word in data.train.task.label_words],
        "examples_by_client_and_label": labels if len(labels) <= 100 else f"{len(labels)} clients",
        **({"natural_clients": names if len(names) <= 100 else f"{len(names)} clients"} if names else {}),
        **attack_of(config.attack, config.clients, config.attackers),
        "base": base,
        "mask": mask.digest,
        "mask_source": mask.source,
        "weights": fingerprint(lm.model),
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": config.device,
        },
    }
    directory.add_metrics({"summary": summary})
    return summary


class _Run:
    """The rounds of a run, each written down when it is over."""

    def __init__(
        self,
        federation: Federation,
        directory: RunDirectory,
        report: Callable[[Progress], None],
        say: Callable[[str], None],
    ) -> None:
        self._federation, self._directory, self._report, self._say = federation, directory, report, say
        self._config = federation.config
        self._traffic, self._steps, self._answers = Traffic(), 0, 0
        self._started = self._begun = time.perf_counter()
        self._before = self._last = self._evaluate()

    def rounds(self) -> None:
        """Before training, the calibration where there is one, and all rounds."""
        done = simulate(self._federation.server, self._federation.clients, self._config.rounds)
        if self._federation.server.round == CALIBRATION:
            self._say(f"a path of {self._config.vp_steps} steps of every client, to find the extreme ones")
            self._write(next(done), self._before)
        else:
            self._write(None, self._before)
        for each in done:
            number, every = each.result.round, self._config.eval_every
            due = number == self._config.rounds or (every and number % every == 0)
            self._write(each, self._evaluate() if due else None)

    def _evaluate(self) -> Evaluation:
        self._last = evaluate(self._federation.model, self._federation.data.validation)
        return self._last

    def _write(self, done: SimulatedRound | None, evaluated: Evaluation | None) -> None:
        """A line of the metrics, and of GradIP where the server has it."""
        number = done.result.round if done is not None else 0
        traffic = done.traffic if done is not None else Traffic()
        line: dict[str, Any] = {"round": number}
        if evaluated is not None:
            line |= {
                "loss": evaluated.loss,
                "validation_loss": evaluated.loss,
                "accuracy": evaluated.accuracy,
                "macro_f1": evaluated.macro_f1,
            }
        if number and done is not None:
            line["loss"] = done.result.loss
        now = time.perf_counter()
        line |= {"bytes_up": traffic.up, "bytes_down": traffic.down, "seconds": round(now - self._begun, 3)}
        self._begun = now
        if done is not None:
            if done.result.rejected:
                line["rejected"] = sum(done.result.rejected.values())
            if done.result.traces:
                self._directory.add_traces(number, done.result.traces)
            self._steps += done.result.steps
            self._answers += traffic.messages if number else 0  # the calibration would send no weights
            self._traffic.up += traffic.up
            self._traffic.down += traffic.down
        self._directory.add_metrics(line)
        timing = self._federation.timing
        self._report(
            Progress(
                round=number,
                loss=line["loss"],
                accuracy=None if evaluated is None else evaluated.accuracy,
                bytes=self._traffic.up + self._traffic.down,
                steps_per_second=timing.steps / timing.total if timing.steps else 0.0,
            )
        )

    def summary(self) -> dict[str, Any]:
        """What the run came to."""
        federation, before, last = self._federation, self._before, self._last
        timing, elements = federation.timing, federation.server.replica.terms.elements
        weights = sum(p.numel() * p.element_size() for _, p in floating_parameters(federation.model))
        return {
            "accuracy_before": before.accuracy,
            "accuracy_after": last.accuracy,
            "macro_f1_before": before.macro_f1,
            "macro_f1_after": last.macro_f1,
            "validation_loss_before": before.loss,
            "validation_loss_after": last.loss,
            "validation_examples": before.examples,
            "truncated_train": federation.data.train.truncated,
            "truncated_validation": federation.data.validation.truncated,
            "steps": self._steps,
            "bytes_up": self._traffic.up,
            "bytes_down": self._traffic.down,
            "bytes_each_way_if_weights_were_sent": weights * self._answers,
            # adapters, layers and whole models have names, which need no ids
            "mask_bytes": 8 * elements if federation.config.method.recipe.elements.ranked else 0,
            "masked_elements": elements,
            "elements": sum(p.numel() for _, p in floating_parameters(federation.model)),
            "rejected_messages": dict(federation.server.rejected),
            "seconds": round(time.perf_counter() - self._started, 3),
            "seconds_per_step": timing.total / timing.steps,
            "forward_share_of_step": timing.forward / timing.total,
        }


def _selected(selection: Selection, labels: list[list[int]]) -> dict[str, Any]:
    """Who was stopped early, why, and how well that found the clients that hold one label only."""
    if selection.thresholds is None:
        return {}
    single = {i for i, row in enumerate(labels) if sum(count > 0 for count in row) == 1}
    right = len(single.intersection(selection.stopped))
    return {
        "stopped": selection.stopped,
        "single_label_clients": sorted(single),
        "precision": right / len(selection.stopped) if selection.stopped else None,
        "recall": right / len(single) if single else None,
        "vp_thresholds": dataclasses.asdict(selection.thresholds),
        "vp_statistics": {i: dataclasses.asdict(found) for i, found in selection.statistics.items()},
    }


__all__ = ["Progress", "execute"]
