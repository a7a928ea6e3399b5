"""What leaves a run: a checkpoint that needs nothing of this package, with a card that says what made it."""

from pathlib import Path

from ...engine.delta import Delta
from ...engine.errors import DeltaError
from ...engine.lm.checkpoint import check_absent, save_checkpoint
from ...engine.lm.lora import merge_lora
from ...engine.lm.models import DTYPES
from ...engine.parameters import fingerprint
from ..run.replay import Replayed
from ..setup.model import load_base_model
from .card import delta_card, run_card


def save_run(done: Replayed, output: Path) -> None:
    """Saves a replayed model, its adapters merged where it has some.

    Args:
        done: the model, which stays as it is but for its adapters.
        output: directory to be made.

    Raises:
        MeerkatError: if there is something already, or it cannot be written.
    """
    if done.lm.adapters:
        merge_lora(done.lm.model)
    save_checkpoint(done.lm, output, run_card(done, output.name, fingerprint(done.lm.model)))


def apply_delta(path: Path, model: str, output: Path, *, trust_remote_code: bool = False) -> Delta:
    """Puts a delta onto its base model and saves what that gives.

    Args:
        path: of the delta.
        model: the base, as ``--model`` takes it.
        output: directory to be made.
        trust_remote_code: see ``models.load_model``.

    Raises:
        DeltaError: if the file is damaged, or the model is not its base.
        MeerkatError: if the model cannot be loaded, or the output cannot be written.
    """
    check_absent(output)
    delta = Delta.load(path)
    if delta.dtype not in DTYPES:
        raise DeltaError(f"{delta.where} is of a model of dtype {delta.dtype!r}; only {', '.join(DTYPES)} are loaded")
    lm = load_base_model(model, delta.dtype, trust_remote_code=trust_remote_code)
    delta.apply(lm.model)
    save_checkpoint(lm, output, delta_card(delta, lm, output.name, model))
    return delta


__all__ = ["apply_delta", "save_run"]
