"""``held_out``: a run's own held-out examples, if they can still be told from those that it was trained on."""

from ...engine.errors import DataError, RunError
from ...engine.lm.example_set import Examples
from ...engine.lm.models import LanguageModel
from ..config.run_config import RunConfig
from ..run.directory import ORIGIN, read_origin
from ..run.replay import Replayed
from ..setup.data import TaskData, client_shares, encode


def held_out(replayed: Replayed, lm: LanguageModel, config: RunConfig) -> Examples:
    """The held-out examples of a run's task, with the layout of its training: the bits are those of its own evaluation.

    Args:
        replayed: the run.
        lm: its model and tokenizer.
        config: its settings with those that the user gave. Its data may be elsewhere now; with another task, the
            examples are those that a run on that task would hold out.

    Raises:
        RunError: if nothing tells which examples the run held out, because the examples have changed or ``origin.json``
            is missing or damaged.
        MeerkatError: if the examples cannot be read.
    """
    own = replayed.config.replace(data_dir=config.data.directory)
    if config.task.name != own.task.name:
        return encode(config, lm).validation
    origin = read_origin(replayed.directory)
    if origin is None:
        raise RunError(
            f"{replayed.directory / ORIGIN} is missing: without it nothing tells whether the held-out examples are "
            f"still the same; put a copy back, or give --data FILE with examples to evaluate"
        )
    data = encode(own, lm)  # as the run did: settings that the user gave may make other tokens of the same rows
    if not _is_data_of(origin.data, own, data):
        raise RunError(
            f"the examples have changed since the run in {replayed.directory} started, so it is not known which of "
            f"them it held out; put them back, or give --data FILE with examples to evaluate"
        )
    is_same = config.data == own.data and config.evaluation.examples == own.evaluation.examples
    return data.validation if is_same else encode(config, lm).validation


def _is_data_of(digest: str, config: RunConfig, data: TaskData) -> bool:
    """Whether a digest in ``origin.json`` is that of the examples and their partition."""
    if digest == data.digest([]):  # of a run whose clients had examples of their own
        return True
    try:
        return digest == data.digest(client_shares(config, data))
    except DataError:  # the run has dealt its examples, and these cannot be dealt
        return False


__all__ = ["held_out"]
