"""``Base``: base model, examples and masks of a search, loaded and computed once, when a run first needs them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ...engine.lm.evaluation import Evaluation, evaluate
from ...engine.lm.models import LanguageModel
from ...engine.mask import SparseMask
from ...engine.weights import MaskedWeights
from ...fed.config.run_config import RunConfig
from ...fed.run.shared import Shared
from ...fed.setup.data import TaskData, describe_examples, encode
from ...fed.setup.mask import make_mask
from ...fed.setup.model import load_language_model, resolved
from .directory import MASKS
from .inputs import Inputs


class Base:
    """Base model, examples and masks of a search.

    Args:
        config: the settings of the user's run.
        output: directory of the search, which gets the masks and the record of what the runs have in common.
        log: called with a line before slow work.
        trust_remote_code: see ``models.load_model``.
    """

    def __init__(self, config: RunConfig, output: Path, log: Callable[[str], None], *, trust_remote_code: bool) -> None:
        self._given, self._output, self._log, self.trust_remote_code = config, output, log, trust_remote_code

    @contextmanager
    def shared(self, config: RunConfig) -> Iterator[Shared]:
        """Context for one run: the base model, whose weights are put back afterwards.

        Args:
            config: the settings of the run, which differ from those of the search in lr, eps and density at most.

        Raises:
            RunError: if examples, base model or the file of the masks are not those that the search began with.
        """
        lm, data, base = self._loaded
        model, mask = lm.model, self._mask(config)
        weights = MaskedWeights(model, mask, self._config.model.backend).live()
        try:
            yield Shared(lm=lm, data=data, mask=mask, base=base, initial=self._initial)
        finally:
            MaskedWeights(model, mask, self._config.model.backend).set_masters_(weights)

    @cached_property
    def _config(self) -> RunConfig:
        return resolved(self._given)

    @cached_property
    def _loaded(self) -> tuple[LanguageModel, TaskData, str]:
        """The base model, the examples, and the fingerprint of the model."""
        self._log(f"loading the model {self._given.model.source} and the task {self._given.task.name}")
        lm = load_language_model(self._config, trust_remote_code=self.trust_remote_code)
        data = encode(self._config, lm)
        inputs = Inputs.of(self._config, lm, data)
        inputs.check(self._output)
        for line in describe_examples(data.train, data.validation):
            self._log(line)
        return lm, data, inputs.base

    @cached_property
    def _initial(self) -> Evaluation:
        lm, data, _ = self._loaded
        self._log(f"evaluating the base model on {len(data.validation)} held-out examples")
        return evaluate(lm.model, data.validation)

    def _mask(self, config: RunConfig) -> SparseMask:
        """The mask of a density. It is kept in a file, so that a search that goes on need not choose it again."""
        lm, data, _ = self._loaded
        path = self._output / MASKS / f"density-{config.mask.density:g}.safetensors"
        if path.exists():
            return SparseMask.load(path, lm.model)
        self._log(f"choosing the mask ({config.mask.file or config.method.recipe.elements})")
        mask = make_mask(dataclasses.replace(config, model=self._config.model), lm, data.train)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
        return mask


__all__ = ["Base"]
