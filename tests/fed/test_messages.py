"""The wire format: golden bytes, round trips, and anything else refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_engine.errors import MessageError
from meerkat_engine.fed.messages import HEADER_BYTES, TrainReply, TrainRequest

UINT = st.integers(0, 2**32 - 1)
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20)


def test_golden_bytes() -> None:
    request = TrainRequest(client=7, round=3, local_steps=2, first_round=2, scalars=np.array([1.5, -2.0], np.float32))
    assert request.encode().hex() == (
        "4d4b5431" "01" "01" "0000" "07000000" "03000000" "02000000" "02000000" "02000000" "00000000" "00000000"
        "520d6d24" "0000c03f" "000000c0"
    )  # fmt: skip
    answer = TrainReply(client=7, round=3, local_steps=1, scalars=np.array([0.25], np.float32), examples=131, loss=0.5)
    assert answer.encode().hex() == (
        "4d4b5431" "03" "01" "0000" "07000000" "03000000" "01000000" "00000000" "01000000" "83000000" "0000003f"
        "9838e20e" "0000803e"
    )  # fmt: skip
    assert HEADER_BYTES == 40


@given(client=UINT, round=st.integers(1, 2**32 - 1), steps=UINT, values=FLOATS)
def test_requests_survive_the_round_trip(client: int, round: int, steps: int, values: list[float]) -> None:
    sent = TrainRequest(
        client=client, round=round, local_steps=steps, first_round=1, scalars=np.array(values, np.float32)
    )
    got = TrainRequest.decode(sent.encode())
    assert (got.client, got.round, got.local_steps, got.first_round) == (client, round, steps, 1)
    assert got.masters is None
    assert got.scalars is not None
    assert got.scalars.tobytes() == np.array(values, np.float32).tobytes()


@given(
    client=UINT,
    round=UINT,
    examples=UINT,
    loss=st.floats(width=32, allow_nan=False, allow_infinity=False),
    values=FLOATS,
)
def test_replies_survive_the_round_trip(
    client: int, round: int, examples: int, loss: float, values: list[float]
) -> None:
    sent = TrainReply(
        client=client,
        round=round,
        local_steps=len(values),
        scalars=np.array(values, np.float32),
        examples=examples,
        loss=loss,
    )
    got = TrainReply.decode(sent.encode())
    assert (got.client, got.round, got.examples, got.loss) == (client, round, examples, loss)
    assert got.local_steps == len(values)
    assert got.masters is None
    assert got.scalars is not None
    assert got.scalars.tobytes() == np.array(values, np.float32).tobytes()


@settings(max_examples=200)
@given(at=st.integers(0, HEADER_BYTES + 7), flip=st.integers(1, 255))
def test_every_damaged_byte_is_noticed(at: int, flip: int) -> None:
    data = bytearray(
        TrainReply(client=1, round=2, local_steps=2, scalars=np.ones(2, np.float32), examples=3, loss=0.5).encode()
    )
    data[at] ^= flip
    with pytest.raises(MessageError):
        TrainReply.decode(bytes(data))


@given(data=st.binary(max_size=100))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    for kind in (TrainReply, TrainRequest):
        with pytest.raises(MessageError):
            kind.decode(data)


def test_a_reply_may_bring_weights() -> None:
    """Of a client that trains by backpropagation."""
    sent = TrainReply(client=1, round=2, local_steps=5, masters=np.ones(3, np.float32), examples=4, loss=0.5)
    got = TrainReply.decode(sent.encode())
    assert got.scalars is None
    assert got.masters is not None
    assert got.masters.tolist() == [1, 1, 1]
    assert got.local_steps == 5
    with pytest.raises(MessageError, match="expected a request, got a reply"):
        TrainRequest.decode(sent.encode())


def test_a_reply_is_no_request() -> None:
    answer = TrainReply(client=1, round=1, local_steps=1, scalars=np.ones(1, np.float32), examples=3, loss=0.5)
    with pytest.raises(MessageError, match="expected a request, got a reply"):
        TrainRequest.decode(answer.encode())
    ask = TrainRequest(client=1, round=1, local_steps=1, first_round=1, scalars=np.ones(0, np.float32))
    with pytest.raises(MessageError, match="expected a reply, got a request"):
        TrainReply.decode(ask.encode())


def test_a_loss_that_is_not_finite_is_refused() -> None:
    answer = TrainReply(client=1, round=1, local_steps=1, scalars=np.ones(1, np.float32), examples=3, loss=float("nan"))
    with pytest.raises(MessageError, match="the loss is nan"):
        TrainReply.decode(answer.encode())


def test_rounds_that_cannot_be() -> None:
    ask = TrainRequest(client=1, round=2, local_steps=1, first_round=3, scalars=np.ones(0, np.float32))
    with pytest.raises(MessageError, match="a request for round 2 cannot bring the scalars from round 3 on"):
        TrainRequest.decode(ask.encode())
