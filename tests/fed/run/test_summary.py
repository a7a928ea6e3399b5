"""The summary of a finished run that is read again: its fields are there and of their kinds."""

from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.errors import RunError
from meerkat_engine.fed.run.summary import check_summary

from helpers.command import call, summary_of


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run with early stopping and hostile clients."""
    run: Path = tmp_path_factory.mktemp("runs") / "r"
    result = call("run", "--rounds", "1", "--local-steps", "1", "--method", "meerkat-vp", "--vp-steps", "6",
                  "--vp-initial", "2", "--vp-later", "2", "--vp-null-paths", "3", "--calibration-texts", "8",
                  "--attack", "scale", "--attackers", "1", "--eval-examples", "40", "--output", run)  # fmt: skip
    assert result.exit_code == 0, result.output
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
    ],
)
def test_a_field_of_another_kind_is_damage(summary: dict[str, Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RunError, match=f"here: {name} is missing in the summary, or of another kind"):
            check_summary(summary | {name: value}, "here")


@pytest.mark.parametrize("name", ["accuracy_before", "elements", "stopped", "precision", "attack", "seconds_per_step"])
def test_a_missing_field_is_damage(summary: dict[str, Any], name: str) -> None:
    without = {key: value for key, value in summary.items() if key != name}
    with pytest.raises(RunError, match=f"here: {name} is missing in the summary"):
        check_summary(without, "here")


@pytest.mark.parametrize("content", [1, [], "x"])
def test_a_summary_that_is_no_object_is_damage(content: object) -> None:
    with pytest.raises(RunError, match="no object"):
        check_summary(content, "here")
