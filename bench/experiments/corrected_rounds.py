"""Federated rounds in plain torch, with corrections of the clients' steps for what their data differ in.

All clients perturb by the same ``z_t``. A correction is a vector v_i of the masked space that client i adds to its
step. It can add the vector itself, or, as the gradient is known, only its part along ``z_t``, a scalar:

    exact      w_i <- w_i - lr (g_i^t z_t + v_i)                 projected      w_i <- w_i - lr (g_i^t + <v_i, z_t>) z_t

    proximal          v_i = mu (w_i - w)            w: the weights at the begin of the round
    control variates  v_i = gamma (c - c_i)         c_i: mean of g_i^t z_t over past rounds; c: mean of all c_i
    repeated seeds    every second round takes the z_t of the round before, and adds g^t - g_i^t of that round to g_i^t

Either way a client uploads T scalars: exact proximal ones are ``g_i^t (1 - lr mu)**(T - t)``, t from 1, and exact
control variates add up to zero over the clients. The server takes the mean, as ever.

References:
    FedProx, arXiv 1812.06127; FedDyn, arXiv 2111.04263; SCAFFOLD, arXiv 1910.06378.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine import stream
from ...fed.client import ClientData
from ...fed.setup.data import client_shares
from .fewer_forwards.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A correction of the clients' scalars; without arguments none.

    Args:
        mu: strength of the proximal term, at least 0.
        gamma: gain of the control variates, in [0, 1].
        memory: share of the newest round in the control variates, in (0, 1].
        projected: whether only the part of the vector along ``z_t`` is added.
        repeated: whether every second round repeats the seeds of the one before, and corrects by its scalars.
    """

    mu: float = 0.0
    gamma: float = 0.0
    memory: float = 0.5
    projected: bool = False
    repeated: bool = False


class Rounds:
    """Rounds of all clients of a problem, from the base model on.

    Args:
        problem: model, mask and examples; the settings say how they are dealt to clients.
        correction: the correction.
        local_steps: T, number of steps of a round.

    Attributes:
        weights: the server's masked weights, float32 [k].
        spread: of each round, the distance of the clients' weights from their mean, by root of the mean square.
    """

    def __init__(self, problem: Problem, correction: Correction, local_steps: int) -> None:
        config, shares = problem.config, client_shares(problem.config, problem.data)
        self.weights = problem.start.clone()
        self.spread: list[float] = []
        self._problem, self._correction, self._steps = problem, correction, local_steps
        self._clients = [
            ClientData(problem.data.train, own, config.step.batch_size, stream.derived_seed(config.seed, "data", i))
            for i, own in enumerate(shares)
        ]
        sizes = torch.tensor([float(len(own)) for own in shares], dtype=torch.float64, device="cpu")
        self._shares = (sizes / sizes.sum()).float()
        self._variates = torch.zeros(len(shares), problem.start.numel(), dtype=torch.float32, device="cpu")
        self._last = torch.zeros(len(shares), local_steps, dtype=torch.float32, device="cpu")

    def run(self, number: int) -> None:
        """Takes round ``number``, from 0."""
        repeats = self._correction.repeated and number % 2 == 1
        first = (number - repeats) * self._steps
        directions = [self._problem.normal(first + t, 0) for t in range(self._steps)]
        known = self._shares @ self._last - self._last if repeats else torch.zeros_like(self._last)
        pulls = self._correction.gamma * (self._shares @ self._variates - self._variates)
        raw, ends = torch.empty_like(self._last), []
        for i, data in enumerate(self._clients):
            w = self.weights.clone()
            for t, z in enumerate(directions):
                raw[i, t] = self._scalar(data, w, z)
                pull = pulls[i] + self._correction.mu * (w - self.weights)
                if self._correction.projected:
                    pull = torch.dot(pull, z) * z
                w -= self._problem.config.step.lr * ((raw[i, t] + known[i, t]) * z + pull)
            ends.append(w)
        mean = self._shares @ torch.stack(ends)
        self.spread.append(float((torch.stack(ends) - mean).square().sum(1).mean().sqrt()))
        newest = raw @ torch.stack(directions) / self._steps
        self._variates += (self._correction.memory if number else 1.0) * (newest - self._variates)
        self.weights, self._last = mean, raw

    def _scalar(self, data: ClientData, w: Tensor, z: Tensor) -> float:
        """Projected gradient of a client's next batch at ``w`` along ``z``."""
        indices, eps = data.next_indices(), self._problem.eps
        return (self._problem.loss(w + eps * z, indices) - self._problem.loss(w - eps * z, indices)) / (2 * eps)


__all__ = ["Correction", "Rounds"]
