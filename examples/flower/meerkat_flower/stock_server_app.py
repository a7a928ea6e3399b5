"""A ServerApp with one of Flower's own strategies. To use it, replace ``server_app`` by its name in pyproject.toml."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedMedian

from meerkat_engine.engine.lm.checkpoint import save_checkpoint
from meerkat_engine.fed.flower.server.run import settings_from
from meerkat_engine.fed.flower.server.strategy import start_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains by FedMedian and saves the model as a Hugging Face checkpoint."""
    settings = settings_from(context.run_config)
    output = Path(str(settings.pop("output", f"models/flower-{context.run_id}")))
    time_limits = {name: float(settings.pop(name)) for name in ("deadline", "wait") if name in settings}
    for name in ("min_nodes", "send_mask"):  # with a strategy, all nodes take part and all are sent the mask
        settings.pop(name, None)
    clients = int(settings["clients"])
    strategy = FedMedian(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    log = logging.getLogger("flwr").info
    trained = start_strategy(grid, strategy, settings, log, **time_limits)
    save_checkpoint(trained.lm, output, f"# FedMedian, {len(trained.scalars)} rounds\n")
    log(f"weights {trained.weights}")
