"""A client on its own: steps that are not taken, Poisson batches, private scalars."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from meerkat_engine import SparseMask
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError, MessageError, NonFiniteLossError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective, example_losses, task_loss
from meerkat_engine.engine.private_closure import PrivateClosure
from meerkat_engine.fed import Client, ClientData, TrainReply, TrainRequest, make_config
from meerkat_engine.fed.methods import Gradient
from meerkat_engine.fed.privacy import Privacy
from meerkat_engine.fed.setup.data import encode
from meerkat_engine.fed.setup.model import load_language_model
from meerkat_engine.fed.setup.server_and_clients import Federation

from helpers.tensors import same_bits

Make = Callable[..., Any]
BY_SCALARS = [Gradient.TWO_POINT, Gradient.FORWARD_DIFFERENCE]
CPU = torch.device("cpu")
PRIVACY = Privacy(clip=0.05, noise_multiplier=0.5, delta=1e-3, batch_size=8)


def spoil(fed: Any, word: str) -> Callable[[list[int]], bool]:
    """Makes the loss of every text with this word NaN, and says of a batch whether one of its examples has it."""
    lm, task = embedded.load(), fed.clients[0].data.task
    token = lm.tokenizer.convert_tokens_to_ids(word)
    fed.replica.model.model.embed_tokens.weight.data[token] = float("nan")
    fed.replica.optimizer.restore()
    return lambda indices: any(token in task.prompts[i] for i in indices)


def again(data: ClientData) -> ClientData:
    """The same data from the beginning."""
    return ClientData(data.task, data.indices, data.batch_size, data._seed, poisson=data.poisson)


@pytest.mark.parametrize("gradient", BY_SCALARS)
@pytest.mark.parametrize("queries", [1, 2])
def test_steps_on_a_bad_batch_are_left_out(federation: Make, gradient: Gradient, queries: int) -> None:
    fed = federation(steps=8, gradient=gradient, queries=queries)
    hit, client = spoil(fed, "bed"), fed.clients[0]
    before, masters = fed.weights, fed.replica.optimizer.weights.masters()
    batches = again(client.data)
    bad = [hit(batches.next_indices()) for _ in range(8)]
    assert 0 < sum(bad) < 8
    found, loss = client.train(1, 8)
    assert found["scalars"].dtype == np.float32
    assert np.isnan(found["scalars"]).reshape(8, queries).tolist() == [[each] * queries for each in bad]
    assert np.isfinite(found["scalars"][np.repeat(~np.array(bad), queries)]).all()
    assert fed.weights == before
    assert same_bits(fed.replica.optimizer.weights.masters(), masters)
    # the steps that were taken, alone, are the same path
    optimizer, batches, losses = fed.replica.optimizer, again(client.data), []
    for step in range(8):
        indices = batches.next_indices()
        if not bad[step]:
            batch = client.data.task.batch(indices, answers="all", device=CPU)
            seeds = fed.terms.seeds(1)[step * queries : (step + 1) * queries]
            losses += optimizer.step_many(
                [lambda batch=batch: task_loss(fed.replica.model, batch, client.objective)], seeds
            )
    assert optimizer.projected_gradients == found["scalars"][~np.isnan(found["scalars"])].tolist()
    assert loss == pytest.approx(torch.stack(losses).double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("gradient", BY_SCALARS)
def test_a_client_whose_losses_are_all_nan_has_taken_nothing(federation: Make, gradient: Gradient) -> None:
    fed = federation(steps=3, gradient=gradient)
    fed.replica.model.model.norm.weight.data[:] = float("nan")
    masters = fed.replica.optimizer.weights.masters()
    found, loss = fed.clients[0].train(1, 3)
    assert np.isnan(found["scalars"]).tolist() == [True] * 3
    assert loss is None
    assert same_bits(fed.replica.optimizer.weights.masters(), masters)


@pytest.mark.parametrize(
    ("spoilt", "missing"),
    [({0: 3e38, 1: -3e38, 2: 3e38, 3: -3e38}, [0, 1]), ({2: math.nan}, [1]), ({1: math.inf}, [0])],
    ids=["g overflows at a finite loss", "a query of two", "the other query"],
)
def test_the_loss_is_that_of_steps_that_were_taken_on_numbers(
    federation: Make, monkeypatch: pytest.MonkeyPatch, spoilt: dict[int, float], missing: list[int]
) -> None:
    fed, seen = federation(steps=2, queries=2), []

    def loss(*arguments: Any) -> torch.Tensor:
        seen.append(task_loss(*arguments))
        return seen[-1].clone().fill_(spoilt.get(len(seen) - 1, seen[-1].item()))

    monkeypatch.setattr("meerkat_engine.fed.client.task_loss", loss)
    found, mean = fed.clients[0].train(1, 2)
    assert np.flatnonzero(np.isnan(found["scalars"])).tolist() == missing
    assert mean == pytest.approx(torch.stack(seen[4:]).double().mean().item(), rel=1e-7)


def test_backpropagation_still_raises(federation: Make) -> None:
    fed = federation(gradient=Gradient.BACKPROPAGATION)
    fed.replica.model.model.norm.weight.data[:] = float("nan")
    masters = fed.replica.optimizer.weights.masters()
    with pytest.raises(
        NonFiniteLossError, match="client 0, round 1: the loss of step 0 is nan; the step was not taken"
    ):
        fed.round()
    assert same_bits(fed.replica.optimizer.weights.masters(), masters)


def test_a_null_path_needs_all_its_steps() -> None:
    config = make_config({
        "method": "meerkat-vp", "clients": 2, "vp_steps": 50, "vp_initial": 10, "vp_later": 25, "eval_examples": 100,
    })  # fmt: skip
    lm = load_language_model(config)
    data = encode(config, lm.tokenizer)
    mask = SparseMask.random(lm.model, 0.01, 1).with_gradient(lm.model, [torch.ones(2, 9, dtype=torch.int64)])
    fed = Federation(config, lm.model, mask, data, [torch.arange(50), torch.arange(50, 100)], None)  # type: ignore[arg-type]
    token = lm.tokenizer.convert_tokens_to_ids("bed")
    lm.model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"null path 0, on held-out examples: step \d+ was not taken"):
        fed._null_paths()


@pytest.mark.parametrize("poisson", [False, True], ids=["plain", "poisson"])
def test_going_to_a_step_is_taking_the_batches_before_it(task_data: EncodedTask, poisson: bool) -> None:
    def fresh() -> ClientData:
        return ClientData(task_data, torch.arange(50, 73), 7, seed=1, poisson=poisson)

    straight = fresh()
    taken = [straight.next_indices() for _ in range(30)]
    assert len({tuple(batch) for batch in taken}) == 30
    for n in (0, 1, 3, 4, 17):
        begun, back = fresh(), fresh()
        begun.next_indices()
        for _ in range(20):
            back.next_indices()
        for data in (begun, back):
            data.seek(n)
            assert [data.next_indices() for _ in range(30 - n)] == taken[n:]
            assert data.seen == straight.seen


def test_poisson_batches(task_data: EncodedTask) -> None:
    indices = torch.arange(40, 60)
    data = ClientData(task_data, indices, 2, seed=1, poisson=True)
    batches = [data.next_indices() for _ in range(2000)]
    sizes = torch.tensor([len(batch) for batch in batches]).double()
    assert sizes.mean().item() == pytest.approx(2, abs=5 * math.sqrt(20 * 0.1 * 0.9 / 2000))
    assert sizes.var().item() == pytest.approx(20 * 0.1 * 0.9, rel=0.2)
    assert sizes.min() == 0
    times = torch.bincount(torch.tensor([i for batch in batches for i in batch]), minlength=60)
    assert times[:40].sum() == 0
    assert (times[40:] / 2000 - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / 2000)
    other = ClientData(task_data, indices, 2, seed=2, poisson=True)
    assert [other.next_indices() for _ in range(20)] != batches[:20]
    empty = next(i for i, batch in enumerate(batches) if not batch)
    data.seek(empty)
    assert data.next_batches(Objective.CANDIDATES, CPU) == []


def private(fed: Any, *, client: int = 0, privacy: Privacy = PRIVACY, noise_seed: int = 77) -> Client:
    plain = fed.clients[client]
    data = ClientData(plain.data.task, plain.data.indices, 8, 5, poisson=True)
    return replace(plain, data=data, privacy=privacy, noise_seed=noise_seed)


@pytest.mark.parametrize("gradient", BY_SCALARS)
@pytest.mark.parametrize("queries", [1, 2])
def test_a_private_client_is_the_private_closure_on_poisson_batches(
    federation: Make, gradient: Gradient, queries: int
) -> None:
    fed, other = (federation(steps=4, gradient=gradient, queries=queries) for _ in range(2))
    client = private(fed)
    found, loss = client.train(1, 4)
    assert loss is None
    opt, data = other.replica.optimizer, again(client.data)
    for step in range(4):
        parts = data.next_batches(Objective.CANDIDATES, CPU)
        closure = PrivateClosure(
            lambda parts=parts: example_losses(other.replica.model, parts, Objective.CANDIDATES),  # type: ignore[misc]
            estimator=gradient, queries=queries, clip=0.05, noise_multiplier=0.5, batch_size=8,
            seed=stream.derived_seed(77, "nois", 1, step),
        )  # fmt: skip
        opt.step_many([closure], other.terms.seeds(1)[step * queries : (step + 1) * queries])
    assert found["scalars"].tolist() == opt.projected_gradients
    assert np.isfinite(found["scalars"]).all()


def test_a_private_answer_tells_scalars_and_no_loss(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two clients, two rounds and two steps with the same data have noise of their own."""
    sent: list[TrainReply] = []
    monkeypatch.setattr(TrainReply, "encode", lambda self: sent.append(self) or b"")
    scalars = []
    for seed in (77, 78):
        client = private(federation(steps=2), noise_seed=seed)
        for round in (1, 2):
            client.data.seek(0)
            client.replica.round = round
            client.handle(
                TrainRequest(
                    client=0, round=round, local_steps=2, first_round=round, scalars=np.empty(0, dtype=np.float32)
                ).encode()
            )
            scalars += sent[-1].scalars.tolist()  # type: ignore[union-attr]
    assert [reply.loss for reply in sent] == [None] * 4
    assert [reply.examples for reply in sent] == [len(client.data)] * 4
    assert len(set(scalars)) == 8


def test_batches_without_examples_are_noise_alone(federation: Make) -> None:
    fed = federation(steps=40)
    plain = fed.clients[0]
    data = ClientData(plain.data.task, plain.data.indices[:8], 1, 5, poisson=True)
    lone = replace(plain, data=again(data), privacy=replace(PRIVACY, batch_size=1), noise_seed=77)
    empty = [not data.next_indices() for _ in range(40)]
    assert 5 < sum(empty) < 30
    found, _ = lone.train(1, 40)
    for step in np.flatnonzero(empty):
        closure = PrivateClosure(
            lambda: torch.empty(0), estimator="two-point", clip=0.05, noise_multiplier=0.5, batch_size=1,
            seed=stream.derived_seed(77, "nois", 1, int(step)),
        )  # fmt: skip
        d = closure() - closure()
        assert found["scalars"][step] == np.float32(d.double().item() / 2e-3)


def test_a_private_client_takes_a_round_once(federation: Make) -> None:
    """Asked again with other weights, its noise would be the same and cancel."""
    fed = federation()
    client = private(fed)
    client.train(1, 2)
    client.train(2, 2)
    for round in (1, 2):
        with pytest.raises(
            MessageError, match=rf"round {round} was asked for after round 2; a private client takes each"
        ):
            client.train(round, 2)
    request = fed.server.request(0)
    with pytest.raises(MessageError, match="a private client takes each batch once"):
        client.handle(request)
    client.train(3, 2)
    fed.clients[0].train(1, 2)  # one that is not private may
    fed.clients[0].train(1, 2)


def test_a_private_client_takes_no_batch_twice(federation: Make) -> None:
    """Who is in a Poisson batch is the chance that its privacy counts on, once."""
    fed = federation()
    client = private(fed)
    request = TrainRequest.decode(fed.server.request(0))
    client.handle(request.encode())
    fed.replica.round = 2
    again = replace(request, round=2, first_round=2, steps_before=1)
    with pytest.raises(MessageError, match="for data from step 1 on, of which this client has taken some; a private"):
        client.handle(again.encode())
    client.handle(replace(again, steps_before=2).encode())


def test_private_steps_are_taken_on_any_batch(federation: Make) -> None:
    fed = federation(steps=8)
    spoil(fed, "bed")
    found, _ = private(fed).train(1, 8)
    assert np.isfinite(found["scalars"]).all()


def test_private_clients_learn(federation: Make) -> None:
    """Small noise, all sensible settings: the loss on the client's own examples goes down."""
    fed = federation(steps=150, density=0.05, lr=1e-2)
    client = private(fed, client=2, privacy=replace(PRIVACY, noise_multiplier=0.1))
    model, task = fed.replica.model, client.data.task
    batch = task.batch(client.data.indices.tolist(), answers="all", device=CPU)

    def loss() -> float:
        with torch.inference_mode():
            return task_loss(model, batch, Objective.CANDIDATES).item()

    before = loss()
    found, _ = client.train(1, 150)
    fed.replica.apply_rounds([found["scalars"].tolist()])
    assert loss() < before - 0.05


def test_what_does_not_go_together(federation: Make) -> None:
    fed = federation()
    good = private(fed)
    averaging = federation(gradient=Gradient.BACKPROPAGATION)
    with pytest.raises(
        ConfigError, match="client 0: scalars can be private, the weights that backpropagation sends cannot"
    ):
        private(averaging)
    with pytest.raises(ConfigError, match="client 0: privacy needs a noise seed, and a noise seed privacy"):
        replace(good, noise_seed=None)
    with pytest.raises(ConfigError, match="privacy needs a noise seed"):
        replace(fed.clients[0], noise_seed=3)
    with pytest.raises(ConfigError, match="Poisson batches, which may be empty, are for private scalars"):
        replace(fed.clients[0], data=good.data)
    with pytest.raises(ConfigError, match="Poisson batches of 8, its data come in plain batches of 8"):
        replace(good, data=fed.clients[0].data)
    with pytest.raises(ConfigError, match="Poisson batches of 9, its data come in Poisson batches of 8"):
        replace(good, privacy=replace(PRIVACY, batch_size=9))
