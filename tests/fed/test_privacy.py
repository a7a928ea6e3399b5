"""The privacy accountant against closed forms and published numbers."""

import math
import sys

import dp_accounting
import pytest
from dp_accounting import pld
from scipy import integrate, optimize, stats

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.fed.privacy import Privacy, epsilon, largest_epsilon


def privacy(noise: float, batch_size: int = 10, delta: float = 1e-5) -> Privacy:
    return Privacy(clip=0.3, noise_multiplier=noise, delta=delta, batch_size=batch_size)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Exact epsilon of one Gaussian mechanism of sensitivity 1: Balle and Wang, arXiv 1805.06530, theorem 8."""

    def excess(eps: float) -> float:
        upper, lower = stats.norm.cdf([0.5 / sigma - eps * sigma, -0.5 / sigma - eps * sigma])
        return float(upper - math.exp(eps) * lower - delta)

    return float(optimize.brentq(excess, 0, 100))


def sampled_epsilon(sigma: float, rate: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism on a Poisson sample, by integrating max(0, p - e^eps q) in both directions."""

    def excess(eps: float) -> float:
        def with_example(x: float) -> float:
            return float((1 - rate) * stats.norm.pdf(x, 0, sigma) + rate * stats.norm.pdf(x, 1, sigma))

        def without(x: float) -> float:
            return float(stats.norm.pdf(x, 0, sigma))

        def integral(p: object, q: object) -> float:
            difference = lambda x: max(0.0, p(x) - math.exp(eps) * q(x))  # type: ignore[operator]  # noqa: E731
            return float(integrate.quad(difference, -12 * sigma, 12 * sigma + 1, limit=500, epsabs=1e-12)[0])

        return max(integral(with_example, without), integral(without, with_example)) - delta

    return float(optimize.brentq(excess, 0, 20, xtol=1e-6))


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 1), (10.0, 100), (0.8, 1), (60.0, 5000)], ids=str)
def test_without_sampling_epsilon_is_that_of_composed_gaussians(noise: float, steps: int) -> None:
    result = epsilon(privacy(noise), 10, steps)
    exact = gaussian_epsilon(noise / math.sqrt(steps), 1e-5)
    assert exact <= result <= exact * 1.001


@pytest.mark.parametrize(("noise", "examples"), [(1.0, 100), (0.6, 1000), (2.0, 20)], ids=str)
def test_epsilon_of_one_sampled_step_equals_the_numerical_integral(noise: float, examples: int) -> None:
    result = epsilon(privacy(noise, delta=1e-4), examples, 1)
    assert result == pytest.approx(sampled_epsilon(noise, 10 / examples, 1e-4), rel=2e-3)


def test_epsilon_agrees_with_published_bounds() -> None:
    """The bound 1.26 of Abadi et al., arXiv 1607.00133, section 3.2, and the limit of many steps, arXiv 1911.11607."""
    result = epsilon(privacy(4.0), 1000, 10_000)
    mu = 0.01 * math.sqrt(10_000 * (math.exp(1 / 4.0**2) - 1))
    assert result == pytest.approx(gaussian_epsilon(1 / mu, 1e-5), rel=0.03)
    assert result < 1.26


@pytest.mark.parametrize("examples", [10, 500])
def test_the_queries_of_a_step_compose_to_one_gaussian(examples: int) -> None:
    together = epsilon(privacy(4.0), examples, 50, queries=4)
    assert together == pytest.approx(epsilon(privacy(2.0), examples, 50), rel=1e-9)
    assert epsilon(privacy(4.0), examples, 50) < together


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta() -> None:
    by_steps = [epsilon(privacy(1.0), 200, steps) for steps in (0, 1, 10, 100)]
    by_rate = [epsilon(privacy(1.0), examples, 50) for examples in (5000, 500, 50, 10)]
    by_noise = [epsilon(privacy(noise), 200, 50) for noise in (8.0, 2.0, 1.0, 0.5)]
    by_delta = [epsilon(privacy(1.0, delta=delta), 200, 50) for delta in (1e-2, 1e-4, 1e-6, 1e-8)]
    for row in (by_steps, by_rate, by_noise, by_delta):
        assert row == sorted(row)
        assert len(set(row)) == 4
    assert by_steps[0] == 0.0


def test_epsilon_does_not_depend_on_the_clip() -> None:
    assert epsilon(privacy(1.0), 200, 5) == epsilon(
        Privacy(clip=9.0, noise_multiplier=1.0, delta=1e-5, batch_size=10), 200, 5
    )


@pytest.mark.parametrize("examples", [10, 200])
def test_the_numbers_are_those_of_the_package_s_accountant(examples: int) -> None:
    step = dp_accounting.PoissonSampledDpEvent(10 / examples, dp_accounting.GaussianDpEvent(1.5))
    for steps in (1, 4, 70):
        accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
        assert epsilon(privacy(1.5), examples, steps) == accountant.get_epsilon(1e-5)


def test_the_distribution_of_a_step_is_made_once_for_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = pld.privacy_loss_distribution.from_gaussian_mechanism
    monkeypatch.setattr(
        pld.privacy_loss_distribution,
        "from_gaussian_mechanism",
        lambda *given, **named: (made.append(named["sampling_prob"]), original(*given, **named))[1],
    )
    for round in range(1, 6):
        largest_epsilon(privacy(1.75), [(100, 3 * round), (70, round)])
    assert made == [10 / 70, 10 / 100]


def test_a_very_large_epsilon_is_computed_in_seconds() -> None:
    """Such an epsilon is useless, but must be correct: it equals mu^2 / 2 + mu * 4.26 to 1e-3."""
    result = epsilon(privacy(0.05), 10, 1000)
    mu = math.sqrt(1000) / 0.05
    assert result == pytest.approx(mu**2 / 2 - mu * stats.norm.ppf(1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0.0}, "the clip of private steps must be finite and positive, got 0.0"),
        ({"noise_multiplier": math.nan}, "the noise multiplier of private steps must be finite and positive, got nan"),
        ({"delta": 0.0}, r"delta must be in \(0, 1\), got 0.0"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\), got 1.0"),
        ({"delta": math.nan}, r"delta must be in \(0, 1\), got nan"),
        ({"batch_size": 0}, "the expected batch size of private steps must be at least 1"),
    ],
    ids=str,
)
def test_privacy_settings_out_of_range_are_errors(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Privacy(**{"clip": 0.3, "noise_multiplier": 1.0, "delta": 1e-5, "batch_size": 10, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("examples", "steps", "queries"), [(9, 1, 1), (10, -1, 1), (10, 1, 0)], ids=str)
def test_arguments_of_epsilon_out_of_range_are_errors(examples: int, steps: int, queries: int) -> None:
    with pytest.raises(ConfigError, match=rf"got {examples} examples, {steps} steps and {queries} queries"):
        epsilon(privacy(1.0), examples, steps, queries)


def test_a_missing_dp_accounting_is_an_error_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(ConfigError, match=r"needs the package dp-accounting .*; in a clone .* '\.\[dp\]'"):
        epsilon(privacy(1.25), 201, 5)  # of which no other test has computed a step
