"""The message format: golden bytes, round trips, and rejection of all other bytes."""

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_engine.engine.errors import MessageError
from meerkat_engine.fed.messages import HEADER_BYTES, Stale, TrainReply, TrainRequest, decode_answer
from meerkat_engine.fed.rejection import RejectedError, Rejection

from helpers.constants import FUZZ
from helpers.messages import with_bytes, with_checksum
from helpers.tensors import fp32_array

UINT = st.integers(0, 2**32 - 1)
FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAN = float("nan")


ONE_OF_EACH: dict[str, tuple[TrainRequest | TrainReply, str]] = {
    "request with scalars": (
        TrainRequest(client=7, round=3, local_steps=2, first_round=2, steps_before=4, scalars=fp32_array(1.5, -2.0)),
        "4d4b5431" "01030000" "07000000" "03000000" "02000000" "02000000" "02000000" "04000000" "00000000"
        "87564e6d" "0000c03f" "000000c0",
    ),
    "request with masters": (
        TrainRequest(client=7, round=3, local_steps=2, first_round=3, masters=fp32_array(0.5)),
        "4d4b5431" "02030000" "07000000" "03000000" "02000000" "03000000" "01000000" "00000000" "00000000"
        "a41bc450" "0000003f",
    ),
    "reply with scalars": (
        TrainReply(client=7, round=3, local_steps=3, scalars=fp32_array(NAN, 0.25, NAN), examples=131, loss=0.5),
        "4d4b5431" "03030100" "07000000" "03000000" "03000000" "02000000" "05000000" "83000000" "0000003f"
        "8edefdfe" "00000000" "0000803e" "00000000" "00000000" "02000000",
    ),
    "reply without a loss": (
        TrainReply(client=7, round=3, local_steps=1, scalars=fp32_array(NAN), examples=131, loss=None),
        "4d4b5431" "03030000" "07000000" "03000000" "01000000" "01000000" "02000000" "83000000" "00000000"
        "953c8fba" "00000000" "00000000",
    ),
    "reply with masters": (
        TrainReply(client=7, round=3, local_steps=2, masters=fp32_array(1.0), examples=131, loss=0.5),
        "4d4b5431" "04030100" "07000000" "03000000" "02000000" "00000000" "01000000" "83000000" "0000003f"
        "a8fa841d" "0000803f",
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("message", [m for m, _ in ONE_OF_EACH.values()], ids=list(ONE_OF_EACH))
BOTH = pytest.mark.parametrize("kind", [TrainRequest, TrainReply], ids=lambda kind: kind.__name__)


@pytest.mark.parametrize(("message", "golden"), ONE_OF_EACH.values(), ids=list(ONE_OF_EACH))
def test_golden_bytes(message: TrainRequest | TrainReply, golden: str) -> None:
    assert message.encode().hex() == golden
    assert type(message).decode(bytes.fromhex(golden)).encode().hex() == golden
    assert HEADER_BYTES == 40


@given(
    client=UINT,
    round=st.integers(1, 2**32 - 1),
    steps=UINT,
    before=UINT,
    values=st.lists(FLOAT, max_size=20),
    by_masters=st.booleans(),
)
def test_a_request_decodes_to_the_same_values(
    client: int, round: int, steps: int, before: int, values: list[float], by_masters: bool
) -> None:
    payload = {"masters" if by_masters else "scalars": fp32_array(*values)}
    sent = TrainRequest(client=client, round=round, local_steps=steps, first_round=1, steps_before=before, **payload)
    got = TrainRequest.decode(sent.encode())
    assert (got.client, got.round, got.local_steps, got.first_round) == (client, round, steps, 1)
    assert got.steps_before == before
    received, other = (got.masters, got.scalars) if by_masters else (got.scalars, got.masters)
    assert other is None
    assert received is not None
    assert received.tobytes() == fp32_array(*values).tobytes()


@given(
    client=UINT,
    round=UINT,
    steps=UINT,
    examples=UINT,
    loss=st.none() | FLOAT,
    values=st.lists(FLOAT | st.just(NAN), max_size=20),
)
def test_a_reply_decodes_to_the_same_values_and_skipped_queries(
    client: int, round: int, steps: int, examples: int, loss: float | None, values: list[float]
) -> None:
    sent = TrainReply(
        client=client, round=round, local_steps=steps, scalars=fp32_array(*values), examples=examples, loss=loss
    )
    data = sent.encode()
    assert len(data) == HEADER_BYTES + 4 * (len(values) + sum(map(np.isnan, values)))
    got = TrainReply.decode(data)
    assert (got.client, got.round, got.local_steps, got.examples, got.loss) == (client, round, steps, examples, loss)
    assert got.masters is None
    assert got.scalars is not None
    assert got.scalars.dtype == np.float32
    np.testing.assert_array_equal(got.scalars, fp32_array(*values))
    assert (np.signbit(got.scalars) == np.signbit(fp32_array(*values)))[~np.isnan(got.scalars)].all()


def is_valid_message(data: bytes) -> bool:
    """Whether the bytes are a valid reply or request. Checks that a valid message encodes to the same bytes."""
    valid = False
    for kind in (TrainReply, TrainRequest):
        try:
            got = kind.decode(data)
        except MessageError:
            continue
        assert got.encode() == data
        valid = True
    return valid


@settings(max_examples=100 * FUZZ, deadline=None)
@given(data=st.binary(max_size=100))
def test_random_bytes_are_rejected_with_a_message_error(data: bytes) -> None:
    assert not is_valid_message(data)


@settings(max_examples=1000 * FUZZ, deadline=None)
@given(
    kind=st.sampled_from([1, 2, 3, 4, 1, 2, 3, 4, 0, 5]),
    flags=st.sampled_from([0, 1, 0, 1, 0, 1, 2]),
    zero=st.sampled_from([0, 0, 0, 0, 1]),
    client=UINT,
    fields=st.lists(st.integers(0, 3) | UINT, min_size=3, max_size=3),
    examples=st.just(0) | UINT,
    count=st.none() | st.none() | UINT,
    loss=st.just(bytes(4)) | FLOAT.map(lambda x: struct.pack("<f", x)) | st.binary(min_size=4, max_size=4),
    words=st.lists(st.integers(0, 3) | UINT, max_size=6),
)
def test_random_headers_are_rejected_or_encode_to_the_same_bytes(
    kind: int,
    flags: int,
    zero: int,
    client: int,
    fields: list[int],
    examples: int,
    count: int | None,
    loss: bytes,
    words: list[int],
) -> None:
    """The checksums are correct, so that the checks after the checksum are reached."""
    count = len(words) if count is None else count
    header = struct.pack("<4sBBBB6I", b"MKT1", kind, 2, flags, zero, client, *fields, count, examples)
    is_valid_message(with_checksum(header + loss + bytes(4) + struct.pack(f"<{len(words)}I", *words)))


@EACH
def test_every_damaged_byte_is_an_error(message: TrainRequest | TrainReply) -> None:
    data = message.encode()
    for position in range(len(data)):
        for flip in range(1, 256):
            damaged = bytearray(data)
            damaged[position] ^= flip
            with pytest.raises(MessageError):
                type(message).decode(bytes(damaged))


@EACH
def test_a_message_of_another_length_is_an_error(message: TrainRequest | TrainReply) -> None:
    data = message.encode()
    for length in range(len(data)):
        with pytest.raises(MessageError):
            type(message).decode(data[:length])
    for more in (b"\0", b"\0\0\0\0", data):
        with pytest.raises(MessageError, match="claims"):
            type(message).decode(data + more)


@EACH
def test_a_request_is_not_a_reply_and_a_reply_is_not_a_request(message: TrainRequest | TrainReply) -> None:
    got, expected = ("reply", "request") if isinstance(message, TrainReply) else ("request", "reply")
    other = TrainRequest if isinstance(message, TrainReply) else TrainReply
    with pytest.raises(MessageError, match=f"expected a {expected}, got a {got}"):
        other.decode(message.encode())


def reply(*values: float, words: tuple[int, ...] = (), skipped: int = 0) -> bytes:
    """A reply from values and words; ``skipped`` is the claimed number of positions of skipped queries."""
    header = struct.pack(
        "<4sBBBB6IfI", b"MKT1", 3, 3, 1, 0, 1, 2, 3, skipped, len(values) + len(words), 5, 0.5, 0
    )  # fmt: skip
    return with_checksum(header + struct.pack(f"<{len(values)}f", *values) + struct.pack(f"<{len(words)}I", *words))


REQUEST = ONE_OF_EACH["request with scalars"][0].encode
MASTERS = ONE_OF_EACH["reply with masters"][0].encode
WITHOUT_LOSS = ONE_OF_EACH["reply without a loss"][0].encode


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (reply(1.0, NAN), r"value 1 is not finite \(nan\)"),
        (reply(float("-inf"), 1.0), r"value 0 is not finite \(-inf\)"),
        (with_bytes(MASTERS(), 40, b"\0\0\xc0\x7f"), r"value 0 is not finite \(nan\)"),
        (with_bytes(reply(1.0), 32, b"\0\0\xc0\x7f"), "the loss is nan"),
        (with_bytes(reply(1.0), 32, b"\0\0\x80\x7f"), "the loss is inf"),
        (with_bytes(WITHOUT_LOSS(), 32, b"\0\0\0\x3f"), "the loss is 0.5 in a message without a loss"),
        (with_bytes(WITHOUT_LOSS(), 32, b"\0\0\0\x80"), "the loss is -0.0 in a message without a loss"),
        (with_bytes(reply(1.0), 6, b"\3"), r"reserved bits are set \(flags 0x03, reserved byte 0x00\)"),
        (with_bytes(reply(1.0), 7, b"\1"), r"reserved bits are set \(flags 0x01, reserved byte 0x01\)"),
        (with_bytes(reply(1.0), 4, b"\6"), "unknown kind of message: 6"),
        (with_bytes(reply(1.0), 5, b"\2"), "version 2; b'MKT1', version 3 was expected"),
        (reply(skipped=1, words=(0,)), "has 1 values and claims that 1 are positions of others"),
        (reply(0.0, 1.0, skipped=2**32 - 1), "has 2 values and claims that 4294967295 are positions"),
        (reply(0.0, 1.0, skipped=1, words=(2,)), "must be ascending, unique and below 2"),
        (reply(0.0, 0.0, skipped=2, words=(1, 0)), "must be ascending, unique and below 2"),
        (reply(0.0, 0.0, skipped=2, words=(1, 1)), "must be ascending, unique and below 2"),
        (reply(0.0, 1.0, skipped=1, words=(1,)), "a skipped query has a scalar other than 0"),
        (reply(-0.0, 1.0, skipped=1, words=(0,)), "a skipped query has a scalar other than 0"),
        (
            with_bytes(MASTERS(), 20, b"\1\0\0\0"),
            "a reply with master values has no queries, this one reports 1 skipped",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_reply_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        TrainReply.decode(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_bytes(REQUEST(), 20, b"\4\0\0\0"), "the request for round 3 has scalars from round 4 on"),
        (with_bytes(REQUEST(), 20, b"\0\0\0\0"), "the request for round 3 has scalars from round 0 on"),
        (with_bytes(REQUEST(), 6, b"\1"), "the request has a loss, only a reply may have one"),
        (Stale(client=1, round=3, at_round=2).encode(), "expected a request, got a reply"),
        (with_bytes(REQUEST(), 44, b"\0\0\xc0\x7f"), "value 1 is not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_request_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        TrainRequest.decode(data)


STALE = Stale(client=7, round=3, at_round=2)


def test_a_stale_client_reports_its_round() -> None:
    golden = (
        "4d4b5431" "05030000" "07000000" "03000000" "00000000" "02000000" "00000000" "00000000" "00000000" "0272a9cf"
    )  # fmt: skip
    assert STALE.encode().hex() == golden
    assert decode_answer(bytes.fromhex(golden)) == STALE
    with pytest.raises(RejectedError, match="client 7 is at round 2, the request was for round 3") as caught:
        TrainReply.decode(bytes.fromhex(golden))
    assert caught.value.rejection is Rejection.STALE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            with_bytes(STALE.encode(), 16, b"\1"),
            "stale client has steps, examples, a loss or values; it must have none",
        ),
        (
            with_bytes(STALE.encode(), 28, b"\1"),
            "stale client has steps, examples, a loss or values; it must have none",
        ),
        (with_bytes(STALE.encode(), 6, b"\1"), "stale client has steps, examples, a loss or values; it must have none"),
        (
            with_checksum(STALE.encode()[:24] + b"\1\0\0\0" + bytes(16)),
            "stale client has steps, examples, a loss or values; it must have none",
        ),
        (with_bytes(STALE.encode(), 20, b"\0"), "stale in round 3 cannot be at round 0"),
        (with_bytes(STALE.encode(), 20, b"\3"), "stale in round 3 cannot be at round 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_stale_message_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        decode_answer(data)


@BOTH
def test_too_many_values_are_rejected_before_they_are_read(
    kind: type[TrainRequest] | type[TrainReply],
) -> None:
    data = bytearray(REQUEST() if kind is TrainRequest else reply(1.0, 2.0))
    kind.decode(bytes(data), max_values=2)
    data[-1] ^= 1  # with this, the checksum would not match, if it were computed
    with pytest.raises(MessageError, match="the message claims 2 values, at most 1 were expected"):
        kind.decode(bytes(data), max_values=1)


def peak_memory(decode: Callable[[bytes], object], data: bytes) -> int:
    """Peak memory, in bytes, of the rejection of a message."""
    tracemalloc.start()
    try:
        with pytest.raises(MessageError):
            decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@BOTH
def test_a_claimed_number_of_values_allocates_no_memory(kind: type[TrainRequest] | type[TrainReply]) -> None:
    start = REQUEST() if kind is TrainRequest else reply()
    many = struct.pack("<I", 2**28)
    assert peak_memory(kind.decode, with_bytes(start, 24, many)) < 50_000
    assert peak_memory(kind.decode, with_bytes(start, 24, many) + bytes(1000)) < 50_000
    values = bytes(4 * 10**6)
    full = with_bytes(start[:HEADER_BYTES] + values, 24, struct.pack("<I", 10**6))
    wrong = with_bytes(full, HEADER_BYTES, b"\0\0\xc0\x7f")
    assert peak_memory(kind.decode, wrong) < len(wrong)
