"""Saving a model as a Hugging Face checkpoint, whole or not at all."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ..atomic_files import sync_directory
from ..errors import ConfigError, MeerkatError, RunError
from .models import LanguageModel


def check_absent(path: Path) -> None:
    """Raises ``ConfigError`` if something is at the path; nothing is ever overwritten."""
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already; choose another place, nothing was changed")


def save_checkpoint(lm: LanguageModel, output: Path, card: str) -> None:
    """Writes a model, its tokenizer and a model card, as transformers lays them out.

    Args:
        lm: the model, in the dtype it is saved in.
        output: directory to be made, with those above it. It is made under another name beside it and renamed, so that
            it is complete as soon as it is there.
        card: content of its ``README.md``.

    Raises:
        ConfigError: if there is something already.
        RunError: if it cannot be written, or transformers finds fault with it; nothing of it is left.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=output.parent) as holder:
            whole = Path(holder) / output.name
            whole.mkdir()
            _fill(whole, lm, card)
            check_absent(output)  # the rename itself would take the place of an empty directory
            os.rename(whole, output)
        sync_directory(output.parent)
    except MeerkatError:
        raise
    except Exception as error:  # of any type: safetensors and tokenizers have their own for a disk that is full
        raise RunError(f"cannot write the checkpoint {output}: {getattr(error, 'strerror', None) or error}") from error


def _fill(directory: Path, lm: LanguageModel, card: str) -> None:
    lm.model.save_pretrained(directory)  # type: ignore[operator]
    lm.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")
    mode = (directory / "README.md").stat().st_mode  # safetensors' own writer lets nobody else read
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(path)


__all__ = ["check_absent", "save_checkpoint"]
