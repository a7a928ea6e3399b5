"""``RequestHandler``: keeps a node's run between Flower's messages, and answers the frames of its ClientApps."""

import logging
import time

import numpy as np

from ....engine import stream
from ....engine.errors import ConfigError, MaskError, MessageError, ModelError, NonFiniteLossError
from ...messages import TrainRequest
from .local_run import LocalRun
from .strategy import strategy_round
from .worker_client import END, FrameHeader

_LOG = logging.getLogger("meerkat.worker")
_UNKNOWN_RUN: FrameHeader = {"known": False}
# Errors about settings, model, mask, messages and losses. Their texts never quote the node's examples.
_SENT_IN_FULL = (ConfigError, MaskError, MessageError, ModelError, NonFiniteLossError)


class RequestHandler:
    """Holds the model, mask and examples of one run; the setup of another run replaces them."""

    def __init__(self) -> None:
        self._session = ""
        self._local_run: LocalRun | None = None

    def handle(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        """Answers a frame.

        Args:
            header: ``do`` is "setup", "round", "stock" (a round of one of Flower's strategies) or "end".
            payload: the mask's file, an encoded request, float64 sums, or nothing, respectively.

        Returns:
            The answer's header and payload. The header has ``known`` (whether this run is loaded) and ``seconds``, or
            only ``error``, the reason of a failure.
        """
        begun = time.perf_counter()
        operations = {"setup": self._set_up, "round": self._round, "stock": self._strategy_round, END: self._end}
        try:
            reply, answer = operations[header["do"]](header, payload)
        except _SENT_IN_FULL as error:
            return {"error": f"{error}"}, b""
        except Exception as error:  # an error must not end the worker, which would lose the model
            # the text may quote the node's examples, which the server must not see
            _LOG.exception("%s failed", header.get("do"))
            return {"error": f"{type(error).__name__}; the node's own log has the reason"}, b""
        return {**reply, "seconds": 0.0 if self._is_private else time.perf_counter() - begun}, answer

    @property
    def _is_private(self) -> bool:
        """Whether the run is private. If so, no times are sent: they would help to guess the size of a batch."""
        return self._local_run is not None and self._local_run.replica.terms.privacy is not None

    def _set_up(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        session = str(header["session"])
        if header["stream_version"] != stream.VERSION:
            raise ConfigError(
                f"the run's perturbation stream has version {header['stream_version']}, this node's has "
                f"{stream.VERSION}; install the server's version of this package"
            )
        if session != self._session:
            self._session, self._local_run = "", None  # frees the old model before the new one is loaded
            self._local_run = LocalRun.prepare(
                header["settings"], header["base"], header["mask"], payload, header["node"]
            )
            self._session = session
        assert self._local_run is not None
        self._local_run.client(int(header["client"]))
        return {"known": True}, b""

    def _end(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        self._session, self._local_run = "", None
        return _UNKNOWN_RUN, b""

    def _round(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        local_run = self._run_of(header["session"])
        if local_run is None or self._drop_if_past(TrainRequest.decode(payload).round):
            return _UNKNOWN_RUN, b""
        return {"known": True}, local_run.client(int(header["client"])).handle(payload)

    def _strategy_round(self, header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
        local_run = self._run_of(header["session"])
        if local_run is None:
            return _UNKNOWN_RUN, b""
        sums = np.frombuffer(payload, dtype=np.float64).reshape(-1, local_run.replica.terms.scalars_per_round)
        if self._drop_if_past(len(sums)):
            return _UNKNOWN_RUN, b""
        answer, loss = strategy_round(local_run, int(header["client"]), sums)
        examples = len(local_run.client(int(header["client"])).data)
        return {"known": True, "examples": examples, "loss": loss}, answer.tobytes()

    def _run_of(self, session: str) -> LocalRun | None:
        """The run that is loaded, if it is the session's."""
        return self._local_run if session == self._session else None

    def _drop_if_past(self, round: int) -> bool:
        """Drops the run if its model is past a round, as when the run is restarted in another directory.

        A private run is never dropped, because it answers no round twice.

        Args:
            round: the requested round.

        Returns:
            Whether the run was dropped.
        """
        assert self._local_run is not None
        if self._is_private or self._local_run.replica.round <= max(round, 1):
            return False
        self._session, self._local_run = "", None
        return True


__all__ = ["RequestHandler"]
