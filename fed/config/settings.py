"""``setting``: a field of a section that the command line, a TOML file and ``make_config`` can set.

A setting has a place in a file, which is a section and a name in it (``count`` in ``[clients]``). It also has a flat
name (``clients``), which options (``--clients``), keyword arguments and messages use.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ...engine.errors import ConfigError, DataError
from ...engine.lm.text import check_text


def setting(
    default: Any,
    help: str,
    *,
    option: str | None = None,
    shown: str | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: value of the setting if nobody sets it.
        help: one line for ``--help``.
        option: flat name; None: the name of the field.
        shown: the default in words, for ``--help``; None: the default itself, or nothing if that is None or "".
        choices: the values of a setting that has few, for ``--help`` and the shell; those of an enumeration need not
            be given.
        metavar: what stands for the value in ``--help``; None: the choices, or the kind of value.
    """
    metadata = {"help": help, "option": option, "shown": shown, "choices": tuple(choices), "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One setting, as a section declares it.

    Args:
        section: name of the section; empty for settings at the top of a file.
        name: name in the section.
        option: flat name.
        type: type of the values, optional types included.
        default: see ``setting``.
        help: see ``setting``.
        shown: the default in words; empty if the help shows none.
        choices: all values; empty if there are many.
        metavar: see ``setting``.
    """

    section: str
    name: str
    option: str
    type: Any
    default: Any
    help: str
    shown: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def place(self) -> str:
        """The place in a file, in words: ``count in [clients]``."""
        return f"{self.name} in [{self.section}]" if self.section else f"{self.name} at the top"

    def convert(self, value: Any) -> Any:
        """Converts a value from a file or the command line to the type of the setting.

        Raises:
            ConfigError: if the value does not fit the type, is an integer with too many bits, or is text that no file
                or path can hold.
        """
        types = get_args(self.type) or (self.type,)
        if value is None and type(None) in types:
            return None
        expected = types[0]
        if isinstance(value, bool) and expected is not bool:
            raise ConfigError(f"{self.option} must be {expected.__name__}, got {value}")
        if isinstance(value, int) and value.bit_length() > self._bits:  # some have too many digits to print
            raise ConfigError(f"{self.option} must be an integer of {self._bits} bits, got one of {value.bit_length()}")
        if isinstance(value, str | Path):
            self._check_text(str(value))
        if isinstance(value, expected):
            return value
        if expected is Path and isinstance(value, str):
            return Path(value)
        if expected is float and isinstance(value, int):
            return float(value)
        if issubclass(expected, StrEnum) and isinstance(value, str):
            try:
                return expected(value)
            except ValueError:
                raise ConfigError(f"unknown {self.option} {value!r}; known: {', '.join(expected)}") from None
        raise ConfigError(f"{self.option} must be {expected.__name__}, got {value!r}")

    @property
    def _bits(self) -> int:
        """Number of bits of the largest integer: what messages hold, except for the seed."""
        return 64 if self.option == "seed" else 32

    def _check_text(self, value: str) -> None:
        """Raises ``ConfigError`` for text that neither a file of settings nor a path can hold."""
        try:
            check_text(value, self.option)
        except DataError as error:
            raise ConfigError(str(error)) from None
        if "\0" in value:
            raise ConfigError(f"{self.option} has a null character; remove it")


def settings_of(section: str, section_class: type) -> list[Setting]:
    """The settings that a section's dataclass declares, in order."""
    types = get_type_hints(section_class)
    settings = []
    for field in dataclasses.fields(section_class):
        if "help" not in field.metadata:  # a section of RunConfig, no setting
            continue
        shown = field.metadata["shown"]
        if shown is None:
            shown = "" if field.default in (None, "") else str(field.default)
        settings.append(
            Setting(
                section=section,
                name=field.name,
                option=field.metadata["option"] or field.name,
                type=types[field.name],
                default=field.default,
                help=field.metadata["help"],
                shown=shown,
                choices=field.metadata["choices"] or _values(types[field.name]),
                metavar=field.metadata["metavar"],
            )
        )
    return settings


def _values(type_: Any) -> tuple[str, ...]:
    """The values of an enumeration, or of one that may be None; empty for other types."""
    first = (get_args(type_) or (type_,))[0]
    return tuple(value.value for value in first) if isinstance(first, type) and issubclass(first, StrEnum) else ()


class Checked:
    """Base class of the sections: checks whose messages use a setting's flat name."""

    def _require(self, holds: bool, name: str, rule: str) -> None:
        """Raises ``ConfigError`` with the setting's flat name, rule and value if ``holds`` is false."""
        if not holds:
            raise ConfigError(f"{self.option(name)} must be {rule}, got {getattr(self, name)}")

    def option(self, name: str) -> str:
        """The flat name of one of the section's settings."""
        fields = {field.name: field for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return str(fields[name].metadata["option"] or name)


__all__ = ["Checked", "Setting", "setting", "settings_of"]
