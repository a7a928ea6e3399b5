"""``Problem``: the loss of a run's task as a function of the masked weights, a float32 vector."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ....engine import stream
from ....engine.errors import ConfigError
from ....engine.lm.evaluation import Evaluation, evaluate
from ....engine.lm.models import LanguageModel
from ....engine.lm.objective import task_loss
from ....engine.mask import SparseMask
from ....engine.weights import MaskedWeights
from ....fed.client import ClientData
from ....fed.config.run_config import RunConfig
from ....fed.setup.data import TaskData, encode
from ....fed.setup.mask import make_mask
from ....fed.setup.model import load_language_model


@dataclasses.dataclass(frozen=True)
class Problem:
    """Model, mask and the examples that follow from a seed. All examples belong to one client.

    Args:
        config: the settings.
        lm: the model.
        mask: its mask.
        weights: its masked weights.
        start: masked weights of the base model, float32 [k].
        data: the examples.
    """

    config: RunConfig
    lm: LanguageModel
    mask: SparseMask
    weights: MaskedWeights
    start: Tensor
    data: TaskData

    @property
    def eps(self) -> float:
        """Scale of the perturbations."""
        return self.config.step.eps

    @classmethod
    def load(cls, config: RunConfig) -> "Problem":
        """Loads model and examples, and chooses the mask."""
        lm = load_language_model(config)
        data = encode(config, lm)
        mask = make_mask(config, lm, data.train)
        weights = MaskedWeights(lm.model, mask, config.model.backend)
        return cls(config, lm, mask, weights, weights.masters(), data)

    def with_seed(self, seed: int) -> "Problem":
        """The same model and mask, with the examples that follow from another seed."""
        config = self.config.replace(seed=seed)
        return dataclasses.replace(self, config=config, data=encode(config, self.lm))

    def batches(self) -> ClientData:
        """The training examples in batches, from the first one on."""
        own = torch.arange(len(self.data.train), device="cpu")
        seed = stream.derived_seed(self.config.seed, "data", 0)
        return ClientData(self.data.train, own, self.config.step.batch_size, seed)

    def normal(self, step: int, query: int) -> Tensor:
        """The perturbation ``z`` of a query, float32 [k]."""
        seed = stream.step_seed(self.config.seed, 0, step, query)
        return stream.normal(seed, self.mask.ids.to(self.start.device), self.config.model.backend)

    def scale_by_scores(self, power: float) -> Tensor:
        """Scale of each element, float32 [k]: the mask's scores to a power, with mean square 1.

        Raises:
            ConfigError: if the mask has no scores, or some are 0.
        """
        if self.mask.scores is None or not bool((self.mask.scores > 0).all()):
            raise ConfigError("a scale by scores needs a mask with positive scores: choose it by sensitivity")
        scale = self.mask.scores.to(self.start.device).double() ** power
        return (scale / scale.square().mean().sqrt()).float()

    def loss(self, w: Tensor, indices: Sequence[int]) -> float:
        """Loss on some training examples with masked weights ``w``, float32 [k], finite."""
        self.weights.set_masters_(w)
        objective = self.config.objective
        with torch.inference_mode():
            batch = self.data.train.batch(indices, answers=objective.answers, device=self.start.device)
            return float(task_loss(self.lm.model, batch, objective))

    def evaluate(self, w: Tensor) -> Evaluation:
        """Scores on the held-out examples with masked weights ``w``, float32 [k], finite."""
        self.weights.set_masters_(w)
        return evaluate(self.lm.model, self.data.validation)


__all__ = ["Problem"]
