"""``open_target``: what the user wants to try: a run, before and after training, or a model alone."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...engine.errors import ConfigError, RunError
from ...engine.lm import embedded
from ...engine.lm.models import LanguageModel
from ..config.run_config import RunConfig, make_config
from ..config.toml import read_toml
from ..run.directory import CONFIG, LEDGER, MASK
from ..run.replay import Replayed, replay_run
from ..setup.model import load_language_model
from ..setup.threads import choose_threads

# Settings that say what task and model are, and how examples are held out. A run has them already.
_OF_A_RUN = (
    "task", "template", "labels", "label_field", "answer", "cut", "dataset", "dataset_config",
    "dataset_revision", "dataset_split", "seed", "device", "dtype",
)  # fmt: skip
# A model without a task gets free text of its own. Its examples are those that the user types.
_NO_TASK = Path("text")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to try. Of a run there are two versions, whose masked weights are swapped in one loaded model.

    Args:
        name: run directory, checkpoint or model, as the user gave it.
        config: settings of the task and the model.
        lm: the loaded model, with the weights after training.
        has_task: whether the user or the run names a task; otherwise the model continues text.
        replayed: the run; None for a model alone, which has one version.
    """

    name: str
    config: RunConfig
    lm: LanguageModel
    has_task: bool
    replayed: Replayed | None = None

    @contextmanager
    def base(self) -> Iterator[LanguageModel]:
        """Context in which the model has the bits that it had before training."""
        if self.replayed is None:
            yield self.lm
            return
        with self._with_masters(self.replayed.start):
            yield self.lm

    @contextmanager
    def tuned(self) -> Iterator[LanguageModel]:
        """Context in which the model has the bits that it had after training.

        Raises:
            ConfigError: if there is no run.
        """
        if self.replayed is None:
            raise ConfigError(f"{self.name} is no run, so there is only one version of the model")
        yield self.lm  # as it is outside of ``base``

    @property
    def versions(self) -> dict[str, AbstractContextManager[LanguageModel]]:
        """The contexts of all versions, each for one use, by name: before and after; for a model alone, model."""
        if self.replayed is None:
            return {"model": self.base()}
        return {"before": self.base(), "after": self.tuned()}

    @contextmanager
    def _with_masters(self, masters: Tensor) -> Iterator[None]:
        assert self.replayed is not None
        masked = self.replayed.masked
        outside = masked.saved()
        try:
            masked.set_masters_(masters)
            yield
        finally:
            masked.put_back_(outside)


def open_target(
    name: str,
    given: Mapping[str, Any],
    *,
    round: int | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """Loads a run, a checkpoint or a model.

    Args:
        name: run directory, checkpoint directory, Hugging Face id, GGUF file, or "embedded".
        given: settings that the user gave, by flat names. A run has its own task and model, and takes few.
        round: the round of a run up to which it is replayed; None: the last one.
        base_model: where a run's base model is now; None: where the run's settings say.
        trust_remote_code: see ``models.load_model``.

    Raises:
        ConfigError: if a setting does not fit.
        RunError: if a run has trained nothing yet, or ended with other weights than those that its ledger gives.
        MeerkatError: if files or model cannot be read; see ``replay.replay_run``.
    """
    if holds_run_files(Path(name)):
        return _open_run(Path(name), given, round, base_model, trust_remote_code)
    for option, value in (("--round", round), ("--model", base_model)):
        if value is not None:
            raise ConfigError(f"{option} is for runs, and {name} is no run directory; leave it out")
    return _open_model(name, given, trust_remote_code)


def holds_run_files(path: Path) -> bool:
    """Whether a directory is a run's, complete or not."""
    return any((path / file).is_file() for file in (CONFIG, LEDGER, MASK))


def _open_run(
    path: Path, given: Mapping[str, Any], round: int | None, base_model: str | None, trust_remote_code: bool
) -> Target:
    for name in _OF_A_RUN:
        if name in given:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{path} is a run, which has its own {name.replace('_', ' ')}; leave {option} out")
    _check_has_begun(path)
    if (path / CONFIG).is_file():
        choose_threads(base_model or make_config(read_toml(path / CONFIG)).model.source)
    replayed = replay_run(path, round=round, model=base_model, trust_remote_code=trust_remote_code)
    if not replayed.ledger.rounds:
        raise RunError(_has_trained_nothing(path))
    recorded = replayed.recorded_weights
    if recorded is not None and recorded != replayed.weights:
        raise RunError(f"{path} ended with other weights than its ledger gives: {recorded}, now {replayed.weights}")
    return Target(
        name=str(path), config=replayed.config.replace(**given), lm=replayed.lm, has_task=True, replayed=replayed
    )


def _check_has_begun(path: Path) -> None:
    """Raises ``RunError`` for a run that was stopped before its first round; files are missing that it writes later."""
    if (path / CONFIG).is_file() and not (path / LEDGER).is_file():
        raise RunError(_has_trained_nothing(path))


def _has_trained_nothing(path: Path) -> str:
    return (
        f"the run in {path} has trained nothing yet: no round is complete; continue it with `meerkat-engine run "
        f"--resume {path}`, or try its base model itself"
    )


def _open_model(name: str, given: Mapping[str, Any], trust_remote_code: bool) -> Target:
    has_task = any(setting in given for setting in ("task", "dataset", "template", "labels", "answer"))
    own = "task" not in given and "dataset" not in given
    settings = {**given, **({"data": str(_NO_TASK)} if own else {})}
    # The settings tie the embedded tasks to the embedded model. A checkpoint of a run on it is a model like it.
    source = embedded.NAME if given.get("task") in embedded.TASKS else name
    config = make_config(settings, {"model": source})
    choose_threads(name)
    lm = load_language_model(config, model=name, trust_remote_code=trust_remote_code)
    return Target(name=name, config=config, lm=lm, has_task=has_task)


__all__ = ["Target", "holds_run_files", "open_target"]
