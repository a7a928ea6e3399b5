"""``make_plan``: what a run will need, from a few measured steps (``meerkat-engine run --dry-run``). Writes nothing."""

import math
import sys
import time
from dataclasses import dataclass

import torch

from ...engine.lm.evaluation import evaluate
from ...engine.mask import SparseMask
from ...engine.parameters import floating_parameters
from ..client import Client
from ..config.run_config import RunConfig
from ..messages import HEADER_BYTES
from ..methods import Stopping
from ..setup.data import check_files
from ..setup.model import resolved
from ..setup.pool import LocalPool
from ..setup.server_and_clients import Federation, make_terms
from .inputs import Inputs, check_before_start, load_inputs
from .rounds import Log
from .terminal import amount

_STEPS = 3  # measured, after one that is not: the first compiles and allocates


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need.

    Args:
        elements: number of elements of the model.
        masked_elements: ``k``, number of elements that are trained.
        mask_source: where the mask comes from.
        steps: local steps of all clients in the run, calibration included, null paths of the server too.
        forwards_a_step: forward passes of a step, micro-batches not counted.
        tokens_a_step: mean number of tokens of a step's batch, in one forward pass.
        seconds_a_step: measured.
        evaluations: number of evaluations of the run, the one before training included.
        seconds_an_evaluation: measured; of generated answers nothing is measured.
        bytes_up: size of a client's answer in a round.
        bytes_down: size of the request to a client that took part in the round before.
        mask_bytes: size of the mask's ids, once a client; 0 if they follow from names.
        host_bytes: largest memory of this process so far; None where the system does not say.
        device_bytes: largest memory on the GPU so far; None on a CPU.
        generates: whether evaluations also generate answers.
    """

    elements: int
    masked_elements: int
    mask_source: str
    steps: int
    forwards_a_step: int
    tokens_a_step: float
    seconds_a_step: float
    evaluations: int
    seconds_an_evaluation: float
    bytes_up: int
    bytes_down: int
    mask_bytes: int
    host_bytes: int | None
    device_bytes: int | None
    generates: bool

    @property
    def seconds(self) -> float:
        """Estimated time of steps and evaluations, in this process alone."""
        return self.steps * self.seconds_a_step + self.evaluations * self.seconds_an_evaluation


def make_plan(config: RunConfig, log: Log, *, trust_remote_code: bool = False) -> Plan:
    """Loads what a run needs, takes a few of its steps, and evaluates the base model.

    Args:
        config: the settings of the run.
        log: see ``execute``.
        trust_remote_code: see ``models.load_model``.

    Raises:
        MeerkatError: see ``execute``: whatever would stop the run at its start.
    """
    check_files(config)
    config = resolved(config)
    device = torch.device(config.model.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    inputs = load_inputs(config, log, trust_remote_code, LocalPool(), None)
    mask = inputs.choose_mask(log)
    check_before_start(inputs, mask, log)
    log(f"taking {_STEPS + 1} steps, and evaluating the base model on {len(inputs.data.validation)} examples")
    seconds_a_step = _measure_steps(inputs, mask)
    start = time.perf_counter()
    evaluate(inputs.lm.model, inputs.data.validation)
    seconds_an_evaluation = time.perf_counter() - start
    terms, recipe = make_terms(config, mask), config.method.recipe
    values = terms.elements if terms.sends_weights else terms.scalars_per_round
    return Plan(
        elements=sum(p.numel() for _, p in floating_parameters(inputs.lm.model)),
        masked_elements=terms.elements,
        mask_source=str(mask.source),
        steps=_steps(config),
        forwards_a_step=recipe.gradient.forwards(terms.queries),
        tokens_a_step=_tokens(inputs),
        seconds_a_step=seconds_a_step,
        evaluations=_evaluations(config),
        seconds_an_evaluation=seconds_an_evaluation,
        bytes_up=HEADER_BYTES + 4 * values,
        bytes_down=HEADER_BYTES + 4 * min(values, terms.elements),  # scalars, or masters if those are fewer
        mask_bytes=8 * terms.elements if recipe.elements.uses_density else 0,
        host_bytes=_host_bytes(),
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        generates=bool(config.evaluation.metrics),
    )


def _measure_steps(inputs: Inputs, mask: SparseMask) -> float:
    """Seconds of a step of client 0, in rounds of its own: a private client answers each round once."""
    config = inputs.config.replace(rounds=max(inputs.config.rounds, 1 + _STEPS))
    federation = Federation(config, inputs.lm.model, mask, inputs.data, inputs.shares, None)
    client, timing = federation.clients[0], federation.timing
    assert isinstance(client, Client)  # the last clients may be hostile, the first is not
    client.train(1, 1)
    before, steps = timing.total, min(_STEPS, config.local_steps)
    for round in range(2, 2 + math.ceil(_STEPS / steps)):
        client.train(round, steps)
    return (timing.total - before) / (timing.steps - 1)


def _steps(config: RunConfig) -> int:
    """Local steps of the run if no client is stopped early."""
    steps = config.rounds * config.clients.participants * config.local_steps
    selection = config.selection
    if config.method.recipe.stopping is not Stopping.NONE:
        null_paths = 0 if selection.thresholds() is not None else selection.null_paths
        steps += (config.clients.count + null_paths) * selection.steps
    return steps


def _evaluations(config: RunConfig) -> int:
    """Evaluations of the run: before training, every so many rounds, and at the end."""
    every = config.evaluation.every
    during = config.rounds // every if every else 0
    return 1 + during + (0 if every and config.rounds % every == 0 else 1)


def _tokens(inputs: Inputs) -> float:
    """Mean number of tokens of a batch."""
    lengths = inputs.data.train.lengths
    return inputs.config.step.batch_size * math.fsum(lengths) / len(lengths)


def _host_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def plan_lines(plan: Plan, config: RunConfig) -> list[str]:
    """A plan in words, one line for each thing.

    Args:
        plan: the plan.
        config: the settings of the run.
    """
    clients = config.clients.participants
    once = f"; {amount(plan.mask_bytes)} of ids to each client once" if plan.mask_bytes else ""
    memory = "unknown" if plan.host_bytes is None else amount(plan.host_bytes)
    if plan.device_bytes is not None:
        memory += f"; on the GPU {amount(plan.device_bytes)}"
    generated = "; generated answers take longer, and are not in it" if plan.generates else ""
    return [
        f"mask            {plan.masked_elements:,} of {plan.elements:,} elements ({plan.mask_source}){once}",
        f"steps           {plan.steps:,} of all clients: {config.rounds} rounds of {config.local_steps} steps of "
        f"{clients} clients{_beside(plan, config)}",
        f"a step          {plan.forwards_a_step} forward passes over {plan.tokens_a_step:,.0f} tokens on average; "
        f"{plan.seconds_a_step * 1e3:.0f} ms (measured)",
        f"a round         {amount(clients * plan.bytes_up)} up, {amount(clients * plan.bytes_down)} down",
        f"memory          {memory} (largest so far; base model, mask, steps and an evaluation)",
        f"time            about {_duration(plan.seconds)} in one process: steps "
        f"{_duration(plan.steps * plan.seconds_a_step)}, {plan.evaluations} evaluations "
        f"{_duration(plan.evaluations * plan.seconds_an_evaluation)}{generated}",
    ]


def _beside(plan: Plan, config: RunConfig) -> str:
    """The steps of the calibration in words; empty if there is none."""
    calibration = plan.steps - config.rounds * config.clients.participants * config.local_steps
    return f", and {calibration:,} to find extreme non-IID clients" if calibration else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


__all__ = ["Plan", "make_plan", "plan_lines"]
