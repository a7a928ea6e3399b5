"""A run's model again, at the end of any of its rounds: base + mask + ledger."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...engine.delta import Delta
from ...engine.errors import ConfigError, LedgerError, ModelError, RunError
from ...engine.lm.models import LanguageModel
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ...engine.replay import replay_
from ...engine.weights import MaskedWeights
from ..config.run_config import RunConfig, make_config
from ..config.toml import read_toml
from ..ledger.file import Ledger, read_ledger
from ..setup.model import load_language_model
from .directory import CONFIG, LEDGER, MASK, METRICS
from .jsonl import is_number, read_lines


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A model brought to the end of a round of a run.

    Args:
        directory: of the run.
        config: its settings.
        ledger: what was replayed.
        metrics: the lines of its metrics up to that round.
        summary: of the run; None if it did not finish.
        lm: the model and its tokenizer.
        masked: its masked weights.
        round: the round; 0 is the base model.
        weights: fingerprint of the weights.
    """

    directory: Path
    config: RunConfig
    ledger: Ledger
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    lm: LanguageModel
    masked: MaskedWeights
    round: int
    weights: str

    @property
    def last(self) -> bool:
        """Whether the ledger ends with this round."""
        return self.round == len(self.ledger.rounds)

    @property
    def recorded(self) -> str | None:
        """Fingerprint in the run's summary; None if the run did not finish, or went on after this round."""
        found = self.summary.get("weights") if self.summary is not None and self.last else None
        return None if found is None else str(found)

    def delta(self) -> Delta:
        """What tells the model from the run's base.

        Raises:
            ConfigError: if the run trained adapters, for which the base model has no place.
        """
        if self.lm.adapters:
            raise ConfigError(
                f"{self.config.method} trains adapters, for which a base model has no place, so there is no delta; "
                f"--output merges them into a checkpoint"
            )
        return Delta.of(
            self.lm.model, self.masked, base=self.ledger.header.base, method=self.config.method, round=self.round
        )


def replay_run(
    directory: Path, *, round: int | None = None, model: str | None = None, trust_remote_code: bool = False
) -> Replayed:
    """Replays a run directory.

    Args:
        directory: of the run.
        round: at whose end the model is wanted, 0 for the base model; None is the ledger's last.
        model: where the base model lies, if elsewhere than the run's settings say.
        trust_remote_code: see ``models.load_model``.

    Raises:
        RunError: if it is no run directory.
        LedgerError: if the ledger is damaged, does not belong to the mask or the base model, or has no such round.
        MeerkatError: if the run's files, model or mask cannot be read.
    """
    _check_run(directory)
    config = make_config(read_toml(directory / CONFIG))
    ledger = read_ledger(directory / LEDGER)
    wanted = len(ledger.rounds) if round is None else round
    if not 0 <= wanted <= len(ledger.rounds):
        raise LedgerError(f"{directory / LEDGER} holds {len(ledger.rounds)} rounds; round {wanted} was asked for")
    metrics = read_lines(directory / METRICS)
    lm = _base(config, directory, model, trust_remote_code)
    mask = SparseMask.load(directory / MASK, lm.model)
    if mask.digest != ledger.header.terms.mask_digest:
        raise LedgerError(f"{directory / LEDGER} was written with another mask than {directory / MASK}")
    base = fingerprint(lm.model)
    if base != ledger.header.base:
        raise LedgerError(
            f"{directory / LEDGER} starts from a base model with fingerprint {ledger.header.base[:12]}; "
            f"{model or config.model.source} has {base[:12]}"
        )
    masked = MaskedWeights(lm.model, mask, config.model.backend)
    _move(masked, ledger, wanted)
    return Replayed(
        directory=directory,
        config=config,
        ledger=ledger,
        metrics=[line for line in metrics if is_number(line.get("round")) and line["round"] <= wanted],
        summary=next((line["summary"] for line in metrics if isinstance(line.get("summary"), dict)), None),
        lm=lm,
        masked=masked,
        round=wanted,
        weights=fingerprint(lm.model),
    )


def _check_run(directory: Path) -> None:
    if not directory.is_dir():
        raise RunError(f"{directory} is no run directory: there is no such directory")
    missing = [name for name in (CONFIG, MASK, LEDGER) if not (directory / name).is_file()]
    if missing:
        raise RunError(f"{directory} is no run directory: it has no {' and no '.join(missing)}")


def _base(config: RunConfig, directory: Path, model: str | None, trust_remote_code: bool) -> LanguageModel:
    try:
        return load_language_model(config, model=model, trust_remote_code=trust_remote_code)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error} ({directory / CONFIG} names it; --model says where it lies now)") from error


def _move(masked: MaskedWeights, ledger: Ledger, wanted: int) -> None:
    """From the base to the end of a round."""
    rounds = ledger.rounds[:wanted]
    if rounds and rounds[-1].masters is not None:  # trained by backpropagation: weights, not scalars
        masked.set_masters_(torch.from_numpy(rounds[-1].masters.copy()))
        return
    replay_(masked, ledger.updates(wanted))


__all__ = ["Replayed", "replay_run"]
