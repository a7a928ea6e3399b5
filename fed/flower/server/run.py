"""A run whose clients are Flower nodes: ``fed.execute`` and ``fed.resume`` over a ``GridExchange``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ....engine import stream
from ...config.run_config import make_config
from ...config.toml import read_toml
from ...ledger.file import read_ledger
from ...run.directory import CONFIG, LEDGER, MASK, is_run
from ...run.execute import Progress, check_same_settings, execute, resume
from ...setup.pool import RemotePool
from ..node.local_run import DERIVED_ELEMENTS, settings_for_nodes
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
    """Starts a run, or resumes the one in its directory.

    Args:
        grid: the ServerApp's Grid.
        settings: settings by name; see ``make_config``.
        output: run directory.
        log: called with each log line.
        deadline: seconds that a round waits for answers. A round in which a client is stale waits up to twice as long.
        min_nodes: number of clients that must have a node before the first round; 0 means all.
        wait: seconds to wait for these nodes; also the time limit for a node to load model and examples.
        send_mask: whether the mask is sent to the nodes; otherwise each has its file or makes the same mask.

    Returns:
        The run's summary; see ``execute``.

    Raises:
        MeerkatError: see ``execute`` and ``resume``; ``TransportError`` if too few nodes come.
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
        parts = [f"round {progress.round} of {progress.rounds}", f"{progress.bytes:,} bytes so far"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if progress.score is not None:
            title, value = progress.score
            parts.append(f"{title} {value:.4f}")
        log(", ".join(parts))

    try:
        if is_run(output):
            same = check_same_settings(settings, output)
            return resume(output, report, log, config=same, pool=RemotePool(exchange))
        return execute(config, output, report, log, pool=RemotePool(exchange))
    finally:
        exchange.release_nodes()


def describe_run(run: Path, *, seconds: float, send_mask: bool = True) -> RunDescription:
    """Describes a run to nodes.

    Args:
        run: run directory, with settings, mask and ledger header.
        seconds: time limit for a node to load the run.
        send_mask: whether to include the mask's file, where the mask does not follow from the settings.
    """
    config, header = make_config(read_toml(run / CONFIG)), read_ledger(run / LEDGER).header
    is_derived = config.method.recipe.elements in DERIVED_ELEMENTS
    return RunDescription(
        settings=settings_for_nodes(config),
        base=header.base,
        mask_digest=header.terms.mask_digest,
        stream_version=stream.VERSION,
        mask=(run / MASK).read_bytes() if send_mask and not is_derived else b"",
        seconds=seconds,
    )


def settings_from(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the settings in a Flower App's configuration: hyphens become underscores, empty strings mean "not set"."""
    return {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}


__all__ = ["describe_run", "serve_run", "settings_from"]
