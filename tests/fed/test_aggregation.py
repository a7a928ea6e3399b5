"""Aggregation rules: equal to other implementations of the same rules, and independent of the order of clients."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.weights import round_fp32
from meerkat_engine.fed.aggregation import Aggregation, Rule, StoppedWeight, Weighting, aggregate, client_weights
from meerkat_engine.fed.config.run_config import make_config

NAN = math.nan
MEAN, MEDIAN, TRIMMED = (Aggregation(rule=rule, trim=0.3) for rule in Rule)
FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
EACH_RULE = pytest.mark.parametrize("rule", list(Rule))


def aggregate_one_query(scalars: Sequence[float], aggregation: Aggregation) -> float:
    """The aggregate of one query, with equal weights."""
    weights = client_weights(dict.fromkeys(range(len(scalars)), 1), Weighting.UNIFORM)
    (result,) = aggregate({i: [g] for i, g in enumerate(scalars)}, weights, 1, aggregation)
    return result


def test_weights_are_uniform_or_by_examples() -> None:
    assert client_weights({3: 30, 1: 10}, Weighting.EXAMPLES) == {1: 0.25, 3: 0.75}
    assert client_weights({3: 30, 1: 10}, Weighting.UNIFORM) == {1: 0.5, 3: 0.5}


def test_a_skipped_scalar_is_0_in_the_mean_and_left_out_by_the_other_rules() -> None:
    scalars = {1: [4.0, NAN, NAN], 3: [8.0, 2.0], 5: [3.0, 6.0]}
    weights = {1: 0.25, 3: 0.5, 5: 0.25}
    assert aggregate(scalars, weights, 4, MEAN) == [5.75, 2.5, 0.0, 0.0]
    assert aggregate(scalars, weights, 4, MEDIAN) == [4.0, 4.0, 0.0, 0.0]
    assert aggregate(scalars, weights, 4, TRIMMED) == [
        5.0,
        4.0,
        0.0,
        0.0,
    ]  # of three scalars, floor(0.9) = 0 are trimmed


def test_the_weight_of_a_stopped_client_is_kept_or_shared() -> None:
    """Client 5 takes only the first step. Client 3 takes both and skips its second query: it keeps its weight."""
    scalars, weights = {1: [4.0, 8.0], 3: [8.0, NAN], 5: [3.0]}, {1: 0.25, 3: 0.5, 5: 0.25}
    share = Aggregation(stopped_weight=StoppedWeight.SHARE)
    assert aggregate(scalars, weights, 3, MEAN) == [5.75, 2.0, 0.0]
    assert aggregate(scalars, weights, 3, share) == [5.75, round_fp32(2.0 / 0.75), 0.0]


def test_shared_weights_change_no_bit_where_no_client_is_stopped() -> None:
    weights = client_weights({0: 1, 1: 10, 2: 10}, Weighting.EXAMPLES)
    assert sum(weights.values()) < 1.0  # by rounding; a division by it would move the mean to another fp32 number
    halfway = 1 + 2.0**-24
    scalars = {i: [halfway, NAN, 7.0] for i in range(3)}
    share = Aggregation(stopped_weight=StoppedWeight.SHARE)
    assert aggregate(scalars, weights, 3, share) == aggregate(scalars, weights, 3, MEAN)


@pytest.mark.parametrize("rule", [Rule.MEDIAN, Rule.TRIMMED_MEAN])
def test_rules_without_weights_share_none(rule: Rule) -> None:
    with pytest.raises(ConfigError, match=f"stopped_weight share is about weights, and {rule} has none"):
        Aggregation(rule=rule, stopped_weight=StoppedWeight.SHARE)


def test_the_mean_is_summed_in_the_order_of_client_ids() -> None:
    scalars = {0: [1e16], 1: [1.0], 2: [-1e16], 3: [3.0]}  # in float64, 1e16 + 1 is 1e16
    weights = dict.fromkeys(scalars, 1.0)
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
        assert aggregate({i: scalars[i] for i in order}, weights, 1, MEAN) == [3.0]


@pytest.mark.parametrize("aggregation", [MEDIAN, TRIMMED], ids=lambda aggregation: aggregation.rule)
def test_median_and_trimmed_mean_ignore_the_numbers_of_examples(aggregation: Aggregation) -> None:
    scalars = {0: [1.0], 1: [2.0], 2: [4.0], 3: [1e8]}
    honest, greedy = (client_weights({0: 9, 1: 9, 2: 9, 3: n}, Weighting.EXAMPLES) for n in (9, 2**32 - 1))
    assert greedy[3] > 0.999999
    assert aggregate(scalars, honest, 1, aggregation) == aggregate(scalars, greedy, 1, aggregation) == [3.0]


@given(st.lists(FLOAT, min_size=1, max_size=12))
def test_the_median_equals_that_of_numpy(scalars: list[float]) -> None:
    assert aggregate_one_query(scalars, MEDIAN) == round_fp32(float(np.median(np.array(scalars, dtype=np.float64))))


@given(
    st.lists(st.integers(-(2**20), 2**20).map(float), min_size=1, max_size=12), st.sampled_from([0.1, 0.2, 0.25, 0.45])
)
def test_the_trimmed_mean_equals_that_of_scipy(scalars: list[float], trim: float) -> None:
    """With integers, whose sums are exact in any order."""
    result = aggregate_one_query(scalars, Aggregation(rule=Rule.TRIMMED_MEAN, trim=trim))
    assert result == pytest.approx(stats.trim_mean(scalars, trim), rel=1e-6)


def test_the_number_of_trimmed_scalars_is_exact_in_decimals() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert Aggregation(trim=0.29).cut(100) == 29
    assert [Aggregation(trim=0.2).cut(n) for n in (4, 5, 9, 10)] == [0, 1, 1, 2]


def test_the_trimmed_mean_is_rounded_once() -> None:
    kept = [1e16, 1.0, -1e16]  # in float64, -1e16 + 1 is -1e16
    assert aggregate_one_query([-3e38, *kept, 3e38], Aggregation(rule=Rule.TRIMMED_MEAN, trim=0.2)) == round_fp32(1 / 3)


@EACH_RULE
@given(data=st.data())
def test_the_order_of_clients_does_not_change_any_bit(rule: Rule, data: st.DataObject) -> None:
    values = st.lists(FLOAT | st.sampled_from([0.0, -0.0, NAN]), min_size=3, max_size=3)
    scalars = data.draw(st.dictionaries(st.integers(0, 20), values, min_size=1, max_size=8))
    order = data.draw(st.permutations(sorted(scalars)))
    aggregation = Aggregation(rule=rule, trim=0.3, clip=data.draw(st.sampled_from([0.0, 1.5])))
    weights = client_weights({i: i + 1 for i in scalars}, Weighting.EXAMPLES)
    first, second = (
        aggregate({i: scalars[i] for i in ids}, weights, 3, aggregation) for ids in (sorted(scalars), order)
    )
    assert np.array(first).tobytes() == np.array(second).tobytes()


@pytest.mark.parametrize(
    ("rule", "expected"), [(Rule.MEAN, 0.125), (Rule.MEDIAN, 0.25), (Rule.TRIMMED_MEAN, 0.25)], ids=str
)
def test_scalars_are_clipped_before_any_rule(rule: Rule, expected: float) -> None:
    """The clipped scalars are -0.5, 0.0, 0.5 and 0.5."""
    assert aggregate_one_query([-7.0, 0.0, 1e30, 2.0], Aggregation(rule=rule, trim=0.3, clip=0.5)) == expected


@given(
    honest=st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=9),
    hostile=st.lists(FLOAT, min_size=2, max_size=2),
    shuffle=st.randoms(use_true_random=False),
)
def test_two_hostile_clients_cannot_move_the_result_out_of_the_honest_range(
    honest: list[float], hostile: list[float], shuffle: random.Random
) -> None:
    scalars = honest + hostile
    shuffle.shuffle(scalars)
    for aggregation in (MEDIAN, TRIMMED):
        assert TRIMMED.cut(len(scalars)) >= 2
        assert min(honest) <= aggregate_one_query(scalars, aggregation) <= max(honest)


FEDAVG = {"method": "fedavg"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trim": 0.5}, r"trim must be in \(0, 0.5\), got 0.5"),
        ({"trim": 0.0}, r"trim must be in \(0, 0.5\), got 0.0"),
        ({"trim": NAN}, r"trim must be in \(0, 0.5\), got nan"),
        ({"clip": -1.0}, "clip must be finite and not negative"),
        ({"clip": math.inf}, "clip must be finite and not negative"),
        ({"max_scalar": 0.0}, "max_scalar must be finite and positive, got 0.0"),
        ({"max_scalar": NAN}, "max_scalar must be finite and positive, got nan"),
        ({"max_scalar": 1e38, "lr": 1e3}, r"lr 1000 times max_scalar 1e\+38 is more than fp32 holds"),
        ({"max_examples": -1}, "max_examples must be 0 or more, got -1"),
        ({"aggregation": "average"}, "unknown aggregation 'average'; known: mean, median, trimmed-mean"),
        (
            {"aggregation": "trimmed-mean", "clients": 4},
            r"trim 0.2 of 4 clients a round cuts none \(floor\(0.2 \* 4\) = 0\); raise trim or the number of clients",
        ),
        ({"aggregation": "trimmed-mean", "clients": 9, "clients_per_round": 3, "trim": 0.3}, "of 3 clients a round"),
        (FEDAVG | {"aggregation": "median"}, "aggregation is about scalars, and fedavg sends weights; leave it out"),
        (FEDAVG | {"clip": 1.0}, "clip is about scalars, and fedavg sends weights"),
        (FEDAVG | {"attack": "scale", "attackers": 1}, "attack is about scalars, and fedavg sends weights"),
        ({"attack": "scale"}, "attack and attackers go together, got scale and 0"),
        ({"attackers": 1}, "attack and attackers go together, got none and 1"),
        ({"attack": "scale", "attackers": 4, "clients": 4}, "attackers must be 0 to 3, fewer than the clients, got 4"),
    ],
    ids=str,
)
def test_invalid_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(settings)


def test_settings_at_the_edge_of_their_range_are_valid() -> None:
    make_config({"aggregation": "trimmed-mean", "clients": 5})
    make_config(FEDAVG | {"max_scalar": 1.0, "trim": 0.1})
    make_config({"attack": "sign-flip", "attackers": 3, "clients": 4})
