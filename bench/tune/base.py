"""``Base``: base model, examples and masks of a search, loaded and computed once, when a run first needs them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ...engine.lm.evaluation import Evaluation, evaluate
from ...engine.lm.models import LanguageModel
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ...engine.weights import MaskedWeights
from ...fed.config.run_config import RunConfig
from ...fed.run.shared import Shared
from ...fed.setup.data import TaskData, encode
from ...fed.setup.mask import make_mask
from ...fed.setup.model import load_language_model, resolved


class Base:
    """Base model, examples and masks of a search.

    Args:
        config: the settings of the user's run.
        masks: directory for the masks.
        log: called with a line before slow work.
        trust_remote_code: see ``models.load_model``.
    """

    def __init__(self, config: RunConfig, masks: Path, log: Callable[[str], None], *, trust_remote_code: bool) -> None:
        self._given, self._masks, self._log, self.trust_remote_code = config, masks, log, trust_remote_code

    @contextmanager
    def shared(self, config: RunConfig) -> Iterator[Shared]:
        """Context for one run: the base model, whose weights are put back afterwards.

        Args:
            config: the settings of the run, which differ from those of the search in lr, eps and density at most.
        """
        model, mask = self._lm.model, self._mask(config)
        weights = MaskedWeights(model, mask, self._config.model.backend).live()
        try:
            yield Shared(lm=self._lm, data=self._data, mask=mask, base=self._fingerprint, initial=self._initial)
        finally:
            MaskedWeights(model, mask, self._config.model.backend).set_masters_(weights)

    @cached_property
    def _config(self) -> RunConfig:
        return resolved(self._given)

    @cached_property
    def _lm(self) -> LanguageModel:
        self._log(f"loading the model {self._given.model.source} and the task {self._given.task.name}")
        return load_language_model(self._config, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _data(self) -> TaskData:
        return encode(self._config, self._lm)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._lm.model)

    @cached_property
    def _initial(self) -> Evaluation:
        self._log(f"evaluating the base model on {len(self._data.validation)} held-out examples")
        return evaluate(self._lm.model, self._data.validation)

    def _mask(self, config: RunConfig) -> SparseMask:
        """The mask of a density. It is kept in a file, so that a search that goes on need not choose it again."""
        path = self._masks / f"density-{config.mask.density:g}.safetensors"
        if path.exists():
            return SparseMask.load(path, self._lm.model)
        self._log(f"choosing the mask ({config.mask.file or config.method.recipe.elements})")
        mask = make_mask(dataclasses.replace(config, model=self._config.model), self._lm, self._data.train)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
        return mask


__all__ = ["Base"]
