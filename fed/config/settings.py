"""``setting``: a field of a section that the command line, a TOML file and ``make_config`` can set.

A setting has a place, its section and name there (``count`` in ``[clients]``), and a flat name, under which options
(``--clients``), keyword arguments and messages know it.
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ...engine.errors import ConfigError


def setting(default: Any, help: str, *, option: str | None = None, shown: str | None = None) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: its value where nothing else is said.
        help: one line for ``--help``.
        option: its flat name; None: the field's own.
        shown: the default in words, for ``--help``; None: the default itself, nothing where it is empty.
    """
    return dataclasses.field(default=default, metadata={"help": help, "option": option, "shown": shown})


@dataclass(frozen=True)
class Setting:
    """One setting, as a section declares it.

    Args:
        section: its section; empty for settings at the top.
        name: its name there.
        option: its flat name.
        type: of its values.
        default: see ``setting``.
        help: see ``setting``.
        shown: the default in words; empty where there is nothing to show.
    """

    section: str
    name: str
    option: str
    type: Any
    default: Any
    help: str
    shown: str

    @property
    def place(self) -> str:
        """Where it stands in a file: ``count in [clients]``."""
        return f"{self.name} in [{self.section}]" if self.section else f"{self.name} at the top"

    def convert(self, value: Any) -> Any:
        """A value from a file or the command line as the dataclass has it.

        Raises:
            ConfigError: if it does not fit.
        """
        types = get_args(self.type) or (self.type,)
        if value is None and type(None) in types:
            return None
        wanted = types[0]
        if isinstance(value, bool) and wanted is not bool:
            raise ConfigError(f"{self.option} must be {wanted.__name__}, got {value}")
        if isinstance(value, wanted):
            return value
        if wanted is Path and isinstance(value, str):
            return Path(value)
        if wanted is float and isinstance(value, int):
            return float(value)
        if issubclass(wanted, StrEnum) and isinstance(value, str):
            try:
                return wanted(value)
            except ValueError:
                raise ConfigError(f"unknown {self.option} {value!r}; known: {', '.join(wanted)}") from None
        raise ConfigError(f"{self.option} must be {wanted.__name__}, got {value!r}")


def settings_of(section: str, kind: type) -> list[Setting]:
    """The settings that a dataclass declares, in order."""
    hints = get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            known, shown = field.metadata, field.metadata["shown"]
            if shown is None:
                shown = "" if field.default in (None, "") else str(field.default)
            option = known["option"] or field.name
            found.append(Setting(section, field.name, option, hints[field.name], field.default, known["help"], shown))
    return found


class Checked:
    """What sections have in common: checks that call a setting by its flat name."""

    def _require(self, holds: bool, name: str, rule: str) -> None:
        """Raises ``ConfigError`` naming the setting, its rule and its value unless something holds."""
        if not holds:
            raise ConfigError(f"{self._option(name)} must be {rule}, got {getattr(self, name)}")

    def _option(self, name: str) -> str:
        fields = {field.name: field for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return str(fields[name].metadata["option"] or name)


__all__ = ["Checked", "Setting", "setting", "settings_of"]
