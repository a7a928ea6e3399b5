"""Array code for scalars against plain Python definitions: the same bits, and the same bytes in a ledger."""

import json
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meerkat_engine.engine.weights import round_fp32
from meerkat_engine.fed.aggregation import Aggregation, Rule, StoppedWeight, aggregate, sum_in_order
from meerkat_engine.fed.ledger.decimals import numbers_to_text
from meerkat_engine.fed.ledger.lines import client_scalars_json
from meerkat_engine.fed.scalars import ClientScalars

FLOAT = st.floats(width=32, allow_infinity=False)
ROWS = st.dictionaries(st.integers(0, 2**32 - 1), st.lists(FLOAT, max_size=6), max_size=12)


def plain_text(values: Sequence[float]) -> bytes:
    return b"".join(b"null," if math.isnan(x) else f"{x!r},".encode() for x in values)


def plain_json(scalars: dict[int, list[float]]) -> bytes:
    kept = {str(i): [None if math.isnan(g) else g for g in scalars[i]] for i in sorted(scalars)}
    return json.dumps(kept, separators=(",", ":"), allow_nan=False).encode()


def plain_aggregate(
    scalars: dict[int, list[float]], weights: dict[int, float], count: int, aggregation: Aggregation
) -> bytes:
    result = []
    for t in range(count):
        present = [(i, scalars[i][t]) for i in sorted(scalars) if t < len(scalars[i]) and not math.isnan(scalars[i][t])]
        ordered = sorted(g for _, g in present)
        if aggregation.rule is Rule.MEAN:
            value = 0.0
            for i, g in present:
                value += weights[i] * g
            takers = [i for i in sorted(scalars) if t < len(scalars[i])]
            if aggregation.stopped_weight is StoppedWeight.SHARE and 0 < len(takers) < len(scalars):
                value /= sum(weights[i] for i in takers)
        elif not ordered:
            value = 0.0
        elif aggregation.rule is Rule.MEDIAN:
            value = statistics.median(ordered)
        else:
            cut = aggregation.cut(len(ordered))
            value = math.fsum(ordered[cut : len(ordered) - cut]) / (len(ordered) - 2 * cut)
        result.append(round_fp32(value))
    return np.array(result).tobytes()


def around_every_power() -> np.ndarray:
    """fp32 numbers at and next to all powers of two and ten, numbers with few bits, the smallest and the largest."""
    powers = [2.0**n for n in range(-149, 128)] + [10.0**n for n in range(-44, 39)]
    exact = np.array(powers, dtype=np.float32)
    integers = np.arange(1, 20_000, dtype=np.float32)
    numbers = np.concatenate([exact, integers, integers / 64, integers / np.float32(1000)])
    neighbours = [np.nextafter(numbers, np.float32(direction)) for direction in (0, np.inf)]
    positive = np.concatenate([numbers, *neighbours, np.array([0, np.nan], dtype=np.float32)])
    return np.concatenate([positive, -positive]).astype(np.float64)


def check_text(values: np.ndarray) -> None:
    text, ends = numbers_to_text(values)
    assert text == plain_text(values.tolist())
    assert ends.tolist() == [i + 1 for i, c in enumerate(text) if c == ord(",")]


def test_text_of_numbers_around_powers_of_two_and_ten() -> None:
    with np.errstate(all="ignore"):
        check_text(around_every_power())


@pytest.mark.parametrize("seed", range(4))
def test_text_of_random_fp32_numbers(seed: int) -> None:
    random = np.random.default_rng(seed)
    any_bits = random.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    usual = (random.standard_normal(100_000) * 10.0 ** random.integers(-5, 6, 100_000)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        values = np.concatenate([any_bits[np.isfinite(any_bits)], usual]).astype(np.float64)
    check_text(values)


def test_text_of_float64_numbers_that_are_not_fp32_numbers() -> None:
    check_text(np.array([0.1, 1 / 3, -1e300, 5e-324, 123456.789, 1e16, 1e22, np.nan, -0.0]))
    check_text(np.empty(0))


@given(ROWS)
@example({})
@example({0: [], 7: []})
@example({3: [math.nan, -0.0], 1: [], 2: [2.0**-149]})
def test_the_json_of_client_scalars_is_that_of_the_json_module(scalars: dict[int, list[float]]) -> None:
    own = ClientScalars.from_lists(scalars)
    assert client_scalars_json(own) == plain_json(scalars)
    assert {i: plain_text(row) for i, row in own.items()} == {i: plain_text(scalars[i]) for i in sorted(scalars)}
    assert own.skipped == sum(math.isnan(g) for row in scalars.values() for g in row)
    sent = {i: np.array(row, dtype=np.float32).tobytes() for i, row in scalars.items()}
    assert ClientScalars.from_bytes(sent) == own


def test_infinite_scalars_are_an_error() -> None:
    with pytest.raises(ValueError, match="infinite"):
        client_scalars_json(ClientScalars.from_lists({1: [1.0, math.inf]}))


AGGREGATIONS = pytest.mark.parametrize(
    "aggregation",
    [*(Aggregation(rule=rule, trim=0.3) for rule in Rule), Aggregation(stopped_weight=StoppedWeight.SHARE)],
    ids=lambda aggregation: f"{aggregation.rule}, {aggregation.stopped_weight}",
)


@AGGREGATIONS
@given(ROWS.filter(bool), st.lists(st.floats(0.01, 1), min_size=12, max_size=12))
@example({0: [-0.0], 1: [-0.0]}, [0.5] * 12)
def test_the_aggregate_equals_that_of_a_plain_loop(
    aggregation: Aggregation, scalars: dict[int, list[float]], shares: list[float]
) -> None:
    weights = dict(zip(sorted(scalars), shares, strict=False))
    for order in (sorted(scalars), sorted(scalars, reverse=True)):
        result = aggregate({i: scalars[i] for i in order}, weights, 6, aggregation)
        assert np.array(result).tobytes() == plain_aggregate(scalars, weights, 6, aggregation)


@AGGREGATIONS
@pytest.mark.parametrize("clients", [1, 8, 9, 127, 129, 10_001])
def test_the_aggregate_of_many_clients_equals_that_of_a_plain_loop(aggregation: Aggregation, clients: int) -> None:
    """With many clients, NumPy's sum, which adds in pairs, would have other bits."""
    random = np.random.default_rng(clients)
    table = (random.standard_normal((clients, 3)) * 10.0 ** random.integers(-6, 7, (clients, 3))).astype(np.float32)
    table[random.random(table.shape) < 0.1] = np.nan
    scalars = dict(enumerate(table.astype(np.float64).tolist()))
    for i in range(1, clients, 3):
        del scalars[i][1:]  # stopped early
    weights = dict(enumerate(random.random(clients).tolist()))
    result = aggregate(scalars, weights, 3, aggregation)
    assert np.array(result).tobytes() == plain_aggregate(scalars, weights, 3, aggregation)


def test_sum_in_order_equals_that_of_a_loop() -> None:
    terms = np.random.default_rng(1).standard_normal((5001, 2))
    assert sum_in_order(terms).tolist() == [sum(column) for column in terms.T.tolist()]
    assert sum_in_order(terms).tolist() != terms.T.copy().sum(axis=1).tolist()
