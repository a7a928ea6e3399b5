"""``Inputs``: what all runs of a search must have in common. Losses of runs that differ in them cannot be compared."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError, RunError
from ...engine.lm.models import LanguageModel
from ...engine.parameters import fingerprint
from ...fed.config.run_config import RunConfig
from ...fed.setup.data import TaskData, client_shares
from ...fed.setup.mask import file_of_choice
from .directory import INPUTS, MASKS, RUNS

_CHANGES = {
    "examples": "other examples",
    "base": "another base model or dtype",
    "mask_file": "another mask file or calibration text",
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all runs of a search have in common, besides the settings. Stored in ``inputs.json`` before the first run.

    Args:
        examples: digest of the examples and of their partition.
        base: fingerprint of the base model.
        mask_file: SHA-256 of the file that masks come from, see ``file_of_choice``; None if there is none.
    """

    examples: str
    base: str
    mask_file: str | None

    @classmethod
    def of(cls, config: RunConfig, lm: LanguageModel, data: TaskData) -> "Inputs":
        """The inputs in this process.

        Args:
            config: the settings of the user's run.
            lm: the base model.
            data: the examples.

        Raises:
            ConfigError: if the file that masks come from cannot be read.
            DataError: if the examples cannot be dealt to the clients.
        """
        return cls(
            examples=data.digest(client_shares(config, data)),
            base=fingerprint(lm.model),
            mask_file=_file_digest(file_of_choice(config)),
        )

    def check(self, output: Path) -> None:
        """Checks that they are those that a search began with, or records them before the first run.

        Args:
            output: directory of the search.

        Raises:
            RunError: if something has changed, or ``inputs.json`` is damaged, or missing although the search has begun.
        """
        path = output / INPUTS
        if not path.exists():
            if any((output / name).exists() for name in (MASKS, RUNS)):
                raise RunError(
                    f"{path} is missing: without it nothing tells whether examples and model are those of the earlier "
                    f"runs; put a copy back, or choose another --output (nothing was changed)"
                )
            write_atomic(path, (json.dumps(vars(self), indent=1) + "\n").encode())
            return
        try:
            before = Inputs(**json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{path} is damaged ({error}); choose another --output (nothing was changed)") from error
        changes = [change for name, change in _CHANGES.items() if getattr(self, name) != getattr(before, name)]
        if changes:
            raise RunError(
                f"the search in {output} began with {' and '.join(changes)}, and its runs cannot be compared with new "
                f"ones; put back what it began with, or choose another --output (nothing was changed)"
            )


def _file_digest(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


__all__ = ["Inputs"]
