"""Saves a model as a Hugging Face checkpoint, atomically."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ..atomic_files import sync_directory
from ..errors import ConfigError, MeerkatError, RunError
from .models import LanguageModel


def check_does_not_exist(path: Path) -> None:
    """Raises ``ConfigError`` if the path exists, because nothing is ever overwritten."""
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already; choose another place (nothing was changed)")


def save_checkpoint(lm: LanguageModel, output: Path, card: str) -> None:
    """Writes a model, its tokenizer and a model card, in transformers' layout.

    The checkpoint is written under a temporary name in the same directory and renamed, so it is complete as soon as
    ``output`` exists.

    Args:
        lm: the model, which is saved in the dtype it has.
        output: directory to create, with its parents.
        card: text of the model card, ``README.md``.

    Raises:
        ConfigError: if ``output`` exists already.
        RunError: if the checkpoint cannot be written, or transformers rejects the model; nothing is left on disk.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=output.parent) as temporary:
            complete = Path(temporary) / output.name
            complete.mkdir()
            _write_files(complete, lm, card)
            check_does_not_exist(output)  # the rename alone would replace an empty directory
            os.rename(complete, output)
        sync_directory(output.parent)
    except MeerkatError:
        raise
    except Exception as error:  # safetensors and tokenizers raise exceptions of their own types, as for a full disk
        raise RunError(f"cannot write the checkpoint {output}: {getattr(error, 'strerror', None) or error}") from error


def _write_files(directory: Path, lm: LanguageModel, card: str) -> None:
    """Writes the checkpoint's files into an empty directory and flushes them to disk."""
    lm.model.save_pretrained(directory)  # type: ignore[operator]
    lm.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")
    mode = (directory / "README.md").stat().st_mode  # safetensors' writer makes files that only the owner can read
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(path)


__all__ = ["check_does_not_exist", "save_checkpoint"]
