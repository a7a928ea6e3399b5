"""The ServerApp: runs a federation whose settings are the Flower App's configuration.

The configuration holds the engine's settings, with hyphens (``local-steps``), and four of the app's own besides
``output``: ``deadline``, ``min-nodes``, ``wait`` and ``send-mask``, which ``serve_run`` explains. ``output`` is the run
directory on the server; if it already holds a run, that run is resumed.
"""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ....engine.lm import embedded
from ...setup.threads import choose_threads
from .run import serve_run, settings_from

# The app's own settings that `serve_run` takes as arguments.
_APP_SETTINGS = ("deadline", "min_nodes", "wait", "send_mask")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs a federation over the nodes that are online."""
    settings = settings_from(context.run_config)
    choose_threads(str(settings.get("model", embedded.NAME)))
    log = logging.getLogger("flwr").info
    output = Path(str(settings.pop("output", f"runs/flower-{context.run_id}")))
    summary = serve_run(
        grid,
        {name: value for name, value in settings.items() if name not in _APP_SETTINGS},
        output,
        log,
        **{name: settings[name] for name in _APP_SETTINGS if name in settings},
    )
    log(f"weights {summary['weights']}")
    log(f"run directory {output.resolve()}")


__all__ = ["app", "main"]
