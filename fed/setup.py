"""From settings to the things a run consists of: model, data, mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .. import embedded, stream
from ..data import calibration_texts, task_rows, token_batches
from ..errors import ConfigError
from ..examples import EncodedTask
from ..mask import SparseMask
from ..models import DTYPES, LanguageModel, load_model
from ..tasks import Row, Task, get_task
from .config import Method, RunConfig


@dataclass(frozen=True)
class TaskData:
    """Training and validation examples of the run's task."""

    train: EncodedTask
    validation: EncodedTask


def load_language_model(config: RunConfig) -> LanguageModel:
    """The run's model and tokenizer."""
    dtype = DTYPES[config.dtype]
    if config.model == embedded.NAME:
        return embedded.load(dtype, config.device)
    return load_model(config.model, dtype, config.device)


def read_rows(config: RunConfig) -> tuple[Task, Sequence[Row], Sequence[Row]]:
    """The run's task, and its training and validation rows."""
    if config.task == embedded.NAME:
        task, train, validation = embedded.TASK, embedded.rows("train"), embedded.rows("validation")
    else:
        task = get_task(config.task)
        train = tuple(task_rows(task, "train", config.data_dir))
        validation = tuple(task_rows(task, "validation", config.data_dir))
    return task, train, validation[: config.eval_examples or None]


def encode(config: RunConfig, tokenizer: object) -> TaskData:
    """The run's examples as tokens."""
    task, train, validation = read_rows(config)
    return TaskData(
        EncodedTask(task, train, tokenizer, config.max_length, f"{task.name}, train"),
        EncodedTask(task, validation, tokenizer, config.max_length, f"{task.name}, validation"),
    )


def make_mask(config: RunConfig, lm: LanguageModel) -> SparseMask:
    """The run's mask: read from its file, or chosen as the method says."""
    if config.mask is not None:
        return SparseMask.load(config.mask, lm.model)
    if config.method is Method.FULL_FEDZO:
        return SparseMask.dense(lm.model)
    if config.method is Method.WEIGHT_MAGNITUDE:
        return SparseMask.magnitude(lm.model, config.density)
    if config.method is Method.RANDOM_MASK:
        return SparseMask.random(lm.model, config.density, stream.derived_seed(config.seed, "mask"))
    texts, where = _texts(config)
    size, length = config.calibration_batch_size, config.calibration_length
    batches = list(token_batches(texts, lm.tokenizer, size, length))
    return SparseMask.from_gradients(
        lm.model,
        tqdm(batches, desc="calibrating", unit="batch", leave=False, disable=None),
        config.density,
        calibration=f"{where}; batches of {size}, at most {length} tokens a text",
    )


def _texts(config: RunConfig) -> tuple[list[str], str]:
    if config.model == embedded.NAME and config.calibration is None:
        return embedded.calibration_texts(config.calibration_texts)
    return calibration_texts(config.calibration, config.data_dir, config.calibration_texts)


def check_files(config: RunConfig) -> None:
    """Raises ``ConfigError`` for a file or directory that was named and is not there, before anything slow begins."""
    for name, path in (("data_dir", config.data_dir), ("mask", config.mask), ("calibration", config.calibration)):
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} {str(path)!r} does not exist")


__all__ = ["TaskData", "check_files", "encode", "load_language_model", "make_mask", "read_rows"]
