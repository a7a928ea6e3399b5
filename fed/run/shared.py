"""``Shared``: what several runs have in common, so that it is loaded once."""

from dataclasses import dataclass

from ...engine.errors import ModelChangedError
from ...engine.lm.evaluation import Evaluation
from ...engine.lm.models import LanguageModel
from ...engine.mask import SparseMask
from ..setup.data import TaskData


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Model, examples and mask of runs that differ in neither; see ``execute``. Each run must start at the base model.

    Args:
        lm: the base model and its tokenizer, as ``load_language_model`` returns it for the runs' settings.
        data: the examples, as ``encode`` returns them.
        mask: the mask, as ``make_mask`` returns it.
        base: fingerprint of the base model.
        initial: evaluation of the base model.
    """

    lm: LanguageModel
    data: TaskData
    mask: SparseMask
    base: str
    initial: Evaluation

    def check(self, base: str) -> None:
        """Raises ``ModelChangedError`` if the model has another fingerprint than the base model."""
        if base != self.base:
            raise ModelChangedError(
                f"the shared model is no longer the base model: its fingerprint is {base[:12]}, not {self.base[:12]}; "
                f"put its weights back after every run"
            )


__all__ = ["Shared"]
