"""Learning rates and seeds, which server and clients derive from the terms."""

import math

import pytest

from meerkat_engine.engine import stream
from meerkat_engine.fed.terms import CALIBRATION, Schedule, Terms


def terms(**settings: object) -> Terms:
    defaults = {"seed": 3, "eps": 1e-3, "lr": 0.5, "local_steps": 4, "elements": 5, "mask_digest": "ab" * 32}
    return Terms(**(defaults | settings))  # type: ignore[arg-type]


def all_learning_rates(terms: Terms) -> list[float]:
    return [lr for round in range(1, terms.rounds + 1) for lr in terms.learning_rates(round)]


def test_a_linear_schedule_decreases_linearly_to_0() -> None:
    assert all_learning_rates(terms(schedule=Schedule.LINEAR, rounds=5)) == [
        0.5 * (1 - step / 20) for step in range(20)
    ]


def test_a_cosine_schedule_is_half_a_period() -> None:
    rates = all_learning_rates(terms(schedule=Schedule.COSINE, rounds=5))
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)], abs=1e-7)
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)


def test_a_cosine_schedule_has_the_same_bits_on_any_machine() -> None:
    """The cosine is the stream's own, not that of the C library."""
    rates = terms(schedule=Schedule.COSINE, rounds=3, local_steps=1).learning_rates(2)
    assert [rate.hex() for rate in rates] == ["0x1.7ffffe8000000p-2"]


def test_a_schedule_needs_the_number_of_rounds_and_ends_after_the_last() -> None:
    with pytest.raises(ValueError, match="a cosine schedule needs the number of rounds"):
        terms(schedule=Schedule.COSINE)
    with pytest.raises(ValueError, match="round 3 was requested, the linear schedule ends with round 2"):
        terms(schedule=Schedule.LINEAR, rounds=2).learning_rates(3)
    assert terms().learning_rates(10**6) == [0.5] * 4


def test_seeds_are_ordered_by_step_then_query() -> None:
    expected = [stream.step_seed(3, 7, step, query) for step in range(4) for query in range(3)]
    assert terms(queries=3).seeds(7) == expected
    assert len(set(expected)) == 12


def test_an_update_has_the_learning_rate_of_its_query() -> None:
    two_queries = terms(queries=2, local_steps=2)
    updates = two_queries.updates(1, [1.0, 2.0, 3.0, 4.0])
    assert updates == [(seed, 0.25, g) for seed, g in zip(two_queries.seeds(1), [1.0, 2.0, 3.0, 4.0], strict=True)]


def test_the_calibration_has_its_own_number_of_steps_at_the_full_learning_rate() -> None:
    calibrated = terms(calibration_steps=6, schedule=Schedule.LINEAR, rounds=2)
    assert calibrated.steps(CALIBRATION) == 6
    assert calibrated.learning_rates(CALIBRATION) == [0.5] * 6
    assert calibrated.seeds(CALIBRATION) == [stream.step_seed(3, 0, step) for step in range(6)]
