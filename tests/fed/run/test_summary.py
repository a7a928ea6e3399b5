"""The summary of a finished run that is read again: its fields are there and of their kinds."""

import math
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.errors import RunError
from meerkat_engine.fed.run.summary import check_summary, client_accuracy_summary
from meerkat_engine.fed.run.terminal import show_run

from helpers.command import call, metrics_of, summary_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with early stopping and hostile clients."""
    run: Path = tmp_path_factory.mktemp("runs") / "r"
    result = call("run", "--rounds", "1", "--local-steps", "1", "--method", "meerkat-vp", "--vp-steps", "6",
                  "--vp-initial", "2", "--vp-later", "2", "--vp-null-paths", "3", "--calibration-texts", "8",
                  "--attack", "scale", "--attackers", "1", "--eval-examples", "40", "--output", run)  # fmt: skip
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture
def summary(run: Path) -> dict[str, Any]:
    """The summary of the run."""
    return summary_of(run)


def test_the_summary_of_a_run_passes(summary: dict[str, Any]) -> None:
    check_summary(summary, "here")
    assert {"stopped", "single_label_clients", "attackers"} <= summary.keys()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weights", [None, 1, []]),
        ("accuracy_after", ["0.5", None, True, []]),
        ("bytes_up", ["7", None]),
        ("stopped", [None, 1, {}]),
        ("single_label_clients", [None, "0"]),
        ("attackers", [None, 1]),
        ("recall", ["1", True]),
        ("seconds_per_step", ["1", [1]]),
        ("client_accuracy", [None, 0.5]),
        ("client_accuracy_worst", ["1", True]),
    ],
)
def test_a_field_of_another_kind_is_damage(summary: dict[str, Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RunError, match=f"here: {name} is missing in the summary, or of another kind"):
            check_summary(summary | {name: value}, "here")


@pytest.mark.parametrize("name", ["accuracy_before", "elements", "stopped", "precision", "attack", "seconds_per_step",
                                  "client_accuracy_worst"])  # fmt: skip
def test_a_missing_field_is_damage(summary: dict[str, Any], name: str) -> None:
    without = {key: value for key, value in summary.items() if key != name}
    with pytest.raises(RunError, match=f"here: {name} is missing in the summary"):
        check_summary(without, "here")


def test_a_clients_own_accuracy_is_that_on_its_shares_of_the_labels() -> None:
    recalls, labels = [0.5, 1.0, 0.75], [[3, 1, 0], [0, 4, 0], [1, 0, 1]]
    fields = client_accuracy_summary(recalls, labels, stopped=[1, 2])
    assert fields == {
        "client_accuracy": [0.625, 1.0, 0.625],
        "client_accuracy_mean": 0.75,
        "client_accuracy_worst": 0.625,
        "client_accuracy_stopped": 0.8125,
    }
    assert "client_accuracy_stopped" not in client_accuracy_summary(recalls, labels)
    assert "client_accuracy" not in client_accuracy_summary(recalls, labels * 34)  # of 102 clients
    assert client_accuracy_summary([], labels) == client_accuracy_summary(recalls, []) == {}


def test_the_accuracy_of_a_client_with_a_class_that_was_not_evaluated_is_not_known() -> None:
    fields = client_accuracy_summary([0.5, math.nan], [[2, 0], [1, 1]], stopped=[0])
    assert fields == {
        "client_accuracy": [0.5, None],
        "client_accuracy_mean": None,
        "client_accuracy_worst": None,
        "client_accuracy_stopped": 0.5,
    }


def test_equal_shares_of_all_classes_have_the_accuracy_of_the_run(run: Path) -> None:
    """In the evaluation and in the summary: the held-out examples of the embedded task are half and half."""
    lines = metrics_of(run)
    recalls = lines[-2]["recalls"]
    assert len(recalls) == 2
    assert sum(recalls) / 2 == pytest.approx(lines[-2]["accuracy"])
    counts = lines[-1]["summary"]["examples_by_client_and_label"]
    assert lines[-1]["summary"]["client_accuracy"] == pytest.approx(
        [(a * recalls[0] + b * recalls[1]) / (a + b) for a, b in counts]
    )


def test_the_own_accuracy_of_stopped_clients_is_shown(
    summary: dict[str, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"client_accuracy_mean": 0.75, "client_accuracy_worst": 0.5, "client_accuracy_stopped": None, "stopped": [1]}
    show_run(run, lambda report, log: summary | own)
    assert "own accuracy    of the clients: mean 0.7500, worst 0.5000, stopped not finite" in capsys.readouterr().out


@pytest.mark.parametrize("content", [1, [], "x"])
def test_a_summary_that_is_no_object_is_damage(content: object) -> None:
    with pytest.raises(RunError, match="no object"):
        check_summary(content, "here")
