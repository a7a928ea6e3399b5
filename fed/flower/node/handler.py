"""``RequestHandler``: what stays on a node between Flower's messages, and what it does with one."""

import logging
import time

import numpy as np

from ....engine.errors import ConfigError, MaskError, MessageError, ModelError, NonFiniteLossError
from ...messages import TrainRequest
from .local_run import LocalRun
from .strategy import strategy_round
from .worker_client import END, FrameHeader

_LOG = logging.getLogger("meerkat.worker")
_UNKNOWN: FrameHeader = {"known": False}
# Errors of settings, model, mask, messages and losses, which quote none of the node's examples.
_TOLD = (ConfigError, MaskError, MessageError, ModelError, NonFiniteLossError)


class RequestHandler:
    """Holds one run's model, mask and examples; a setup for another takes their place."""

    def __init__(self) -> None:
        self._session = ""
        self._participant: LocalRun | None = None

    def handle(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        """Deals with a frame: ``do`` is "setup", "round", "stock" or "end"; the answer's ``error`` is what failed."""
        begun = time.perf_counter()
        try:
            found, answer = getattr(self, f"_{_DOES[header['do']]}")(header, payload)
        except _TOLD as error:
            return {"error": f"{error}"}, b""
        except Exception as error:  # a worker that ends takes the model with it
            # what it says may quote the node's examples, which are not the server's to read
            _LOG.exception("%s failed", header.get("do"))
            return {"error": f"{type(error).__name__}; the node's own log says why"}, b""
        return {**found, "seconds": 0.0 if self._is_private else time.perf_counter() - begun}, answer

    @property
    def _is_private(self) -> bool:
        """Whether nobody is to know how long steps take, from which the size of a batch could be guessed."""
        return self._participant is not None and self._participant.replica.terms.privacy is not None

    def _set_up(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        session = str(header["session"])
        if session != self._session:
            self._session, self._participant = "", None  # not two models at a time
            self._participant = LocalRun.prepare(
                header["settings"], header["base"], header["mask"], payload, header["node"]
            )
            self._session = session
        assert self._participant is not None
        self._participant.client(int(header["client"]))
        return {"known": True}, b""

    def _finish(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        self._session, self._participant = "", None
        return _UNKNOWN, b""

    def _round(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        participant = self._participant_for(header["session"])
        if participant is None or self._forgets(TrainRequest.decode(payload).round):
            return _UNKNOWN, b""
        return {"known": True}, participant.client(int(header["client"])).handle(payload)

    def _stock(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        participant = self._participant_for(header["session"])
        if participant is None:
            return _UNKNOWN, b""
        sums = np.frombuffer(payload, dtype=np.float64).reshape(-1, participant.replica.terms.values)
        if self._forgets(len(sums)):
            return _UNKNOWN, b""
        answer, loss = strategy_round(participant, int(header["client"]), sums)
        examples = len(participant.client(int(header["client"])).data)
        return {"known": True, "examples": examples, "loss": loss}, answer.tobytes()

    def _participant_for(self, session: str) -> LocalRun | None:
        return self._participant if session == self._session else None

    def _forgets(self, round: int) -> bool:
        """Forgets a model that has moved beyond a round, where a run was begun again in another directory; whether so.

        Not a private one, which answers no round twice.
        """
        assert self._participant is not None
        if self._is_private or self._participant.replica.round <= max(round, 1):
            return False
        self._session, self._participant = "", None
        return True


_DOES = {"setup": "set_up", "round": "round", "stock": "stock", END: "finish"}


__all__ = ["RequestHandler"]
