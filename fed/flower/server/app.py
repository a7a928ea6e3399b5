"""The ServerApp: a run of this engine, whose settings are the app's configuration.

Beside the engine's settings, with hyphens (``local-steps``): ``output``, the run directory on the server, which is gone
on with if it holds a run; ``deadline``, ``min-nodes``, ``wait`` and ``send-mask``, as in ``serve_run``.
"""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .run import serve_run, settings_from

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs a federation over the nodes that are there."""
    settings = settings_from(context.run_config)
    log = logging.getLogger("flwr").info
    output = Path(str(settings.pop("output", f"runs/flower-{context.run_id}")))
    summary = serve_run(
        grid,
        {name: value for name, value in settings.items() if name not in _OWN},
        output,
        log,
        **{name: settings[name] for name in _OWN if name in settings},
    )
    log(f"weights {summary['weights']}")
    log(f"run directory {output.resolve()}")


_OWN = ("deadline", "min_nodes", "wait", "send_mask")

__all__ = ["app", "main"]
