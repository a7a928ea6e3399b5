"""Complete rounds of a federation: shared and separate replicas, replay, stale clients, rejected messages."""

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meerkat_engine import replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import DataError, MaskError, MessageError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.weights import round_fp32
from meerkat_engine.fed import ClientData, Replica, Terms, read_ledger, serve, simulate
from meerkat_engine.fed.aggregation import Aggregation, Weighting
from meerkat_engine.fed.messages import HEADER_BYTES, Stale, TrainReply, TrainRequest
from meerkat_engine.fed.methods import Gradient
from meerkat_engine.fed.server import RoundFailedError, Server
from meerkat_engine.fed.terms import Schedule

from helpers.tensors import same_bits

Make = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", list(Weighting))
@pytest.mark.parametrize("stopped", [[], [1]], ids=["all T", "one stops early"])
@pytest.mark.parametrize("steps", [1, 3])
def test_replaying_the_ledger_gives_the_same_bits(
    federation: Make, tmp_path: Path, steps: int, stopped: list[int], weighting: Weighting, dtype: torch.dtype
) -> None:
    fed = federation(steps=steps, stopped=stopped, weighting=weighting, dtype=dtype, ledger=tmp_path / "l")
    for _ in range(3):
        fed.round()
    assert fed.weights != fingerprint(fed.base.model)
    ledger = read_ledger(tmp_path / "l")
    assert [len(g) for g in ledger.rounds[0].clients.values()] == [steps, 1 if stopped else steps, steps]
    replay(fed.base.model, fed.mask, ledger.updates())
    assert fingerprint(fed.base.model) == fed.weights


def test_a_round_is_the_formula_of_the_paper(federation: Make, tmp_path: Path) -> None:
    """w_{r+1} = w_r - lr * sum_t (sum_i p_i g_i^t) z_t, computed with vectors."""
    fed = federation(steps=2, stopped=[2], ledger=tmp_path / "l")
    before = fed.replica.optimizer.weights.masters()
    fed.round()
    line = read_ledger(tmp_path / "l").rounds[0]
    sizes = [len(client.data) for client in fed.clients]
    p = [n / sum(sizes) for n in sizes]
    expected = before
    for t in range(2):
        g = round_fp32(sum(p[i] * (line.clients[i][t] if t < len(line.clients[i]) else 0.0) for i in range(3)))
        assert line.scalars[t] == g
        z = stream.normal(stream.step_seed(11, 1, t), fed.mask.ids)
        expected = expected - z * torch.tensor(1e-2 * g, dtype=torch.float32)
    assert same_bits(fed.replica.optimizer.weights.masters(), expected)


def test_the_new_weights_are_the_mean_of_the_clients_end_points(federation: Make) -> None:
    """Averaging scalars is the same as averaging the weights after local steps, up to rounding."""
    fed = federation(steps=3, weighting=Weighting.UNIFORM)
    start, ends = fed.replica.optimizer.weights.masters(), []
    for client in fed.clients:
        replica = fed.fresh_replica(torch.float32)
        reply = TrainReply.decode(replace(client, replica=replica).handle(fed.server.request(client.id)))
        for t, g in enumerate(reply.scalars.tolist()):
            replica.set_lr(1e-2)
            replica.optimizer.apply(stream.step_seed(11, 1, t), g)
        ends.append(replica.optimizer.weights.masters())
        fed.server.receive(reply.encode())
    fed.server.finish_round()
    average = torch.stack(ends).double().mean(0)
    moved = (average - start.double()).abs().max()
    difference = (fed.replica.optimizer.weights.masters().double() - average).abs().max()
    assert difference < 1e-4 * moved


def test_clients_with_one_shared_model_or_with_their_own_give_the_same_bits(federation: Make) -> None:
    together, apart = federation(shared=True), federation(shared=False)
    for members in ([0, 1, 2], [0, 2], [2], [0, 1, 2]):  # client 1 misses two rounds, client 0 one
        assert together.round(members) == apart.round(members)
    assert together.weights == apart.weights
    apart.server.receive(apart.clients[1].handle(apart.server.request(1)))
    assert fingerprint(apart.clients[1].replica.model) == apart.weights


def test_local_steps_restore_the_shared_model(federation: Make) -> None:
    fed = federation(steps=3)
    before = fed.weights
    fed.clients[0].handle(fed.server.request(0))
    assert fed.weights == before


def test_a_client_that_missed_rounds_gets_masters_if_those_are_smaller(federation: Make) -> None:
    fed = federation(shared=False, steps=4, density=1e-4)  # 8 elements: masters are smaller after 3 missed rounds
    for _ in range(4):
        fed.round([0, 2])
    request = TrainRequest.decode(fed.server.request(1))
    assert request.masters is not None
    assert len(fed.server.request(1)) == HEADER_BYTES + 4 * len(fed.mask)
    fed.clients[1].handle(fed.server.request(1))
    assert fingerprint(fed.clients[1].replica.model) == fed.weights


def test_messages_have_four_bytes_a_scalar(federation: Make) -> None:
    fed = federation(steps=5)
    fed.round()
    request = fed.server.request(0)
    assert len(request) == HEADER_BYTES + 4 * 5
    assert len(fed.clients[0].handle(request)) == HEADER_BYTES + 4 * 5
    assert HEADER_BYTES <= 64


def test_the_order_of_replies_does_not_matter(federation: Make) -> None:
    a, b = federation(), federation()
    a.round([0, 1, 2])
    b.round([2, 0, 1])
    assert a.weights == b.weights


def reply(
    client: int = 0,
    round: int = 1,
    scalars: tuple[float, ...] = (0.5, 0.5),
    examples: int = 5,
    steps: int | None = None,
) -> bytes:
    values = np.array(scalars, dtype=np.float32)
    steps = len(values) if steps is None else steps
    return TrainReply(
        client=client, round=round, local_steps=steps, scalars=values, examples=examples, loss=0.5
    ).encode()


def test_a_round_without_answers_stays_open(federation: Make) -> None:
    fed = federation()
    with pytest.raises(RoundFailedError, match="round 1: no client sent a usable answer"):
        fed.server.finish_round()
    fed.round()


def test_a_client_rejects_requests_that_do_not_fit(federation: Make) -> None:
    fed = federation(shared=False)
    fed.round()
    fed.round()
    target = fed.clients[0]
    good = TrainRequest.decode(fed.server.request(0))
    for client, request, message in (
        (target, replace(good, client=1), "is for client 1, this is client 0"),
        (target, replace(good, local_steps=3), "for 3 local steps, the federation's terms allow 1 to 2"),
        (target, replace(good, scalars=good.scalars[:1]), r"1 scalars, a multiple of 2 \(one round\) was expected"),
        (target, replace(good, round=9), "its scalars bring this client to round 3"),
        (
            target,
            replace(good, scalars=np.tile(good.scalars, 2)),
            "for round 3; its scalars bring this client to round 4",
        ),
        (target, replace(good, scalars=np.array([np.nan, 1], dtype=np.float32)), "not finite"),
        (
            target,
            replace(good, scalars=None, masters=np.zeros(3, dtype=np.float32)),
            "got 3 master values, 838 were expected",
        ),
    ):
        before = fingerprint(client.replica.model), client.replica.round
        with pytest.raises(MessageError, match=message):
            client.handle(request.encode())
        assert (fingerprint(client.replica.model), client.replica.round) == before


@pytest.mark.parametrize("gradient", [Gradient.TWO_POINT, Gradient.BACKPROPAGATION])
def test_a_restarted_client_continues_as_if_it_had_never_stopped(federation: Make, gradient: Gradient) -> None:
    """A restarted client has base model, mask and examples only. The server sends the rounds that it missed."""
    undisturbed = federation(shared=False, gradient=gradient)
    for result in simulate(undisturbed.server, undisturbed.clients, 4):
        assert not result.record.rejected
    fed = federation(shared=False, gradient=gradient)
    for result in simulate(fed.server, fed.clients, 2):
        assert not result.record.rejected
    old = fed.clients[1]
    assert old.data.seen == 2 * 2 * 8
    data = ClientData(old.data.task, old.data.indices, 8, stream.derived_seed(11, "data", 1))
    fed.clients[1] = replace(old, replica=fed.fresh_replica(torch.float32), data=data)
    third, fourth = simulate(fed.server, fed.clients, 4)
    by_scalars = gradient is Gradient.TWO_POINT  # masters can be applied at any round
    assert third.record.rejected == ({"client 1: is at an earlier round": 1} if by_scalars else {})
    assert not fourth.record.rejected
    assert set(third.record.clients) == ({0, 1, 2} if by_scalars else set())
    assert fed.weights == undisturbed.weights
    assert fingerprint(fed.clients[1].replica.model) == fingerprint(undisturbed.clients[1].replica.model)


def test_a_client_that_always_reports_to_be_stale_is_asked_twice_a_round(federation: Make) -> None:
    fed = federation(shared=False)
    fed.round()
    asked = []

    def exchange(requests: Iterable[tuple[int, bytes]]) -> Iterable[tuple[int, bytes]]:
        for i, request in requests:
            asked.append(i)
            yield i, Stale(client=1, round=2, at_round=1).encode() if i == 1 else fed.clients[i].handle(request)

    (result,) = serve(fed.server, exchange, 2)
    assert asked == [0, 1, 2, 1]
    assert result.record.rejected == {"client 1: is at an earlier round": 2}
    assert sorted(result.record.clients) == [0, 2]


def test_the_same_request_gets_the_same_answer(federation: Make) -> None:
    fed = federation(shared=False)
    fed.round()
    request = fed.server.request(0)
    assert fed.server.request(0) == request
    assert fed.clients[0].handle(request) == fed.clients[0].handle(request)


def test_a_client_rejects_rounds_after_the_last_one_of_the_terms(federation: Make) -> None:
    fed = federation(rounds=2)
    fed.round()
    fed.round()
    with pytest.raises(MessageError, match="for round 3, the terms end with round 2"):
        fed.clients[0].handle(fed.server.request(0))


def test_only_sampled_clients_take_part(federation: Make) -> None:
    fed = federation(clients=5, per_round=2, shared=False)
    assert fed.server.participants() == federation(clients=5, per_round=2).server.participants()
    seen = set()
    for round in range(1, 7):
        members = fed.server.participants()
        assert len(members) == len(set(members)) == 2
        outsider = next(i for i in range(5) if i not in members)
        with pytest.raises(MessageError, match=f"client {outsider} does not take part in round {round}"):
            fed.server.receive(reply(client=outsider, round=round))
        fed.round(members)
        seen.update(members)
    assert seen == set(range(5))
    fed.clients[0].handle(fed.server.request(0))  # clients that were not sampled catch up at their next request
    assert fingerprint(fed.clients[0].replica.model) == fed.weights


def test_only_participants_have_a_weight_in_the_mean(federation: Make) -> None:
    fed = federation(clients=4, per_round=2, weighting=Weighting.UNIFORM)
    first, second = fed.server.participants()
    fed.server.receive(reply(client=first, scalars=(1.0, 2.0)))
    fed.server.receive(reply(client=second, scalars=(3.0, 4.0)))
    assert fed.server.finish_round().record.scalars == [2.0, 3.0]


@pytest.mark.parametrize("gradient", list(Gradient))
@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedules_queries_and_estimators_replay_to_the_same_bits(
    federation: Make, tmp_path: Path, schedule: Schedule, gradient: Gradient
) -> None:
    queries = 1 if gradient is Gradient.BACKPROPAGATION else 3
    terms = {"schedule": schedule, "rounds": 3, "queries": queries, "gradient": gradient}
    fed = federation(ledger=tmp_path / "l", stopped=[1], **terms)
    for _ in range(3):
        fed.round()
    ledger = read_ledger(tmp_path / "l")
    assert ledger.header.terms == fed.terms
    rates = [lr for line in ledger.rounds for lr in line.lr]
    assert (rates[-1] < rates[0] / 2) == (schedule is not Schedule.CONSTANT)
    if gradient is Gradient.BACKPROPAGATION:
        replica = fed.fresh_replica(torch.float32)
        replica.load_masters(4, ledger.rounds[-1].masters)
        assert fingerprint(replica.model) == fed.weights
    else:
        assert [len(g) for g in ledger.rounds[0].clients.values()] == [6, 3, 6]
        replay(fed.base.model, fed.mask, ledger.updates())
        assert fingerprint(fed.base.model) == fed.weights


def test_a_reply_of_the_wrong_kind_is_rejected(federation: Make) -> None:
    masters = np.zeros(3, dtype=np.float32)
    wrong = TrainReply(client=0, round=1, local_steps=2, masters=masters, examples=5, loss=0.5).encode()
    with pytest.raises(MessageError, match=r"client 0 sent no scalars, 2 were expected \(gradient: two-point\)"):
        federation().server.receive(wrong)
    fedavg = federation(gradient=Gradient.BACKPROPAGATION).server
    with pytest.raises(MessageError, match="client 0 sent no master values, 838 were expected"):
        fedavg.receive(reply())
    with pytest.raises(MessageError, match="client 0 sent 3 master values, 838 were expected"):
        fedavg.receive(wrong)


def test_micro_batches_give_the_scalars_of_the_full_batch(federation: Make) -> None:
    full, micro = federation(), federation()
    for client in micro.clients:
        client.data.micro_batch_size = 3
    for fed in (full, micro):
        fed.round()
    scalars = [list(fed.server._history) for fed in (full, micro)]
    # losses agree to float32 rounding, 1e-7, and the difference quotient divides that by 2 eps
    assert scalars[0] == pytest.approx(scalars[1], abs=1e-3)


def test_every_example_is_used_once_an_epoch(task_data: EncodedTask) -> None:
    data = ClientData(task_data, torch.arange(50, 60), 4, seed=1)
    drawn = [i for _ in range(10) for i in data.next_indices()]
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(50, 60))
    assert drawn[:10] != drawn[10:20]


def test_a_client_needs_at_least_a_batch_of_examples(task_data: EncodedTask) -> None:
    with pytest.raises(DataError, match="the client has no examples"):
        ClientData(task_data, torch.arange(0), 4, seed=1)
    with pytest.raises(DataError, match="the batch size is 4, the client has 3 examples"):
        ClientData(task_data, torch.arange(3), 4, seed=1)


def test_a_replica_checks_the_mask_of_the_terms(federation: Make) -> None:
    fed = federation()
    terms: Terms = replace(fed.terms, mask_digest="0" * 64)
    with pytest.raises(MaskError, match="the federation uses 000000000000"):
        Replica(embedded.load().model, fed.mask, terms)


def test_hundreds_of_simulated_clients_share_one_model(task_data: EncodedTask) -> None:
    from helpers.federation import Federation

    def peak(clients: int) -> int:
        fed = Federation(task_data, clients=1, steps=1)
        one = fed.clients[0]
        server = Server(list(range(clients)), fed.replica, None, Aggregation())
        tracemalloc.start()
        crowd = [replace(one, id=i, data=ClientData(task_data, torch.arange(16), 8, seed=i)) for i in range(clients)]
        list(simulate(server, crowd, 1))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert all(client.replica is fed.replica for client in crowd)
        return used

    few, many = peak(10), peak(310)
    model = sum(p.numel() * 4 for p in embedded.load().model.parameters())
    assert (many - few) / 300 < model / 50
