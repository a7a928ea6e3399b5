"""What the parts share: the command line, and a JSON file that is written whenever something is known."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ...engine.atomic_files import write_atomic
from ...engine.lm.models import check_device


class Record:
    """The JSON file of a part. What was written stays if the part is stopped.

    Args:
        path: path of the file; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}

    def directory(self) -> Path:
        """Makes a new directory for files that are not results."""
        return Path(tempfile.mkdtemp(prefix=f"meerkat-{self._path.stem}-"))

    def __setitem__(self, name: str, value: Any) -> None:
        """Adds a value and writes the file."""
        self._values[name] = value
        self._write()

    def append(self, name: str, value: Any) -> None:
        """Adds a value to a list and writes the file."""
        self._values.setdefault(name, []).append(value)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self._values, indent=1) + "\n"
        write_atomic(self._path, text.encode(), replaces=lambda _: True)


def part(measure: Callable[[torch.device, Record], None]) -> click.Command:
    """Makes the command of a part from the function that measures it.

    Args:
        measure: takes the device and the record. It raises an error, or exits, if something is wrong.
    """

    @click.command(help=measure.__doc__)
    @click.option("--device", type=click.Choice(["cuda", "cpu"]), required=True)
    @click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="the JSON file")
    def command(device: str, output: Path) -> None:
        measure(check_device(device), Record(output))

    return command


__all__ = ["Record", "part"]
