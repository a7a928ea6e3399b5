"""The learning rate of each rule, and its trials with that rate."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .methods import METHODS, Method
from .problem import Problem
from .trial import run_trial, typical_scalar

TUNING_SEED = 1000  # added to the first seed: the seed on which learning rates are chosen
_FACTOR = 2.0  # between neighbouring learning rates
_POINTS = 4  # evaluations of a trial

Log = Callable[[str], None]


def compare(problem: Problem, names: Sequence[str], seeds: Sequence[int], log: Log, tuning_trials: int = 4) -> Any:
    """Compares rules at equal forwards: as many as ``rounds`` times ``local_steps`` two-point steps take.

    Args:
        problem: model, mask and examples.
        names: names of rules, see ``METHODS``.
        seeds: seeds of the trials; none: only learning rates are chosen.
        log: called with a line of text after each trial.
        tuning_trials: number of trials to choose a learning rate, the same for each rule.

    Returns:
        Results for JSON: ``forwards``, ``typical_scalar``, ``lr`` (the configured one), ``before`` (loss and score of
        the base model on the examples of each seed), and ``methods`` by name: ``lr``, ``tuning`` (pairs of learning
        rate and loss, null if it is not finite), ``trials`` by seed (see ``run_trial``).
    """
    config = problem.config
    forwards = 2 * config.rounds * config.local_steps
    tuning = problem.with_seed(config.seed + TUNING_SEED)
    typical = typical_scalar(tuning)
    log(f"typical scalar: {typical:.4g}")
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        method = METHODS[name]
        rate, tried = _choose_rate(tuning, method, typical, forwards // 2, tuning_trials, log)
        methods[name] = {"lr": rate, "tuning": tried, "trials": {}}
    before = {}
    for seed in seeds:
        seeded = problem.with_seed(seed)
        base = seeded.evaluate(seeded.start)
        before[str(seed)] = [base.loss, base.main[1]]
        for name in names:
            curve = run_trial(seeded, METHODS[name], methods[name]["lr"], typical, forwards, _POINTS)
            methods[name]["trials"][str(seed)] = curve
            log(f"{name}, seed {seed}: {curve[-1]}")
    return {
        "forwards": forwards, "typical_scalar": typical, "lr": config.step.lr, "before": before, "methods": methods,
    }  # fmt: skip


def _choose_rate(
    problem: Problem, method: Method, typical: float, forwards: int, trials: int, log: Log
) -> tuple[float, list[tuple[float, float | None]]]:
    """Climbs to the learning rate with the smallest validation loss; returns it and all that were tried."""
    losses: dict[int, float] = {}
    rate = problem.config.step.lr * method.lr_factor
    while len(losses) < trials:
        exponent = _next_exponent(losses)
        lr = rate * _FACTOR**exponent
        loss = run_trial(problem, method, lr, typical, forwards, 1)[-1]["loss"]
        losses[exponent] = math.inf if loss is None else loss
        log(f"{method.name}, learning rate {lr:g}: {losses[exponent]:.4f}")
    best = min(losses, key=lambda exponent: losses[exponent])
    tried = [(rate * _FACTOR**e, loss if math.isfinite(loss) else None) for e, loss in sorted(losses.items())]
    return rate * _FACTOR**best, tried


def _next_exponent(losses: dict[int, float]) -> int:
    """The next learning rate to try: from the best one towards the side that is open, or where its neighbour is better.

    Args:
        losses: loss by exponent, of consecutive exponents; empty at first.
    """
    if not losses:
        return 0
    best, low, high = min(losses, key=lambda exponent: losses[exponent]), min(losses), max(losses)
    if len(losses) == 1:
        return 1
    if best == high:
        return high + 1
    if best == low:
        return low - 1
    return high + 1 if losses[high] < losses[low] else low - 1


__all__ = ["TUNING_SEED", "compare"]
