"""From settings to the things a run consists of: model, data, mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .. import embedded, stream
from ..data import calibration_texts, own_rows, task_rows, token_batches
from ..errors import ConfigError
from ..examples import EncodedTask
from ..mask import SparseMask
from ..models import DTYPES, LanguageModel, load_model
from ..tasks import Row, Task
from .config import Method, RunConfig
from .partition import Group, Partition, groups_of
from .task_choice import chosen_task


@dataclass(frozen=True)
class TaskData:
    """Training and validation examples of the run's task.

    Args:
        train: to be dealt to clients.
        validation: held out.
        groups: what the data call the client of each training example, where clients are natural; else None.
    """

    train: EncodedTask
    validation: EncodedTask
    groups: list[Group] | None = None


def load_language_model(config: RunConfig) -> LanguageModel:
    """The run's model and tokenizer."""
    dtype = DTYPES[config.dtype]
    if config.model == embedded.NAME:
        return embedded.load(dtype, config.device)
    return load_model(config.model, dtype, config.device)


def read_rows(config: RunConfig) -> tuple[Task, Sequence[Row], Sequence[Row]]:
    """The run's task, and its training and validation rows."""
    task = chosen_task(config)
    train: Sequence[Row]
    validation: Sequence[Row]
    if config.data is not None:
        train, validation = own_rows(task, config.data, config.validation, config.seed)
    elif config.task == embedded.NAME:
        train, validation = embedded.rows("train"), embedded.rows("validation")
    else:
        train = task_rows(task, "train", config.data_dir)
        validation = task_rows(task, "validation", config.data_dir)
    return task, train, validation[: config.eval_examples or None]


def encode(config: RunConfig, tokenizer: object) -> TaskData:
    """The run's examples as tokens."""
    task, train, validation = read_rows(config)
    groups = None
    if config.partition is Partition.NATURAL and task.client_field is not None:
        groups = groups_of(train, task.client_field, f"{task.name}, train")
    return TaskData(
        EncodedTask(task, train, tokenizer, config.max_length, f"{task.name}, train"),
        EncodedTask(task, validation, tokenizer, config.max_length, f"{task.name}, validation"),
        groups,
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
    for name in ("data_dir", "data", "validation", "mask", "calibration"):
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} {str(path)!r} does not exist")


__all__ = ["TaskData", "check_files", "encode", "load_language_model", "make_mask", "read_rows"]
