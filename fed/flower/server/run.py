"""A whole run whose clients are Flower nodes: ``fed.execute`` and ``fed.resume`` over a ``GridExchange``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ...config.run_config import make_config
from ...config.toml import read_toml
from ...ledger.file import read_ledger
from ...run.directory import CONFIG, LEDGER, MASK, is_run
from ...run.execute import Progress, check_same_settings, execute, resume
from ...setup.pool import RemotePool
from ..node.local_run import FOLLOWING, settings_for_nodes
from ..records import RunDescription
from .exchange import GridExchange

Log = Callable[[str], None]


def serve_run(
    grid: Grid,
    settings: Mapping[str, Any],
    output: Path,
    log: Log,
    *,
    deadline: float = 600.0,
    min_nodes: int = 0,
    wait: float = 600.0,
    send_mask: bool = True,
) -> dict[str, Any]:
    """Begins a run, or goes on with the one that lies in its directory.

    Args:
        grid: of the ServerApp.
        settings: by name, as ``make_config`` takes them.
        output: run directory.
        log: called with lines for people.
        deadline: seconds that a round waits for answers. A round in which a client turns out to be behind waits once
            more.
        min_nodes: clients that must have a node before the first round; 0 is all.
        wait: seconds that these are waited for, and that a node may take to load model and examples.
        send_mask: whether nodes are sent the mask; otherwise each has its file, or chooses the same.

    Returns:
        The summary; see ``execute``.

    Raises:
        MeerkatError: as ``execute`` and ``resume``; ``TransportError`` if too few nodes come.
    """
    config = make_config(settings)
    exchange = GridExchange(
        grid,
        lambda: describe_run(output, seconds=wait, send_mask=send_mask),
        deadline=deadline,
        at_least=min_nodes or config.clients.count,
        wait=wait,
        log=log,
    )

    def report(progress: Progress) -> None:
        told = [f"round {progress.round} of {progress.rounds}", f"{progress.bytes:,} bytes so far"]
        for what, value in (("loss", progress.loss), ("accuracy", progress.accuracy)):
            if value is not None:
                told.append(f"{what} {value:.4f}")
        log(", ".join(told))

    try:
        if is_run(output):
            check_same_settings(settings, output)
            return resume(output, report, log, pool=RemotePool(exchange))
        return execute(config, output, report, log, pool=RemotePool(exchange))
    finally:
        exchange.dismiss()


def describe_run(run: Path, *, seconds: float, send_mask: bool = True) -> RunDescription:
    """What a node has to know of the run in a directory; the arguments are those of ``serve_run``."""
    settings, header = read_toml(run / CONFIG), read_ledger(run / LEDGER).header
    follows = make_config(settings).method.recipe.elements in FOLLOWING
    return RunDescription(
        settings=settings_for_nodes(settings),
        base=header.base,
        mask_digest=header.terms.mask_digest,
        mask=(run / MASK).read_bytes() if send_mask and not follows else b"",
        seconds=seconds,
    )


def settings_from(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a Flower App's configuration: names with hyphens, empty for what is not set."""
    return {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}


__all__ = ["describe_run", "serve_run", "settings_from"]
