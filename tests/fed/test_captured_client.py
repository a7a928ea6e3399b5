"""Local steps as CUDA graphs, which are imitated: the bits of other steps, and what a run says of them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine import SparseMask
from meerkat_engine.engine.captured import Capture
from meerkat_engine.engine.lm.evaluation import Evaluation
from meerkat_engine.engine.lm.layout import Layout
from meerkat_engine.engine.lm.scores import scores_in
from meerkat_engine.fed import ClientData, make_config
from meerkat_engine.fed.methods import Gradient
from meerkat_engine.fed.run.directory import RunDirectory
from meerkat_engine.fed.run.metrics import Metrics, check_metrics_line
from meerkat_engine.fed.run.summary import check_summary
from meerkat_engine.fed.run.terminal import _print_summary
from meerkat_engine.fed.setup.data import encode
from meerkat_engine.fed.setup.model import load_language_model
from meerkat_engine.fed.setup.server_and_clients import Federation

from helpers.graphs import ImitatedGraphs

Make = Callable[..., Any]


def with_batches_of_one_shape(fed: Any) -> Any:
    """Gives all clients packed examples of one length, which a GPU's batches would be padded to."""
    lengths = torch.tensor([len(prompt) for prompt in fed.clients[0].data.task.prompts])
    alike = (lengths == lengths.mode().values).nonzero().flatten()
    task = copy.copy(fed.clients[0].data.task)
    task.layout = Layout.PACKED  # the only one that a client has captured
    for i, client in enumerate(fed.clients):
        client.data = ClientData(task, alike[i :: len(fed.clients)], 4, seed=i)
    return fed


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("gradient", [Gradient.TWO_POINT, Gradient.FORWARD_DIFFERENCE])
def test_clients_share_graphs_and_have_the_bits_of_other_steps(
    federation: Make, gradient: Gradient, queries: int
) -> None:
    """From client to client and round to round the masters are put back, and graphs go on writing to them."""
    options = {"steps": 6, "gradient": gradient, "queries": queries}
    plain, graphs = with_batches_of_one_shape(federation(**options)), with_batches_of_one_shape(federation(**options))
    plain.replica.optimizer.capture = Capture.OFF
    imitated = ImitatedGraphs(graphs.replica.optimizer)
    for _ in range(2):
        assert graphs.round() == plain.round()
    assert graphs.weights == plain.weights
    captured = graphs.replica.optimizer.captured_steps
    assert captured == imitated.replayed > imitated.recorded >= 1
    assert graphs.replica.optimizer.not_captured is None
    timing = [client.timing for client in graphs.clients]
    assert any(math.isnan(of_client.forward) for of_client in timing)
    assert all(0 < client.timing.forward < client.timing.total for client in plain.clients)


def test_programs_on_a_cpu_are_timed_like_other_steps(federation: Make) -> None:
    fed = federation(steps=3)
    fed.round()
    assert fed.replica.optimizer.captured_steps == 0
    assert all(0 < client.timing.forward < client.timing.total for client in fed.clients)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "no shape of a batch has come twice yet"),
        ({"capture": "off"}, "--capture is off"),
        ({"method": "fedavg"}, "fedavg trains by backpropagation"),
        ({"dp_noise": 1.0}, "private steps draw new noise in every forward pass"),
    ],
)
def test_a_run_says_how_its_steps_run_on_a_gpu(settings: dict[str, Any], reason: str) -> None:
    config = make_config({"clients": 2, "device": "cpu", **settings})
    lm = load_language_model(config)
    mask = SparseMask.random(lm.model, 0.01, 1, frozen=True)
    fed = Federation(config, lm.model, mask, encode(config, lm), [torch.arange(50), torch.arange(50, 100)], None)
    optimizer = fed.server.replica.optimizer
    assert optimizer.capture == config.model.capture
    fed.timing.steps = 1
    assert fed.how_steps_run() is None
    optimizer.weights.values.device = torch.device("cuda")
    assert fed.how_steps_run() == f"local steps are not CUDA graphs: {reason}"
    fed.timing.steps = 0
    assert fed.how_steps_run() is None


def test_the_time_of_forwards_in_a_graph_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = Evaluation(loss=1.0, examples=4, scores={"accuracy": 0.5, "macro_f1": 0.5})
    with RunDirectory(tmp_path / "r") as directory:
        metrics = Metrics(directory, [], 4)
        lines = [
            metrics.add(None, evaluation, seconds=1, in_steps=0.5, in_forwards=forwards) for forwards in (0.4, math.nan)
        ]
    assert [line["seconds_in_forwards"] for line in lines] == [0.4, None]
    for line in lines:
        check_metrics_line(line, None, "here", scores_in(line))
    metrics._lines = [line | {"steps": 5} for line in lines]
    summary = metrics.summary()
    assert summary["seconds_per_step"] == pytest.approx(0.1)
    assert summary["forward_share_of_step"] is None
    fields = {"weights": "w", "masked_elements": 1, "elements": 2, "bytes_each_way_if_weights_were_sent": 1}
    fields |= {"mask_bytes": 0, "truncated_train": 0, "truncated_validation": 0}
    check_summary(summary | fields, "here")
    _print_summary(summary | fields, tmp_path)
    assert "time per step   100.0 ms: replayed from CUDA graphs" in capsys.readouterr().out
