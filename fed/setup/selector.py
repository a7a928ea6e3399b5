"""``Selector`` finds the clients that are stopped early, and ``ClientMaker`` makes clients, those of null paths too."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...engine import stream
from ...engine.errors import NonFiniteLossError
from ...engine.lm.example_set import Examples
from ...engine.lm.objective import MicroBatchMap
from ..client import Client, ClientData, Timing
from ..config.run_config import RunConfig
from ..gradip import GradIP, Trace
from ..methods import Stopping
from ..privacy import Privacy
from ..replica import Replica
from ..selection import (
    NullPaths,
    Selection,
    Thresholds,
    client_thresholds,
    null_thresholds,
    path_statistics,
    random_clients,
)
from ..terms import CALIBRATION


class ClientMaker:
    """Makes the clients of a run, which share one replica.

    Args:
        config: the settings.
        replica: the replica.
        timing: gets the times of the steps.

    Attributes:
        config: the settings.
        replica: the replica.
    """

    def __init__(self, config: RunConfig, replica: Replica, timing: Timing) -> None:
        self.config, self.replica, self._timing = config, replica, timing

    def client(
        self,
        id: int,
        data: Examples,
        indices: Tensor,
        purpose: str,
        privacy: Privacy | None = None,
        micro_batch_map: MicroBatchMap | None = None,
    ) -> Client:
        """Makes a client.

        Args:
            id: its id.
            data: examples.
            indices: int64 [n], those of the client.
            purpose: what its batches are drawn for: one purpose and id give one order of examples.
            privacy: differential privacy of its scalars; None: they are not private.
            micro_batch_map: see ``Federation``.
        """
        config = self.config
        seed = stream.derived_seed(config.seed, purpose, id)
        noise = None if privacy is None else stream.derived_seed(config.seed, "priv", id)
        examples = ClientData(
            data, indices, config.step.batch_size, seed, config.step.micro_batch_size, poisson=privacy is not None
        )
        return Client(id, examples, self.replica, config.objective, self._timing, privacy, noise, micro_batch_map)


class Selector:
    """Finds the clients that are stopped early from their virtual paths.

    Args:
        make: makes the clients of null paths.
        gradip: computes GradIP of null paths; None if no client can be stopped.
        held_out: the server's own examples, for null paths.

    Attributes:
        selection: the result; empty before the calibration.
    """

    def __init__(self, make: ClientMaker, gradip: GradIP | None, held_out: Examples) -> None:
        self.selection = Selection()
        self._make, self._gradip, self._held_out, self._config = make, gradip, held_out, make.config
        self._windows = make.config.selection.windows(make.config.step.queries)

    def select(self, traces: Mapping[int, Trace]) -> Selection:
        """Finds the clients by the thresholds that the settings give or say how to derive.

        Args:
            traces: virtual path of each client.
        """
        return self.select_by(self._thresholds(traces), traces)

    def select_by(
        self, thresholds: Thresholds, traces: Mapping[int, Trace], stopped: list[int] | None = None
    ) -> Selection:
        """Finds the clients by given thresholds.

        Args:
            thresholds: thresholds of the statistics of a path.
            traces: virtual path of each client.
            stopped: ids from the ledger; None: choose them by the thresholds.
        """
        statistics = {i: path_statistics(trace.gradip, self._windows, thresholds.sigma) for i, trace in traces.items()}
        if stopped is None:
            stopped = [i for i, of_client in statistics.items() if of_client.exceeds(thresholds)]
            if self._config.method.recipe.stopping is Stopping.RANDOM:
                stopped = random_clients(sorted(traces), len(stopped), self._config.seed)
        self.selection = Selection(stopped=sorted(stopped), thresholds=thresholds, statistics=statistics)
        return self.selection

    def _thresholds(self, traces: Mapping[int, Trace]) -> Thresholds:
        selection = self._config.selection
        given = selection.thresholds()
        if given is not None:
            return given
        if selection.null is NullPaths.CLIENTS:
            return client_thresholds({i: trace.gradip for i, trace in traces.items()}, self._windows)
        return null_thresholds(self._null_paths(), self._windows)

    def _null_paths(self) -> list[list[float]]:
        """GradIP along null paths: the paths that IID clients would have on the server's held-out examples."""
        assert self._gradip is not None
        terms = self._make.replica.terms
        all_indices = torch.arange(len(self._held_out), device="cpu")
        scalars = {}
        for i in range(self._config.selection.null_paths):
            client = self._make.client(i, self._held_out, all_indices, "null")
            result, _ = client.train(CALIBRATION, terms.calibration_steps)
            skipped = np.flatnonzero(~np.isfinite(result["scalars"]))
            if len(skipped):
                step = int(skipped[0]) // terms.queries
                raise NonFiniteLossError(
                    f"null path {i}, on held-out examples: a query of step {step} was skipped because a loss or lr * g "
                    f"was not finite; thresholds need all steps; try a smaller lr or eps"
                )
            scalars[i] = result["scalars"].tolist()
        return [trace.gradip for trace in self._gradip.traces(terms.seeds(CALIBRATION), scalars).values()]


__all__ = ["ClientMaker", "Selector"]
