"""Learning rates that an experiment searches for before it runs an arm, with ``bench.tune``.

OUTPUT/searches/NAME      directory of the search
OUTPUT/rates/NAME.json    what it found, as ``tune.json``; the search is not repeated if this file is there
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.atomic_files import write_atomic
from ...engine.errors import RunError
from ...fed.config.run_config import RunConfig
from ..tune.find import find

RATES, SEARCHES = "rates", "searches"


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the learning rate of one or more arms.

    Args:
        name: name of its files.
        settings: settings of the user's run that is searched for; they override those that all arms share.
    """

    name: str
    settings: dict[str, Any]


def rate(search: Search, config: RunConfig, output: Path, log: Callable[[str], None]) -> float:
    """Returns the learning rate that a search chooses; searches if that has not been done.

    Args:
        search: the search.
        config: the settings of the run that is searched for.
        output: directory of the experiment.
        log: called with a line before slow work.

    Raises:
        RunError: if no run of the search is better than the base model, or the file of the rate is damaged.
    """
    path = output / RATES / f"{search.name}.json"
    if not path.exists():
        found = find(config, output / SEARCHES / search.name, lambda line: log(f"{search.name}: {line}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(found.json(), indent=1) + "\n").encode())
    try:
        return float(json.loads(path.read_bytes())["chosen"]["lr"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no result of a search ({error}); delete it to search again") from error


__all__ = ["RATES", "SEARCHES", "Search", "rate"]
