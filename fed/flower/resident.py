"""``Resident``: what stays on a node between Flower's messages, and what it does with one."""

import logging
import time
from typing import Any

import numpy as np

from ...errors import ConfigError, MeerkatError
from ..methods import Stopping
from .link import Header
from .participant import Participant

_LOG = logging.getLogger("meerkat.worker")
_UNKNOWN: Header = {"known": False}


class Resident:
    """Holds one run's model, mask and examples; a setup for another takes their place."""

    def __init__(self) -> None:
        self._session = ""
        self._participant: Participant | None = None

    def handle(self, header: Header, payload: bytes) -> tuple[Header, bytes]:
        """Deals with a frame: ``do`` is "setup", "round" or "stock"; the answer's ``error`` says what was wrong with it."""
        begun = time.perf_counter()
        try:
            found, answer = getattr(self, f"_{_DOES[header['do']]}")(header, payload)
        except MeerkatError as error:
            return {"error": f"{error}"}, b""
        except Exception as error:  # a worker that ends takes the model with it
            _LOG.exception("%s failed", header.get("do"))
            return {"error": f"{type(error).__name__}: {error}"}, b""
        return {**found, "seconds": time.perf_counter() - begun}, answer

    def _set_up(self, header: Header, payload: bytes) -> tuple[Header, bytes]:
        session = str(header["session"])
        if session != self._session:
            self._session, self._participant = "", None  # not two models at a time
            self._participant = Participant.prepare(
                header["settings"], header["base"], header["mask"], payload, header["node"]
            )
            self._session = session
        assert self._participant is not None
        self._participant.client(int(header["client"]))
        return {"known": True}, b""

    def _round(self, header: Header, payload: bytes) -> tuple[Header, bytes]:
        if self._participant is None or header["session"] != self._session:
            return _UNKNOWN, b""
        return {"known": True}, self._participant.client(int(header["client"])).handle(payload)

    def _stock(self, header: Header, payload: bytes) -> tuple[Header, bytes]:
        if self._participant is None or header["session"] != self._session:
            return _UNKNOWN, b""
        values = self._participant.replica.terms.values
        sums = np.frombuffer(payload, dtype=np.float64).reshape(-1, values)
        answer, loss = stock_round(self._participant, int(header["client"]), sums)
        examples = len(self._participant.client(int(header["client"])).data)
        return {"known": True, "examples": examples, "loss": loss}, answer.tobytes()


_DOES = {"setup": "set_up", "round": "round", "stock": "stock"}


def stock_round(participant: Participant, client: int, sums: np.ndarray) -> tuple[np.ndarray, float]:
    """A round under a strategy that knows nothing of this engine: see ``stock``.

    Args:
        participant: the node's.
        client: id.
        sums: float64 [r, T * queries], what came down in rounds 1 to r.

    Returns:
        What goes up, float64 [T * queries], and the mean loss; 0 where no step was taken or it is not told.
    """
    config, replica = participant.config, participant.replica
    if config.method.recipe.stopping is not Stopping.NONE or replica.terms.privacy is not None:
        raise ConfigError("early stopping and dp_noise need this engine's own server; leave them out, or take its app")
    moved = np.diff(sums, axis=0).astype(np.float32)
    if replica.round > len(sums):
        raise ConfigError(f"round {len(sums)} was asked for, this client stands at round {replica.round} already")
    replica.catch_up(1, moved.reshape(-1))
    one = participant.client(client)
    one.data.go_to((len(sums) - 1) * config.local_steps)
    found, loss = one.train(len(sums), config.local_steps)
    taken: Any = np.nan_to_num(found["scalars"].astype(np.float64), nan=0.0)
    return sums[-1] + taken, 0.0 if loss is None else loss


__all__ = ["Resident", "stock_round"]
