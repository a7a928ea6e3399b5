"""The server of NVIDIA FLARE: carries the bytes between ``meerkat_engine.fed``'s server and the sites."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from federation import make_server
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.model_controller import ModelController

from meerkat_engine.errors import MessageError
from meerkat_engine.parameters import fingerprint


class ScalarController(ModelController):
    """Rounds of scalars.

    Args:
        clients: how many sites there are, ``site-1`` and so on.
        rounds: to take.
        deadline: seconds that a round waits for answers, at most.
        output: file for what came out.
    """

    def __init__(self, clients: int, rounds: int, deadline: int, output: str) -> None:
        super().__init__(task_check_period=0.02)
        self.clients, self.rounds, self.deadline, self.output = clients, rounds, deadline, output

    def run(self) -> None:
        """Called by FLARE when the job begins."""
        torch.set_num_threads(1)
        self.server, self.told = make_server(self.clients), []
        seconds = []
        while self.server.round <= self.rounds:
            begun = time.perf_counter()
            for id in self.server.participants():
                request = np.frombuffer(self.server.request(id), dtype=np.uint8)
                self.send_model(
                    data=FLModel(params={"message": request}, current_round=self.server.round),
                    targets=[f"site-{id + 1}"],
                    timeout=self.deadline,
                    callback=self.answered,
                )
            while self.get_num_standing_tasks():
                if self.abort_signal.triggered:
                    return
                time.sleep(0.005)
            self.info(f"round {self.server.round}: loss {self.server.finish_round().line.loss:.4f}")
            seconds.append(time.perf_counter() - begun)
        weights = fingerprint(self.server.replica.model)
        Path(self.output).write_text(json.dumps({"weights": weights, "seconds": seconds, "told": self.told}))

    def answered(self, result: FLModel) -> bool:
        """Takes a site's answer into the round; FLARE knows whom it is from."""
        site = result.meta["client_name"]
        try:
            reply = self.server.receive(
                result.params["message"].tobytes(), sender=int(site.removeprefix("site-")) - 1
            )
        except MessageError as error:
            self.warning(f"{site}: {error}")
            return False
        self.told.append({"round": reply.round, "site": site, **result.metrics})
        return True
