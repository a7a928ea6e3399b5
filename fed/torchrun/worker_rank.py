"""``run_worker_rank``: the side of all ranks but 0 in a run over several processes."""

import struct

from ...engine.errors import MeerkatError, RunError
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ..config.run_config import RunConfig, make_config
from ..config.toml import parse_toml
from ..messages import TrainRequest
from ..setup.data import client_shares, encode
from ..setup.mask import make_mask
from ..setup.model import load_language_model
from ..setup.server_and_clients import Federation
from ..setup.threads import choose_threads
from .rank_pool import BUILD, DONE, END, FAILED, LOAD, TIMING
from .ranks import Ranks, software


class _Inputs:
    """Inputs of a run on this rank: model, examples and their partition."""

    def __init__(self, config: RunConfig, trust_remote_code: bool) -> None:
        self.config = config
        choose_threads(config.model.source)
        self.lm = load_language_model(config, trust_remote_code=trust_remote_code)
        self.data = encode(config, self.lm)
        self.shares = client_shares(config, self.data)

    def digests(self) -> list[bytes]:
        """Fingerprint of the base model, digest of the examples, their layout, and software: rank 0 compares them."""
        examples = self.data.digest(self.shares)
        return [text.encode() for text in (fingerprint(self.lm.model), examples, self.data.train.layout, software())]


class _Clients:
    """The clients of a run on this rank, which share one replica.

    Args:
        ranks: the processes of the run.
        inputs: inputs of the run.
        digest: digest of rank 0's mask.
        file: contents of rank 0's mask file; empty: make the mask from the settings.
    """

    def __init__(self, ranks: Ranks, inputs: _Inputs, digest: bytes, file: bytes) -> None:
        config, model = inputs.config, inputs.lm.model
        mask = SparseMask.from_bytes(file, model) if file else make_mask(config, inputs.lm)
        if mask.digest.encode() != digest:
            raise RunError(f"the mask on this rank is {mask.digest[:12]}, on rank 0 it is {digest.decode()[:12]}")
        federation = Federation(
            config, model, mask, inputs.data, inputs.shares, None, micro_batch_map=ranks.micro_batch_map
        )
        self._clients = {client.id: client for client in federation.clients}
        self._replica, self._timing = federation.server.replica, federation.timing

    def answer(self, update: bytes, *parts: bytes) -> list[bytes]:
        """Answers requests to clients.

        Args:
            update: the rounds that the replica has missed, as an encoded ``TrainRequest``; may be empty.
            parts: packed client id and encoded request, alternating.

        Returns:
            The packed times (see ``TIMING``), then one answer for each request.
        """
        if update:
            missed_update = TrainRequest.decode(update)
            if missed_update.masters is not None:
                self._replica.load_masters(missed_update.round, missed_update.masters)
            elif missed_update.scalars is not None:
                self._replica.catch_up(missed_update.first_round, missed_update.scalars)
        before = self._times()
        answers = [
            self._clients[struct.unpack("<I", i)[0]].handle(request)
            for i, request in zip(parts[::2], parts[1::2], strict=True)
        ]
        spent = (after - earlier for after, earlier in zip(self._times(), before, strict=True))
        return [TIMING.pack(*spent), *answers]

    def _times(self) -> tuple[int, float, float]:
        """The values of ``TIMING`` so far."""
        return self._timing.steps, self._timing.forward, self._timing.total


def run_worker_rank(ranks: Ranks, *, trust_remote_code: bool) -> None:
    """Answers the messages of rank 0 until one ends the run. Errors of this rank are sent to rank 0, which raises them.

    Args:
        ranks: the processes of the run.
        trust_remote_code: see ``models.load_model``.

    Raises:
        RunError: on rank 1, if rank 0 has ended.
        SystemExit: on the other ranks, if rank 0 has ended, so that the user sees the error once.
    """
    inputs: _Inputs | None = None
    clients: _Clients | None = None
    while True:
        try:
            kind, *parts = ranks.receive(0)
        except RunError as error:
            if ranks.rank > 1:
                raise SystemExit(1) from error
            raise RunError("rank 0 has ended; the reason is in its last output, or in that of torchrun") from error
        if kind == END:
            return
        try:
            if kind == LOAD:
                config = make_config(parse_toml(parts[0].decode(), "the settings from rank 0"))
                inputs = _Inputs(config, trust_remote_code)
                answer = inputs.digests()
            elif kind == BUILD:
                assert inputs is not None
                clients, answer = _Clients(ranks, inputs, *parts), []
            else:
                assert clients is not None
                answer = clients.answer(*parts)
        except (MeerkatError, OSError) as error:  # rank 0 raises it
            ranks.send(0, [FAILED, str(error).encode()])
        else:
            ranks.send(0, [DONE, *answer])


__all__ = ["run_worker_rank"]
