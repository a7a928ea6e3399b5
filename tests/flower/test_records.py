"""Run descriptions as messages, their sessions, and nodes that claim to be clients."""

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from meerkat_engine.fed.flower.records import RunDescription
from meerkat_engine.fed.flower.server.nodes import Nodes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DESCRIPTION = RunDescription(settings="seed = 1", base="b" * 64, mask_digest="m" * 64, stream_version=1, mask=b"ids",
                             seconds=3.0)  # fmt: skip


def test_description_survives_the_message() -> None:
    assert RunDescription.from_content(DESCRIPTION.to_content()) == DESCRIPTION
    assert RunDescription.from_content(RecordDict({"other": ConfigRecord({})})) is None


@pytest.mark.parametrize("field", ["settings", "base", "mask_digest"])
def test_different_descriptions_have_different_sessions(field: str) -> None:
    changed: dict[str, Any] = {field: "other"}
    assert replace(DESCRIPTION, **changed).session != DESCRIPTION.session


def test_session_does_not_depend_on_the_masks_file() -> None:
    assert replace(DESCRIPTION, mask=b"", seconds=9.0).session == DESCRIPTION.session


def test_first_node_that_claims_a_client_has_it_while_online() -> None:
    lines: list[str] = []
    nodes = Nodes(lines.append)
    nodes.claim(7, 0)
    nodes.claim(8, 0)
    nodes.claim(9, 1)
    assert (nodes.node_of(0), nodes.client_of(7), nodes.client_of(8), nodes.client_of(10)) == (7, 0, None, None)
    assert len(nodes) == 2
    nodes.keep_online([8, 9])
    assert (nodes.node_of(0), nodes.client_of(8), 7 in nodes) == (8, 0, False)
    assert lines == [
        "client 0 is node 7",
        "node 8 is rejected: it claims to be client 0, which is node 7",
        "client 1 is node 9",
        "client 0: its node 7 went offline",
    ]
