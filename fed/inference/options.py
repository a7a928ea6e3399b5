"""Options that ``predict``, ``evaluate`` and ``chat`` share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError
from ...engine.lm.checkpoint import check_does_not_exist
from ...engine.lm.generation import Sampling
from ..config.options import given_options, settings_from_file

Command = Callable[..., None]


def of_target(command: Command) -> Command:
    """Decorator that adds the argument TARGET and the options with which ``target.open_target`` loads it."""
    for option in (
        click.option("--trust-remote-code", is_flag=True,
                     help="run Python code that comes with the model, if there is any"),
        click.option("--model", "base_model",
                     help="path or id of a run's base model, if it is not where the run's config.toml says"),
        click.option("--round", "round", type=int, metavar="R",
                     help="try a run as it was after round R [default: the last round]"),
        click.argument("name", metavar="TARGET"),
    ):  # fmt: skip
        command = option(command)
    return command


def of_sampling(command: Command) -> Command:
    """Decorator that adds the options that ``sampling`` reads."""
    for option in (
        click.option("--seed", type=click.IntRange(min=0, max=2**64 - 1), metavar="N",
                     help="seed of --temperature [default: 0]"),
        click.option("--top-p", type=float, metavar="P",
                     help="draw from the fewest tokens that together have this probability [default: 1, all]"),
        click.option("--temperature", type=float, default=0.0, metavar="T",
                     help="draw tokens, at this temperature [default: 0, take the most likely token]"),
    ):  # fmt: skip
        command = option(command)
    return command


def sampling(temperature: float, top_p: float | None, seed: int | None) -> Sampling | None:
    """How tokens are drawn; None takes the most likely one.

    Raises:
        ConfigError: if a value is out of range, or one is given that has no effect.
    """
    if temperature == 0:
        for name, value in (("--top-p", top_p), ("--seed", seed)):
            if value is not None:
                raise ConfigError(f"{name} is for drawing tokens; give --temperature too, or leave {name} out")
        return None
    return Sampling(temperature=temperature, top_p=1.0 if top_p is None else top_p, seed=seed or 0)


def given_settings(config_file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user gave by options, and those in a file for which the command has an option."""
    in_file = {name: value for name, value in settings_from_file(config_file).items() if name in options}
    return in_file | given_options(options)


def check_new(path: Path | None) -> None:
    """Raises ``ConfigError`` if a file to write exists. Call it before slow work."""
    if path is not None:
        check_does_not_exist(path)


def write_new(path: Path, text: str) -> None:
    """Writes a new file in UTF-8, completely or not at all, and the directories that it needs.

    Raises:
        RunError: if it cannot be written, or another file is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


__all__ = ["check_new", "given_settings", "of_sampling", "of_target", "sampling", "write_new"]
