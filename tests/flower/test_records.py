"""What travels: setups that are told apart, nodes that claim to be clients, answers that no honest node gives."""

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from meerkat_engine.fed.flower.records import RunDescription
from meerkat_engine.fed.flower.server.nodes import Nodes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SETUP = RunDescription(settings="seed = 1", base="b" * 64, mask_digest="m" * 64, mask=b"ids", seconds=3.0)


def test_a_setup_arrives_as_it_was_sent() -> None:
    assert RunDescription.of(SETUP.content()) == SETUP
    assert RunDescription.of(RecordDict({"other": ConfigRecord({})})) is None


@pytest.mark.parametrize("field", ["settings", "base", "mask_digest"])
def test_setups_that_differ_are_sessions_that_differ(field: str) -> None:
    changed: dict[str, Any] = {field: "other"}
    assert replace(SETUP, **changed).session != SETUP.session


def test_a_setup_is_the_same_session_with_or_without_the_masks_file() -> None:
    assert replace(SETUP, mask=b"", seconds=9.0).session == SETUP.session


def test_of_nodes_that_claim_to_be_one_client_the_first_is_while_it_is_there() -> None:
    said: list[str] = []
    nodes = Nodes(said.append)
    nodes.claim(7, 0)
    nodes.claim(8, 0)
    nodes.claim(9, 1)
    assert (nodes.node_of(0), nodes.client_of(7), nodes.client_of(8), nodes.client_of(10)) == (7, 0, None, None)
    assert len(nodes) == 2
    nodes.present([8, 9])
    assert (nodes.node_of(0), nodes.client_of(8), 7 in nodes) == (8, 0, False)
    assert said == [
        "client 0 is node 7",
        "node 8 is refused: it says it is client 0, which node 7 is while it is there",
        "client 1 is node 9",
        "client 0: its node 7 has gone",
    ]
