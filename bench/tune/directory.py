"""The directory of a search: one process writes it, and only a search with the same settings goes on in it.

DIR/search.json     settings of the search and of its runs
DIR/inputs.json     digests of examples and base model, and of the file that masks come from
DIR/masks           masks, one a density
DIR/runs/NAME       run directories
DIR/tune.json       what was found, and what every run did
DIR/figure.png      held-out loss against learning rate
DIR/config.toml     settings to go on with
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError, RunError
from ...fed.run.directory import RunDirectory

SEARCH, INPUTS, RESULT, FIGURE = "search.json", "inputs.json", "tune.json", "figure.png"
MASKS, RUNS = "masks", "runs"
_BEFORE_START = re.compile(r"\.lock|\.search\.json\.\d+\.partial")


@contextmanager
def search_directory(output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Context in which this process alone writes the directory of a search, which is new or of an earlier call.

    Args:
        output: path of the directory.
        settings: everything that the search depends on, ready for JSON.

    Raises:
        ConfigError: if the directory holds a search with other settings; the first that differs is named.
        RunError: if it holds something else, or another process is writing to it.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"{output} is a file; choose another --output (nothing was changed)")
    path = output / SEARCH
    files = [] if path.exists() or not output.exists() else list(output.iterdir())
    if any(not _BEFORE_START.fullmatch(file.name) for file in files):
        raise RunError(f"{output} holds other files; choose another --output (nothing was changed)")
    with RunDirectory(output):
        if not path.exists():
            write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
        _check_same(path, settings)
        yield


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_bytes())
        names = [*settings, *before.keys()]
    except (ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); choose another --output (nothing was changed)") from error
    for name in names:
        if settings.get(name) != before.get(name):
            raise ConfigError(
                f"the search in {path.parent} has {name} {before.get(name)}, now it is {settings.get(name)}; give the "
                f"same settings to go on with it, or choose another --output (nothing was changed)"
            )


def write_if_missing(path: Path, content: bytes) -> None:
    """Writes a file of a search, unless an earlier call has written it."""
    if not path.exists():
        write_atomic(path, content)


__all__ = ["FIGURE", "INPUTS", "MASKS", "RESULT", "RUNS", "SEARCH", "search_directory", "write_if_missing"]
