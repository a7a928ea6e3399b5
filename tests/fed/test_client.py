"""A single client: skipped queries, Poisson batches, private scalars."""

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


def make_losses_nan(fed: Any, word: str) -> Callable[[list[int]], bool]:
    """Makes the loss of every text with this word NaN.

    Returns:
        Whether one of the examples with the given indices has the word.
    """
    lm, task = embedded.load(), fed.clients[0].data.task
    token = lm.tokenizer.convert_tokens_to_ids(word)
    fed.replica.model.model.embed_tokens.weight.data[token] = float("nan")
    fed.replica.optimizer.restore()
    return lambda indices: any(token in task.prompts[i] for i in indices)


def restarted(data: ClientData) -> ClientData:
    """The same data from the beginning."""
    return ClientData(data.task, data.indices, data.batch_size, data._seed, poisson=data.poisson)


@pytest.mark.parametrize("gradient", BY_SCALARS)
@pytest.mark.parametrize("queries", [1, 2])
def test_steps_on_a_batch_with_a_nan_loss_are_skipped(federation: Make, gradient: Gradient, queries: int) -> None:
    fed = federation(steps=8, gradient=gradient, queries=queries)
    has_word, client = make_losses_nan(fed, "bed"), fed.clients[0]
    before, masters = fed.weights, fed.replica.optimizer.weights.masters()
    batches = restarted(client.data)
    bad = [has_word(batches.next_indices()) for _ in range(8)]
    assert 0 < sum(bad) < 8
    results, loss = client.train(1, 8)
    assert results["scalars"].dtype == np.float32
    assert np.isnan(results["scalars"]).reshape(8, queries).tolist() == [[is_bad] * queries for is_bad in bad]
    assert np.isfinite(results["scalars"][np.repeat(~np.array(bad), queries)]).all()
    assert fed.weights == before
    assert same_bits(fed.replica.optimizer.weights.masters(), masters)
    # the other steps alone give the same path
    optimizer, batches, losses = fed.replica.optimizer, restarted(client.data), []
    for step in range(8):
        indices = batches.next_indices()
        if not bad[step]:
            batch = client.data.task.batch(indices, answers="all", device=CPU)
            seeds = fed.terms.seeds(1)[step * queries : (step + 1) * queries]
            losses += optimizer.step_many(
                [lambda batch=batch: task_loss(fed.replica.model, batch, client.objective)], seeds
            )
    assert optimizer.projected_gradients == results["scalars"][~np.isnan(results["scalars"])].tolist()
    assert loss == pytest.approx(torch.stack(losses).double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("gradient", BY_SCALARS)
def test_a_client_whose_losses_are_all_nan_skips_all_queries(federation: Make, gradient: Gradient) -> None:
    fed = federation(steps=3, gradient=gradient)
    fed.replica.model.model.norm.weight.data[:] = float("nan")
    fed.replica.optimizer.restore()  # of its masked elements
    masters = fed.replica.optimizer.weights.masters()
    results, loss = fed.clients[0].train(1, 3)
    assert np.isnan(results["scalars"]).tolist() == [True] * 3
    assert loss is None
    assert same_bits(fed.replica.optimizer.weights.masters(), masters)


@pytest.mark.parametrize(
    ("replaced", "missing"),
    [({0: 3e38, 1: -3e38, 2: 3e38, 3: -3e38}, [0, 1]), ({2: math.nan}, [1]), ({1: math.inf}, [0])],
    ids=["g overflows at a finite loss", "a query of two", "the other query"],
)
def test_the_mean_loss_is_of_steps_with_a_finite_loss_and_a_finite_scalar(
    federation: Make, monkeypatch: pytest.MonkeyPatch, replaced: dict[int, float], missing: list[int]
) -> None:
    fed, seen = federation(steps=2, queries=2), []

    def loss(*arguments: Any) -> torch.Tensor:
        seen.append(task_loss(*arguments))
        return seen[-1].clone().fill_(replaced.get(len(seen) - 1, seen[-1].item()))

    monkeypatch.setattr("meerkat_engine.fed.client.task_loss", loss)
    results, mean = fed.clients[0].train(1, 2)
    assert np.flatnonzero(np.isnan(results["scalars"])).tolist() == missing
    assert mean == pytest.approx(torch.stack(seen[4:]).double().mean().item(), rel=1e-7)


def test_backpropagation_still_raises(federation: Make) -> None:
    fed = federation(gradient=Gradient.BACKPROPAGATION)
    fed.replica.model.model.norm.weight.data[:] = float("nan")
    fed.replica.optimizer.restore()  # of its masked elements
    masters = fed.replica.optimizer.weights.masters()
    with pytest.raises(
        NonFiniteLossError, match="client 0, round 1: the loss of step 0 is nan; the step was not applied"
    ):
        fed.round()
    assert same_bits(fed.replica.optimizer.weights.masters(), masters)


def test_a_null_path_with_a_skipped_query_is_an_error() -> None:
    config = make_config({
        "method": "meerkat-vp", "clients": 2, "vp_steps": 50, "vp_initial": 10, "vp_later": 25, "eval_examples": 100,
    })  # fmt: skip
    lm = load_language_model(config)
    data = encode(config, lm)
    mask = SparseMask.random(lm.model, 0.01, 1, frozen=True)
    mask = mask.with_gradient(lm.model, [torch.ones(2, 9, dtype=torch.int64)])
    fed = Federation(config, lm.model, mask, data, [torch.arange(50), torch.arange(50, 100)], None)  # type: ignore[arg-type]
    token = lm.tokenizer.convert_tokens_to_ids("bed")
    lm.model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"null path 0, on held-out examples: a query of step \d+ was skipped"):
        fed._selector._null_paths()


@pytest.mark.parametrize("poisson", [False, True], ids=["plain", "poisson"])
def test_seeking_to_a_step_gives_the_batches_from_there_on(task_data: EncodedTask, poisson: bool) -> None:
    def fresh() -> ClientData:
        return ClientData(task_data, torch.arange(50, 73), 7, seed=1, poisson=poisson)

    expected = fresh()
    batches = [expected.next_indices() for _ in range(30)]
    assert len({tuple(batch) for batch in batches}) == 30
    for n in (0, 1, 3, 4, 17):
        after_1_batch, after_20_batches = fresh(), fresh()
        after_1_batch.next_indices()
        for _ in range(20):
            after_20_batches.next_indices()
        for data in (after_1_batch, after_20_batches):
            data.seek(n)
            assert [data.next_indices() for _ in range(30 - n)] == batches[n:]
            assert data.seen == expected.seen


def test_poisson_batches_contain_each_example_independently(task_data: EncodedTask) -> None:
    indices = torch.arange(40, 60)
    data = ClientData(task_data, indices, 2, seed=1, poisson=True)
    batches = [data.next_indices() for _ in range(2000)]
    sizes = torch.tensor([len(batch) for batch in batches]).double()
    assert sizes.mean().item() == pytest.approx(2, abs=5 * math.sqrt(20 * 0.1 * 0.9 / 2000))
    assert sizes.var().item() == pytest.approx(20 * 0.1 * 0.9, rel=0.2)
    assert sizes.min() == 0
    counts = torch.bincount(torch.tensor([i for batch in batches for i in batch]), minlength=60)
    assert counts[:40].sum() == 0
    assert (counts[40:] / 2000 - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / 2000)
    other = ClientData(task_data, indices, 2, seed=2, poisson=True)
    assert [other.next_indices() for _ in range(20)] != batches[:20]
    empty = next(i for i, batch in enumerate(batches) if not batch)
    data.seek(empty)
    assert data.next_batches(Objective.CANDIDATES, CPU) == []


def private(fed: Any, *, client: int = 0, privacy: Privacy = PRIVACY, noise_seed: int = 77) -> Client:
    """A private client with the examples of one of the federation's clients."""
    plain = fed.clients[client]
    data = ClientData(plain.data.task, plain.data.indices, 8, 5, poisson=True)
    return replace(plain, data=data, privacy=privacy, noise_seed=noise_seed)


@pytest.mark.parametrize("gradient", BY_SCALARS)
@pytest.mark.parametrize("queries", [1, 2])
def test_a_private_client_applies_the_private_closure_to_poisson_batches(
    federation: Make, gradient: Gradient, queries: int
) -> None:
    fed, other = (federation(steps=4, gradient=gradient, queries=queries) for _ in range(2))
    client = private(fed)
    results, loss = client.train(1, 4)
    assert loss is None
    opt, data = other.replica.optimizer, restarted(client.data)
    for step in range(4):
        parts = data.next_batches(Objective.CANDIDATES, CPU)
        closure = PrivateClosure(
            lambda parts=parts: example_losses(other.replica.model, parts, Objective.CANDIDATES),  # type: ignore[misc]
            estimator=gradient, queries=queries, clip=0.05, noise_multiplier=0.5, batch_size=8,
            seed=stream.derived_seed(77, "nois", 1, step),
        )  # fmt: skip
        opt.step_many([closure], other.terms.seeds(1)[step * queries : (step + 1) * queries])
    assert results["scalars"].tolist() == opt.projected_gradients
    assert np.isfinite(results["scalars"]).all()


def test_a_private_reply_has_scalars_and_no_loss(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same data, two clients, rounds or steps have different noise."""
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


def test_the_scalar_of_an_empty_batch_is_noise_only(federation: Make) -> None:
    fed = federation(steps=40)
    plain = fed.clients[0]
    data = ClientData(plain.data.task, plain.data.indices[:8], 1, 5, poisson=True)
    client = replace(plain, data=restarted(data), privacy=replace(PRIVACY, batch_size=1), noise_seed=77)
    empty = [not data.next_indices() for _ in range(40)]
    assert 5 < sum(empty) < 30
    results, _ = client.train(1, 40)
    for step in np.flatnonzero(empty):
        closure = PrivateClosure(
            lambda: torch.empty(0), estimator="two-point", clip=0.05, noise_multiplier=0.5, batch_size=1,
            seed=stream.derived_seed(77, "nois", 1, int(step)),
        )  # fmt: skip
        d = closure() - closure()
        assert results["scalars"][step] == np.float32(d.double().item() / 2e-3)


def test_a_private_client_rejects_a_round_that_it_has_answered(federation: Make) -> None:
    """A second answer, with other weights, would have the same noise, which would cancel."""
    fed = federation()
    client = private(fed)
    client.train(1, 2)
    client.train(2, 2)
    for round in (1, 2):
        with pytest.raises(
            MessageError, match=rf"round {round} was requested after round 2; a private client takes each"
        ):
            client.train(round, 2)
    request = fed.server.request(0)
    with pytest.raises(MessageError, match="a private client takes each batch once"):
        client.handle(request)
    client.train(3, 2)
    fed.clients[0].train(1, 2)  # a client that is not private accepts it
    fed.clients[0].train(1, 2)


def test_a_private_client_rejects_data_that_it_has_used(federation: Make) -> None:
    """The accountant assumes that every Poisson batch is sampled independently and used once."""
    fed = federation()
    client = private(fed)
    request = TrainRequest.decode(fed.server.request(0))
    client.handle(request.encode())
    fed.replica.round = 2
    second = replace(request, round=2, first_round=2, steps_before=1)
    with pytest.raises(
        MessageError, match="for data from step 1 on, some of which this client has already used; a private"
    ):
        client.handle(second.encode())
    client.handle(replace(second, steps_before=2).encode())


def test_a_private_step_is_not_skipped_because_of_a_nan_loss(federation: Make) -> None:
    fed = federation(steps=8)
    make_losses_nan(fed, "bed")
    results, _ = private(fed).train(1, 8)
    assert np.isfinite(results["scalars"]).all()


def test_a_private_client_learns(federation: Make) -> None:
    """With little noise, the loss on the client's own examples decreases."""
    fed = federation(steps=150, density=0.05, lr=1e-2)
    client = private(fed, client=2, privacy=replace(PRIVACY, noise_multiplier=0.1))
    model, task = fed.replica.model, client.data.task
    batch = task.batch(client.data.indices.tolist(), answers="all", device=CPU)

    def loss() -> float:
        with torch.inference_mode():
            return task_loss(model, batch, Objective.CANDIDATES).item()

    before = loss()
    results, _ = client.train(1, 150)
    fed.replica.apply_rounds([results["scalars"].tolist()])
    assert loss() < before - 0.05


def test_private_clients_need_matching_settings(federation: Make) -> None:
    fed = federation()
    client = private(fed)
    fedavg = federation(gradient=Gradient.BACKPROPAGATION)
    with pytest.raises(
        ConfigError, match="client 0: a client that trains by backpropagation sends weights, which cannot be private"
    ):
        private(fedavg)
    with pytest.raises(ConfigError, match="client 0: privacy and noise_seed must be given together"):
        replace(client, noise_seed=None)
    with pytest.raises(ConfigError, match="privacy and noise_seed must be given together"):
        replace(fed.clients[0], noise_seed=3)
    with pytest.raises(ConfigError, match="Poisson batches may be empty, which only a private client can handle"):
        replace(fed.clients[0], data=client.data)
    with pytest.raises(ConfigError, match="data come in plain batches of 8, its privacy needs Poisson batches of 8"):
        replace(client, data=fed.clients[0].data)
    with pytest.raises(ConfigError, match="data come in Poisson batches of 8, its privacy needs Poisson batches of 9"):
        replace(client, privacy=replace(PRIVACY, batch_size=9))
