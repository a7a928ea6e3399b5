"""A run over a Grid, in this process: nodes that come, go, forget and fail, and what a node takes from the server."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from meerkat_engine.engine.errors import ConfigError, MaskError, ModelError, TransportError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.fed import execute, make_config
from meerkat_engine.fed.config.toml import parse_toml, to_toml
from meerkat_engine.fed.flower.node import app as client_app
from meerkat_engine.fed.flower.node.handler import RequestHandler
from meerkat_engine.fed.flower.node.local_run import LocalRun, settings_on_node
from meerkat_engine.fed.flower.records import RunDescription
from meerkat_engine.fed.flower.server import exchange
from meerkat_engine.fed.flower.server.run import describe_run, serve_run, settings_from
from meerkat_engine.fed.ledger.file import read_ledger
from meerkat_engine.fed.messages import TrainRequest

from helpers.models import make_model, make_tokenizer
from helpers.nodes import LocalGrid, Node

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SETTINGS: dict[str, Any] = {"clients": 3, "rounds": 4, "local_steps": 2, "eval_examples": 40, "seed": 3,
                            "calibration_texts": 32}  # fmt: skip


class StoppedError(Exception):
    """Stands for whatever ends a ServerApp."""


class Served:
    """Runs over three nodes, and what was said meanwhile."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nodes = [Node.numbered(i) for i in range(3)]
        self.grid = LocalGrid(self.nodes, client_app.app, patch)
        self.said: list[str] = []
        self.when: dict[str, Callable[[], None]] = {}  # beginning of a line -> what happens then, once

    def log(self, line: str) -> None:
        self.said.append(line)
        for start in [start for start in self.when if line.startswith(start)]:
            self.when.pop(start)()

    def run(self, output: Path, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        given = SETTINGS | (settings or {})
        return serve_run(self.grid, given, output, self.log, **{"deadline": 30, "wait": 1} | options)

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.said)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with all clients in this process."""
    output = tmp_path_factory.mktemp("here") / "run"
    execute(make_config(SETTINGS), output, lambda progress: None, lambda line: None)
    return output


def ledger_of(run: Path) -> bytes:
    return (run / "ledger.jsonl").read_bytes()


def test_the_bits_of_one_process(served: Served, tmp_path: Path, here: Path) -> None:
    served.run(tmp_path / "there")
    assert ledger_of(tmp_path / "there") == ledger_of(here)
    assert all(node.ended for node in served.nodes)


def test_a_worker_that_forgot_everything_catches_up_in_the_same_round(
    served: Served, tmp_path: Path, here: Path
) -> None:
    def forget() -> None:
        served.nodes[1].resident = RequestHandler()

    served.when["round 2 of 4"] = forget
    served.run(tmp_path / "there")
    lines, same = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "there", here))
    assert [line.clients for line in lines] == [line.clients for line in same]
    assert [dict(line.rejected) for line in lines] == [{}, {}, {"client 1: stands at an earlier round": 1}, {}]


def test_a_node_that_forgot_everything_is_told_of_the_run_again(served: Served, tmp_path: Path, here: Path) -> None:
    def forget() -> None:
        served.nodes[1].resident = RequestHandler()
        served.nodes[1].context.state.clear()  # a SuperNode keeps it in memory

    served.when["round 2 of 4"] = forget
    served.run(tmp_path / "there")
    assert served.heard("client 1 was started anew: it is told of the run")
    lines, same = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "there", here))
    assert [line.clients for line in lines] == [line.clients for line in same]


def test_a_round_waits_for_nobody_beyond_its_deadline(served: Served, tmp_path: Path) -> None:
    served.when["round 1 of 4"] = lambda: served.grid.deaf.add(101)
    served.when["round 2 of 4"] = lambda: served.grid.deaf.clear()
    begun = time.monotonic()
    served.run(tmp_path / "there", deadline=2)
    assert time.monotonic() - begun < 15
    assert served.said.count("no answer within 2 s from client 1") == 1
    lines = read_ledger(tmp_path / "there" / "ledger.jsonl").rounds
    assert [set(line.clients) for line in lines] == [{0, 1, 2}, {0, 2}, {0, 1, 2}, {0, 1, 2}]


def test_a_run_goes_on_over_other_nodes(served: Served, tmp_path: Path, here: Path, monkeypatch: Any) -> None:
    def stop() -> None:
        raise StoppedError

    served.when["round 2 of 4"] = stop
    with pytest.raises(StoppedError):
        served.run(tmp_path / "there")
    Served(monkeypatch).run(tmp_path / "there")
    lines, same = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "there", here))
    assert [line.clients for line in lines] == [line.clients for line in same]


def test_a_run_begun_again_elsewhere_over_nodes_that_are_past_it(served: Served, tmp_path: Path, here: Path) -> None:
    """Nodes that heard nothing of the first one's end hold its model; the second has the same settings."""

    def stop() -> None:
        raise StoppedError

    served.when["round 3 of 4"] = stop
    with pytest.raises(StoppedError):
        served.run(tmp_path / "first")
    assert [node.resident._participant.replica.round for node in served.nodes if node.resident._participant] == [3] * 3
    served.run(tmp_path / "second")
    lines, same = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "second", here))
    assert [line.clients for line in lines] == [line.clients for line in same]


def test_runs_with_other_settings_over_the_same_nodes(served: Served, tmp_path: Path, here: Path) -> None:
    served.run(tmp_path / "first", {"seed": 4})
    served.run(tmp_path / "second")
    assert ledger_of(tmp_path / "second") == ledger_of(here)
    with pytest.raises(ConfigError, match="seed"):
        served.run(tmp_path / "second", {"seed": 4})
    assert ledger_of(tmp_path / "second") == ledger_of(here)


def test_a_node_that_could_not_take_part_is_asked_again(
    served: Served, tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_AGAIN", 0.2)
    node = Node(Context(1, 102, {"client-id": 2, "mask": "/no/where"}, RecordDict(), {}))
    served.grid.nodes[102] = node
    served.when["node 102 cannot take part"] = lambda: node.context.node_config.pop("mask")
    served.run(tmp_path / "there", wait=30)
    assert ledger_of(tmp_path / "there") == ledger_of(here)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"answer": "text", "known": True, "seconds": 0.1},
        {"answer": b"garbage", "known": True, "seconds": 0.1},
        {"known": True, "seconds": 0.1},
        {"answer": b"", "known": True, "seconds": "long"},
    ],
)
def test_answers_that_no_honest_node_gives(
    served: Served, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = served.grid.pull_messages

    def pulled(ids: Any) -> Any:
        for reply in pull(ids):
            if "meerkat-round" in reply.content.config_records and reply.metadata.src_node_id == 102:
                reply.content = RecordDict({"meerkat-round": ConfigRecord(content)} if content else {})
            yield reply

    monkeypatch.setattr(served.grid, "pull_messages", pulled)
    served.run(tmp_path / "there")
    taken = [set(line.clients) for line in read_ledger(tmp_path / "there" / "ledger.jsonl").rounds]
    assert taken == [{0, 1}] * 4, served.said


def test_of_two_that_claim_to_be_one_client_the_first_is(served: Served, tmp_path: Path, here: Path) -> None:
    double = Node(Context(1, 200, {"client-id": 1}, RecordDict(), {}))
    served.grid.nodes[200] = double
    served.run(tmp_path / "there")
    assert served.heard("node 200 is refused: it says it is client 1, which node 101 is while it is there")
    assert ledger_of(tmp_path / "there") == ledger_of(here)
    assert "round" in served.nodes[1].asked
    assert "round" not in double.asked


def test_too_few_nodes_are_an_error_that_leaves_a_run_to_go_on_with(
    served: Served, tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_STILL", 0.5)
    gone = served.grid.nodes.pop(102)
    with pytest.raises(TransportError, match="2 of 3 clients have a node after 1 s; start the others"):
        served.run(tmp_path / "there")
    assert served.heard("waiting up to 1 s for nodes of 3 clients")
    assert served.heard("2 of 3 clients have a node after")
    served.grid.nodes[102] = gone
    served.run(tmp_path / "there")
    lines, same = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "there", here))
    assert [line.clients for line in lines] == [line.clients for line in same]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"client-id": 3}, "the node is client 3; the run has the clients 0 to 2"),
        ({}, "does not say which client it is"),
        ({"client-id": "0"}, "does not say which client it is"),
        ({"client-id": 2, "mask": "/no/where"}, "/no/where"),
    ],
)
def test_a_node_that_cannot_take_part_says_why(served: Served, tmp_path: Path, node: Any, text: str) -> None:
    served.grid.nodes[102] = Node(Context(1, 102, node, RecordDict(), {}))
    served.run(tmp_path / "there", min_nodes=2)
    assert served.heard("node 102 cannot take part: "), served.said
    assert served.heard(text), served.said
    assert {i for line in read_ledger(tmp_path / "there" / "ledger.jsonl").rounds for i in line.clients} == {0, 1}


def prepared(setup: RunDescription, node: Any = None) -> LocalRun:
    return LocalRun.prepare(setup.settings, setup.base, setup.mask_digest, setup.mask, node or {})


def asked(round: int) -> bytes:
    return TrainRequest(client=0, round=round, local_steps=2, first_round=1, scalars=np.zeros(2, np.float32)).encode()


def told_of(setup: RunDescription) -> RequestHandler:
    """A worker that was told of a run."""
    told: Any = {"do": "setup", "session": "one", "settings": setup.settings, "base": setup.base,
                 "mask": setup.mask_digest, "node": {}, "client": 0}  # fmt: skip
    resident = RequestHandler()
    assert resident.handle(told, setup.mask)[0]["known"]
    return resident


def private(setup: RunDescription) -> RunDescription:
    settings = parse_toml(setup.settings, "settings") | {"dp_noise": 1.0, "dp_clip": 0.01}
    return replace(setup, settings=to_toml(settings))


def test_a_round_of_another_run_is_not_taken(here: Path) -> None:
    resident = told_of(describe_run(here, seconds=1))
    for do in ("round", "stock"):
        assert not resident.handle({"do": do, "session": "other", "client": 0, "round": 2}, asked(2))[0]["known"]
    assert resident.handle({"do": "round", "session": "one", "client": 0}, asked(2))[0]["known"]


def test_a_private_node_takes_no_round_twice(here: Path) -> None:
    resident = told_of(private(describe_run(here, seconds=1)))
    header = {"do": "round", "session": "one", "client": 0}
    assert resident.handle(header, asked(2))[0] == {"known": True, "seconds": 0.0}
    assert "a private client takes each" in resident.handle(header, asked(2))[0]["error"]
    earlier = TrainRequest(client=0, round=1, local_steps=2, first_round=1, scalars=np.zeros(0, np.float32)).encode()
    assert "this client stands at round 2" in resident.handle(header, earlier)[0]["error"]


def test_a_private_node_keeps_noise_and_batches_to_itself(here: Path) -> None:
    setup = describe_run(here, seconds=1)
    one, other = (prepared(private(setup)).client(0) for _ in range(2))
    assert [one.data.next_indices() for _ in range(3)] != [other.data.next_indices() for _ in range(3)]
    assert one.noise_seed != other.noise_seed
    same = [prepared(setup).client(0).data.next_indices() for _ in range(2)]
    assert same[0] == same[1]  # a node whose scalars are not private draws what the settings say


def test_a_node_has_the_runs_model_and_mask_or_none(here: Path) -> None:
    setup = describe_run(here, seconds=1)
    prepared(setup)
    with pytest.raises(ModelError, match="the run's base model is 000000000000, the one here"):
        prepared(replace(setup, base="0" * 64))
    with pytest.raises(MaskError, match="the run's mask is 000000000000, the one here"):
        prepared(replace(setup, mask_digest="0" * 64))
    with pytest.raises(MaskError, match="the server sent no mask"):
        prepared(replace(setup, mask=b""))
    prepared(replace(setup, mask=b""), {"mask": str(here / "mask.safetensors")})


def test_the_server_names_no_path_device_or_backend() -> None:
    given = {"rounds": 7, "data_dir": "/etc", "validation": "/etc/passwd", "calibration": "/etc/passwd",
             "mask": "/etc/passwd", "backend": "triton", "device": "cuda"}  # fmt: skip
    config = settings_on_node(to_toml(given), {})
    assert config.rounds == 7
    assert (config.data.directory, config.data.validation, config.mask.calibration, config.mask.file) == (None,) * 4
    assert (config.model.backend, config.model.device) == ("auto", "cpu")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        settings_on_node("trust_remote_code = true", {})


@pytest.mark.parametrize("model", ["/models/mine", "../mine", "a/b/c", "~/mine", "x.gguf/../../y"])
def test_a_path_as_the_runs_model_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="say where it lies here"):
        settings_on_node(to_toml({"model": model, "task": "sst2"}), {})


def test_a_hub_id_that_is_a_directory_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = to_toml({"model": "org/name", "task": "sst2"})
    assert settings_on_node(text, {}).model.source == "org/name"
    Path("org/name").mkdir(parents=True)
    with pytest.raises(ConfigError, match="say where it lies here"):
        settings_on_node(text, {})
    assert settings_on_node(text, {"model": "org/name"}).model.source == "org/name"


def test_a_node_with_examples_of_its_own(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text("".join(f'{{"text": "a film {i}", "label": {i % 2}}}\n' for i in range(20)))
    text = to_toml({"model": "org/name", "template": "{text} It was", "labels": "bad,good"})
    with pytest.raises(ConfigError, match="data of the nodes' own"):
        settings_on_node(text, {})
    assert settings_on_node(text, {"data": str(rows)}).data.file == rows


def test_what_a_node_cannot_do_tells_nothing_of_its_examples(served: Served, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    make_tokenizer("a film it was bad good").save_pretrained(tmp_path / "model")
    for i, last in enumerate(("good", "bad", "Jane Doe is ill")):
        rows = [*(("good", "bad")[n % 2] for n in range(20)), last]
        (tmp_path / f"{i}.jsonl").write_text("".join(f'{{"text": "a film", "label": "{label}"}}\n' for label in rows))
        node = {"client-id": i, "model": str(tmp_path / "model"), "data": str(tmp_path / f"{i}.jsonl")}
        served.grid.nodes[100 + i] = Node(Context(1, 100 + i, node, RecordDict(), {}))
    settings = {"model": str(tmp_path / "model"), "template": "{text} it was", "labels": "bad,good",
                "data": str(tmp_path / "0.jsonl"), "method": "random-mask", "density": 0.1}  # fmt: skip
    served.run(tmp_path / "there", settings, min_nodes=2)
    assert served.heard("client 0 is node 100"), served.said
    assert served.heard("node 102 cannot take part: DataError; the node's own log says why"), served.said
    assert not served.heard("Jane"), served.said


def test_a_round_waits_for_somebody_to_come(served: Served, tmp_path: Path, here: Path) -> None:
    """All are gone when it begins, and come back."""
    gone = dict(served.grid.nodes)

    def leave() -> None:
        served.grid.nodes.clear()

    served.when["round 2 of 4"] = leave
    timer = threading.Timer(8, lambda: served.grid.nodes.update(gone))
    timer.start()
    served.run(tmp_path / "there", deadline=60)
    timer.join()
    assert [len(line.clients) > 0 for line in read_ledger(tmp_path / "there" / "ledger.jsonl").rounds] == [True] * 4


def test_answers_that_cannot_be_read_end_no_run(
    served: Served, tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull, failures = served.grid.pull_messages, iter([True])

    def once(ids: Any) -> Any:
        if len(served.said) > 8 and next(failures, False):
            raise ValueError("garbage")
        return pull(ids)

    monkeypatch.setattr(served.grid, "pull_messages", once)
    served.run(tmp_path / "there")
    assert served.heard("answers could not be read: ValueError: garbage")
    assert ledger_of(tmp_path / "there") == ledger_of(here)


def test_settings_from_an_app() -> None:
    assert settings_from({"local-steps": 3, "data-dir": "", "alpha": 0.5}) == {"local_steps": 3, "alpha": 0.5}


def test_names_of_the_embedded_model_are_no_paths() -> None:
    assert settings_on_node("", {}).model.source == embedded.NAME
