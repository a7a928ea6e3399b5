"""Broken and hostile clients: rejected messages change nothing, robust rules limit the effect of accepted ones."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_engine.engine.errors import MessageError
from meerkat_engine.engine.weights import round_fp32
from meerkat_engine.fed import execute, make_config, read_ledger, simulate
from meerkat_engine.fed.aggregation import Rule, Weighting
from meerkat_engine.fed.attack import Attack, HostileClient, with_attackers
from meerkat_engine.fed.messages import HEADER_BYTES, TrainReply
from meerkat_engine.fed.privacy import Privacy, epsilon
from meerkat_engine.fed.rejection import RejectedError, Rejection
from meerkat_engine.fed.server import RoundFailedError

from helpers.command import call
from helpers.tensors import fp32_array

Make = Callable[..., Any]
INF, NAN = float("inf"), float("nan")


def answer(fed: Any, client: int) -> TrainReply:
    """An honest client's reply in the current round."""
    return TrainReply.decode(fed.clients[client].handle(fed.server.request(client)))


def state(fed: Any, ledger: Path) -> tuple[Any, ...]:
    """All state that a rejected message must not change."""
    server = fed.server
    of_clients = (dict(server.claimed_examples), dict(server._client_round), dict(server._answers.values))
    of_round = (server.round, server.participants())
    return fed.weights, fed.replica.optimizer.weights.masters().tolist(), ledger.read_bytes(), of_clients, of_round


def finish(fed: Any, clients: tuple[int, ...]) -> Any:
    """Receives honest replies of some clients and finishes the round; returns its ledger line."""
    for client in clients:
        fed.server.receive(answer(fed, client).encode(), sender=client)
    return fed.server.finish_round().record


def with_raw_nan(reply: TrainReply) -> bytes:
    """A message with NaN as value 1 and a correct checksum (``encode`` would write a skipped query instead)."""
    from helpers.messages import with_bytes

    return with_bytes(reply.encode(), HEADER_BYTES + 4, b"\0\0\xc0\x7f")


MESSAGES: dict[str, tuple[Callable[[TrainReply], bytes], Rejection, str]] = {
    "nothing": (lambda _: b"", Rejection.MALFORMED, "has 0 bytes"),
    "truncated": (lambda r: r.encode()[:-1], Rejection.MALFORMED, "claims 2 values"),
    "longer": (lambda r: r.encode() + bytes(4), Rejection.MALFORMED, "claims 2 values"),
    "damaged": (lambda r: r.encode()[:-1] + b"\xff", Rejection.MALFORMED, "checksum"),
    "of another protocol": (lambda r: b"X" + r.encode()[1:], Rejection.MALFORMED, "begins"),
    "far too many values": (
        lambda r: replace(r, scalars=fp32_array(*[0.1] * 1000)).encode(),
        Rejection.MALFORMED,
        "claims 1000 values, at most 4 were expected",
    ),
    "nan": (with_raw_nan, Rejection.NOT_FINITE, "value 1 is not finite"),
    "inf": (
        lambda r: replace(r, scalars=fp32_array(0.5, -INF)).encode(),
        Rejection.NOT_FINITE,
        "value 1 is not finite",
    ),
    "loss nan": (lambda r: replace(r, loss=NAN).encode(), Rejection.NOT_FINITE, "the loss is nan"),
    "loss inf": (lambda r: replace(r, loss=INF).encode(), Rejection.NOT_FINITE, "the loss is inf"),
    "too large": (
        lambda r: replace(r, scalars=fp32_array(NAN, -1.01e8)).encode(),
        Rejection.TOO_LARGE,
        r"client 0 sent a scalar of absolute value 1.01e\+08",
    ),
    "one step": (
        lambda r: replace(r, local_steps=1).encode(),
        Rejection.COUNT,
        "client 0 sent a reply for 1 local steps, 2 were requested",
    ),
    "one scalar": (
        lambda r: replace(r, scalars=fp32_array(0.5)).encode(),
        Rejection.COUNT,
        "client 0 sent 1 scalars, 2 were expected",
    ),
    "three scalars": (
        lambda r: replace(r, scalars=fp32_array(1, 2, 3)).encode(),
        Rejection.COUNT,
        "client 0 sent 3 scalars, 2 were expected",
    ),
    "weights": (lambda r: replace(r, masters=fp32_array(1, 2)).encode(), Rejection.COUNT, "client 0 sent no scalars"),
    "unknown client": (
        lambda r: replace(r, client=9).encode(),
        Rejection.UNKNOWN,
        "client 9 is not part of this federation",
    ),
    "old round": (
        lambda r: replace(r, round=1).encode(),
        Rejection.ROUND,
        "client 0 sent an answer for round 1 in round 2",
    ),
    "calibration": (
        lambda r: replace(r, round=0).encode(),
        Rejection.ROUND,
        "client 0 sent an answer for round 0 in round 2",
    ),
    "future round": (
        lambda r: replace(r, round=3).encode(),
        Rejection.ROUND,
        "client 0 sent an answer for round 3 in round 2",
    ),
    "second answer": (
        lambda r: replace(r, client=1).encode(),
        Rejection.REPEATED,
        "client 1 has already answered round 2",
    ),
    "no examples": (lambda r: replace(r, examples=0).encode(), Rejection.EXAMPLES, "client 0 reported 0 examples"),
    "far too many examples": (
        lambda r: replace(r, examples=2**32 - 1).encode(),
        Rejection.EXAMPLES,
        r"client 0 reported 4294967295 examples, \d+ in an earlier round",
    ),
}


@pytest.mark.parametrize(("make", "rejection", "reason"), MESSAGES.values(), ids=list(MESSAGES))
def test_a_rejected_message_changes_nothing_and_the_round_continues_without_it(
    federation: Make, tmp_path: Path, make: Callable[[TrainReply], bytes], rejection: Rejection, reason: str
) -> None:
    """Sends the message in round 2, and compares with a federation in which client 0 does not answer that round."""
    path, other = tmp_path / "a", tmp_path / "b"
    fed, without = federation(ledger=path), federation(ledger=other)
    for each in (fed, without):
        finish(each, (0, 1, 2))
    message = make(answer(fed, 0))
    fed.server.receive(answer(fed, 1).encode(), sender=1)
    before, counted = state(fed, path), fed.server.rejected.total()
    with pytest.raises(RejectedError, match=reason) as caught:
        fed.server.receive(message)
    assert caught.value.rejection is rejection
    assert state(fed, path) == before
    assert fed.server.rejected.total() == counted + 1
    (key,) = fed.server.rejected_this_round()
    assert key.endswith(f": {rejection}")
    result, clean = finish(fed, (2,)), finish(without, (1, 2))
    assert result == replace(
        clean, rejected={key: 1}, bytes_up=clean.bytes_up + len(message), bytes_down=result.bytes_down
    )
    assert clean.rejected == {}
    assert fed.weights == without.weights
    assert read_ledger(path).rounds == [read_ledger(other).rounds[0], result]
    finish(fed, (0, 1, 2))  # the client can take part again
    assert fed.server.rejected_this_round() == {}


def test_the_weights_of_the_mean_are_those_of_the_accepted_clients(federation: Make) -> None:
    fed = federation()
    one, two = (replace(answer(fed, i), scalars=fp32_array(*g)) for i, g in ((1, (0.5, 0.5)), (2, (1.0, 2.0))))
    with pytest.raises(MessageError):
        fed.server.receive(replace(answer(fed, 0), examples=0).encode())
    fed.server.receive(replace(one, examples=30).encode())
    fed.server.receive(replace(two, examples=10).encode())
    assert fed.server.finish_round().record.scalars == [0.625, 0.875]  # weights 3/4 and 1/4


def test_a_replayed_message_changes_nothing(federation: Make, tmp_path: Path) -> None:
    fed = federation(ledger=tmp_path / "l")
    first = answer(fed, 0).encode()
    fed.server.receive(first)
    with pytest.raises(RejectedError, match="client 0 has already answered round 1"):
        fed.server.receive(first)
    finish(fed, (1, 2))
    before = state(fed, tmp_path / "l")
    with pytest.raises(RejectedError, match="client 0 sent an answer for round 1 in round 2"):
        fed.server.receive(first)
    assert state(fed, tmp_path / "l") == before
    assert fed.server.rejected == {"client 0: a second answer": 1, "client 0: another round": 1}


def test_a_client_cannot_answer_in_the_name_of_another(federation: Make, tmp_path: Path) -> None:
    fed = federation(ledger=tmp_path / "l")
    message, before = answer(fed, 1).encode(), state(fed, tmp_path / "l")
    for sender in (0, 9):
        with pytest.raises(RejectedError, match=f"client {sender} sent a message in the name of client 1"):
            fed.server.receive(message, sender=sender)
    assert state(fed, tmp_path / "l") == before
    assert fed.server.rejected_this_round() == {
        "client 0: sent in another client's name": 1, "unknown: sent in another client's name": 1,
    }  # fmt: skip
    fed.server.receive(message, sender=1)


def test_a_malformed_message_is_counted_for_the_authenticated_sender(federation: Make) -> None:
    """Without an authenticated sender, the message is counted as unknown."""
    server = federation().server
    for sender in (2, None):
        with pytest.raises(MessageError):
            server.receive(b"no message", sender=sender)
    assert server.rejected_this_round() == {"client 2: malformed": 1, "unknown: malformed": 1}


def test_a_hostile_sender_cannot_fill_the_servers_memory(federation: Make) -> None:
    """New ids, rounds, values and lengths add no keys: their number is bounded by clients times reasons."""
    fed = federation()
    honest = answer(fed, 0)

    def send(start: int) -> None:
        for i in range(start, start + 1000):
            for message in (
                replace(honest, client=1000 + i),
                replace(honest, round=2 + i),
                replace(honest, local_steps=3 + i),
                replace(honest, scalars=fp32_array(2e8 + 1e3 * i, 0.0)),
            ):
                with pytest.raises(MessageError):
                    fed.server.receive(message.encode())
            with pytest.raises(MessageError):
                fed.server.receive(bytes(i))

    send(0)
    keys = dict(fed.server.rejected)
    assert len(keys) == 5
    tracemalloc.start()
    send(1000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert fed.server.rejected == {key: 2 * count for key, count in keys.items()}
    assert grown < 20_000


def private_federation(federation: Make, ledger: Path) -> Any:
    return federation(ledger=ledger, privacy=Privacy(clip=1.0, noise_multiplier=2.0, delta=1e-4, batch_size=8))


def test_epsilon_counts_clients_none_of_whose_answers_was_accepted(federation: Make, tmp_path: Path) -> None:
    """Whoever received their messages has seen scalars of theirs."""
    pytest.importorskip("dp_accounting")
    fed = private_federation(federation, tmp_path / "l")
    privacy, resumed = fed.terms.privacy, private_federation(federation, tmp_path / "m")
    honest = replace(answer(fed, 0), examples=400)
    short, rounds = replace(honest, local_steps=1), []
    for round, of_client_1 in ((1, b"unreadable"), (2, replace(short, client=1, round=2, examples=9).encode())):
        of_client_2 = replace(short, client=2, round=round, examples=50).encode()
        for client, message in ((1, of_client_1), (2, of_client_2)):
            with pytest.raises(RejectedError):
                fed.server.receive(message, sender=client)
        fed.server.receive(replace(honest, round=round).encode(), sender=0)
        rounds.append(fed.server.finish_round().record)
    # client 1 has an unknown number of examples, and counts with the fewest that a private client may have
    assert [line.epsilon for line in rounds] == [epsilon(privacy, 8, 2), epsilon(privacy, 8, 4)]
    assert [line.rejected_examples for line in rounds] == [{1: 8, 2: 50}, {}]
    ledger = read_ledger(tmp_path / "l")
    assert ledger.rounds == rounds
    for line in ledger.rounds:
        resumed.server.restore(line)
    for client in (1, 2):  # with an accepted answer, its number of examples is known
        for server in (fed.server, resumed.server):
            server.receive(replace(honest, client=client, round=3, examples=60 * client).encode(), sender=client)
    result = fed.server.finish_round().record
    assert result == resumed.server.finish_round().record
    assert result.epsilon == epsilon(privacy, 60, 6)


def test_a_private_client_that_reports_less_than_a_batch_of_examples_is_rejected(
    federation: Make, tmp_path: Path
) -> None:
    fed = private_federation(federation, tmp_path / "l")
    few = replace(answer(fed, 0), examples=7).encode()
    with pytest.raises(
        RejectedError, match=r"client 0 reported 7 examples, at least 8 \(a private batch\) were expected"
    ):
        fed.server.receive(few)


def test_a_client_that_was_not_sampled_is_rejected(federation: Make, tmp_path: Path) -> None:
    fed = federation(clients=4, per_round=2, ledger=tmp_path / "l")
    members = fed.server.participants()
    outsider = next(i for i in range(4) if i not in members)
    message, before = answer(fed, outsider).encode(), state(fed, tmp_path / "l")
    with pytest.raises(RejectedError, match=f"client {outsider} does not take part in round 1"):
        fed.server.receive(message, sender=outsider)
    assert state(fed, tmp_path / "l") == before
    assert fed.server.rejected_this_round() == {f"client {outsider}: not sampled": 1}


def test_scalars_up_to_max_scalar_are_accepted(federation: Make) -> None:
    server = federation(max_scalar=10.0).server
    largest = TrainReply(client=0, round=1, local_steps=2, examples=5, loss=0.5, scalars=fp32_array(-10.0, NAN))
    with pytest.raises(MessageError, match=r"client 0 sent a scalar of absolute value 10\.0001, at most 10 is"):
        server.receive(replace(largest, scalars=fp32_array(-10.0001, NAN)).encode())
    server.receive(largest.encode())


def test_reported_examples_are_bounded_and_binding(federation: Make) -> None:
    fed = federation(max_examples=100)
    honest = replace(answer(fed, 0), examples=100)
    with pytest.raises(RejectedError, match="client 0 reported 101 examples, at most 100 are allowed"):
        fed.server.receive(replace(honest, examples=101).encode())
    assert fed.server.claimed_examples == {}  # a rejected claim is not binding
    fed.server.receive(honest.encode())
    fed.server.finish_round()
    with pytest.raises(RejectedError, match="client 0 reported 99 examples, 100 in an earlier round"):
        fed.server.receive(replace(honest, round=2, examples=99).encode())
    fed.server.receive(replace(honest, round=2).encode())
    assert fed.server.claimed_examples == {0: 100}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 99.0),  # weighting by examples trusts the claim
        ({"weighting": Weighting.UNIFORM}, 34.0),
        ({"rule": Rule.MEDIAN}, 2.0),
    ],
    ids=["mean by examples", "uniform mean", "median"],
)
def test_a_client_that_claims_many_examples_determines_the_mean_by_examples_only(
    federation: Make, settings: dict[str, Any], expected: float
) -> None:
    server = federation(steps=1, **settings).server
    for client, g, examples in ((0, 1.0, 5), (1, 2.0, 5), (2, 99.0, 2**32 - 1)):
        reply = TrainReply(client=client, round=1, local_steps=1, examples=examples, loss=0.5, scalars=fp32_array(g))
        server.receive(reply.encode())
    assert server.finish_round().record.scalars == [pytest.approx(expected, rel=1e-6)]


def test_skipped_queries_and_missing_losses_do_not_count(federation: Make) -> None:
    fed = federation(weighting=Weighting.UNIFORM)
    p = 1 / 3
    for client, scalars, loss in ((0, (1.0, NAN), 0.25), (1, (NAN, NAN), None), (2, (2.0, 8.0), 0.75)):
        reply = TrainReply(client=client, round=1, local_steps=2, examples=5, loss=loss, scalars=fp32_array(*scalars))
        fed.server.receive(reply.encode())
    result = fed.server.finish_round().record
    assert result.scalars == [round_fp32(p * 1.0 + p * 2.0), round_fp32(p * 8.0)]
    assert result.loss == 0.5
    before = fed.weights
    for client in range(3):
        skipped = TrainReply(client=client, round=2, local_steps=2, examples=5, loss=None, scalars=fp32_array(NAN, NAN))
        fed.server.receive(skipped.encode())
    result = fed.server.finish_round().record
    assert (result.scalars, result.loss) == ([0.0, 0.0], None)
    assert fed.weights == before


@pytest.mark.parametrize("rule", list(Rule))
def test_the_order_of_arrival_changes_no_weight(federation: Make, rule: Rule) -> None:
    a, b = federation(clients=5, rule=rule), federation(clients=5, rule=rule)
    replies = {i: answer(a, i).encode() for i in range(5)}
    for i in range(5):
        b.server.request(i)
    for fed, order in ((a, (0, 1, 2, 3, 4)), (b, (3, 1, 4, 0, 2))):
        for i in order:
            fed.server.receive(replies[i])
    assert a.server.finish_round().record == b.server.finish_round().record
    assert a.weights == b.weights


def test_a_round_with_only_rejected_messages_stays_open_and_reports_them(federation: Make) -> None:
    fed = federation()
    with pytest.raises(MessageError):
        fed.server.receive(b"", sender=2)
    with pytest.raises(
        RoundFailedError, match=r"round 1: no client .* \(rejected messages: {'client 2: malformed': 1}\)"
    ):
        fed.server.finish_round()
    assert finish(fed, (0, 1, 2)).rejected == {"client 2: malformed": 1}


@pytest.mark.parametrize(("attack", "factor"), [(Attack.SIGN_FLIP, -1.0), (Attack.SCALE, 1e6)])
def test_a_hostile_client_alters_its_scalars_and_nothing_else(federation: Make, attack: Attack, factor: float) -> None:
    fed, clean = federation(), federation()
    clients = with_attackers(fed.clients, attack, 1)
    assert clients[:2] == fed.clients[:2]
    assert isinstance(clients[2], HostileClient)
    assert clients[2].id == 2
    honest, altered = answer(clean, 2), TrainReply.decode(clients[2].handle(fed.server.request(2)))
    assert altered.scalars is not None
    assert honest.scalars is not None
    assert altered.scalars.tolist() == (honest.scalars * np.float32(factor)).tolist()
    assert replace(altered, scalars=honest.scalars).encode() == honest.encode()


def test_a_rejected_hostile_client_leaves_the_bits_of_a_run_without_it(federation: Make) -> None:
    """In a simulation with the mean, which the hostile client would have determined."""
    fed, without = federation(max_scalar=1e3), federation()
    rounds = list(simulate(fed.server, with_attackers(fed.clients, Attack.SCALE, 1), 2))
    for _ in range(2):
        finish(without, (0, 1))
    assert [result.record.rejected for result in rounds] == [{"client 2: a scalar too large": 1}] * 2
    assert fed.weights == without.weights


def test_a_simulation_authenticates_senders(federation: Make) -> None:
    fed = federation()

    class Thief(HostileClient):
        """Sends its answer in the name of client 2."""

        def handle(self, message: bytes) -> bytes:
            return replace(TrainReply.decode(self.honest.handle(message)), client=2).encode()

    list(simulate(fed.server, [Thief(fed.clients[0], Attack.SCALE), *fed.clients[1:]], 1))
    assert fed.server.rejected == {"client 0: sent in another client's name": 1}
    assert sorted(fed.server.claimed_examples) == [1, 2]


# 12 rounds are enough for this task, and keep the test below a minute on one core.
TWO_OF_TEN = {"clients": 10, "partition": "iid", "rounds": 12, "batch_size": 8, "eval_every": 0, "eval_examples": 200}
RULES: dict[str, dict[str, Any]] = {
    "mean": {}, "median": {"aggregation": "median"}, "trimmed-mean": {"aggregation": "trimmed-mean"},
}  # fmt: skip


def accuracy(output: Path, **settings: Any) -> float:
    summary = execute(make_config(TWO_OF_TEN | settings), output, lambda _: None, lambda _: None)
    return float(summary["accuracy_after"])


@pytest.mark.slow
def test_with_a_fifth_hostile_median_and_trimmed_mean_learn_and_the_mean_does_not(tmp_path: Path) -> None:
    clean = accuracy(tmp_path / "clean")
    mask = {"mask": tmp_path / "clean" / "mask.safetensors"}
    assert clean > 0.97
    for attack in ("scale", "sign-flip"):
        for name, rule in RULES.items():
            attacked = accuracy(tmp_path / f"{name}-{attack}", attack=attack, attackers=2, **mask, **rule)
            if name != "mean":
                assert attacked > clean - 0.02, (name, attack)
            elif attack == "scale":
                assert attacked < 0.6, (name, attack)


def test_the_command_line_prints_the_hostile_clients(tmp_path: Path) -> None:
    settings = ["--rounds", "1", "--local-steps", "1", "--calibration-texts", "16", "--eval-examples", "40"]
    attack = ["--attack", "scale", "--attackers", "2", "--aggregation", "median", "--max-scalar", "1e3"]
    result = call("run", *settings, *attack, "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "hostile         2, 3 (scale)" in result.output
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    summary = lines[-1]["summary"]
    assert (summary["attack"], summary["attackers"]) == ("scale", [2, 3])
    assert summary["rejected_messages"] == {"client 2: a scalar too large": 1, "client 3: a scalar too large": 1}
    assert lines[1]["rejected"] == summary["rejected_messages"]
    written = (tmp_path / "r" / "config.toml").read_text()
    assert '[aggregation]\nrule = "median"' in written
    assert "max_scalar = 1000.0" in written
