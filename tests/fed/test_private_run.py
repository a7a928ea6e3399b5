"""Private runs, from settings to summary: reported values, epsilon, and settings that exclude each other."""

from pathlib import Path

import pytest
from click.testing import Result

from meerkat_engine.fed import read_ledger
from meerkat_engine.fed.privacy import Privacy, epsilon, largest_epsilon
from meerkat_engine.fed.run.directory import LEDGER

from helpers.command import call, metrics_of

pytest.importorskip("dp_accounting")

SMALL = ("--clients", "2", "--local-steps", "3", "--calibration-texts", "32", "--eval-examples", "60")
PRIVATE = ("--dp-noise", "1.5", "--dp-clip", "0.05", "--dp-delta", "1e-4")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("private") / "run"
    result = call("run", *SMALL, *PRIVATE, "--rounds", "4", "--output", output)
    assert result.exit_code == 0, result.output
    return output, result


def test_epsilon_is_in_ledger_metrics_and_summary(private: tuple[Path, Result]) -> None:
    output, result = private
    ledger, lines = read_ledger(output / LEDGER), metrics_of(output)
    terms = Privacy(clip=0.05, noise_multiplier=1.5, delta=1e-4, batch_size=16)
    assert ledger.header.terms.privacy == terms
    fewest = min(ledger.rounds[0].examples.values())
    expected = [epsilon(terms, fewest, 3 * round) for round in (1, 2, 3, 4)]
    assert [line.epsilon for line in ledger.rounds] == expected
    assert [line["epsilon"] for line in lines[1:-1]] == expected
    assert expected == sorted(expected)
    summary = lines[-1]["summary"]
    assert (summary["epsilon"], summary["delta"]) == (expected[-1], 1e-4)
    assert (
        f"differential privacy: epsilon {expected[-1]:.3g} at delta 0.0001 at most, after all rounds" in result.output
    )
    assert f"privacy         epsilon {expected[-1]:.3g} at delta 0.0001" in result.output


def test_a_private_run_records_no_training_loss(private: tuple[Path, Result]) -> None:
    output, _ = private
    assert [line.loss for line in read_ledger(output / LEDGER).rounds] == [None] * 4
    assert [line["loss"] for line in metrics_of(output)[1:-1]] == [None] * 4


def test_a_private_run_replays_and_has_a_report(private: tuple[Path, Result], tmp_path: Path) -> None:
    output, _ = private
    assert "the same bits as at the end of the run" in call("replay", output).output
    result = call("report", output, "--output", tmp_path / "report.html")
    assert result.exit_code == 0, result.output


def test_epsilon_includes_the_calibration_steps(tmp_path: Path) -> None:
    result = call("run", *SMALL, *PRIVATE, "--rounds", "1", "--method", "meerkat-vp", "--partition", "mixed",
                  "--vp-steps", "12", "--vp-initial", "4", "--vp-later", "6", "--output", tmp_path / "r")  # fmt: skip
    assert result.exit_code == 0, result.output
    ledger = read_ledger(tmp_path / "r" / LEDGER)
    terms, calibration = ledger.header.terms.privacy, ledger.calibration
    assert terms is not None
    assert calibration is not None
    claimed_examples = calibration.examples
    assert calibration.epsilon == largest_epsilon(terms, [(n, 12) for n in claimed_examples.values()])
    steps = {i: 12 + (1 if i in calibration.stopped else 3) for i in claimed_examples}
    assert ledger.rounds[0].epsilon == max(epsilon(terms, claimed_examples[i], steps[i]) for i in claimed_examples)


def test_largest_epsilon_is_that_of_the_least_protected_client() -> None:
    terms = Privacy(clip=1, noise_multiplier=1, delta=1e-5, batch_size=8)
    clients = [(100, 5), (100, 9), (50, 3), (400, 40), (50, 9)]
    assert largest_epsilon(terms, clients) == max(epsilon(terms, n, steps) for n, steps in clients)
    assert largest_epsilon(terms, []) == 0


def test_a_clip_without_noise_is_an_error(tmp_path: Path) -> None:
    result = call("run", *SMALL, "--dp-clip", "0.5", "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "dp_clip protects nobody without noise; give dp_noise too, or leave it out" in result.output


def test_the_model_card_reports_epsilon(private: tuple[Path, Result], tmp_path: Path) -> None:
    output, _ = private
    assert call("replay", output, "--output", tmp_path / "model", "--round", "2").exit_code == 0
    expected = read_ledger(output / LEDGER).rounds[1].epsilon
    assert f"epsilon {expected:.3g} at delta 0.0001, simulated" in (tmp_path / "model" / "README.md").read_text()
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1  # card and weights have the same permissions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "fedavg"), "fedavg sends weights, which dp_noise does not make private"),
        (("--method", "task-mask"), "task-mask chooses its elements by gradients of the clients' examples"),
        (("--dp-delta", "1"), "delta must be in (0, 1), got 1.0"),
        (("--dp-clip", "0"), "the clip of private steps must be finite and positive, got 0.0"),
        (("--dp-noise", "-1"), "dp_noise must be finite and not negative (0: no privacy), got -1.0"),
    ],
)
def test_settings_that_exclude_privacy_are_errors(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = call("run", *SMALL, *PRIVATE, *options, "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "r").exists()
