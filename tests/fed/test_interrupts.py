"""A federation that is interrupted (Ctrl-C) anywhere and called again gives the bits of one that never was."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from meerkat_engine.engine.journal import Journal
from meerkat_engine.fed import read_ledger, simulate
from meerkat_engine.fed.methods import Gradient

from helpers.interrupts import Interrupts

Make = Callable[..., Any]
ROUNDS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "scalars": {"queries": 2},
    "sampled clients with a replica each": {"clients": 4, "per_round": 2, "shared": False},
    "weights": {"gradient": Gradient.BACKPROPAGATION, "steps": 1},
}


def run_rounds(fed: Any) -> None:
    list(simulate(fed.server, fed.clients, ROUNDS))


def count_places(fed: Any) -> int:
    """Runs the rounds; returns the number of places at which an interrupt could have come."""
    with Interrupts().active() as interrupts:
        run_rounds(fed)
    return interrupts.seen


def interrupt(fed: Any, place: int) -> bool:
    """Runs the rounds up to a place; returns whether it was reached."""
    try:
        with Interrupts(place).active():
            run_rounds(fed)
    except KeyboardInterrupt:
        return True
    return False


def rounds_in(ledger: Path) -> list[dict[str, Any]]:
    """The rounds of a ledger without the sizes of the messages, of which some were sent twice."""
    return [{**line.fields(), "bytes_up": 0, "bytes_down": 0} for line in read_ledger(ledger).rounds]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_interrupted_federation_continues_to_the_same_bits(
    federation: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    undisturbed, random = federation(ledger=tmp_path / "undisturbed", **settings), Random(1)
    places = count_places(undisturbed)
    for trial in range(8):
        fed = federation(ledger=tmp_path / f"{trial}", **settings)
        for _ in range(3):
            if not interrupt(fed, random.randrange(places)):
                break
        run_rounds(fed)
        assert fed.server.round == ROUNDS + 1
        assert fed.weights == undisturbed.weights
        assert rounds_in(tmp_path / f"{trial}") == rounds_in(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["scalars", "weights"])
def test_an_interrupt_while_a_round_is_finished_does_not_lose_or_repeat_it(
    federation: Make, tmp_path: Path, name: str
) -> None:
    """Ledger, model and the server's own state change here, one after the other."""
    undisturbed = answered_round(federation, tmp_path / "undisturbed", name)
    with Interrupts().active() as interrupts:
        undisturbed.server.finish_round()
    last = range(interrupts.seen - 12, interrupts.seen)
    for place in {*Random(2).sample(range(interrupts.seen), 20), *last}:
        fed = answered_round(federation, tmp_path / f"{place}", name)
        with pytest.raises(KeyboardInterrupt), Interrupts(place).active():
            fed.server.finish_round()
        while fed.server.round == 1:
            fed.server.finish_round()
        assert fed.weights == undisturbed.weights
        assert rounds_in(tmp_path / f"{place}") == rounds_in(tmp_path / "undisturbed")


def answered_round(federation: Make, ledger: Path, name: str) -> Any:
    """A federation whose clients have answered round 1."""
    fed = federation(ledger=ledger, **SETTINGS[name])
    for client in fed.clients:
        fed.server.receive(client.handle(fed.server.request(client.id)))
    return fed


def test_an_update_that_an_interrupt_left_pending_is_not_applied_to_the_restored_weights(
    federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = federation()
    client, request = fed.clients[0], fed.server.request(0)
    expected, original, calls = client.handle(request), Journal.flush_, []

    def interrupted(journal: Journal) -> None:
        calls.append(journal)
        if len(calls) in (2, 3):  # after the last step, before its update, and again in the repetition
            raise KeyboardInterrupt
        original(journal)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "flush_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.handle(request)
    assert client.handle(request) == expected
