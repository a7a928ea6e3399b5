"""Server's side in NVIDIA FLARE: carries messages between the server of ``meerkat_engine.fed`` and the sites."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from federation import MASK, make_server
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.model_controller import ModelController

from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import serve


class ScalarController(ModelController):
    """Runs a federation in which the sites send scalars.

    Args:
        sites: number of sites. They are named ``site-1``, ``site-2`` and so on; client ids count from 0.
        rounds: number of rounds.
        deadline: maximum number of seconds that a round waits for answers.
        output: path of the JSON file for the results.
    """

    def __init__(self, sites: int, rounds: int, deadline: int, output: str) -> None:
        super().__init__(persistor_id="", task_check_period=0.02)
        self.sites, self.rounds, self.deadline, self.output = sites, rounds, deadline, output
        self.answers: list[FLModel] = []

    def run(self) -> None:
        """Runs all rounds; FLARE calls it when the job begins."""
        torch.set_num_threads(1)
        self.server = make_server(Path(__file__).with_name(MASK), self.sites)
        seconds, losses, metrics, begun = [], [], [], time.perf_counter()
        for result in serve(self.server, self.exchange, self.rounds):
            seconds.append(time.perf_counter() - begun)
            losses.append(result.record.loss)
            metrics.append({answer.meta["client_name"]: answer.metrics for answer in self.answers})
            self.info(f"round {result.record.round}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s")
            begun = time.perf_counter()
        results = {
            "weights": fingerprint(self.server.replica.model),
            "losses": losses,
            "seconds": seconds,
            "metrics": metrics,
        }
        Path(self.output).write_text(json.dumps(results))

    def exchange(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Sends each request to its site; yields the answers that come in time, with the sender that FLARE reports."""
        self.answers = []
        for id, request in requests:
            message = FLModel(params={"message": np.frombuffer(request, dtype=np.uint8)})
            self.send_model(
                data=message, targets=[f"site-{id + 1}"], timeout=self.deadline, callback=self.answers.append
            )
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                raise InterruptedError("the job was aborted")
            time.sleep(0.005)
        for answer in self.answers:
            yield int(answer.meta["client_name"].removeprefix("site-")) - 1, answer.params["message"].tobytes()
