"""``find`` searches for the learning rate of a run and writes what it found."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigError
from ...fed.config.run_config import RunConfig
from ...fed.config.toml import config_toml
from ...fed.run.directory import CONFIG
from ...fed.setup.data import check_files
from .base import Base
from .directory import FIGURE, RESULT, RUNS, search_directory, write_if_missing
from .figure import draw
from .grid import Grid
from .result import Found
from .search import Search, rungs


def find(
    config: RunConfig,
    output: Path,
    log: Callable[[str], None],
    *,
    lrs: Sequence[float] = (),
    eps: bool = False,
    density: bool = False,
    rounds: int | None = None,
    show: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> Found:
    """Searches for the learning rate with the smallest held-out loss; goes on with a search that was stopped.

    Args:
        config: the settings of the user's run.
        output: directory of the search.
        log: called with a line before slow work.
        lrs: see ``Grid``.
        eps: see ``Grid``.
        density: see ``Grid``.
        rounds: number of rounds of the longest runs; None: half of those of the user's run.
        show: called with the table of all runs before it is checked that one of them is better than the base model.
        trust_remote_code: see ``models.load_model``.

    Raises:
        ConfigError: if the settings do not fit, or the directory holds a search with other settings.
        RunError: if no run is better than the base model, or the directory cannot be used.
    """
    longest = rounds or max(1, config.rounds // 2)
    if longest > config.rounds:
        raise ConfigError(f"--tune-rounds {longest} is more than the {config.rounds} rounds of a full run")
    grid = Grid(config, lrs, eps=eps, density=density)
    check_files(config)
    with search_directory(output, _settings(config, lrs, grid.axes, longest)):
        base = Base(config, output, log, trust_remote_code=trust_remote_code)
        search = Search(grid, rungs(longest), base, output / RUNS, log)
        best = search.run()
        found = Found(search, best, search.safer(best))
        if show is not None:
            show(found.table())
        found.check()
        _write(found, grid.config(found.chosen), output, log)
    return found


def _settings(config: RunConfig, lrs: Sequence[float], axes: list[str], longest: int) -> dict[str, Any]:
    """What a search depends on, ready for JSON."""
    flat = {name: None if value is None else str(value) for name, value in config.flat().items()}
    return {"lrs": list(lrs), "axes": axes, "tune_rounds": longest, **flat}


def _write(found: Found, config: RunConfig, output: Path, log: Callable[[str], None]) -> None:
    """Writes the files of the result that are not there yet; config.toml, which says that all is done, last."""
    write_if_missing(output / RESULT, (json.dumps(found.json(), indent=1) + "\n").encode())
    if not (output / FIGURE).exists():
        try:
            draw(found, output / FIGURE)
        except ConfigError as error:  # matplotlib is not installed
            log(f"no figure: {error}")
    write_if_missing(output / CONFIG, config_toml(config).encode())


__all__ = ["find"]
