"""``execute``: a run from its settings to its run directory."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import stream
from ..evaluation import evaluate
from ..mask import SparseMask
from ..parameters import fingerprint, floating_parameters
from . import setup
from .client import Client, ClientData, Timing
from .config import RunConfig
from .ledger import Header, LedgerWriter
from .partition import histogram, split
from .replica import Replica
from .rundir import RunDirectory, check_free
from .server import Server
from .simulation import Traffic, simulate
from .task_choice import chosen_task
from .terms import Terms


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
    say(f"loading the model {config.model} and the task {chosen_task(config).name}")
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
        say(f"... {len(labels) - 8} more clients")
    base = fingerprint(lm.model)
    say(f"choosing the mask ({config.mask or config.method})")
    mask = setup.make_mask(config, lm)
    terms = Terms.of(mask, seed=config.seed, eps=config.eps, lr=config.lr, local_steps=config.local_steps)
    header = Header(terms=terms, base=base, method=config.method, clients=config.clients, weighting=config.weighting)
    directory = RunDirectory(output)
    with directory.begin(config, mask, header) as ledger:
        federation = _Federation(config, lm.model, mask, terms, data, shares, ledger)
        summary = _run_rounds(config, federation, directory, report)
    summary |= {
        "partition": config.partition.describe(config.alpha),
        "examples_by_client_and_label": labels if len(labels) <= 100 else f"{len(labels)} clients",
        **({"natural_clients": names if len(names) <= 100 else f"{len(names)} clients"} if names else {}),
        "base": base,
        "mask": mask.digest,
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


class _Federation:
    """Server and clients of a run around one model."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        mask: SparseMask,
        terms: Terms,
        data: setup.TaskData,
        shares: list[torch.Tensor],
        ledger: LedgerWriter,
    ) -> None:
        replica = Replica(model, mask, terms, config.backend)
        self.model, self.data, self.timing = model, data, Timing()
        self.server = Server(list(range(config.clients)), replica, ledger, config.weighting)
        self.clients = [
            Client(
                i,
                ClientData(data.train, share, config.batch_size, stream.derived_seed(config.seed, "data", i)),
                replica,
                config.objective,
                self.timing,
            )
            for i, share in enumerate(shares)
        ]


def _run_rounds(
    config: RunConfig, federation: _Federation, directory: RunDirectory, report: Callable[[Progress], None]
) -> dict[str, Any]:
    model, validation, timing = federation.model, federation.data.validation, federation.timing
    total, steps, started = Traffic(), 0, time.perf_counter()
    before = last = evaluate(model, validation)
    directory.add_metrics(
        {
            "round": 0,
            "loss": before.loss,
            "validation_loss": before.loss,
            "accuracy": before.accuracy,
            "macro_f1": before.macro_f1,
            "bytes_up": 0,
            "bytes_down": 0,
            "seconds": round(time.perf_counter() - started, 3),
        }
    )
    report(Progress(round=0, loss=before.loss, accuracy=before.accuracy, bytes=0, steps_per_second=0.0))
    begun = time.perf_counter()
    for done in simulate(federation.server, federation.clients, config.rounds):
        number = done.result.round
        line: dict[str, Any] = {"round": number, "loss": done.result.loss}
        evaluated = number == config.rounds or (config.eval_every and number % config.eval_every == 0)
        if evaluated:
            last = evaluate(model, validation)
            line |= {"validation_loss": last.loss, "accuracy": last.accuracy, "macro_f1": last.macro_f1}
        seconds, begun = time.perf_counter() - begun, time.perf_counter()
        line |= {"bytes_up": done.traffic.up, "bytes_down": done.traffic.down, "seconds": round(seconds, 3)}
        directory.add_metrics(line | ({"rejected": done.result.rejected} if done.result.rejected else {}))
        total.up, total.down, steps = (
            total.up + done.traffic.up,
            total.down + done.traffic.down,
            steps + done.result.steps,
        )
        report(
            Progress(
                round=number,
                loss=done.result.loss,
                accuracy=last.accuracy if evaluated else None,
                bytes=total.up + total.down,
                steps_per_second=timing.steps / timing.total,
            )
        )
    weights = sum(p.numel() * p.element_size() for _, p in floating_parameters(model))
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": last.accuracy,
        "macro_f1_before": before.macro_f1,
        "macro_f1_after": last.macro_f1,
        "validation_loss_before": before.loss,
        "validation_loss_after": last.loss,
        "validation_examples": before.examples,
        "truncated_train": federation.data.train.truncated,
        "truncated_validation": validation.truncated,
        "steps": steps,
        "bytes_up": total.up,
        "bytes_down": total.down,
        "bytes_each_way_if_weights_were_sent": weights * config.clients * config.rounds,
        "mask_bytes": 8 * federation.server.replica.terms.elements,
        "masked_elements": federation.server.replica.terms.elements,
        "elements": sum(p.numel() for _, p in floating_parameters(model)),
        "rejected_messages": dict(federation.server.rejected),
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_per_step": timing.total / timing.steps,
        "forward_share_of_step": timing.forward / timing.total,
    }


__all__ = ["Progress", "execute"]
