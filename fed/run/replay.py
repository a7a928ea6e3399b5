"""``replay_run``: rebuilds a run's model, after any of its rounds, from base model, mask and ledger."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """A run's model as it was after one of its rounds.

    Args:
        directory: the run directory.
        config: the run's settings.
        ledger: the run's complete ledger.
        metrics: lines of the metrics up to the round.
        summary: the run's summary; None if the run did not finish.
        lm: the model after the round, and its tokenizer.
        masked: the model's masked weights.
        start: masters of the base model's masked weights, float32 [k].
        round: number of the round; 0 is the base model.
        weights: fingerprint of the model's weights.
    """

    directory: Path
    config: RunConfig
    ledger: Ledger
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    lm: LanguageModel
    masked: MaskedWeights
    start: Tensor
    round: int
    weights: str

    @property
    def is_last_round(self) -> bool:
        """Whether the ledger ends with this round."""
        return self.round == len(self.ledger.rounds)

    @property
    def recorded_weights(self) -> str | None:
        """Fingerprint of the weights in the run's summary; None if there is no summary, or it is of a later round."""
        if self.summary is None or not self.is_last_round:
            return None
        weights = self.summary.get("weights")
        return None if weights is None else str(weights)

    def delta(self) -> Delta:
        """The masked weights as a delta to the run's base model.

        Raises:
            ConfigError: if the run trained adapters, which the base model does not have.
        """
        if self.lm.adapters:
            raise ConfigError(
                f"{self.config.method} trains adapters, which the base model does not have, so there is no delta; "
                f"use --output DIR, which saves a checkpoint with the adapters merged"
            )
        return Delta.of(
            self.lm.model,
            self.masked,
            base=self.ledger.header.base,
            start=self.start,
            kept=self.config.model.kept,
            method=self.config.method,
            round=self.round,
        )


def replay_run(
    directory: Path, *, round: int | None = None, model: str | None = None, trust_remote_code: bool = False
) -> Replayed:
    """Replays the ledger of a run directory.

    Args:
        directory: the run directory.
        round: number of the last round to replay; 0 gives the base model; None: the last round of the ledger.
        model: where the base model is now; None: where the run's settings say.
        trust_remote_code: see ``models.load_model``.

    Raises:
        RunError: if the directory is not a run directory.
        LedgerError: if the ledger is damaged, does not belong to the mask or the base model, or has no such round.
        MeerkatError: if the run's files, model or mask cannot be read.
    """
    _check_run(directory)
    config = make_config(read_toml(directory / CONFIG))
    if config.model.device != "cpu" and not torch.cuda.is_available():  # a CPU gives the same bits
        config = config.replace(device="cpu", backend="auto")
    ledger = read_ledger(directory / LEDGER)
    last_round = len(ledger.rounds) if round is None else round
    if not 0 <= last_round <= len(ledger.rounds):
        raise LedgerError(f"{directory / LEDGER} holds {len(ledger.rounds)} rounds; round {last_round} was requested")
    metrics = read_lines(directory / METRICS)
    lm = _load_base_model(config, directory, model, trust_remote_code)
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
    start = masked.masters()
    _apply_rounds(masked, ledger, last_round)
    return Replayed(
        directory=directory,
        config=config,
        ledger=ledger,
        metrics=[line for line in metrics if is_number(line.get("round")) and line["round"] <= last_round],
        summary=next((line["summary"] for line in metrics if isinstance(line.get("summary"), dict)), None),
        lm=lm,
        masked=masked,
        start=start,
        round=last_round,
        weights=fingerprint(lm.model),
    )


def _check_run(directory: Path) -> None:
    if not directory.is_dir():
        raise RunError(f"{directory} is not a run directory: there is no such directory")
    missing = [name for name in (CONFIG, MASK, LEDGER) if not (directory / name).is_file()]
    if missing == [MASK]:
        raise RunError(
            f"{directory / MASK} is missing; put it back, or make it again with `meerkat-engine run --resume "
            f"{directory}`"
        )
    if missing:
        raise RunError(f"{directory} is not a run directory: it has no {' and no '.join(missing)}")


def _load_base_model(config: RunConfig, directory: Path, model: str | None, trust_remote_code: bool) -> LanguageModel:
    try:
        return load_language_model(config, model=model, trust_remote_code=trust_remote_code)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error} ({directory / CONFIG} names this model; if it was moved, give --model)") from error


def _apply_rounds(masked: MaskedWeights, ledger: Ledger, last_round: int) -> None:
    """Moves the weights from the base model to the end of a round."""
    rounds = ledger.rounds[:last_round]
    if rounds and rounds[-1].masters is not None:  # trained by backpropagation: the ledger has weights, not scalars
        masked.set_masters_(torch.from_numpy(rounds[-1].masters.copy()))
        return
    replay_(masked, ledger.updates(last_round))


__all__ = ["Replayed", "replay_run"]
