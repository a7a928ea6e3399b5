"""Saves a model as a Hugging Face checkpoint, atomically."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..atomic_files import sync_directory
from ..errors import ConfigError, MeerkatError, RunError
from ..frozen.weight import FrozenWeight, frozen_weights
from ..parameters import fingerprint, floating_parameters
from .models import LanguageModel, load_complete


def check_does_not_exist(path: Path) -> None:
    """Raises ``ConfigError`` if the path exists, because nothing is ever overwritten."""
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already; choose another place (nothing was changed)")


def save_checkpoint(lm: LanguageModel, output: Path, card: str) -> None:
    """Writes a model, its tokenizer and a model card, in transformers' layout.

    The checkpoint is written under a temporary name in the same directory, loaded again and compared with the model,
    and then renamed, so it is complete and right as soon as ``output`` exists. Meanwhile memory holds the model twice.

    Args:
        lm: the model, which is saved in the dtype it has.
        output: directory to create, with its parents.
        card: text of the model card, ``README.md``.

    Raises:
        ConfigError: if ``output`` exists already.
        RunError: if the checkpoint cannot be written, transformers rejects the model, or loading the checkpoint does
            not give the same weights and tokenizer; nothing is left on disk.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=output.parent) as temporary:
            complete = Path(temporary) / output.name
            complete.mkdir()
            _write_files(complete, lm, card)
            _compare(complete, lm)
            check_does_not_exist(output)  # the rename alone would replace an empty directory
            os.rename(complete, output)
        sync_directory(output.parent)
    except MeerkatError:
        raise
    except Exception as error:  # safetensors and tokenizers raise exceptions of their own types, as for a full disk
        raise RunError(f"cannot write the checkpoint {output}: {getattr(error, 'strerror', None) or error}") from error


def _write_files(directory: Path, lm: LanguageModel, card: str) -> None:
    """Writes the checkpoint's files into an empty directory and flushes them to disk."""
    dense = {"state_dict": _dense_state(lm.model)} if frozen_weights(lm.model) else {}
    lm.model.save_pretrained(directory, **dense)  # type: ignore[operator]
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


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, in which tied frozen weights share one dense tensor, so that they are saved once."""
    dense: dict[int, Tensor] = {}
    return {
        name: dense.setdefault(id(value), value.detach()) if isinstance(value, FrozenWeight) else value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
    }


def _compare(directory: Path, lm: LanguageModel) -> None:
    """Raises ``RunError`` unless loading the directory gives the model's bits and the tokenizer's tokens."""
    own = dict(floating_parameters(lm.model))
    dtypes = {parameter.dtype for parameter in own.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds all values of the smaller dtypes
    try:
        with torch.device("cpu"):  # whatever torch's default device is
            loaded, _ = load_complete(type(lm.model), str(directory), dtype, {})
    except ValueError as error:
        raise RunError(f"the checkpoint would not give the model back: {error}; nothing was saved") from error
    for name, parameter in floating_parameters(loaded):
        if name in own:
            parameter.data = parameter.data.to(own[name].dtype)
    if fingerprint(loaded) != fingerprint(lm.model, rounded=True):
        raise RunError(
            f"the checkpoint would not give the model back: {type(lm.model).__name__} loads other weights from it; "
            f"nothing was saved"
        )
    if type(lm.tokenizer).from_pretrained(str(directory)).get_vocab() != lm.tokenizer.get_vocab():
        raise RunError("the checkpoint would not give the tokenizer back: it loads other tokens; nothing was saved")


__all__ = ["check_does_not_exist", "save_checkpoint"]
