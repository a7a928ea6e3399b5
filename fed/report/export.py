"""Saves a run's model, or an applied delta, as a Hugging Face checkpoint with a model card."""

from pathlib import Path

from ...engine.delta import Delta
from ...engine.errors import DeltaError
from ...engine.lm.checkpoint import check_does_not_exist, save_checkpoint
from ...engine.lm.lora import merge_lora
from ...engine.lm.models import DTYPES
from ...engine.lm.quantize import Quantize
from ...engine.parameters import fingerprint
from ..run.replay import Replayed
from ..setup.model import load_base_model
from .card import delta_card, run_card


def save_run(replayed: Replayed, output: Path) -> None:
    """Saves a replayed model as a checkpoint. Adapters are merged into the model first.

    Args:
        replayed: the replayed run. Its model changes only if it has adapters.
        output: path of the checkpoint directory, which must not exist.

    Raises:
        MeerkatError: if the path exists or cannot be written.
    """
    if replayed.lm.adapters:
        merge_lora(replayed.lm.model)
    save_checkpoint(replayed.lm, output, run_card(replayed, output.name, fingerprint(replayed.lm.model, rounded=True)))


def apply_delta(
    path: Path, model: str, output: Path, *, onto_plain: bool = False, trust_remote_code: bool = False
) -> Delta:
    """Applies a delta to its base model and saves the result as a checkpoint.

    Args:
        path: path of the delta file.
        model: value of ``--model``, which names the base model.
        output: path of the checkpoint directory, which must not exist.
        onto_plain: whether to apply it to the base model's plain weights although those of the run were kept in
            another format. That is another model than the run's.
        trust_remote_code: see ``models.load_model``.

    Returns:
        The delta.

    Raises:
        DeltaError: if the file is damaged, or the model is not the delta's base model.
        MeerkatError: if the model cannot be loaded, or the output cannot be written.
    """
    check_does_not_exist(output)
    delta = Delta.load(path)
    if delta.dtype not in DTYPES:
        raise DeltaError(
            f"{delta.where} belongs to a model of dtype {delta.dtype!r}; only {', '.join(DTYPES)} can be loaded"
        )
    if onto_plain and delta.kept == "none":
        raise DeltaError(f"{delta.where} is of a run on plain weights; leave --onto-plain out, and the base is checked")
    kept, _, how = ("none" if onto_plain else delta.kept).partition("+")
    if kept not in list(Quantize):
        raise DeltaError(
            f"{delta.where} belongs to a base whose weights are kept as {delta.kept!r}; known: {', '.join(Quantize)}"
        )
    lm = load_base_model(
        model,
        delta.dtype,
        quantize=Quantize(kept),
        adds=how == "add",
        rounds=how == "round",
        trust_remote_code=trust_remote_code,
    )
    base = fingerprint(lm.model)
    (delta.apply_to_other if onto_plain else delta.apply)(lm.model)
    save_checkpoint(lm, output, delta_card(delta, lm, output.name, model, base))
    return delta


__all__ = ["apply_delta", "save_run"]
