"""Batches of token ids, and simple reference implementations of losses and gradients."""

import torch
from torch import nn

from meerkat_engine.engine.lm.batches import Batch
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective
from meerkat_engine.engine.parameters import floating_parameters

from helpers.constants import CPU

BATCH = torch.arange(60).view(3, 20) % 90 + 3
CALIBRATION_BATCHES = [torch.arange(i, i + 40).view(2, 20) % 90 + 3 for i in (0, 17, 40)]
# A batch of another shape is summed in another order: it differs by a few units of 2**-24 for logits of order 1.
TOLERANCE = 2e-6


def candidate_log_likelihoods(model: nn.Module, data: EncodedTask, example: int) -> list[list[float]]:
    """Computes the log-likelihood of each token of each candidate, one unpadded sequence at a time."""
    log_likelihoods = []
    for answer in data.candidates:
        ids = torch.tensor([data.prompts[example] + answer])
        log_p = model(input_ids=ids).logits.float().log_softmax(-1)[0]
        start = len(data.prompts[example])
        log_likelihoods.append([log_p[start + j - 1, token].item() for j, token in enumerate(answer)])
    return log_likelihoods


def micro_batches(data: EncodedTask, objective: Objective, sizes: list[int]) -> list[Batch]:
    """Splits the first examples of a data set into batches of the given sizes."""
    answers = "all" if objective is Objective.CANDIDATES else "gold"
    parts = torch.arange(sum(sizes)).split(sizes)
    return [data.batch(part.tolist(), answers=answers, device=CPU) for part in parts]


def gradient_moments(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes mean squared and mean gradient over the batches by plain autograd, each as one vector."""
    gradients = []
    for batch in CALIBRATION_BATCHES:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        gradients.append(torch.cat([p.grad.view(-1).clone() for _, p in floating_parameters(model)]))  # type: ignore[union-attr]
    model.zero_grad()
    stacked = torch.stack(gradients)
    return (stacked**2).mean(0), stacked.mean(0)
