"""Settings as TOML: sections in the file, flat names in the program."""

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import tomli_w

from ...engine.errors import ConfigError
from .run_config import SETTINGS, RunConfig

_PLACES = {(each.section, each.name): option for option, each in SETTINGS.items()}
_SECTION_NAMES = {each.section for each in SETTINGS.values()} - {""}


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a file, by their flat names.

    Raises:
        ConfigError: if it cannot be read, or one of them is no setting or stands in another place.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The settings in some TOML, by their flat names.

    Args:
        text: the TOML.
        where: it is from, for messages.

    Raises:
        ConfigError: as ``read_toml``.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"cannot read the settings in {where}: {error}") from error
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key in _SECTION_NAMES:
            found |= {_option(key, name, where): inner for name, inner in value.items()}
        else:
            found[_option("", key, where)] = value
    return found


def _option(section: str, name: str, where: str) -> str:
    """The flat name of the setting in some place of a file."""
    if (section, name) in _PLACES:
        return _PLACES[section, name]
    here = f"[{section}] " if section else ""
    if name in SETTINGS:
        raise ConfigError(f"{where}: {here}{name} is now {SETTINGS[name].place}")
    if section:
        known = ", ".join(sorted(each for part, each in _PLACES if part == section))
        raise ConfigError(f"{where}: [{section}] has no setting {name!r}; known: {known}")
    top = ", ".join(sorted(each for part, each in _PLACES if not part))
    raise ConfigError(
        f"{where}: unknown setting {name!r}; known at the top: {top}; sections: {', '.join(sorted(_SECTION_NAMES))}"
    )


def to_toml(settings: Mapping[str, Any]) -> str:
    """Settings by flat names as TOML, section by section; unset ones are left out.

    Raises:
        ConfigError: for a name that is no setting.
    """
    if unknown := sorted(settings.keys() - SETTINGS.keys()):
        raise ConfigError(f"unknown setting {unknown[0]!r}")
    tables: dict[str, dict[str, Any]] = {}
    for option, each in SETTINGS.items():
        value = settings.get(option)
        if value is not None:
            plain = str(value) if isinstance(value, Path | StrEnum) else value
            tables.setdefault(each.section, {})[each.name] = plain
    return tomli_w.dumps(tables.pop("", {}) | tables)


def config_toml(config: RunConfig) -> str:
    """All settings of a run as TOML, with a comment that says what its partition means."""
    settings = config.flat()
    if config.data.file is not None:  # which is a task of its own
        del settings["task"]
    return f"# partition: {config.clients.partition.describe(config.clients.alpha)}\n{to_toml(settings)}"


__all__ = ["config_toml", "parse_toml", "read_toml", "to_toml"]
