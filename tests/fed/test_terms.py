"""Learning rates and seeds that server and clients derive, each for itself."""

import math

import pytest

from meerkat_engine.engine import stream
from meerkat_engine.fed.terms import CALIBRATION, Schedule, Terms


def terms(**settings: object) -> Terms:
    known = {"seed": 3, "eps": 1e-3, "lr": 0.5, "local_steps": 4, "elements": 5, "mask_digest": "ab" * 32}
    return Terms(**(known | settings))  # type: ignore[arg-type]


def whole(of: Terms) -> list[float]:
    return [lr for round in range(1, of.rounds + 1) for lr in of.learning_rates(round)]


def test_a_linear_schedule_falls_evenly_to_nothing() -> None:
    assert whole(terms(schedule=Schedule.LINEAR, rounds=5)) == [0.5 * (1 - step / 20) for step in range(20)]


def test_a_cosine_schedule_is_half_a_turn() -> None:
    rates = whole(terms(schedule=Schedule.COSINE, rounds=5))
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)], abs=1e-7)
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)


def test_a_cosine_schedule_has_the_same_bits_on_any_machine() -> None:
    """It is made of the stream's own cosine, not of the C library's."""
    rates = terms(schedule=Schedule.COSINE, rounds=3, local_steps=1).learning_rates(2)
    assert [rate.hex() for rate in rates] == ["0x1.7ffffe8000000p-2"]


def test_a_schedule_needs_the_number_of_rounds_and_ends_with_them() -> None:
    with pytest.raises(ValueError, match="a cosine schedule needs the number of rounds"):
        terms(schedule=Schedule.COSINE)
    with pytest.raises(ValueError, match="the linear schedule ends with round 2; round 3 was asked for"):
        terms(schedule=Schedule.LINEAR, rounds=2).learning_rates(3)
    assert terms().learning_rates(10**6) == [0.5] * 4


def test_seeds_are_ordered_by_step_then_query() -> None:
    expected = [stream.step_seed(3, 7, step, query) for step in range(4) for query in range(3)]
    assert terms(queries=3).seeds(7) == expected
    assert len(set(expected)) == 12


def test_a_querys_share_of_the_learning_rate_goes_with_its_scalar() -> None:
    of = terms(queries=2, local_steps=2)
    found = of.updates(1, [1.0, 2.0, 3.0, 4.0])
    assert found == [(seed, 0.25, g) for seed, g in zip(of.seeds(1), [1.0, 2.0, 3.0, 4.0], strict=True)]


def test_the_calibration_has_steps_of_its_own_at_the_full_rate() -> None:
    of = terms(calibration_steps=6, schedule=Schedule.LINEAR, rounds=2)
    assert of.steps(CALIBRATION) == 6
    assert of.learning_rates(CALIBRATION) == [0.5] * 6
    assert of.seeds(CALIBRATION) == [stream.step_seed(3, 0, step) for step in range(6)]
