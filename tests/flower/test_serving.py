"""Runs over a Grid in this process: nodes that come, go, restart and fail, and settings that a node accepts."""

import logging
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
from meerkat_engine.engine.lm import embedded, layout
from meerkat_engine.engine.lm.objective import Objective
from meerkat_engine.fed import execute, make_config
from meerkat_engine.fed.config.toml import parse_toml, to_toml
from meerkat_engine.fed.flower.node import app as client_app
from meerkat_engine.fed.flower.node.handler import RequestHandler
from meerkat_engine.fed.flower.node.local_run import LocalRun, settings_for_nodes, settings_on_node
from meerkat_engine.fed.flower.records import RunDescription
from meerkat_engine.fed.flower.server import exchange
from meerkat_engine.fed.flower.server.run import describe_run, serve_run, settings_from
from meerkat_engine.fed.ledger.file import read_ledger
from meerkat_engine.fed.messages import TrainRequest

from helpers.examples import EXAMPLES
from helpers.models import make_model, make_tokenizer
from helpers.nodes import LocalGrid, Node

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SETTINGS: dict[str, Any] = {"clients": 3, "rounds": 4, "local_steps": 2, "eval_examples": 40, "seed": 3,
                            "calibration_texts": 32}  # fmt: skip


class StoppedError(Exception):
    """Ends a ServerApp in a test."""


class ThreeNodes:
    """Three nodes, the runs over them, and the log.

    Args:
        patch: see ``LocalGrid``.

    Attributes:
        nodes: the nodes of clients 0 to 2, with the ids 100 to 102.
        grid: reaches the nodes.
        lines: log lines so far.
        on_line: beginning of a log line -> function to call once, when such a line is logged.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nodes = [Node.numbered(i) for i in range(3)]
        self.grid = LocalGrid(self.nodes, client_app.app, patch)
        self.lines: list[str] = []
        self.on_line: dict[str, Callable[[], None]] = {}

    def log(self, line: str) -> None:
        self.lines.append(line)
        for start in [start for start in self.on_line if line.startswith(start)]:
            self.on_line.pop(start)()

    def run(self, output: Path, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        all_settings = SETTINGS | (settings or {})
        return serve_run(self.grid, all_settings, output, self.log, **{"deadline": 30, "wait": 1} | options)

    def logged(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> ThreeNodes:
    return ThreeNodes(monkeypatch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the same run with all clients in one process."""
    output = tmp_path_factory.mktemp("reference") / "run"
    execute(make_config(SETTINGS), output, lambda progress: None, lambda line: None)
    return output


def ledger_of(run: Path) -> bytes:
    return (run / "ledger.jsonl").read_bytes()


def test_ledger_is_the_one_of_a_run_in_one_process(federation: ThreeNodes, tmp_path: Path, reference: Path) -> None:
    federation.run(tmp_path / "flower")
    assert ledger_of(tmp_path / "flower") == ledger_of(reference)
    assert all(node.ended for node in federation.nodes)


def test_restarted_worker_catches_up_in_the_same_round(federation: ThreeNodes, tmp_path: Path, reference: Path) -> None:
    def forget() -> None:
        federation.nodes[1].handler = RequestHandler()

    federation.on_line["round 2 of 4"] = forget
    federation.run(tmp_path / "flower")
    rounds, expected = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "flower", reference))
    assert [line.clients for line in rounds] == [line.clients for line in expected]
    assert [dict(line.rejected) for line in rounds] == [{}, {}, {"client 1: is at an earlier round": 1}, {}]


def test_restarted_node_is_registered_again(federation: ThreeNodes, tmp_path: Path, reference: Path) -> None:
    def forget() -> None:
        federation.nodes[1].handler = RequestHandler()
        federation.nodes[1].context.state.clear()  # a SuperNode keeps it in memory

    federation.on_line["round 2 of 4"] = forget
    federation.run(tmp_path / "flower")
    assert federation.logged("client 1: node 101 no longer has the run; it is registered again")
    rounds, expected = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "flower", reference))
    assert [line.clients for line in rounds] == [line.clients for line in expected]


def test_round_ends_at_its_deadline(federation: ThreeNodes, tmp_path: Path) -> None:
    federation.on_line["round 1 of 4"] = lambda: federation.grid.deaf.add(101)
    federation.on_line["round 2 of 4"] = lambda: federation.grid.deaf.clear()
    begun = time.monotonic()
    federation.run(tmp_path / "flower", deadline=2)
    assert time.monotonic() - begun < 15
    assert federation.lines.count("no answer within 2 s from client 1") == 1
    rounds = read_ledger(tmp_path / "flower" / "ledger.jsonl").rounds
    assert [set(line.clients) for line in rounds] == [{0, 1, 2}, {0, 2}, {0, 1, 2}, {0, 1, 2}]


def test_run_is_resumed_over_other_nodes(
    federation: ThreeNodes, tmp_path: Path, reference: Path, monkeypatch: Any
) -> None:
    def stop() -> None:
        raise StoppedError

    federation.on_line["round 2 of 4"] = stop
    with pytest.raises(StoppedError):
        federation.run(tmp_path / "flower")
    ThreeNodes(monkeypatch).run(tmp_path / "flower")
    rounds, expected = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "flower", reference))
    assert [line.clients for line in rounds] == [line.clients for line in expected]


def test_run_restarts_in_another_directory_over_nodes_that_are_past_it(
    federation: ThreeNodes, tmp_path: Path, reference: Path
) -> None:
    """The nodes were not released, so they still hold the first run's model; both runs have the same settings."""

    def stop() -> None:
        raise StoppedError

    federation.on_line["round 3 of 4"] = stop
    with pytest.raises(StoppedError):
        federation.run(tmp_path / "first")
    assert [node.handler._local_run.replica.round for node in federation.nodes if node.handler._local_run] == [3] * 3
    federation.run(tmp_path / "second")
    rounds, expected = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "second", reference))
    assert [line.clients for line in rounds] == [line.clients for line in expected]


def test_runs_with_different_settings_share_the_nodes(federation: ThreeNodes, tmp_path: Path, reference: Path) -> None:
    federation.run(tmp_path / "first", {"seed": 4})
    federation.run(tmp_path / "second")
    assert ledger_of(tmp_path / "second") == ledger_of(reference)
    with pytest.raises(ConfigError, match="seed"):
        federation.run(tmp_path / "second", {"seed": 4})
    assert ledger_of(tmp_path / "second") == ledger_of(reference)


def test_node_that_could_not_take_part_is_registered_again(
    federation: ThreeNodes, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_RETRY_SECONDS", 0.2)
    node = Node(Context(1, 102, {"client-id": 2, "mask": "/no/where"}, RecordDict(), {}))
    federation.grid.nodes[102] = node
    federation.on_line["node 102 cannot take part"] = lambda: node.context.node_config.pop("mask")
    federation.run(tmp_path / "flower", wait=30)
    assert ledger_of(tmp_path / "flower") == ledger_of(reference)


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
def test_malformed_answers_are_not_used(
    federation: ThreeNodes, tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = federation.grid.pull_messages

    def pull_changed(ids: Any) -> Any:
        for reply in pull(ids):
            if "meerkat-round" in reply.content.config_records and reply.metadata.src_node_id == 102:
                reply.content = RecordDict({"meerkat-round": ConfigRecord(content)} if content else {})
            yield reply

    monkeypatch.setattr(federation.grid, "pull_messages", pull_changed)
    federation.run(tmp_path / "flower")
    clients = [set(line.clients) for line in read_ledger(tmp_path / "flower" / "ledger.jsonl").rounds]
    assert clients == [{0, 1}] * 4, federation.lines


def test_second_node_of_a_client_is_rejected(federation: ThreeNodes, tmp_path: Path, reference: Path) -> None:
    second = Node(Context(1, 200, {"client-id": 1}, RecordDict(), {}))
    federation.grid.nodes[200] = second
    federation.run(tmp_path / "flower")
    assert federation.logged("node 200 is rejected: it claims to be client 1, which is node 101")
    assert ledger_of(tmp_path / "flower") == ledger_of(reference)
    assert "round" in federation.nodes[1].operations
    assert "round" not in second.operations


def test_run_with_too_few_nodes_can_be_resumed(
    federation: ThreeNodes, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_LOG_SECONDS", 0.5)
    node = federation.grid.nodes.pop(102)
    with pytest.raises(TransportError, match="2 of 3 clients have a node after 1 s; start the others"):
        federation.run(tmp_path / "flower")
    assert federation.logged("waiting up to 1 s for nodes of 3 clients")
    assert federation.logged("2 of 3 clients have a node after")
    federation.grid.nodes[102] = node
    federation.run(tmp_path / "flower")
    rounds, expected = (read_ledger(run / "ledger.jsonl").rounds for run in (tmp_path / "flower", reference))
    assert [line.clients for line in rounds] == [line.clients for line in expected]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"client-id": 3}, "this node is client 3; the run has clients 0 to 2"),
        ({}, "configuration has no client id"),
        ({"client-id": "0"}, "configuration has no client id"),
        ({"client-id": 2, "mask": "/no/where"}, "/no/where"),
    ],
)
def test_reason_why_a_node_cannot_take_part_is_logged(
    federation: ThreeNodes, tmp_path: Path, node: Any, text: str
) -> None:
    federation.grid.nodes[102] = Node(Context(1, 102, node, RecordDict(), {}))
    federation.run(tmp_path / "flower", min_nodes=2)
    assert federation.logged("node 102 cannot take part: "), federation.lines
    assert federation.logged(text), federation.lines
    assert {i for line in read_ledger(tmp_path / "flower" / "ledger.jsonl").rounds for i in line.clients} == {0, 1}


def prepare(description: RunDescription, node: Any = None) -> LocalRun:
    return LocalRun.prepare(
        description.settings, description.base, description.mask_digest, description.mask, node or {}
    )


def encoded_request(round: int) -> bytes:
    return TrainRequest(client=0, round=round, local_steps=2, first_round=1, scalars=np.zeros(2, np.float32)).encode()


def handler_of(description: RunDescription) -> RequestHandler:
    """The handler of a worker that has loaded a run, in the session "one"."""
    header: Any = {"do": "setup", "session": "one", "settings": description.settings, "base": description.base,
                   "mask": description.mask_digest, "stream_version": description.stream_version, "node": {},
                   "client": 0}  # fmt: skip
    handler = RequestHandler()
    assert handler.handle(header, description.mask)[0]["known"]
    return handler


def test_node_with_another_version_of_the_stream_cannot_take_part(reference: Path) -> None:
    """Its perturbations would be others, and its scalars about other directions."""
    description = describe_run(reference, seconds=1)
    header: Any = {"do": "setup", "session": "one", "settings": description.settings, "base": description.base,
                   "mask": description.mask_digest, "stream_version": 2, "node": {}, "client": 0}  # fmt: skip
    reply, _ = RequestHandler().handle(header, description.mask)
    assert str(reply["error"]).startswith("the run's perturbation stream has version 2, this node's has 1; install")


def private(description: RunDescription) -> RunDescription:
    """The same run with private scalars."""
    settings = parse_toml(description.settings, "settings") | {"dp_noise": 1.0, "dp_clip": 0.01}
    return replace(description, settings=to_toml(settings))


def test_request_of_another_run_is_not_answered(reference: Path) -> None:
    handler = handler_of(describe_run(reference, seconds=1))
    for do in ("round", "stock"):
        header = {"do": do, "session": "other", "client": 0, "round": 2}
        assert not handler.handle(header, encoded_request(2))[0]["known"]
    assert handler.handle({"do": "round", "session": "one", "client": 0}, encoded_request(2))[0]["known"]


def test_private_node_answers_no_round_twice(reference: Path) -> None:
    handler = handler_of(private(describe_run(reference, seconds=1)))
    header = {"do": "round", "session": "one", "client": 0}
    assert handler.handle(header, encoded_request(2))[0] == {"known": True, "seconds": 0.0}
    assert "a private client takes each" in handler.handle(header, encoded_request(2))[0]["error"]
    earlier = TrainRequest(client=0, round=1, local_steps=2, first_round=1, scalars=np.zeros(0, np.float32)).encode()
    assert "bring this client to round 2" in handler.handle(header, earlier)[0]["error"]


def test_private_node_draws_secret_noise_and_batches(reference: Path) -> None:
    description = describe_run(reference, seconds=1)
    one, other = (prepare(private(description)).client(0) for _ in range(2))
    assert [one.data.next_indices() for _ in range(3)] != [other.data.next_indices() for _ in range(3)]
    assert one.noise_seed != other.noise_seed
    same = [prepare(description).client(0).data.next_indices() for _ in range(2)]
    assert same[0] == same[1]  # without privacy the batches follow from the settings


def test_other_base_model_or_mask_is_an_error(reference: Path) -> None:
    description = describe_run(reference, seconds=1)
    prepare(description)
    with pytest.raises(ModelError, match="the run's base model is 000000000000, this node's"):
        prepare(replace(description, base="0" * 64))
    with pytest.raises(MaskError, match="the run's mask is 000000000000, this node's"):
        prepare(replace(description, mask_digest="0" * 64))
    with pytest.raises(MaskError, match="the server sent no mask"):
        prepare(replace(description, mask=b""))
    prepare(replace(description, mask=b""), {"mask": str(reference / "mask.safetensors")})


def test_servers_paths_device_and_backend_are_ignored() -> None:
    settings = {"task": embedded.NAME, "rounds": 7, "data_dir": "/etc", "validation": "/etc/passwd",
                "calibration": "/etc/passwd", "mask": "/etc/passwd", "backend": "triton", "device": "cuda",
                "capture": "off", "calibration_elements": 9}  # fmt: skip
    config = settings_on_node(to_toml(settings), {})
    assert config.rounds == 7
    assert config.mask.elements == 0
    assert settings_on_node(to_toml(settings), {"calibration-elements": 5}).mask.elements == 5
    assert "elements" not in settings_for_nodes(make_config({"calibration_elements": 9}))
    assert (config.data.directory, config.data.validation, config.mask.calibration, config.mask.file) == (None,) * 4
    assert (config.model.backend, config.model.device, config.model.capture) == ("auto",) * 3
    with pytest.raises(ConfigError, match="trust_remote_code"):
        settings_on_node("trust_remote_code = true", {})


@pytest.mark.parametrize("model", ["/models/mine", "../mine", "a/b/c", "~/mine", "x.gguf/../../y"])
def test_path_as_the_runs_model_is_rejected(model: str) -> None:
    with pytest.raises(ConfigError, match="loads a path only if it is started with"):
        settings_on_node(to_toml({"model": model, "task": "sst2"}), {})


def test_hub_id_that_is_also_a_directory_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = to_toml({"model": "org/name", "task": "sst2"})
    assert settings_on_node(text, {}).model.source == "org/name"
    Path("org/name").mkdir(parents=True)
    with pytest.raises(ConfigError, match="loads a path only if it is started with"):
        settings_on_node(text, {})
    assert settings_on_node(text, {"model": "org/name"}).model.source == "org/name"


def test_run_on_the_nodes_own_examples_needs_data_of_the_node(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text("".join(f'{{"text": "a film {i}", "label": {i % 2}}}\n' for i in range(20)))
    text = to_toml({"model": "org/name", "template": "{text} It was", "labels": "bad,good"})
    with pytest.raises(ConfigError, match="the run uses each node's own examples"):
        settings_on_node(text, {})
    assert settings_on_node(text, {"data": str(rows)}).data.file == rows


def test_free_text_of_the_nodes_needs_their_data_and_their_chat_template(tmp_path: Path) -> None:
    text = to_toml({"model": "org/name", "chat_template": "t.jinja"})
    with pytest.raises(ConfigError, match="the run uses each node's own examples"):
        settings_on_node(text, {})
    with pytest.raises(ConfigError, match="the run has a chat template of its own"):
        settings_on_node(text, {"data": "own.jsonl"})
    config = settings_on_node(text, {"data": "own.jsonl", "chat-template": "mine.jinja"})
    assert config.data.chat_template == Path("mine.jinja")
    assert config.objective is Objective.LANGUAGE_MODEL


@pytest.mark.parametrize("own", [{}, {"template": "{prompt}", "labels": "bad,good", "label_field": "completion"}])
def test_run_on_own_data_with_the_embedded_model_needs_data_of_the_node(own: dict[str, str], tmp_path: Path) -> None:
    """Without them, the node would train on the embedded task, and the server could not tell."""
    server = make_config({"model": embedded.NAME, "data": tmp_path / "server.jsonl"} | own)
    with pytest.raises(ConfigError, match="the run uses each node's own examples"):
        settings_on_node(settings_for_nodes(server), {})
    config = settings_on_node(settings_for_nodes(server), {"data": "own.jsonl"})
    assert config.digest() == server.digest()


def test_node_without_data_cannot_take_part_in_a_run_on_own_data(federation: ThreeNodes, tmp_path: Path) -> None:
    data = str(EXAMPLES / "data" / "remarks-held-out.jsonl")
    for i in range(2):
        federation.nodes[i].context.node_config["data"] = data
    federation.run(tmp_path / "flower", {"model": embedded.NAME, "data": data, "rounds": 1}, min_nodes=2)
    assert federation.logged("node 102 cannot take part: the run uses each node's own examples; start this node with")
    (line,) = read_ledger(tmp_path / "flower" / "ledger.jsonl").rounds
    assert sorted(line.clients) == [0, 1]


def free_text_of_three_nodes(federation: ThreeNodes, directory: Path, words: str, *left_out: str) -> dict[str, Any]:
    """Gives each node a file of free text; returns the settings of a run whose server has a file of its own.

    Args:
        federation: the nodes.
        directory: where the files are written.
        words: vocabulary of the model.
        left_out: lines added to the files of the nodes.
    """
    make_model().save_pretrained(directory / "model")  # type: ignore[operator]
    make_tokenizer(words).save_pretrained(directory / "model")
    for i, answer in enumerate(("bad", "good", "a film")):
        lines = [f'{{"prompt": "a film it", "completion": " was {answer}"}}'] * 20
        (directory / f"{i}.jsonl").write_text("\n".join([*lines, *left_out]))
        node = {"client-id": i, "model": str(directory / "model"), "data": str(directory / f"{i}.jsonl")}
        federation.grid.nodes[100 + i] = Node(Context(1, 100 + i, node, RecordDict(), {}))
    (directory / "server.jsonl").write_text('{"prompt": "it was", "completion": " it"}\n' * 20)
    return {"model": str(directory / "model"), "data": str(directory / "server.jsonl"), "method": "random-mask",
            "density": 0.1}  # fmt: skip


def test_nodes_train_on_their_own_free_text(federation: ThreeNodes, tmp_path: Path) -> None:
    settings = free_text_of_three_nodes(federation, tmp_path, "a film it was bad good")
    federation.run(tmp_path / "flower", settings, min_nodes=3)
    rounds = read_ledger(tmp_path / "flower" / "ledger.jsonl").rounds
    assert [sorted(line.clients) for line in rounds] == [[0, 1, 2]] * len(rounds), federation.lines
    assert all(line.loss is not None for line in rounds)


def test_rows_left_out_are_in_the_log_of_the_node_alone(
    federation: ThreeNodes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = free_text_of_three_nodes(
        federation, tmp_path, "a film it was bad good", '{"prompt": "Jane Doe", "completion": ""}'
    )
    replies: list[Any] = []
    pull = federation.grid.pull_messages

    def keep(ids: Any) -> Any:
        replies.extend(pulled := list(pull(ids)))
        return pulled

    monkeypatch.setattr(federation.grid, "pull_messages", keep)
    caplog.set_level(logging.INFO, "meerkat.worker")
    federation.run(tmp_path / "flower", settings, min_nodes=3)
    own = [record.getMessage() for record in caplog.records if record.name == "meerkat.worker"]
    for i, answer in enumerate(("bad", "good", "a film")):
        assert f"training data: left out, no answer: 1 rows ({tmp_path / f'{i}.jsonl'}, line 21)" in own
        assert any(f"[[was {answer}" in line for line in own), own
    assert len(replies) >= 3 + 3 * SETTINGS["rounds"]
    sent = "".join(str(reply.content) for reply in replies) + "".join(federation.lines)
    for quoted in ("left out", ".jsonl, line", "was bad", "was good", "was a film"):
        assert quoted not in sent, sent


def test_reason_why_batches_of_a_node_are_not_packed_is_in_its_log(
    reference: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_difference", lambda *inputs: "the logits differ")
    caplog.set_level(logging.INFO, "meerkat.worker")
    prepare(describe_run(reference, seconds=1))
    assert "batches are sorted, not packed: the logits differ" in caplog.messages


@pytest.mark.parametrize("name", ["json", "text", "squad"])
def test_a_data_set_without_an_owner_is_rejected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By such a name `datasets` may read the files of the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("own.json").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match=f"a node reads only data sets whose name has an owner: .* OWNER/{name}"):
        settings_on_node(to_toml({"model": "org/name", "dataset": name}), {})


def test_a_data_set_that_is_a_path_of_the_server_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = to_toml({"model": "org/name", "dataset": "org/data"})
    assert settings_on_node(text, {}).data.dataset == "org/data"
    monkeypatch.chdir(tmp_path)
    Path("org/data").mkdir(parents=True)
    for settings in (text, to_toml({"model": "org/name", "dataset": "/etc/data"})):
        with pytest.raises(ConfigError, match="a node reads no path that the server names"):
            settings_on_node(settings, {})


def test_errors_sent_to_the_server_quote_no_examples(federation: ThreeNodes, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    make_tokenizer("a film it was bad good").save_pretrained(tmp_path / "model")
    for i, last in enumerate(("good", "bad", "Jane Doe is ill")):
        rows = [*(("good", "bad")[n % 2] for n in range(20)), last]
        (tmp_path / f"{i}.jsonl").write_text("".join(f'{{"text": "a film", "label": "{label}"}}\n' for label in rows))
        node = {"client-id": i, "model": str(tmp_path / "model"), "data": str(tmp_path / f"{i}.jsonl")}
        federation.grid.nodes[100 + i] = Node(Context(1, 100 + i, node, RecordDict(), {}))
    settings = {"model": str(tmp_path / "model"), "template": "{text} it was", "labels": "bad,good",
                "data": str(tmp_path / "0.jsonl"), "method": "random-mask", "density": 0.1}  # fmt: skip
    federation.run(tmp_path / "flower", settings, min_nodes=2)
    assert federation.logged("client 0 is node 100"), federation.lines
    assert federation.logged("node 102 cannot take part: DataError; the node's own log has the reason"), (
        federation.lines
    )
    assert not federation.logged("Jane"), federation.lines


def test_round_without_nodes_waits_for_one(federation: ThreeNodes, tmp_path: Path, reference: Path) -> None:
    """All nodes are offline when the round begins, and come back 8 s later."""
    nodes = dict(federation.grid.nodes)

    def leave() -> None:
        federation.grid.nodes.clear()

    federation.on_line["round 2 of 4"] = leave
    timer = threading.Timer(8, lambda: federation.grid.nodes.update(nodes))
    timer.start()
    federation.run(tmp_path / "flower", deadline=60)
    timer.join()
    assert [len(line.clients) > 0 for line in read_ledger(tmp_path / "flower" / "ledger.jsonl").rounds] == [True] * 4


def test_unreadable_answers_do_not_end_the_run(
    federation: ThreeNodes, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull, failures = federation.grid.pull_messages, iter([True])

    def fail_once(ids: Any) -> Any:
        if len(federation.lines) > 8 and next(failures, False):
            raise ValueError("garbage")
        return pull(ids)

    monkeypatch.setattr(federation.grid, "pull_messages", fail_once)
    federation.run(tmp_path / "flower")
    assert federation.logged("answers could not be read: ValueError: garbage")
    assert ledger_of(tmp_path / "flower") == ledger_of(reference)


def test_settings_are_read_from_an_apps_configuration() -> None:
    assert settings_from({"local-steps": 3, "data-dir": "", "alpha": 0.5}) == {"local_steps": 3, "alpha": 0.5}


def test_name_of_the_embedded_model_is_no_path() -> None:
    assert settings_on_node(to_toml({"task": embedded.NAME}), {}).model.source == embedded.NAME
