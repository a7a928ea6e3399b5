"""Settings as TOML files: sections and names in the file, flat names in the program."""

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigError
from .run_config import SETTINGS, RunConfig

# (section, name) -> flat name
_FLAT_NAMES = {(setting.section, setting.name): option for option, setting in SETTINGS.items()}
_SECTION_NAMES = {setting.section for setting in SETTINGS.values()} - {""}


def read_toml(path: Path) -> dict[str, Any]:
    """Reads the settings in a file.

    Returns:
        Values as in the file, by the flat names of the settings.

    Raises:
        ConfigError: if the file cannot be read, or has an unknown setting or one in the wrong section.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Reads the settings in a TOML text.

    Args:
        text: the TOML.
        where: name of the source, for messages.

    Returns:
        See ``read_toml``.

    Raises:
        ConfigError: see ``read_toml``.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for integers with thousands of digits
        raise ConfigError(f"cannot read the settings in {where}: {error}") from error
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key in _SECTION_NAMES:
            settings |= {_flat_name(key, name, where): inner for name, inner in value.items()}
        else:
            settings[_flat_name("", key, where)] = value
    return settings


def _flat_name(section: str, name: str, where: str) -> str:
    """The flat name of a setting; raises ``ConfigError`` if the section has no setting of that name."""
    if (section, name) in _FLAT_NAMES:
        return _FLAT_NAMES[section, name]
    prefix = f"[{section}] " if section else ""
    if name in SETTINGS:  # a flat name, as files had them before they had sections
        raise ConfigError(f"{where}: {prefix}{name} is now {SETTINGS[name].place}")
    known = ", ".join(sorted(known_name for known_section, known_name in _FLAT_NAMES if known_section == section))
    if section:
        raise ConfigError(f"{where}: [{section}] has no setting {name!r}; known: {known}")
    raise ConfigError(
        f"{where}: unknown setting {name!r}; known at the top: {known}; sections: {', '.join(sorted(_SECTION_NAMES))}"
    )


def to_toml(settings: Mapping[str, Any]) -> str:
    """Writes settings as TOML, section by section. Settings that are None are left out.

    Args:
        settings: values by flat names.

    Raises:
        ConfigError: if a name is no setting.
    """
    if unknown := sorted(settings.keys() - SETTINGS.keys()):
        raise ConfigError(f"unknown setting {unknown[0]!r}")
    tables: dict[str, dict[str, Any]] = {}
    for option, setting in SETTINGS.items():
        value = settings.get(option)
        if value is not None:
            toml_value = str(value) if isinstance(value, Path | StrEnum) else value
            tables.setdefault(setting.section, {})[setting.name] = toml_value
    top = _lines(tables.pop("", {}))
    sections = [f"[{section}]\n{_lines(values)}" for section, values in tables.items()]
    return "\n".join([*([top] if top else []), *sections])


def _lines(values: Mapping[str, Any]) -> str:
    """One line ``name = value`` for each setting. The standard library reads TOML but does not write it."""
    return "".join(f"{name} = {_literal(value)}\n" for name, value in values.items())


# A basic string may hold every character but quotes, backslashes and control characters other than the tab.
_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(32), 127) if chr(code) != "\t"} | {
    ord(character): escape
    for character, escape in zip('\b\n\f\r"\\', ("\\b", "\\n", "\\f", "\\r", '\\"', "\\\\"), strict=True)
}


def _literal(value: bool | int | float | str) -> str:
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def config_toml(config: RunConfig) -> str:
    """All settings of a run as TOML, with a comment that describes the partition."""
    return f"# partition: {config.clients.partition.describe(config.clients.alpha)}\n{to_toml(config.as_given())}"


__all__ = ["config_toml", "parse_toml", "read_toml", "to_toml"]
