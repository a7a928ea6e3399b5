"""``Runs`` makes the runs of an experiment that are missing, with the masks and learning rates that they need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...fed.config.run_config import RunConfig
from ...fed.methods import Elements
from ...fed.run.directory import is_run
from ...fed.run.execute import execute, resume
from ...fed.setup.mask import make_mask
from ...fed.setup.model import load_language_model
from .experiment import Arm, Experiment, Settings, configuration, slug
from .finished import FinishedRun
from .rates import rate

RECORDS, RUNS, MASKS, _LOCKS = "records", "runs", "masks", ".locks"


class Runs:
    """The runs of an experiment, in its directory.

    Args:
        experiment: the experiment.
        given: the user's settings.
        output: directory of the experiment.
        log: called with a line of text before each run.
    """

    def __init__(self, experiment: Experiment, given: Settings, output: Path, log: Callable[[str], None]) -> None:
        self._experiment, self._given, self._output, self._log = experiment, given, output, log

    def make(self, jobs: Sequence[tuple[Arm, int]]) -> None:
        """Makes the runs that are missing; then waits for those that other processes are at.

        Args:
            jobs: arm and seed of each run.
        """
        busy = [(arm, seed) for arm, seed in jobs if not self._make(arm, seed, wait=False)]
        if busy:
            self._log(f"{self._experiment.name}: other processes are at {len(busy)} runs; waiting for them")
        for arm, seed in busy:  # if the other process was stopped, the run is made here
            self._make(arm, seed, wait=True)

    def finished(self, arm: Arm) -> dict[int, FinishedRun]:
        """Returns the finished runs of an arm by seed, ascending."""
        records = (self._output / RECORDS / slug(arm.name)).glob("seed-*.json")
        seeds = sorted(int(path.stem.removeprefix("seed-")) for path in records)
        return {seed: FinishedRun.recorded(self._record(arm, seed)) for seed in seeds}

    def _make(self, arm: Arm, seed: int, *, wait: bool) -> bool:
        """Makes a run, unless it has been made. Returns False if another process is at it, or at what it needs."""
        record, directory = self._record(arm, seed), self._output / RUNS / slug(arm.name) / f"seed-{seed}"
        try:
            with self._alone(f"{slug(arm.name)}-{seed}", wait=wait):
                if not record.exists():
                    if not directory.exists():
                        config = self._config(arm, seed, wait=wait)
                        self._log(f"{self._experiment.name}: {arm.name}, seed {seed}")
                        _run(config, directory)
                    FinishedRun.in_directory(directory, self._experiment.extra(directory)).record(record)
        except Timeout:
            return False
        return True

    def _config(self, arm: Arm, seed: int, *, wait: bool) -> RunConfig:
        """The settings of a run, with its mask and its learning rate."""
        settings = {**arm.settings, "seed": seed}
        if arm.search is not None:
            with self._alone(arm.search.name, wait=wait):
                searched = configuration(self._experiment, self._given, arm.search.settings)
                searched = self._with_mask(searched, wait=wait)
                settings["lr"] = rate(arm.search, searched, self._output, self._log)
        return self._with_mask(configuration(self._experiment, self._given, settings), wait=wait)

    def _with_mask(self, config: RunConfig, *, wait: bool) -> RunConfig:
        """The settings with a mask file if the mask does not depend on the seed. The file is made once."""
        elements = config.method.recipe.elements
        if config.mask.file is not None or elements not in (Elements.SENSITIVITY, Elements.MAGNITUDE):
            return config
        path = self._output / MASKS / f"{elements}-{config.mask.density:g}.safetensors"
        with self._alone(path.stem, wait=wait):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make_mask(config, load_language_model(config)).save(path)
        return config.replace(mask=path)

    def _record(self, arm: Arm, seed: int) -> Path:
        return self._output / RECORDS / slug(arm.name) / f"seed-{seed}.json"

    @contextmanager
    def _alone(self, name: str, *, wait: bool) -> Iterator[None]:
        """Context in which no other process is at a run, a mask or a search. Raises ``Timeout`` if one is."""
        path = self._output / _LOCKS / name
        path.parent.mkdir(exist_ok=True)
        with FileLock(path, timeout=-1 if wait else 0):
            yield


def _run(config: RunConfig, directory: Path) -> None:
    """Runs in ``DIRECTORY.unfinished`` and renames it to ``directory`` when the run has finished."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    if is_run(unfinished):  # an earlier call was interrupted
        resume(unfinished, lambda _: None, lambda _: None)
    else:
        execute(config, unfinished, lambda _: None, lambda _: None)
    unfinished.rename(directory)


__all__ = ["Runs"]
