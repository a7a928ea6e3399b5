"""A finished run's model again: base + mask + ledger."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import LedgerError
from ..mask import SparseMask
from ..models import LanguageModel
from ..parameters import fingerprint
from ..trajectory import replay
from ..weights import MaskedWeights
from . import setup
from .config import make_config, read_toml
from .ledger import read_ledger
from .rundir import CONFIG, LEDGER, MASK, METRICS


@dataclass(frozen=True)
class Replayed:
    """A model brought to the end of a run's ledger.

    Args:
        lm: the model and its tokenizer.
        rounds: applied.
        weights: fingerprint of the weights.
        recorded: fingerprint in the run's summary; None if the run did not finish.
    """

    lm: LanguageModel
    rounds: int
    weights: str
    recorded: str | None


def replay_run(directory: Path) -> Replayed:
    """Replays a run directory.

    Raises:
        LedgerError: if the ledger is damaged, or does not belong to the mask or the base model.
        MeerkatError: if the run's files, model or mask cannot be read.
    """
    config = make_config(read_toml(directory / CONFIG))
    ledger = read_ledger(directory / LEDGER)
    lm = setup.load_language_model(config)
    mask = SparseMask.load(directory / MASK, lm.model)
    if mask.digest != ledger.header.terms.mask_digest:
        raise LedgerError(f"{directory / LEDGER} was written with another mask than {directory / MASK}")
    base = fingerprint(lm.model)
    if base != ledger.header.base:
        raise LedgerError(
            f"{directory / LEDGER} starts from a base model with fingerprint {ledger.header.base[:12]}; "
            f"{config.model} has {base[:12]}"
        )
    if ledger.rounds and ledger.rounds[-1].masters is not None:  # trained by backpropagation: weights, not scalars
        weights = MaskedWeights(lm.model, mask, config.backend)
        weights.set_masters_(torch.from_numpy(ledger.rounds[-1].masters.copy()))
    else:
        replay(lm.model, mask, ledger.steps(), config.backend)
    return Replayed(lm, len(ledger.rounds), fingerprint(lm.model), _recorded(directory / METRICS))


def _recorded(path: Path) -> str | None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return str(json.loads(lines[-1])["summary"]["weights"])
    except (IndexError, KeyError, json.JSONDecodeError):  # no line, a round's line, or a torn one
        return None


__all__ = ["Replayed", "replay_run"]
